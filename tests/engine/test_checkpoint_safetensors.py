"""Files of safetensors: read like others, and told apart when they end early or are damaged."""

import json
import struct
import sys

import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checkpointing.weight_files import read_weight_file
from s4m_d2.errors import WeightsError

from .checkpoint_files import Model, same

save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def path(tmp_path):
    save_file(Model(seed=1).state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_safetensors_file_loads_whatever_its_name(path, name):
    loaded = Model(seed=2)
    S4MCheckpointer(loaded).load(str(path.rename(path.with_name(name))), require=True)
    assert same(loaded, Model(seed=1))


def test_a_header_whose_length_looks_like_a_pickles_first_byte_is_no_pickle(tmp_path):
    # The first byte is the lowest of the header's length: pad the names until it is 0x80.
    for padding in range(300):
        save_file({"w" + "x" * padding: torch.ones(2)}, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of that length")
    (content,) = read_weight_file(str(tmp_path / "w.safetensors")).values()
    assert content.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_safetensors_file_that_ends_early_is_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="truncated"):
        S4MCheckpointer(Model()).load(str(path))


def too_long(content):
    return content + b"more"


def no_json(content):
    return content.replace(b'"dtype"', b'"dtypo"', 1)


def no_header(content):
    return struct.pack("<Q", 2**60) + content[8:]


def not_a_table(content):
    header = json.dumps([1, 2]).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("damage", [too_long, no_json, no_header, not_a_table])
def test_a_damaged_safetensors_file_is_not_called_truncated(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        S4MCheckpointer(Model()).load(str(path))


def test_without_the_package_its_name_is_given(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match="pip install safetensors"):
        S4MCheckpointer(Model()).load(str(path))
