import io
import logging
import os
import pickle
import pickletools
import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from s4m_d2.engine import weight_names
from s4m_d2.engine.checkpoint import S4MCheckpointer
from s4m_d2.engine.restricted_pickle import UnsafePickleError, load_arrays
from s4m_d2.errors import WeightsError


class Model(nn.Module):
    """A backbone with Detectron2's names, and a head."""

    def __init__(self, width=4, classes=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            stem = nn.Module()
            stem.conv1 = nn.Conv2d(3, width, 7, bias=False)
            stem.conv1.norm = nn.BatchNorm2d(width)
            block = nn.Module()
            block.conv1 = nn.Conv2d(width, width, 1, bias=False)
            block.conv1.norm = nn.BatchNorm2d(width)
            block.shortcut = nn.Conv2d(width, width, 1, bias=False)
            block.shortcut.norm = nn.BatchNorm2d(width)
            self.backbone = nn.Module()
            self.backbone.stem = stem
            self.backbone.res2 = nn.Sequential(block)
            self.head = nn.Linear(width, classes)
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))


class Counter:
    """A checkpointable object."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def same(model, other, prefix=""):
    state = other.state_dict()
    return all(
        torch.equal(value, state[name])
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    )


def arrays(model, prefix=""):
    return {
        name.removeprefix(prefix): value.numpy()
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }


def save(tmp_path, content, name="weights.pth"):
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return str(path)


def backbone_by(rename, model):
    """The backbone's arrays under other names."""
    return {rename(name): value for name, value in arrays(model, "backbone.").items()}


def caffe2_name(name):
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    name = name.replace("shortcut.norm", "branch1_bn").replace("shortcut", "branch1")
    name = name.replace("res2.0.conv1.norm", "res2_0_branch2a_bn")
    name = name.replace("res2.0.conv1", "res2_0_branch2a").replace(".", "_")
    words = {"bn_weight": "bn_gamma", "bn_bias": "bn_beta"}
    for old, new in words.items():
        name = name.replace(old, new)
    return name.replace("_weight", "_w")


def torchvision_name(name):
    name = name.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return name.replace("res2.", "layer1.").replace("conv1.norm", "bn1")


# Saving


