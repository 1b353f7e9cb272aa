"""The Triton kernels: compiled for a GPU that need not be there, and run under the interpreter."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normlab as nl
from normlab.core.partition import partition
from normlab.kernels.triton import call, plan

ROOT = Path(__file__).parents[2]
HERE = "tests/kernels/"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: make test-triton"
)


def version(package):
    if importlib.util.find_spec(package) is None:
        return (0, 0)
    return tuple(int(n) for n in importlib.metadata.version(package).split(".")[:2])


# There the interpreter cannot count up to a number known at run time.
uninterpretable = pytest.mark.skipif(
    version("triton") < (3, 7) and version("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 does not work with numpy 2.4 and later",
)


@needs_triton
@uninterpretable
@pytest.mark.timeout(900)
def test_under_the_interpreter():
    """In a process of its own: the interpreter is switched on before Triton is imported."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE + "interpreted.py"]
    done = subprocess.run(
        line, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@needs_triton
@pytest.mark.skipif(call.interpreted(), reason="the interpreter compiles nothing")
def test_the_kernels_compile_for_sm_90():
    """Without a device; in a process of its own, for Triton warns of settings to come."""
    done = subprocess.run(
        [sys.executable, HERE + "triton_ahead.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "compiled" in done.stdout


@needs_triton
@uninterpretable
@pytest.mark.timeout(900)
def test_the_benchmark_checks_itself_under_the_interpreter(tmp_path):
    line = [sys.executable, "benchmarks/gpu.py", "--interpret", "--minutes", "0.5"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(tmp_path):
    line = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No GPU to measure on" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_tables_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    times = {"min": 1.0, "median": 1.1}
    one = {
        "method": "batch", "shape": "A", "dims": [2, 3], "dtype": "float32", "layout": "nchw",
        "variant": "normlab", "copy_ms": times, "triton": True, "forward_ratio": 1.0,
        "both_ratio": 1.5, "issue_us": 90.0,
    }  # fmt: skip
    native = one | {"variant": "native", "both_ratio": 1.2, "triton": False}
    bad = one | {"variant": "compiled", "error": "RuntimeError: no"}
    record = {
        "environment": {"gpu": "one"}, "command": "c", "date": "d", "failed": [], "skipped": ["x"],
        "rows": [one, native, bad],
    }  # fmt: skip
    text = gpu.markdown(record)
    assert "| batch A | 1.50 / 1.20 / error |" in text
    assert "- batch A float32 nchw: 1.50 against 1.20 (native)" in text
    assert "RuntimeError: no" in text
    assert "Skipped: x" in text


def test_the_backend_says_what_is_missing():
    if call.available():
        pytest.skip("nothing is missing")
    with pytest.raises(ValueError, match=r"backend 'triton' is not part of this installation: .+"):
        nl.kernels.backend("triton")


PATTERNS = [
    ("n c * -> c (n *)", {}), ("n c * -> (n c) (*)", {}), ("n c * -> n (c *)", {}),
    ("n (g c) * -> (n g) (c *)", {"g": 4}), ("(b n) c * -> (b c) (n *)", {"n": 4}),
    ("(b n) (g c) * -> (b g) (c n *)", {"n": 4, "g": 2}), ("n c * -> (n *) (c)", {}),
]  # fmt: skip
SHAPES = [(64, 64, 32, 32), (128, 256, 14, 14), (128, 512, 7, 7), (8, 24, 1, 1), (32, 64, 112, 112)]


@pytest.mark.parametrize(("pattern", "sizes"), PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_plans_cover_each_element_once(pattern, sizes, shape, columns):
    layout = partition(pattern).bind(shape, sizes=sizes)
    n, c, p = layout.lengths
    for limit in (plan.FORWARD, plan.BACKWARD):
        found = plan.areas(layout, columns, limit)
        if found is None:
            continue
        ba, b1, b2 = found.tile(limit)
        assert ba * b1 * b2 <= limit
        assert b1 >= found.m1
        assert b2 >= found.m2
        assert found.outer * found.inner * found.m1 * found.m2 == n * c * p
        top = sum(
            (size - 1) * stride
            for size, stride in (
                (found.outer, found.so), (found.inner, found.sa),
                (found.m1, found.s1), (found.m2, found.s2),
            )
        )  # fmt: skip
        assert top == n * c * p - 1
        assert found.outer * found.tiles(ba) < 1 << 31
    if layout.blocks is None:
        return
    lines = plan.lines(layout, columns)
    assert lines.n * lines.c * lines.p == n * c * p
    assert (lines.n - 1) * lines.sn + (lines.c - 1) * lines.sc + (
        lines.p - 1
    ) * lines.sp == n * c * p - 1
    units, pieces = lines.pieces()
    assert (pieces - 1) * units < lines.bn * lines.chunks() <= pieces * units
    # Sums of a tile's element over a piece stay short, for they are in float32.
    assert units <= 1 << 12


def test_tensors_of_the_processor_are_left_to_it():
    layout = partition("n c * -> c (n *)").bind((4, 3, 5))
    if not call.interpreted():
        assert not call.supports(torch.randn(4, 3, 5), layout, nl.Standardize(), None)
