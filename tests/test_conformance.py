"""The laws, each shown to hold where it should and to break where it should."""

import dataclasses
import doctest
import math
import random
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.activations import batch
from normlab.conformance import ConformanceError, law_names, report, suite
from normlab.core.card import invariances
from normlab.core.partition import Layout, Partition
from normlab.kernels.reference import deviation

CARDS = nl.catalogue("activation")
PER_CHANNEL = invariances("channel")
functorch = torch._C._functorch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- Layers that break one law each -------------------------------------------------------------


class ShuffledLayout(Layout):
    def undo(self, z):
        return super().undo(z.flip(-1))


class ShuffledPartition(Partition):
    def bind(self, shape, **options):
        layout = super().bind(shape, **options)
        return ShuffledLayout(*(getattr(layout, f.name) for f in dataclasses.fields(layout)))


class Shuffled(nl.BatchNorm):
    def __init__(self, channels):
        super().__init__(channels)
        fields = {f.name: getattr(self.partition, f.name)
                  for f in dataclasses.fields(Partition) if f.init}  # fmt: skip
        self.partition = ShuffledPartition(**fields)


class Enlarged(nl.BatchNorm):
    def forward(self, x, mask=None):
        return 1.01 * super().forward(x, mask)


class Upcast(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y.float() if y.dtype == torch.bfloat16 else y


class LowPrecision(nl.BatchNorm):
    _apply = nn.Module._apply


class WrongInVolumes(nl.BatchNorm):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.001 if x.ndim == 5 else 1)


class NeedsContiguous(nl.BatchNorm):
    def forward(self, x, mask=None):
        scale = 1.001 if not kinds(x) and not x.is_contiguous() else 1
        return super().forward(x, mask) * scale