def test_what_is_saved_is_loaded_again(tmp_path):
    saved, counter = Model(seed=1), Counter(7)
    S4MCheckpointer(saved, str(tmp_path), counter=counter).save("model_0000009", iteration=9)

    loaded, restored = Model(seed=2), Counter()
    checkpointer = S4MCheckpointer(loaded, str(tmp_path), counter=restored)
    rest = checkpointer.resume_or_load("", resume=True)

    assert same(loaded, saved)
    assert restored.value == 7
    assert rest == {"iteration": 9}
    assert checkpointer.last_report.missing == () and checkpointer.last_report.mismatched == ()


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    checkpointer = S4MCheckpointer(Model(seed=1), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def half_a_save(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("model")
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("later")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"


def test_a_file_has_its_name_only_once_it_is_complete(tmp_path, monkeypatch):
    seen = []
    original = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda src, dst: (
            (seen.append((os.path.basename(dst), os.path.exists(dst)))) or original(src, dst)
        ),
    )
    S4MCheckpointer(Model(), str(tmp_path)).save("model")
    assert seen == [("model.pth", False), ("last_checkpoint", False)]


def test_saved_files_have_the_users_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        S4MCheckpointer(Model(), str(tmp_path)).save("model")
    finally:
        os.umask(previous)
    assert (tmp_path / "model.pth").stat().st_mode & 0o777 == 0o644


# Formats

FORMATS = {
    "bare": lambda sd: sd,
    "entry model": lambda sd: {"model": sd, "iteration": 3},
    "entry state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "DDP": lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}},
    "student branch": lambda sd: {"model": {f"modelStudent.{k}": v for k, v in sd.items()}},
    "DDP and branch": lambda sd: {
        "model": {f"module.modelStudent.module.{k}": v for k, v in sd.items()}
    },
}


@pytest.mark.parametrize("layout", FORMATS)
def test_every_layout_of_a_checkpoint_loads_completely(tmp_path, layout):
    saved, loaded = Model(seed=1), Model(seed=2)
    path = save(tmp_path, FORMATS[layout](saved.state_dict()))
    S4MCheckpointer(loaded).load(path, require=True)
    assert same(loaded, saved)


def two_branches(student, teacher):
    return {"model": {f"modelStudent.{k}": v for k, v in student.state_dict().items()}
            | {f"modelTeacher.{k}": v for k, v in teacher.state_dict().items()}}  # fmt: skip


def hook_state(student, teacher):
    hooks = {"EMATeacherHook": {"teacher": teacher.state_dict()}}
    return {"model": student.state_dict(), "trainer": {"iteration": 1, "hooks": hooks}}


def own_entry(student, teacher):
    return {"model": student.state_dict(), "teacher": teacher.state_dict()}


def nested_entry(student, teacher):
    return {"model": student.state_dict(), "teacher": {"model": teacher.state_dict(), "decay": 0.9}}


@pytest.mark.parametrize("layout", [two_branches, hook_state, own_entry, nested_entry])
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_the_wanted_branch_is_loaded(tmp_path, layout, branch):
    models = {"student": Model(seed=1), "teacher": Model(seed=2)}
    path = save(tmp_path, layout(models["student"], models["teacher"]))
    loaded = Model(seed=3)
    S4MCheckpointer(loaded).load(path, branch=branch, require=True)
    assert same(loaded, models[branch])


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_file_with_one_model_serves_for_either_branch(tmp_path, branch):
    saved = Model(seed=1)
    for prefix in ("", "modelTeacher.", "modelStudent."):
        path = save(tmp_path, {"model": {f"{prefix}{k}": v for k, v in saved.state_dict().items()}})
        loaded = Model(seed=3)
        S4MCheckpointer(loaded).load(path, branch=branch, require=True)
        assert same(loaded, saved)


BACKBONES = {
    "Caffe2 names": ("b.pkl", lambda m: backbone_by(caffe2_name, m)),
    "Caffe2 blobs": (
        "b.pkl",
        lambda m: {
            "blobs": backbone_by(caffe2_name, m) | {"conv1_w_momentum": np.zeros(3)},
            "cfg": "text",
        },
    ),
    "model zoo": (
        "b.pkl",
        lambda m: {
            "model": backbone_by(str, m),
            "__author__": "torchvision",
            "matching_heuristics": True,
        },
    ),
    "pycls": ("b.pyth", lambda m: {"model_state": {
        k.removeprefix("backbone."): v for k, v in m.state_dict().items() if "backbone" in k}}),
    "torchvision": ("b.pth", lambda m: {
        torchvision_name(k.removeprefix("backbone.")): v
        for k, v in m.state_dict().items() if "backbone" in k}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_finds_its_place_in_the_model(tmp_path, kind):
    name, content = BACKBONES[kind]
    saved, loaded, start = Model(seed=1), Model(seed=2), Model(seed=2)
    S4MCheckpointer(loaded).load(save(tmp_path, content(saved), name))
    assert same(loaded, saved, "backbone.")
    assert same(loaded, start, "head.")


def test_heuristics_can_be_asked_for_behind_the_file_name(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    bare = {k.removeprefix("backbone."): v for k, v in saved.state_dict().items()}
    path = save(tmp_path, bare)
    with pytest.raises(WeightsError, match="backbone"):
        S4MCheckpointer(loaded).load(path, require=True)
    S4MCheckpointer(loaded).load(f"{path}?matching_heuristics=True")
    assert same(loaded, saved, "backbone.")


def test_a_model_zoo_detector_loads_with_its_own_names(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    path = save(tmp_path, {"model": arrays(saved), "__author__": "Somebody"}, "model_final.pkl")
    S4MCheckpointer(loaded).load(path, require=True)
    assert same(loaded, saved)


def test_frozen_norms_that_never_had_counters_lack_nothing(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    state = {k: v for k, v in saved.state_dict().items() if "num_batches" not in k}
    del state["pixel_mean"]
    checkpointer = S4MCheckpointer(loaded)
    checkpointer.load(save(tmp_path, state), require=True)
    assert checkpointer.last_report.missing == ()


# What did not fit


def test_the_report_says_what_became_of_each_weight(tmp_path, caplog):
    state = Model(seed=1, classes=5).state_dict()
    state["extra"] = state.pop("backbone.res2.0.shortcut.norm.running_mean")
    checkpointer = S4MCheckpointer(Model(seed=2))
    with caplog.at_level(logging.WARNING):
        checkpointer.load(save(tmp_path, state))
    report = checkpointer.last_report
    assert report.unexpected == ("extra",)
    assert report.missing == ("backbone.res2.0.shortcut.norm.running_mean",)
    assert report.mismatched == (("head.weight", (5, 4), (3, 4)), ("head.bias", (5,), (3,)))
    assert len(report.matched) == len(state) - 3
    assert "head.weight is (5, 4) in the file and (3, 4) in the model" in caplog.text


def test_a_bare_backbone_is_no_cause_for_a_warning(tmp_path, caplog):
    state = {k: v for k, v in Model(seed=1).state_dict().items() if k.startswith("backbone.")}
    with caplog.at_level(logging.INFO):
        S4MCheckpointer(Model(seed=2)).load(save(tmp_path, state))
    assert [r.levelname for r in caplog.records if "parameters loaded" in r.message] == ["INFO"]


def remove_head(state):
    del state["head.bias"]


def change_head(state):
    state["head.bias"] = torch.zeros(9)


def change_backbone(state):
    state["backbone.stem.conv1.weight"] = torch.zeros(8, 3, 3, 3)


def halve_backbone(state):
    for name in [name for name in state if "backbone.res2" in name]:
        del state[name]


def rename_all(state):
    for name in list(state):
        state[f"other.{name}"] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "require", "message"),
    [
        (remove_head, True, r"lack 1 of the model's .* head\.bias"),
        (change_head, True, r"head\.bias is \(9,\) in the file and \(3,\) in the model"),
        (change_backbone, False, r"another architecture: backbone\.stem\.conv1\.weight"),
        (halve_backbone, False, r"hold only 3 of the backbone's 9"),
        (rename_all, False, r"hold nothing of this model: .*the file has other\."),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(
    tmp_path, change, require, message
):
    state = Model(seed=1).state_dict()
    change(state)
    loaded, start = Model(seed=2), Model(seed=2)
    with pytest.raises(WeightsError, match=message):
        S4MCheckpointer(loaded).load(save(tmp_path, state), require=require)
    assert same(loaded, start)


def test_continuing_needs_the_state_of_every_object(tmp_path):
    S4MCheckpointer(Model(), str(tmp_path)).save("model")
    with pytest.raises(WeightsError, match="no state of counter"):
        S4MCheckpointer(Model(), str(tmp_path), counter=Counter()).resume_or_load("")


def test_a_damaged_last_checkpoint_names_the_way_out(tmp_path):
    checkpointer = S4MCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"truncated.*older checkpoint.*last_checkpoint"):
        checkpointer.resume_or_load("")


# Bad files


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


# Hostile files


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


def opcodes(*parts):
    """A pickle from raw opcodes (protocol 0 and 2)."""
    return b"\x80\x02" + b"".join(parts) + b"."


GET_NDARRAY = b"cnumpy\nndarray\n"
GET_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
SET_DEFAULTS = b"N}U\x0c__defaults__)s\x86b"  # BUILD with the slot state {"__defaults__": ()}
SET_CLASS = b"N}U\x09__class__" + GET_NDARRAY + b"s\x86b"


@pytest.mark.parametrize(
    "content",
    [
        opcodes(b"cos\nsystem\nU\x04true\x85R"),
        opcodes(b"cnumpy.core.multiarray\n__dict__\n"),
        opcodes(b"cbuiltins\ngetattr\n", GET_NDARRAY, b"U\x05dumps\x86R"),
        opcodes(b"ctorch\nload\n"),
        opcodes(GET_RECONSTRUCT, SET_DEFAULTS),
        opcodes(GET_NDARRAY, SET_DEFAULTS),
        opcodes(GET_RECONSTRUCT, b")R", SET_CLASS),
        opcodes(GET_NDARRAY, b")\x81"),
        opcodes(GET_NDARRAY),
        opcodes(GET_RECONSTRUCT, b")R(K\x01K\x02K\x03tb"),
        opcodes(b"\x8f"),
    ],
)
def test_opcodes_beyond_arrays_are_refused(content):
    with pytest.raises(pickle.UnpicklingError):
        load_arrays(io.BytesIO(content))


def test_dotted_names_of_protocol_4_do_not_reach_attributes():
    name = b"\x8c\x05numpy\x8c\x10ndarray.__init__\x93"
    with pytest.raises(UnsafePickleError, match=r"ndarray\.__init__"):
        load_arrays(io.BytesIO(b"\x80\x04" + name + b"."))


@pytest.mark.parametrize(
    "value", [np.array([{}], dtype=object), np.array(["a"]), np.zeros(2, dtype="f4,i4")]
)
def test_arrays_of_other_things_than_numbers_are_refused(value):
    with pytest.raises(UnsafePickleError):
        load_arrays(io.BytesIO(pickle.dumps({"a": value}, protocol=4)))


def test_an_array_with_too_few_bytes_for_its_shape_is_refused():
    content = pickle.dumps(np.zeros(3, dtype=np.uint8), protocol=2)
    shape = b"K\x03\x85"  # the tuple (3,)
    assert content.count(shape) == 1
    with pytest.raises(UnsafePickleError, match=r"shape \(200,\) and 3 bytes"):
        load_arrays(io.BytesIO(content.replace(shape, b"K\xc8\x85")))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_as_they_were(protocol):
    content = OrderedDict(
        plain=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6).reshape(2, 3)),
        big_endian=np.arange(6, dtype=">f8"),
        half=np.arange(4, dtype=np.float16),
        bits=np.array([True, False]),
        empty=np.zeros((0, 3), dtype=np.int64),
        scalar_array=np.array(3.5),
        scalar=np.float32(2.5),
        nested={"list": [1, (2, b"bytes", "text", None)]},
    )
    loaded = load_arrays(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    assert list(loaded) == list(content)
    assert loaded["nested"] == content["nested"]
    for name in list(content)[:-1]:
        assert np.array_equal(loaded[name], content[name])
        assert loaded[name].dtype.isnative and loaded[name].dtype.type == content[name].dtype.type
    loaded["plain"][0, 0] = 1  # writable


def test_python_2_files_are_read():
    # What Python 2 wrote for {"w": np.arange(2, dtype="<f4")}: bytes are str there.
    raw = np.arange(2, dtype="<f4").tobytes()
    content = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + raw + b"tbs."
    )
    pickletools.dis(content, out=io.StringIO())  # well-formed
    loaded = load_arrays(io.BytesIO(content))
    assert loaded["w"].tolist() == [0.0, 1.0]


def test_nothing_is_imported_for_a_pickle(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(UnsafePickleError, match="colorsys"):
        load_arrays(io.BytesIO(opcodes(b"ccolorsys\nrgb_to_hsv\n")))
    assert "colorsys" not in sys.modules


def test_addresses_that_cannot_be_fetched_are_named(monkeypatch):
    checkpointer = S4MCheckpointer(Model())

    class Offline:
        @staticmethod
        def get_local_path(path):
            raise OSError("Name or service not known")

    checkpointer.path_manager = Offline
    with pytest.raises(WeightsError, match="cannot be fetched.*Download the file by other means"):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")


def test_a_branch_that_does_not_exist_is_the_callers_mistake():
    assert set(weight_names.BRANCHES) == {"student", "teacher"}
    with pytest.raises(ValueError, match="branch"):
        S4MCheckpointer(Model()).load("x", branch="ema")
