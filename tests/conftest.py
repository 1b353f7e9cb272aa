"""What every test runs under: one thread, a fixed seed, few and repeatable random examples."""

import warnings

import pytest
import torch
from hypothesis import settings
from torch.autograd import forward_ad

settings.register_profile("normlab", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("normlab")

with warnings.catch_warnings(), forward_ad.dual_level():
    warnings.simplefilter("ignore")  # torch's first dual number warns of torch's own torch.jit
    forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads differ in their last digits from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
