import os
import pickle
import pickletools

import numpy as np
import pytest

from normlab.data import DataError
from normlab.data.unpickle import read_pickle


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "f4", "?"])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_arrays_of_every_protocol(protocol, dtype, core):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    content = pickle.dumps({"a": array, "t": array.T, "b": b"\xff", "n": [array[0, 1]]}, protocol)
    if protocol < 4:  # names have their length written before them from protocol 4 on
        content = content.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
    read = read_pickle(content, "test")
    assert np.array_equal(read["a"], array)
    assert np.array_equal(read["t"], array.T)
    # Up to protocol 4 numpy itself turns foreign byte orders into the native one.
    assert read["a"].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert read["b"] == b"\xff"
    assert read["n"] == [array[0, 1]]


def test_python_2(make):
    pixels, labels = make.rows(3, 10)
    read = read_pickle(make.python2_pickle(pixels, labels), "test")
    assert np.array_equal(read["data"], pixels)
    assert read["labels"] == labels.tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_command_is_refused_and_not_run(tmp_path, protocol):
    flag = tmp_path / "ran"
    content = pickle.dumps({"data": Attack(os.system, f"touch {flag}")}, protocol)
    pickle.loads(content)
    assert flag.exists(), "the attack must work, or its refusal shows nothing"
    flag.unlink()
    with pytest.raises(DataError, match=r"(posix|nt)\.system"):
        read_pickle(content, "bad.pickle")
    assert not flag.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy", "dtype.__class__"),
        ("numpy.core.multiarray", "fromfile"),
        ("normlab.data.unpickle", "pickle"),
        ("no_such_module_anywhere", "x"),
    ],
)
def test_other_names_are_refused(module, name):
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name))
    with pytest.raises(DataError, match="do not trust"):
        read_pickle(content + b"\x93.", "bad.pickle")


def test_arrays_of_objects_are_refused():
    content = pickle.dumps(np.array([None, 1], dtype=object))
    with pytest.raises(DataError, match="plain numbers"):
        read_pickle(content, "bad.pickle")


def test_forged_shape_is_refused(make):
    pixels, labels = make.rows(3, 10)
    content = make.python2_pickle(pixels, labels)
    forged = content.replace(b"K\x01J\x03\x00\x00\x00", b"K\x01J\xff\x00\x00\x00")
    assert forged != content
    with pytest.raises(DataError, match="damaged"):
        read_pickle(forged, "bad.pickle")


def test_forged_byte_order_is_refused():
    content = b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01OK\x00tb."
    with pytest.raises(DataError, match="byte order 'O'"):
        read_pickle(content, "bad.pickle")


def test_forged_fields_give_no_unchecked_dtype():
    start = b"\x80\x02cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    state = b"(K\x03U\x01|NU\x01a}U\x01aK\x00sK\x01K\x01K\x00tb"
    kind = read_pickle(start + state + b".", "bad.pickle")
    assert type(kind) is not np.dtype
    assert kind.dtype() == np.uint8


def test_every_truncation_is_a_data_error(make):
    pixels, labels = make.rows(1, 10)
    content = make.python2_pickle(pixels, labels)
    ends = {position for _, _, position in pickletools.genops(content)} | {1, 50, 500}
    for end in ends - {None}:
        with pytest.raises(DataError, match="truncated"):
            read_pickle(content[:end], "cut.pickle")


def test_any_damaged_byte_is_a_data_error_or_harmless(make):
    pixels, labels = make.rows(1, 10)
    content = make.python2_pickle(pixels[:, :40], labels)
    refused = 0
    for position in range(len(content)):
        for value in (0, 46, 99, 255):
            damaged = bytearray(content)
            damaged[position] = value
            try:
                read_pickle(bytes(damaged), "damaged.pickle")
            except DataError:
                refused += 1
    assert refused > len(content)
