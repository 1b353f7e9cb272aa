"""Importing the package is free and changes nothing; names are found when asked for."""

import subprocess
import sys

import pytest

import normlab as nl


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_torch():
    heavy = "('torch', 'numpy', 'scipy', 'jinja2', 'altair', 'rich')"
    code = f"import sys, normlab; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_layers_load_torch_alone():
    heavy = "('scipy', 'jinja2', 'altair', 'rich', 'tyro', 'matplotlib', 'pandas')"
    code = (
        "import sys, normlab as nl; nl.BatchNorm(3); nl.catalogue();"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert run(code) == "[]"


def test_import_changes_no_setting():
    look = (
        "state = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().sum().item(), "
        "torch.random.initial_seed(), len(warnings.filters), locale.setlocale(locale.LC_ALL), "
        "os.environ.copy());"
    )
    code = (
        "import os, locale, torch, warnings, torch.distributed; torch.manual_seed(3);"
        + look + "before = state; import normlab as nl; nl.catalogue(); nl.BatchNorm(3);"
        + look + "print([(a, b) for a, b in zip(state, before) if a != b])"
    )  # fmt: skip
    assert run(code) == "[]"


def test_dir_lists_what_can_be_looked_up():
    names = dir(nl)
    assert names == sorted(names)
    assert {"BatchNorm", "norm", "catalogue", "Normalize", "statistics", "kernels"} <= set(names)
    assert {card.layer.__name__ for card in nl.catalogue("activation").values()} <= set(names)
    assert not [n for n in names if n.startswith("_") and n != "__version__"]
    for name in ("BatchNorm", "Running", "Affine", "AllReduce", "partition", "kernels"):
        assert getattr(nl, name) is getattr(nl, name)


@pytest.mark.parametrize("name", ["Nonsense", "batchnorm", "_private", "BatchNorn", "torch"])
def test_unknown_names(name):
    with pytest.raises(AttributeError, match=name):
        getattr(nl, name)
    assert not hasattr(nl, name)


def test_version():
    assert nl.__version__.count(".") == 2
