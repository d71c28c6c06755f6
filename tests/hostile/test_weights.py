"""Checkpoints of SAM and of the model that are missing, damaged, foreign or malicious."""

import copy
import functools
import io
import itertools
import json
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError
from s4m_d2.sam.checkpoint import load_sam

from .rows import one_error


def build(width=4):
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def as_file(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Exploit:
    """Unpickling this creates a file, with any unpickler that imports what it is asked for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


MODEL = build()
READERS = {
    "model": lambda path: S4MCheckpointer(MODEL).load(str(path), require=True),
    "SAM": lambda path: load_sam(build, path, "vit_b"),
}
STATE = copy.deepcopy(MODEL.state_dict())
ZIP, LEGACY = as_file(STATE), as_file(STATE, _use_new_zipfile_serialization=False)


def without_entry(name: str) -> bytes:
    """The archive without a file of it."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as old, zipfile.ZipFile(result, "w") as new:
        for entry in old.namelist():
            if not entry.endswith(name):
                new.writestr(entry, old.read(entry))
    return result.getvalue()


def as_safetensors(change) -> bytes:
    """A file of safetensors: a header of JSON after its length, then the numbers."""
    numbers = STATE["0.weight"].numpy().tobytes()
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, len(numbers)]}
    header = json.dumps(change({"0.weight": entry})).encode()
    return struct.pack("<Q", len(header)) + header + numbers


ARRAYS = pickle.dumps({"model": {name: value.numpy() for name, value in STATE.items()}})
TENSORS = as_safetensors(dict)
FILES = {
    "empty": b"",
    "truncated": ZIP[: len(ZIP) // 2],
    "truncated, old format": LEGACY[: len(LEGACY) // 2],
    "archive without data": without_entry("data/0"),
    "another archive": b"PK\x05\x06" + b"\0" * 18,  # empty
    "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 375042383\n",
    "a number": as_file(3),
    "no entries": as_file({}),
    "only a few of the entries": as_file({"0.weight": STATE["0.weight"]}),
    "another width": as_file(build(width=5).state_dict()),
    "one name that is a number": as_file({1: torch.zeros(3), "image_encoder.a": torch.zeros(3)}),
    "values that are text": as_file({name: "0" for name in STATE}),
    "a whole model": as_file(build()),
    "arrays, truncated": ARRAYS[: len(ARRAYS) // 2],
    "a pickled number": pickle.dumps(3),
    "pickled text": pickle.dumps({"model": {"lr": "0.1"}}),
    "safetensors, truncated": TENSORS[: len(TENSORS) // 2],
    "safetensors, too long": TENSORS + b"more",
    "safetensors, other keys": as_safetensors(lambda header: {"0.weight": {"dtypo": "F32"}}),
    "safetensors, an endless header": struct.pack("<Q", 2**60) + TENSORS[8:],
    "missing": lambda path: None,
    "folder": os.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("reader", READERS)
def test_files_are_refused_and_named_whatever_their_ending_and_the_model_stays(tmp_path, reader):
    for row, ending in itertools.product(FILES, ("pth", "pkl", "safetensors")):
        is_safetensors = reader == "model" and row.startswith(("safetensors", "LFS"))
        if ending == "safetensors" and not is_safetensors:
            continue
        content, path = FILES[row], tmp_path / f"weights.{ending}"
        content(path) if callable(content) else path.write_bytes(content)
        with one_error(WeightsError, str(path)):
            READERS[reader](path)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
    assert all(torch.equal(value, STATE[name]) for name, value in MODEL.state_dict().items())


def test_without_safetensors_its_name_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").write_bytes(TENSORS)
    with one_error(WeightsError, "pip install safetensors"):
        READERS["model"](tmp_path / "weights.safetensors")


MALICIOUS = {
    "PyTorch": as_file,
    "PyTorch, old format": functools.partial(as_file, _use_new_zipfile_serialization=False),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_code_of_a_file_runs(tmp_path, reader):
    for suffix, row in itertools.product((".pth", ".pkl"), MALICIOUS):
        proof = tmp_path / "proof"
        content = MALICIOUS[row]({"more": Exploit(proof), **STATE})
        if row.startswith("PyTorch"):
            torch.load(io.BytesIO(content), weights_only=False)
            assert proof.is_dir()  # the file does what it is meant to do
            proof.rmdir()
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(content)
        with one_error(WeightsError, str(path)):
            READERS[reader](path)
        assert not proof.exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [ZIP, LEGACY], ids=["zip", "old"])
def test_a_damaged_file_never_ends_in_another_error(tmp_path, reader, content):
    """Bytes changed at random: the file loads (a weight changed) or is refused."""
    rng = np.random.default_rng(0)
    path = tmp_path / "weights.pth"
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 1 + rng.integers(20)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            READERS[reader](path)
        except WeightsError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
