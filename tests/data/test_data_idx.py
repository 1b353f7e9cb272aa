import gzip
import struct

import numpy as np
import pytest

from normlab.data import DataError
from normlab.data.idx import read_idx, write_idx

VALUES = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"values{suffix}"
    write_idx(path, VALUES)
    assert np.array_equal(read_idx(path, 3), VALUES)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_same_values_give_same_bytes(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_idx(first, VALUES)
    write_idx(second, VALUES)
    assert first.read_bytes() == second.read_bytes()


def test_layout_is_the_published_one(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    assert read_idx(path, 1).tolist() == [7, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 1, 1) + b"a", "00000803"),
        (bytes([0, 0, 13, 1]) + struct.pack(">I", 1) + b"aaaa", "00000d01"),
        (bytes([0, 0, 8, 1, 0, 0]), "only 2 bytes"),
        (bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"ab", "expected 3 values.*found 2"),
        (bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"abcd", "expected 3 values.*found more"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_wrong_content_is_named(tmp_path, content, message, suffix):
    path = tmp_path / f"labels{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, 1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "never compressed"])
def test_damaged_compression_names_the_file(tmp_path, suffix, damage):
    path = tmp_path / f"values{suffix}"
    write_idx(path, np.random.default_rng(0).integers(0, 256, (9, 9, 9), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    else:
        content = bytearray(b"plain text, no archive")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|truncated") as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="absent"):
        read_idx(tmp_path / "absent", 1)
