"""Files that end early, are no weights, or would run code."""

import pickle
import warnings

import numpy as np
import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import Model, arrays


def test_no_weights_where_they_are_required(tmp_path):
    with pytest.raises(WeightsError, match=r"set MODEL\.WEIGHTS"):
        S4MCheckpointer(Model()).load("", require=True)
    assert S4MCheckpointer(Model()).load("") == {}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_ends_early_is_told_apart_from_a_wrong_one(tmp_path, zipped, share):
    path = tmp_path / "weights.pth"
    torch.save(Model().state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="truncated"):
        S4MCheckpointer(Model()).load(str(path))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_model_zoo_file_that_ends_early_is_truncated(tmp_path, share):
    path = tmp_path / "weights.pkl"
    content = pickle.dumps({"model": arrays(Model())})
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="truncated"):
        S4MCheckpointer(Model()).load(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("text.pth", b"just some text", "this is neither"),
        ("text.pkl", b"just some text", "no pickle of arrays"),
        ("number.pkl", pickle.dumps(3), "found a int"),
        ("empty.pkl", pickle.dumps({"model": {}}), "hold no model"),
        ("values.pkl", pickle.dumps({"lr": 0.1}), "'lr' with a float"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        S4MCheckpointer(Model()).load(str(tmp_path / name))


def test_other_archives_and_damaged_ones_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with pytest.raises(WeightsError, match="damaged or no PyTorch checkpoint"):
        S4MCheckpointer(Model()).load(str(tmp_path / "arrays.npz"))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        S4MCheckpointer(Model()).load(str(tmp_path / "none.pth"))
    with pytest.raises(WeightsError, match="a folder"):
        S4MCheckpointer(Model()).load(str(tmp_path))


class Exploit:
    """Unpickling this creates a file, with any unpickler that imports what it is asked for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(tmp_path, protocol):
    proof = tmp_path / "created"
    content = pickle.dumps({"model": Exploit(proof)}, protocol=protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pickle.loads(content)
    assert proof.exists()  # the pickle does what it is meant to do
    proof.unlink()

    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"asks for .*open.*no code"):
        S4MCheckpointer(Model()).load(str(path))
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_pytorch_file_runs(tmp_path, zipped):
    proof = tmp_path / "created"
    path = tmp_path / "weights.pth"
    content = {"model": Model().state_dict(), "hook": Exploit(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused because loading them may run code"):
        S4MCheckpointer(Model()).load(str(path))
    assert not proof.exists()
