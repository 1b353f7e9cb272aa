"""`normlab doctor` on machines that lack this or that."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from normlab.cli import main
from normlab.commands import doctor
from normlab.kernels.cpu import library

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Nothing set, and the choice of kernels open again before and after."""
    for name in (library.SWITCH, "THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "LD_PRELOAD",
                 "NORMLAB_DATA_DIR", "CXX"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture
def found(capsys):
    def look():
        assert main(["doctor", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return look


def test_text_says_what_json_says(found, capsys):
    facts = found()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(key.replace("_", " ") in text for key in facts if key != "advice")
    assert facts["torch"] == torch.__version__
    assert facts["torch"] in text
    for advice in facts["advice"].values():
        assert f"→ {advice.split()[0]}" in text


def test_versions_and_kernels_in_use(found):
    facts = found()
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["backend"] == "auto"
    assert facts["threads"]["torch"] == 1
    loaded, words = library.load()
    assert facts["compiled_kernels"]["in_use"] == (loaded is not None)
    assert words.startswith(facts["compiled_kernels"]["which"])


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["absent", "corrupt"])
def test_without_kernels_the_repair_is_advised(found, tmp_path, monkeypatch, content):
    folder = tmp_path / "site" / "normlab" / "kernels" / "cpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(library, "FOLDER", folder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    if content:
        (folder / "_baseline.so").write_bytes(content)
    facts = found()
    assert not facts["compiled_kernels"]["in_use"]
    expected = "_baseline.so does not load" if content else "none were built"
    assert expected in facts["compiled_kernels"]["which"]
    assert "pip install" in facts["advice"]["compiled_kernels"]


@pytest.mark.parametrize(("value", "words"), [("off", "switched off"), ("of", "none in use")])
def test_the_switch_is_named(found, monkeypatch, value, words):
    monkeypatch.setenv(library.SWITCH, value)
    facts = found()
    assert facts["compiled_kernels"]["in_use"] is False
    assert words in facts["compiled_kernels"]["which"]
    assert "unset it" in facts["advice"]["compiled_kernels"]


def test_missing_packages_of_an_extra(found, monkeypatch):
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "scipy" else present(n))
    facts = found()
    assert facts["extra_lab"]["scipy"] is None
    assert facts["extra_lab"]["tyro"]
    assert facts["advice"]["extra_lab"] == "missing: scipy; pip install 'normlab[lab]'"


def test_extras_are_those_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in doctor.EXTRAS.items():
        wanted = declared["optional-dependencies"][extra]
        assert [re.split("[<>=]", one)[0] for one in wanted] == list(packages)


def test_threads_beyond_the_cores(found, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS=" in found()["advice"]["threads"]


@pytest.mark.parametrize("pages", ["madvise", "always", "never", None])
@pytest.mark.parametrize("setting", [None, "0", "1"])
def test_huge_pages_are_advised_where_they_help(monkeypatch, pages, setting):
    def read(path):
        if pages is None:
            raise FileNotFoundError(path)
        return "always madvise never".replace(pages, f"[{pages}]")

    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", read)
    if setting:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", setting)
    advice = {}
    facts = doctor._allocator(advice)
    assert facts["huge_pages"] == pages
    assert facts["THP_MEM_ALLOC_ENABLE"] == setting
    assert bool(advice) == (pages == "madvise" and setting != "1")


def test_a_data_folder_that_is_not_there(found, monkeypatch, tmp_path):
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path))
    assert "data_folder" not in found()["advice"]
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path / "nowhere"))
    facts = found()
    assert facts["data_folder"] == {"NORMLAB_DATA_DIR": str(tmp_path / "nowhere")}
    assert "nowhere is no folder" in facts["advice"]["data_folder"]


def test_a_build_for_cuda_that_finds_no_device(found, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = found()
    assert facts["gpu_support"]["cuda"] == "13.0"
    assert "finds no device" in facts["advice"]["gpu_support"]


@pytest.mark.parametrize("cxx", [None, "/nowhere/c++", "{here}"])
def test_the_compiler_that_is_named_counts(monkeypatch, tmp_path, cxx):
    program = tmp_path / "cxx"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if cxx:
        monkeypatch.setenv("CXX", cxx.format(here=program) + " -m64")
    assert doctor._compiler() == (str(program) if cxx == "{here}" else None)
