"""Image data sets, and how their samples are grouped into batches and shared statistics."""

from normlab.data.augmentation import augment
from normlab.data.batching import batches
from normlab.data.errors import DataError
from normlab.data.images import ImageData
from normlab.data.registry import load, names
from normlab.data.seeds import generator
from normlab.data.sharing import share
from normlab.data.splitting import split

__all__ = [
    "DataError",
    "ImageData",
    "augment",
    "batches",
    "generator",
    "load",
    "names",
    "share",
    "split",
]