class WrongGradient(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y + 0.01 * (y - y.detach())


class Wrapper(nn.Module):
    """Not one of normlab's layers, so that its memory is its own affair."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nl.BatchNorm(channels)


class WrongSecondDerivative(Wrapper):
    def forward(self, x):
        return self.inner(x) + (x - x.detach()) ** 2  # 0, of gradient 0, of second derivative 2


class NoisyEvaluation(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y if self.training else y + 1e-3 * torch.rand((), dtype=x.dtype)


class CountsEvaluation(nl.BatchNorm):
    def forward(self, x, mask=None):
        if not self.training and not kinds(x):
            self.num_batches_tracked.add_(1)
        return super().forward(x, mask)


class LeaksBatchMates(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y if self.training else y + 1e-3 * x.mean(0, keepdim=True)


class WritesWeight(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        if self.training and not torch.is_grad_enabled():
            self.weight.mul_(1.5)
        return y


class Forgetful(nl.BatchNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_buffer("running_mean", self.running_mean, persistent=False)


class FreshCopies(nl.BatchNorm):
    def __deepcopy__(self, memo):
        return type(self)(self.num_channels).to(self.weight.dtype)


class Unpicklable(nl.BatchNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.lock = lambda: None


def kinds(x):
    """Which transforms of torch.func hold x, innermost first: g for grad and jvp, v for vmap."""
    found = ""
    while functorch.is_functorch_wrapped_tensor(x):
        found += "v" if functorch.is_batchedtensor(x) else "g"
        x = functorch.get_unwrapped(x)
    return found


class WrongUnder(nl.BatchNorm):
    def __init__(self, channels, transforms):
        super().__init__(channels)
        self.transforms = transforms

    def forward(self, x, mask=None):
        return super().forward(x, mask) * (1.001 if kinds(x) == self.transforms else 1)


class CountsProbes(nl.BatchNorm):
    def forward(self, x, mask=None):
        if kinds(x) == "g":
            self.num_batches_tracked = self.num_batches_tracked + 1
        return super().forward(x, mask)


class Hoarder(nl.BatchNorm):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 0 * torch.tanh(x)


class RawMoments(Wrapper):
    """σ² = E[x²] − E[x]², clipped, as some libraries have it."""

    def forward(self, x):
        y = self.inner(x)
        if not self.training or x.numel() == 0:
            return y
        dims = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(dims, keepdim=True)
        variance = ((x * x).mean(dims, keepdim=True) - mean**2).clamp(min=0)
        weight, bias = (p.view(-1, *[1] * (x.ndim - 2)) for p in self.inner.parameters())
        return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).to(x.dtype)


class RefusesEmpty(nl.BatchNorm):
    def forward(self, x, mask=None):
        if len(x) == 0:
            raise RuntimeError("expected 1 sample or more")
        return super().forward(x, mask)


class NaNForOne(nl.BatchNorm):
    def forward(self, x, mask=None):
        return x * math.nan if self.training and len(x) == 1 else super().forward(x, mask)


class Unguarded(nl.BatchNorm):
    def _write(self, values, present):
        for name, value in values.items():
            stored = getattr(self, name)
            stored.lerp_(value.to(stored.dtype), 0.1)


class LeaksMask(nl.BatchNorm):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y if mask is None or mask.all() else y + 1e-3 * x.mean()


BROKEN = {
    "partition_reversible": (Shuffled, {}),
    "moments": (Enlarged, {"moments": True, "invariances": PER_CHANNEL}),
    "invariances": (nl.RMSNorm, {"invariances": invariances("sample")}),
    "dtypes": (Upcast, {}),
    "statistics_precision": (LowPrecision, {}),
    "ranks": (WrongInVolumes, {}),
    "layouts": (NeedsContiguous, {}),
    "gradcheck": (WrongGradient, {}),
    "gradgradcheck": (WrongSecondDerivative, {}),
    "evaluation_repeatable": (NoisyEvaluation, {}),
    "evaluation_state": (CountsEvaluation, {}),
    "evaluation_batch_mates": (LeaksBatchMates, {}),
    "no_grad": (WritesWeight, {}),
    "state_dict": (Forgetful, {}),
    "deepcopy": (FreshCopies, {}),
    "pickle": (Unpicklable, {}),
    "twin": (partial(nl.BatchNorm, eps=1e-4), {"twin": batch.twin}),
    "reference": (nl.BatchNorm, {"reference": partial(batch.reference, eps=1e-4)}),
    "jacobian": (partial(WrongUnder, transforms="g"), {}),
    "hessian_vector_product": (partial(WrongUnder, transforms="gg"), {}),
    "per_sample_gradient": (partial(WrongUnder, transforms="gv"), {}),
    "stacked_models": (partial(WrongUnder, transforms="v"), {}),
    "captured_buffers": (CountsProbes, {}),
    "saved_memory": (Hoarder, {}),
    "large_mean": (RawMoments, {}),
    "empty_batch": (RefusesEmpty, {}),
    "single_element": (NaNForOne, {}),
    "not_finite": (Unguarded, {}),
    "mask": (LeaksMask, {}),
}


def test_every_law_has_a_layer_that_breaks_it():
    assert tuple(BROKEN) == law_names()


@pytest.mark.parametrize("law", BROKEN)
def test_a_layer_that_breaks_one_law_fails_that_law_alone(law):
    factory, declared = BROKEN[law]
    found = nl.check_normalizer(factory, **declared)
    assert [r.law for r in found.failures] == [law], str(found)
    result = found[law]
    if result.measured is None:
        assert result.detail.startswith("raised ")
    else:
        assert result.measured > result.tolerance
        assert f"{result.measured:.2g}" in str(result)
        assert result.reason
    with pytest.raises(ConformanceError, match=f"breaks {law}"):
        found.raise_for_failures()


class DetachedVariance(RawMoments):
    def forward(self, x):
        y = self.inner(x)
        if not self.training or x.numel() == 0:
            return y
        dims = [d for d in range(x.ndim) if d != 1]
        centered = x - x.mean(dims, keepdim=True)
        return centered / (centered.detach().square().mean(dims, keepdim=True) + 1e-5).sqrt()


def test_a_detached_variance_has_wrong_gradients_of_both_orders():
    found = nl.check_normalizer(DetachedVariance, laws=["gradcheck", "gradgradcheck", "jacobian"])
    assert [r.law for r in found.failures] == ["gradcheck", "gradgradcheck"]
    assert "numerical" in found["gradcheck"].detail


class EpsOutside(nl.BatchNorm):
    """γ·(x − μ)/(σ + ε) + β, with ε outside the root."""

    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        if not self.training:
            return y
        dims = [d for d in range(x.ndim) if d != 1]
        variance = x.var(dims, correction=0, keepdim=True)
        ratio = deviation(variance, self.operation, self.eps) / (variance.sqrt() + self.eps)
        bias = self.bias.view(-1, *[1] * (x.ndim - 2))
        return (y - bias) * ratio + bias


def test_a_misplaced_eps_shows_beside_the_twin_and_the_reference_alone():
    laws = [law for law in law_names() if law != "saved_memory"]
    found = nl.check_normalizer(EpsOutside, card=CARDS["batch"], laws=laws)
    assert {r.law for r in found.failures} >= {"twin", "reference"}
    assert found["moments"].passed
    assert found["gradcheck"].passed
    assert 1e-9 < found["twin"].measured < 1e-3


# --- Layers that keep the laws ------------------------------------------------------------------


@pytest.mark.parametrize("name", CARDS)
def test_every_method_keeps_the_laws_with_the_options_of_its_card(name):
    card = CARDS[name]
    found = nl.check_normalizer(lambda c: card.make(c, **card.case))
    found.raise_for_failures()
    assert found["reference"].passed
    assert found["twin"].passed is (True if card.twin else None)
    assert found["invariances"].passed is (True if card.declared else None)
    assert found["moments"].passed is (True if card.moments else None)


@pytest.mark.parametrize("name", [name for name in CARDS if CARDS[name].case])
def test_every_method_keeps_the_laws_with_its_defaults(name):
    nl.check_normalizer(CARDS[name].make).raise_for_failures()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("batch", {"channel_dim": -1}),
        ("batch", {"affine": False}),
        ("batch", {"track_running_stats": False}),
        ("batch", {"momentum": None, "activation": "relu"}),
        ("layer", {"over": "position", "activation": "silu"}),
        ("rms", {"channel_dim": -1}),
        ("ghost_batch", {"batch_size": 3}),
        ("instance", {"track_running_stats": True, "activation": "tlu"}),
        ("lp_batch", {"p": "max"}),
        ("batch_renorm", {"rmax": 3.0, "dmax": 5.0, "channel_dim": -1}),
    ],
)
def test_other_options_keep_the_laws_too(name, options):
    found = nl.check_normalizer(partial(CARDS[name].make, **options))
    found.raise_for_failures()
    assert found["reference"].passed is None  # written for the card's options


@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize("name", ["group", "position"])
def test_any_number_of_channels_will_do(name, channels):
    nl.check_normalizer(CARDS[name].make, channels=channels).raise_for_failures()


def test_options_of_the_card_alone_get_its_twin():
    laws = ["twin", "reference"]
    same = nl.check_normalizer(lambda c: nl.GroupNorm(3, c), laws=laws)
    other = nl.check_normalizer(lambda c: nl.GroupNorm(2, c), laws=laws)
    assert [r.passed for r in same] == [True, True]
    assert [r.passed for r in other] == [None, None]


# --- Layers of others ---------------------------------------------------------------------------


def test_torch_batch_norm_breaks_what_it_is_known_to_break():
    found = nl.check_normalizer(
        nn.BatchNorm2d,
        ranks=(2,),
        invariances=PER_CHANNEL,
        moments="n c * -> c (n *)",
        reference=batch.reference,
        twin=lambda channels, rank: nl.BatchNorm(channels),
    )
    broken = {"statistics_precision", "captured_buffers", "not_finite"}
    assert {r.law for r in found.failures} == broken
    assert "mutate a captured Tensor" in found["captured_buffers"].detail
    assert found["mask"].passed is None
    assert all(found[law].passed for law in ("moments", "invariances", "reference", "twin"))


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (partial(nn.GroupNorm, 3), {"moments": "n (g c) * -> (n g) (c *)",
                                    "invariances": invariances("sample and group")}),
        (nn.LayerNorm, {"channel_dim": -1, "moments": "n c * -> (n *) (c)",
                        "invariances": invariances("position")}),
        (nn.RMSNorm, {"channel_dim": -1}),
        (nn.Identity, {}),
    ],
)  # fmt: skip
def test_torch_layers_without_statistics_keep_the_laws(factory, options):
    nl.check_normalizer(factory, **options).raise_for_failures()


def test_memory_of_other_layers_is_measured_only_when_asked():
    assert nl.check_normalizer(nn.Identity)["saved_memory"].passed is None
    found = nl.check_normalizer(RawMoments, laws=["saved_memory"])["saved_memory"]
    assert found.passed is False
    assert found.measured > 1.9  # the input twice: in the wrapped layer, and beside it


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (lambda c: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda c: 1, "TypeError: factory(6) returns a layer; received int"),
        (lambda c: nn.Flatten(), "shape"),
        (lambda c: nn.LSTM(c, c), "received tuple"),
        (lambda c: nn.Linear(c + 1, c), "RuntimeError"),
    ],
)
def test_errors_of_a_layer_are_broken_laws_and_no_crash(factory, text):
    found = nl.check_normalizer(factory, laws=["dtypes", "gradcheck"], ranks=(1,), channel_dim=-1)
    assert not found["dtypes"].passed
    assert text in found["dtypes"].detail


class Warns(nn.Identity):
    def forward(self, x):
        warnings.warn("take care", stacklevel=2)
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(5)
        random.random()
        return x * 1.0


def test_the_program_is_left_as_it_was():
    torch.manual_seed(123)
    random.seed(123)
    expected = torch.get_rng_state(), random.getstate()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        nl.check_normalizer(nl.BatchNorm, laws=["gradcheck", "dtypes"]).raise_for_failures()
        found = nl.check_normalizer(Warns, laws=["dtypes", "gradgradcheck", "evaluation_state"])
        assert [r.law for r in found.failures] == ["gradgradcheck"]  # one law's mess is its own
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        nl.check_normalizer(nl.BatchNorm, laws=["gradcheck", "dtypes"]).raise_for_failures()
    assert not caught
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() == torch.float32


def test_reports_are_the_same_whatever_the_seed():
    texts = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        texts.add(str(nl.check_normalizer(nl.norm("ic", 6).__class__)))
    assert len(texts) == 1


# --- The report, and wrong arguments ------------------------------------------------------------


def test_a_report_is_a_sequence_a_truth_and_a_table():
    found = nl.check_normalizer(partial(nl.BatchNorm, eps=1e-4), twin=batch.twin)
    assert len(found) == len(list(found)) == len(law_names())
    assert not found
    assert not found.passed
    assert f"{len(found) - 1 - str(found).count('  -    ')} laws hold, 1 broken" in str(found)
    with pytest.raises(KeyError, match="twins"):
        found["twins"]
    with pytest.raises(AttributeError):
        found.subject = "another"
    with pytest.raises(ConformanceError, match=r"twin .*> 1e-09.*\[tolerance: float64"):
        found.raise_for_failures()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"laws": ["gradchek"]}, "no law is called 'gradchek'. Did you mean gradcheck"),
        ({"channels": 0}, "channels is at least 1; received 0"),
        ({"ranks": ()}, "ranks are numbers of position axes"),
        ({"channel_dim": 2}, "channel_dim is 1 or -1; received 2"),
    ],
)
def test_wrong_arguments_raise(options, text):
    with pytest.raises(ValueError, match=text):
        nl.check_normalizer(nn.Identity, **options)


@pytest.mark.parametrize("module", [suite, report])
def test_examples_of_the_documentation_run(module):
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed
