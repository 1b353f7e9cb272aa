"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), binary or pickled, in a folder or an archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from normlab.data.archive import read_archive, read_folder
from normlab.data.cifar_rows import Rows, from_binary, from_pickle
from normlab.data.errors import DataError
from normlab.data.images import ImageData
from normlab.data.places import listing
from normlab.data.unpickle import read_pickle

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """The names of the files of one published version of a data set."""

    train: tuple[str, ...]
    test: str
    meta: str
    folder: str
    archive: str
    pickled: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_LAYOUTS = {
    10: (
        _Layout(
            tuple(f"{b}.bin" for b in _BATCHES), "test_batch.bin", "batches.meta.txt",
            "cifar-10-batches-bin", "cifar-10-binary.tar.gz", False,
        ),
        _Layout(
            _BATCHES, "test_batch", "batches.meta",
            "cifar-10-batches-py", "cifar-10-python.tar.gz", True,
        ),
    ),
    100: (
        _Layout(
            ("train.bin",), "test.bin", "fine_label_names.txt",
            "cifar-100-binary", "cifar-100-binary.tar.gz", False,
        ),
        _Layout(
            ("train",), "test", "meta", "cifar-100-python", "cifar-100-python.tar.gz", True
        ),
    ),
}  # fmt: skip


def load_cifar(where: Path, classes: int) -> ImageData:
    """Load CIFAR-10 or CIFAR-100 (fine labels).

    Args:
        where: The folder of the files, a folder that holds that folder or the archive under their
            published names, or the archive itself.
        classes: 10 or 100.

    Returns:
        The data, images of 3×32×32.  The title tells if training files are missing.

    Raises:
        DataError: If files are missing, damaged or inconsistent.
    """
    layout, files, source = _find(where, classes)
    _check_complete(layout, files, source)
    read = from_pickle if layout.pickled else from_binary
    train = [read(files[n], f"{n} of {source}", classes) for n in layout.train if n in files]
    test_images, test_labels = _tensors(
        [read(files[layout.test], f"{layout.test} of {source}", classes)]
    )
    images, labels = _tensors(train)
    title = f"CIFAR-{classes}"
    if len(labels) != 50_000:
        title += f" ({len(labels):,} of 50,000 training images)"
    names = _class_names(files.get(layout.meta), layout, classes, source)
    note = "Krizhevsky 2009, published without a formal licence"
    return ImageData(
        f"cifar{classes}", title, images, labels, test_images, test_labels, names, note
    )


def _tensors(parts: list[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.concatenate([p[0] for p in parts])
    labels = np.concatenate([p[1] for p in parts])
    return torch.from_numpy(images), torch.from_numpy(labels)


def _find(where: Path, classes: int) -> tuple[_Layout, dict[str, bytes], Path]:
    """The first layout of which a file is there, with the content of its files."""
    layouts = _LAYOUTS[classes]
    if where.is_file():
        for layout in layouts:
            files = read_archive(where, layout.names)
            if files:
                return layout, files, where
    for layout in layouts:
        for folder in (where, where / layout.folder, where / f"cifar{classes}" / layout.folder,
                       where / f"cifar{classes}", where / f"cifar-{classes}"):  # fmt: skip
            # The names of the class file alone ("meta") are too common to mean anything.
            if any((folder / name).is_file() for name in (*layout.train, layout.test)):
                return layout, read_folder(folder, layout.names), folder
    for layout in layouts:
        archive = where / layout.archive
        if archive.is_file():
            return layout, read_archive(archive, layout.names), archive
    searched = "; or ".join(
        f"{', '.join(x.names)} (also in {x.folder}/ or {x.archive})" for x in layouts
    )
    raise DataError(
        f"the files of CIFAR-{classes} in {where}: {searched}",
        listing(where),
        "pass the folder or the .tar.gz archive of the binary or python version",
    )


def _check_complete(layout: _Layout, files: dict[str, bytes], source: Path) -> None:
    """The test file and an unbroken run of training files must be there."""
    present = [name in files for name in layout.train]
    # A first part alone is a legitimate smaller set; a gap is an accident.
    run = present.index(False) if False in present else len(present)
    missing = [n for n, p in zip(layout.train, present, strict=True) if not p]
    if run == 0 or any(present[run:]) or layout.test not in files:
        absent = missing if run == 0 or any(present[run:]) else []
        absent += [layout.test] * (layout.test not in files)
        raise DataError(
            f"{', '.join(layout.train)} and {layout.test} in {source}",
            f"no {', no '.join(absent)}",
            "complete the folder, or fetch the archive again",
        )


def _class_names(
    content: bytes | None, layout: _Layout, classes: int, source: Path
) -> tuple[str, ...]:
    """The names in the class file; without one, the published or numbered names."""
    if content is None:
        return CIFAR10_CLASSES if classes == 10 else tuple(f"class {i}" for i in range(classes))
    if layout.pickled:
        meta = read_pickle(content, f"{layout.meta} of {source}")
        key = "label_names" if classes == 10 else "fine_label_names"
        # A pickle of Python 3 may hold bytes where one of Python 2 holds text.
        fields = {_text(k): v for k, v in meta.items()} if isinstance(meta, dict) else {}
        listed = fields.get(key)
        names = [_text(n) for n in listed] if isinstance(listed, list) else []
    else:
        names = content.decode("utf-8", "replace").split()
    if len(names) != classes or len(set(names)) != classes:
        raise DataError(
            f"{classes} different class names in {layout.meta} of {source}",
            f"{len(names)} names, {len(set(names))} of them different",
            "fetch the file again, or remove it to use default names",
        )
    return tuple(names)


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
