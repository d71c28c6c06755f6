"""The reader of pickled arrays: what it reads, and that it runs nothing."""

import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from s4m_d2.restricted_pickle import UnsafePickleError, load_arrays


def load(content):
    return load_arrays(io.BytesIO(content))


def opcodes(*parts):
    """A pickle from raw opcodes (protocol 0 and 2)."""
    return b"\x80\x02" + b"".join(parts) + b"."


GET_NDARRAY = b"cnumpy\nndarray\n"
GET_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
SET_DEFAULTS = b"N}U\x0c__defaults__)s\x86b"  # BUILD with the slot state {"__defaults__": ()}
SET_CLASS = b"N}U\x09__class__" + GET_NDARRAY + b"s\x86b"


def test_nothing_but_stand_ins_is_called_and_these_cannot_be_changed():
    for content in (
        opcodes(b"cos\nsystem\nU\x04true\x85R"),
        opcodes(b"cnumpy.core.multiarray\n__dict__\n"),
        opcodes(b"cbuiltins\ngetattr\n", GET_NDARRAY, b"U\x05dumps\x86R"),
        opcodes(b"ctorch\nload\n"),
        opcodes(b"\x8c\x05numpy\x8c\x10ndarray.__init__\x93"),  # a dotted name of protocol 4
        opcodes(GET_RECONSTRUCT, SET_DEFAULTS),
        opcodes(GET_NDARRAY, SET_DEFAULTS),
        opcodes(GET_RECONSTRUCT, b")R", SET_CLASS),
        opcodes(GET_NDARRAY, b")\x81"),
        opcodes(GET_RECONSTRUCT, b")R(K\x01K\x02K\x03tb"),
    ):
        with pytest.raises(pickle.UnpicklingError):
            load(content)


def doubled(empty, join):
    """Opcodes of a value that holds itself 2^60 times; the stack below stays as it was."""
    gets = [b"h" + bytes([i]) for i in range(61)]
    levels = b"".join(join(get) + b"q" + bytes([i]) for i, get in enumerate(gets[:-1], start=1))
    return b"(" + empty + b"q\x00" + levels + b"1" + gets[-1]


TUPLES = doubled(b")", lambda get: get + get + b"\x86")
LISTS = doubled(b"]", lambda get: b"](" + get + get + b"e")
DICTS = doubled(b"}", lambda get: b"}(U\x01a" + get + b"U\x01b" + get + b"u")


@pytest.mark.timeout(60)
def test_a_small_file_takes_little_time():
    for content in (
        *(opcodes(b"}U\x01a", value, b"s") for value in (TUPLES, LISTS, DICTS)),
        opcodes(b"}", TUPLES, b"K\x01s"),
        opcodes(b"}(", TUPLES, b"K\x01u"),
        opcodes(b"(", TUPLES, b"K\x01d"),
        opcodes(b"\x8f(", TUPLES, b"\x90"),
        opcodes(b"ccollections\nOrderedDict\n]", TUPLES, b"K\x01\x86a\x85R"),
        opcodes(b"cnumpy\ndtype\n", TUPLES, b"\x85R"),
        opcodes(GET_RECONSTRUCT, b")R", LISTS, b"K\x01s"),
        opcodes(b"]q\x00h\x00a"),
    ):
        with pytest.raises(pickle.UnpicklingError):
            load(content)


def test_arrays_of_other_things_than_numbers_are_refused():
    for value in (
        np.array([{}], dtype=object),
        np.array(len, dtype=object),
        np.array(["a"]),
        np.zeros(2, dtype="f4,i4"),
    ):
        with pytest.raises(UnsafePickleError):
            load(pickle.dumps({"a": value}, protocol=4))


def test_bytes_become_neither_objects_nor_arrays_of_another_shape():
    def array(dtype, shape):
        kind = b"cnumpy\ndtype\nU\x02" + dtype + b"\x85R"
        return opcodes(GET_RECONSTRUCT, b")R(K\x01", shape, kind, b"\x89U\x08ABCDEFGHtb")

    assert load(array(b"u1", b"K\x08\x85")).tobytes() == b"ABCDEFGH"
    for shape in (
        b"K\xc8\x85",
        b"J\xff\xff\xff\xffJ\xf8\xff\xff\xff\x86",
        b"(" + b"K\x01" * 99 + b"t",
    ):
        with pytest.raises(UnsafePickleError):
            load(array(b"u1", shape))
    with pytest.raises(UnsafePickleError):
        load(array(b"O8", b")"))


def test_arrays_come_back_as_they_were():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
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
        loaded = load(pickle.dumps(content, protocol=protocol))
        assert list(loaded) == list(content)
        assert loaded["nested"] == content["nested"]
        for name in list(content)[:-1]:
            found, expected = loaded[name], content[name]
            assert np.array_equal(found, expected)
            assert found.dtype.isnative and found.dtype.type == expected.dtype.type
        loaded["plain"][0, 0] = 1  # writable


def test_dictionaries_that_numpy_saved():
    """Tensors among them, and whole numbers as keys."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        scores = torch.rand(3, 4, 5)
        content = {
            "keys": torch.tensor([2, 14]),
            "cam": scores[1:, ::2].half(),  # neither the storage's first value nor contiguous
            "maps": {0: np.zeros(2), np.int64(3): np.ones(2, bool)},
        }
        saved = pickle.dumps(np.array(content), protocol=protocol)
        loaded = load(saved)
        assert loaded["keys"].tolist() == [2, 14]
        np.testing.assert_array_equal(loaded["cam"], scores[1:, ::2].half().numpy())
        maps = {key: value.tolist() for key, value in loaded["maps"].items()}
        assert maps == {0: [0.0, 0.0], 3: [True, True]}


def test_a_tensor_with_fewer_values_than_its_shape_is_refused():
    """A stride of 0 repeats a value: a few bytes would become as many as the shape asks for."""
    for shape, stride in (((10**6, 10**6), (0, 0)), ((2, 2), (2, 1)), ((3,), (-1,))):
        tensor = torch.zeros(3).as_strided((2,), (1,))
        saved = pickle.dumps(tensor, protocol=0)
        changed = saved.replace(b"(I2\ntp", b"(" + b"".join(b"I%d\n" % n for n in shape) + b"tp")
        assert changed != saved
        changed = changed.replace(b"(I1\ntp", b"(" + b"".join(b"I%d\n" % n for n in stride) + b"tp")
        with pytest.raises(UnsafePickleError):
            load(changed)


def test_python_2_files_are_read_and_truncated_ones_refused():
    # What Python 2 wrote for {"w": np.arange(2, dtype="<f4")}: bytes are str there.
    raw = np.arange(2, dtype="<f4").tobytes()
    content = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + raw + b"tbs."
    )
    assert load(content)["w"].tolist() == [0.0, 1.0]
    for end in range(len(content)):
        with pytest.raises((pickle.UnpicklingError, EOFError)):
            load(content[:end])
