"""A few named files, from a folder or from a tar archive that is never unpacked to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from normlab.data.errors import DataError

# The largest file of the sets read here is CIFAR-100's pickle with 155 MB; an archive that
# claims more would fill the memory before anything could be checked.
LARGEST = 1 << 28


def read_folder(directory: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Read those of the wanted files that a folder has.

    Args:
        directory: The folder.
        wanted: File names.

    Returns:
        The content of each file found.

    Raises:
        DataError: If a file cannot be read.
    """
    found = {}
    for path in (directory / name for name in wanted):
        if path.is_file():
            try:
                found[path.name] = path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"a readable {path}", str(error), "check its permissions"
                ) from error
    return found


def read_archive(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Read those of the wanted files that a .tar.gz archive has, wherever in it they lie.

    Args:
        path: The archive.
        wanted: File names without folders.

    Returns:
        The content of each file found.

    Raises:
        DataError: If the archive is damaged, has a member that points outside, has a wanted name
            twice, or a wanted file larger than 256 MB.
    """
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = _safe_name(member, path)
                # Links and devices are never followed, and only plain files have content.
                if name not in wanted or not member.isreg():
                    continue
                _check_member(member, name, found, path)
                content = archive.extractfile(member)
                found[name] = content.read() if content is not None else b""
                if len(found[name]) != member.size:
                    raise EOFError(f"{name} ends early")
            # gzip compares its checksum at the very end, which tarfile does not reach.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"a complete archive {path}",
            f"{type(error).__name__}: {error}",
            "the archive is truncated or damaged: fetch it again",
        ) from error
    return found


def _safe_name(member: tarfile.TarInfo, path: Path) -> str:
    parts = PurePosixPath(member.name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(
            f"relative names inside {path}",
            f"the member {member.name!r}, which points outside",
            "do not trust this archive: fetch it again from the original source",
        )
    return parts.name


def _check_member(member: tarfile.TarInfo, name: str, found: Collection[str], path: Path) -> None:
    if name in found:
        raise DataError(
            f"one {name} in {path}", f"a second one, {member.name}", "fetch the original archive"
        )
    if member.size > LARGEST:
        raise DataError(
            f"at most {LARGEST} bytes in {name} of {path}",
            f"{member.size}",
            "fetch the original archive",
        )
