"""Choosing, loading and switching off the compiled kernels, on machines of every kind."""

import ctypes
import importlib.machinery
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import normlab as nl
from normlab.kernels.cpu import library

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
LEVELS = ("avx512bf16", "avx512", "avx2", "baseline")
BUILT = [level for level in LEVELS if (library.FOLDER / f"_{level}{SUFFIX}").is_file()]
REPAIR = "with a C++ compiler"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation of its own, without libraries, on a processor that runs all of them."""
    inside = tmp_path / "site" / "normlab" / "kernels" / "cpu"
    inside.mkdir(parents=True)
    monkeypatch.setattr(library, "FOLDER", inside)
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    library.load.cache_clear()
    yield inside
    library.load.cache_clear()


def compile_c(path, source):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.name != "posix":
        pytest.skip("needs a C compiler")
    path.with_suffix(".c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".c"))]
    subprocess.run(command, check=True)


def ours(abi=library.ABI):
    return (
        f"int normlab_abi(void) {{ return {abi}; }}"
        "int normlab_forward(void *c, int d) { return 0; }"
        "int normlab_backward(void *c, int d) { return 0; }"
        "int normlab_lines_forward(void *c, int d) { return 0; }"
        "int normlab_lines_backward(void *c, int d) { return 0; }"
        "int normlab_powers_forward(void *c, int d) { return 0; }"
        "int normlab_powers_backward(void *c, int d) { return 0; }"
        "int normlab_units(void *c, int d, int b) { return 0; }"
        "int normlab_rewrite(void *c, int d) { return 0; }"
        "int normlab_maps(void *c, int p, int d) { return 0; }"
        "int normlab_middle(void *m, void *c, int b, int d) { return 0; }"
        "int normlab_blend(void *c, int d) { return 0; }"
        "void normlab_stream_from(long long b) {}"
    )


def test_without_libraries_torch_does_the_work(folder):
    loaded, words = library.load()
    assert loaded is None
    assert words.startswith("none were built; ")
    assert "pip install --force-reinstall --no-deps" in words
    x = torch.randn(8, 4, 3, requires_grad=True)
    y = nl.BatchNorm(4)(x)
    y.square().sum().backward()
    model = nl.weight("standardization", torch.nn.Conv1d(4, 5, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name in ("centralization", "adaptive_clip"):
        nl.gradient(name, model).attach(optimizer)
    nl.norm("evonorm_s0", 5, groups=1)(model(x)).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="none were built"):
        nl.kernels.backend("cpu")
    assert nl.kernels.backend.name() == "auto"


def test_a_checkout_is_repaired_where_it_lies(folder):
    (folder / "normalize.cpp").touch()
    (folder.parents[3] / "setup.py").touch()
    assert library.load()[1].endswith(f"pip install --no-deps -e {folder.parents[3]}")


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(200)])
def test_a_corrupt_library_is_named_with_the_repair(folder, content):
    (folder / f"_avx2{SUFFIX}").write_bytes(content)
    loaded, words = library.load()
    assert loaded is None
    assert f"_avx2{SUFFIX} does not load" in words
    assert REPAIR in words


def test_a_library_of_another_interface_is_refused(folder):
    compile_c(folder / f"_avx512{SUFFIX}", ours(library.ABI + 1))
    loaded, words = library.load()
    assert loaded is None
    assert f"built for interface {library.ABI + 1} where this normlab has {library.ABI}" in words
    assert REPAIR in words


@pytest.mark.parametrize("name", ["abi", "forward", "backward"])
def test_a_library_that_lacks_a_function_is_refused(folder, name):
    compile_c(folder / f"_avx2{SUFFIX}", ours().replace(f"normlab_{name}", "other"))
    loaded, words = library.load()
    assert loaded is None
    assert f"normlab_{name}" in words


def test_the_next_library_stands_in_for_one_that_fails_and_words_say_so(folder):
    (folder / f"_avx512{SUFFIX}").write_bytes(b"")
    compile_c(folder / f"_avx2{SUFFIX}", ours())
    loaded, words = library.load()
    assert loaded is not None
    assert words.startswith(f"_avx2{SUFFIX}, for a processor with AVX512; _avx512{SUFFIX}")
    assert REPAIR in words


@pytest.mark.parametrize(
    ("capability", "level"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "baseline"), ("SVE256", "baseline")],
)
def test_the_processor_decides(folder, monkeypatch, capability, level):
    for each in LEVELS:
        compile_c(folder / f"_{each}{SUFFIX}", ours())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert library.load()[1] == f"_{level}{SUFFIX}, for a processor with {capability}"


def test_the_processor_rounds_to_bfloat16_itself(folder, monkeypatch):
    for each in LEVELS:
        compile_c(folder / f"_{each}{SUFFIX}", ours())
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert library.load()[1].startswith(f"_avx512bf16{SUFFIX}")
    library.load.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert library.load()[1].startswith(f"_avx2{SUFFIX}")  # torch was told to do without
    library.load.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(library, "FOLDER", folder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert library.load()[1].startswith(f"_avx512{SUFFIX}")  # a torch that cannot tell


def test_the_switch(folder, monkeypatch):
    compile_c(folder / f"_avx512{SUFFIX}", ours())
    monkeypatch.setenv(library.SWITCH, "off")
    loaded, words = library.load()
    assert loaded is None
    assert "NORMLAB_KERNELS=off" in words
    for value in ("auto", ""):
        library.load.cache_clear()
        monkeypatch.setenv(library.SWITCH, value)
        assert library.load()[0] is not None
    library.load.cache_clear()
    monkeypatch.setenv(library.SWITCH, "of")
    with pytest.raises(ValueError, match=r"auto or off; received 'of'; unset it"):
        library.load()


def test_threads_that_come_first_at_once(folder):
    compile_c(folder / f"_avx512{SUFFIX}", ours())
    call = ctypes.byref(library.Call())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: library.load()[0], range(64)))
    assert all(one.normlab_forward(call, 0) == 0 for one in found)
    assert len({one._handle for one in found}) == 1


def run(code, **settings):
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


def test_nothing_is_loaded_before_a_layer_runs():
    code = (
        "import torch, normlab as nl; layer = nl.BatchNorm(3); nl.catalogue();"
        "from normlab.kernels.cpu.library import load; print(load.cache_info().currsize, end=' ');"
        "layer(torch.randn(4, 3)); print(load.cache_info().currsize)"
    )
    assert run(code) == "0 1"


@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
@pytest.mark.parametrize(("allowed", "level"), [("default", "baseline"), ("avx2", "avx2")])
def test_what_torch_is_told_holds_for_the_kernels(allowed, level):
    if level not in BUILT:
        pytest.skip("not built for this processor")
    code = (
        "import torch; from normlab.kernels.cpu.library import load;"
        "print(torch.backends.cpu.get_cpu_capability(), load()[1])"
    )
    best, words = run(code, ATEN_CPU_CAPABILITY=allowed).split(" ", 1)
    if best.lower() == allowed:  # else this processor lacks it
        assert words.startswith(f"_{level}{SUFFIX}")


@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
@pytest.mark.parametrize("allowed", ["default", "avx2", "avx512"])
def test_no_nan_is_rounded_to_a_number_in_bfloat16(allowed):
    """Whatever its payload: that of GPUs has all bits set, where adding one carries to the sign."""
    code = (
        "import torch, normlab as nl\n"
        "for layer in (nl.BatchNorm(40), nl.norm('evonorm_s0', 40, groups=8)):\n"
        "    layer.weight.data.view(torch.int32)[:] = torch.tensor([0x7fffffff, -1]).repeat(20)\n"
        "    for x in torch.randn(2, 40, 7), torch.randn(2, 7, 40).mT:\n"
        "        print(layer(x.bfloat16()).isnan().all().item(), end=' ')"
    )
    assert run(code, ATEN_CPU_CAPABILITY=allowed) == "True True True True"


@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
def test_subnormal_numbers_survive_the_library():
    code = (
        "import torch; from normlab.kernels.cpu.library import load; assert load()[0];"
        "print((torch.full((64,), 1e-40) * 0.5).sum().item() > 0, 5e-324 > 0)"
    )
    assert run(code) == "True True"


@pytest.mark.skipif(not BUILT, reason="no compiled kernels here")
def test_every_library_that_was_built_loads():
    """Loading runs nothing but `normlab_abi`, which every x86-64 processor can."""
    for level in BUILT:
        assert isinstance(library._open(library.FOLDER / f"_{level}{SUFFIX}"), ctypes.CDLL)
