"""Small files in every layout that the loaders read, written to a temporary folder."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, request):
    """No test sees the data of the machine, unless it is there to use it."""
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("NORMLAB_DATA_DIR", raising=False)


@pytest.fixture
def untouched_chance():
    """Fail if the test moves the global generators of torch or numpy."""
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def rows(count, classes, seed=0):
    """Random pixels (N, 3072) and labels that go round the classes."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (count, 3072), dtype=np.uint8), np.arange(count) % classes


def python2_pickle(pixels, labels, key="labels"):
    """The bytes that Python 2 and numpy 1 wrote in 2009, opcode by opcode."""
    raw = pixels.tobytes()
    return b"".join(
        (
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n",
            b"K\x00\x85U\x01b\x87R(K\x01",
            struct.pack("<cIcI", b"J", pixels.shape[0], b"J", pixels.shape[1]) + b"\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<I", len(raw)) + raw + b"tb",
            b"U" + bytes([len(key)]) + key.encode() + b"](",
            b"".join(b"K" + bytes([label]) for label in labels.tolist()),
            b"eu.",
        )
    )


def cifar_files(classes, pickled, count=20):
    """Name and content of each file of a small CIFAR, and what must be read from them."""
    names = [f"thing{i}" for i in range(classes)]
    parts = {"train": rows(count, classes, 1), "test": rows(classes, classes, 2)}
    files = {}
    stems = {"train": "data_batch_1", "test": "test_batch"} if classes == 10 else {}
    for part, (pixels, labels) in parts.items():
        stem = stems.get(part, part)
        if pickled:
            key = "labels" if classes == 10 else "fine_labels"
            files[stem] = pickle.dumps({b"data": pixels, key.encode(): labels.tolist()})
        else:
            columns = [labels[:, None].astype(np.uint8), pixels]
            # CIFAR-100 has the coarse label first; 255 shows if it is taken for the fine one.
            columns = [np.full((len(labels), 1), 255, np.uint8)] * (classes == 100) + columns
            files[f"{stem}.bin"] = np.concatenate(columns, axis=1).tobytes()
    if pickled:
        key = "label_names" if classes == 10 else "fine_label_names"
        files["batches.meta" if classes == 10 else "meta"] = pickle.dumps({key: names})
    else:
        meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        files[meta] = "\n".join([*names, ""]).encode()
    return files, parts, tuple(names)


def write_files(folder, files):
    """Write name and content of each file, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(path, files, prefix="inside/"):
    """Write the files as a .tar.gz archive."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def make():
    """The writers above, for tests in other files."""

    class Make:
        rows = staticmethod(rows)
        python2_pickle = staticmethod(python2_pickle)
        cifar = staticmethod(cifar_files)
        folder = staticmethod(write_files)
        archive = staticmethod(write_archive)

    return Make
