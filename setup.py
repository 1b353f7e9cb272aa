"""Builds the CPU kernels as plain shared libraries, one for each instruction set.

Where there is no C++ compiler, or it fails, the package installs without: layers then use torch
operations, and ``normlab doctor`` says so. ``NORMLAB_KERNELS=off`` builds none.
"""

import contextlib
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

FOLDER = "src/normlab/kernels/cpu"
SOURCES, HEADERS = ([p.as_posix() for p in sorted(Path(FOLDER).glob(f"*.{end}"))]
                    for end in ("cpp", "h"))  # fmt: skip

# Exactly what torch asks of a processor before it calls it AVX2 or AVX512 (kernels/cpu/library.py).
# Features, not -march=x86-64-v3, which older compilers do not know.
GNU = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-mprefer-vector-width=512"],
}  # fmt: skip
GNU["avx512bf16"] = [*GNU["avx512"], "-mavx512bf16"]
MSVC = {"baseline": [], "avx2": ["/arch:AVX2"], "avx512": ["/arch:AVX512"]}
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = list(MSVC if sys.platform == "win32" else GNU) if X86 else ["baseline"]

# Never -ffast-math: it lets linkers add code that flushes subnormal numbers of the whole process.
GNU_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno",
             "-fno-trapping-math", "-ffp-contract=fast"]  # fmt: skip
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc"]


def recipes(msvc, level):
    """Flags to compile and to link with, best first: threads where there is OpenMP, else without.

    On macOS torch brings an OpenMP of its own, beside which a second one does harm.
    """
    if msvc:
        flags = MSVC_FLAGS + MSVC[level]
        return [([*flags, "/openmp:experimental"], []), (flags, [])]
    flags = GNU_FLAGS + GNU[level]
    threads = [] if sys.platform == "darwin" else [([*flags, "-fopenmp"], ["-fopenmp"])]
    return [*threads, ([*flags, "-fopenmp-simd"], [])]


class PlainLibraries(build_ext):
    """Libraries that ctypes loads: without Python's headers, and without a module's entry point."""

    def finalize_options(self):
        """One library for each instruction set, as many at a time as there are processors."""
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext):
        """Compile and link one library; where no recipe works, leave none of that name behind."""
        level = ext.name.rpartition("_")[2]
        path = self.get_ext_fullpath(ext.name)
        Path(path).unlink(missing_ok=True)
        error = None
        for compiling, linking in recipes(self.compiler.compiler_type == "msvc", level):
            try:
                objects = self.compiler.compile(
                    ext.sources,
                    output_dir=os.path.join(self.build_temp, level),
                    extra_postargs=compiling,
                )
                self.compiler.link_shared_object(
                    objects, path, extra_postargs=linking, target_lang="c++"
                )
                return
            except (BaseError, CCompilerError) as failure:
                error = failure
        raise error

    def copy_extensions_to_source(self):
        """Put what was built beside the source, whole at once, for whoever loads it meanwhile.

        A library of an older source goes, even where no new one could be built.
        """
        for ext in self.extensions:
            name = self.get_ext_filename(self.get_ext_fullname(ext.name))
            built, place = Path(self.build_lib, name), Path(FOLDER, Path(name).name)
            if built.is_file():
                part = place.with_name(f"{place.name}.{os.getpid()}.part")
                self.copy_file(str(built), str(part))
                part.replace(place)
            elif place.is_file() and place.stat().st_mtime < max(
                Path(source).stat().st_mtime for source in SOURCES + HEADERS
            ):
                with contextlib.suppress(OSError):  # in use, on Windows
                    place.unlink()


setup(
    cmdclass={"build_ext": PlainLibraries},
    ext_modules=[]
    if os.environ.get("NORMLAB_KERNELS", "").lower() == "off"
    else [
        Extension(
            f"normlab.kernels.cpu._{level}", SOURCES, depends=["setup.py", *HEADERS], optional=True
        )
        for level in LEVELS
    ],
)
