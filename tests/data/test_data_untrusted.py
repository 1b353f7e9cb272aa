import io
import os
import pickle
import tarfile

import pytest

from normlab.data import DataError, load


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("archived", [False, True])
def test_malicious_pickle(tmp_path, make, name, archived):
    files, _, _ = make.cifar(10, True)
    flag = tmp_path / "ran"
    files[name] = pickle.dumps(Attack(f"touch {flag}"))
    if archived:
        place = make.archive(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        place = make.folder(tmp_path / "plain", files)
    with pytest.raises(DataError, match=f"in {name} of .*system"):
        load("cifar10", place)
    assert not flag.exists()


@pytest.mark.parametrize("bad", ["../../escaped", "/tmp/escaped", "inside/../../escaped", "..\\x"])
def test_archive_that_points_outside(tmp_path, make, bad):
    files, _, _ = make.cifar(10, False)
    archive = make.archive(tmp_path / "cifar-10-binary.tar.gz", {bad: b"x", **files}, prefix="")
    with pytest.raises(DataError, match="points outside"):
        load("cifar10", archive)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


def test_links_in_archives_are_not_followed(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("data_batch_1.bin", "test_batch.bin"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
    with pytest.raises(DataError, match=r"expected data_batch_1|expected the files"):
        load("cifar10", path)


def test_name_twice_in_archive(tmp_path, make):
    files, _, _ = make.cifar(10, False)
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for prefix in ("a/", "b/"):
            for name, content in files.items():
                member = tarfile.TarInfo(prefix + name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="one data_batch_1"):
        load("cifar10", path)


def test_oversized_member_is_refused_before_reading(tmp_path, make, monkeypatch):
    files, _, _ = make.cifar(10, False)
    monkeypatch.setattr("normlab.data.archive.LARGEST", 1000)
    with pytest.raises(DataError, match="at most 1000 bytes"):
        load("cifar10", make.archive(tmp_path / "cifar-10-binary.tar.gz", files))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty"])
def test_damaged_archive_names_the_file(tmp_path, make, damage):
    files, _, _ = make.cifar(10, False)
    path = make.archive(tmp_path / "cifar-10-binary.tar.gz", files)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) * 2 // 3]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
        content[len(content) // 2 + 1] ^= 255
    else:
        content = bytearray(b"no archive at all" * (damage == "text"))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|truncated") as caught:
        load("cifar10", path)
    assert str(path) in str(caught.value)
