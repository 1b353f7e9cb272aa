"""The dropout of the independent-component layer: rate, scale, and one mask for both passes."""

import pytest
import torch

import normlab as nl
from activations.cases import build, sample


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_rate_and_scale(rate):
    layer, plain = nl.norm("ic", 4, dropout=rate), nl.norm("ic", 4, dropout=0.0)
    x = torch.randn(64, 4, 20, 20)
    y, whole = layer(x), plain(x)
    kept = y != 0
    # A binomial share of 102,400 elements: five standard deviations.
    spread = 5 * (rate * (1 - rate) / y.numel()) ** 0.5
    assert abs((~kept).float().mean().item() - rate) < spread
    # One product in float32.
    torch.testing.assert_close(y[kept], whole[kept] / (1 - rate), rtol=1e-6, atol=0)


def test_elements_are_dropped_on_their_own():
    """Not channels, nor samples, nor a period of eight: neighbours agree as chance has it."""
    kept = (nl.norm("ic", 8, dropout=0.5)(torch.randn(32, 8, 16, 16)) != 0).float()
    for dim in range(4):
        for step in (1, 7):
            pairs = (kept == kept.roll(step, dim)).float().mean().item()
            assert abs(pairs - 0.5) < 5 * 0.5 / kept.numel() ** 0.5
    flat = kept.reshape(-1)
    assert abs((flat == flat.roll(8)).float().mean().item() - 0.5) < 5 * 0.5 / flat.numel() ** 0.5


def test_two_passes_drop_differently_and_a_seed_repeats():
    layer, x = nl.norm("ic", 4, dropout=0.5), torch.randn(8, 4, 5)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(8, 6, 5, 3), (8, 6), (7, 6, 1, 5), (2, 6, 64, 64)])
def test_gradients_use_the_mask_of_the_forward_pass(shape):
    layer, plain = build("ic", {"dropout": 0.4}), build("ic", {"dropout": 0.0})
    x, z = sample(shape).requires_grad_(), sample(shape).requires_grad_()
    y = layer(x)
    gate = (y != 0).double() / 0.6
    dy = sample(shape, seed=4)
    y.backward(dy)
    plain(z).backward(dy * gate)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-11, atol=1e-12)  # the same float64 sums
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-11, atol=1e-12)


def test_second_derivatives_and_forward_mode_see_one_mask():
    layer, x = build("ic", {"dropout": 0.4}), sample((4, 6, 3)).requires_grad_()
    layer.update = False

    def repeated(x):
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(repeated, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(repeated, (x,))


def test_evaluation_drops_nothing_and_draws_nothing():
    layer, plain = nl.norm("ic", 4, dropout=0.5).eval(), nl.norm("ic", 4, dropout=0.0).eval()
    x, before = torch.randn(8, 4, 5), torch.get_rng_state()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_do_not_see_the_dropout():
    layer, plain = nl.norm("ic", 4, dropout=0.5), nl.norm("ic", 4, dropout=0.0)
    x = torch.randn(8, 4, 5)
    layer(x), plain(x)
    assert torch.equal(layer.running_var, plain.running_var)


def test_padding_stays_zero():
    layer, mask = nl.norm("ic", 4, dropout=0.3), torch.rand(8, 5) > 0.5
    y = layer(torch.randn(8, 4, 5), mask)
    assert (y.movedim(1, -1)[~mask] == 0).all()


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_the_rate_in_low_precision(dtype, rate):
    """Uniform numbers in the dtype itself are multiples of twice this rate."""
    y = nl.norm("ic", 4, dropout=rate)(torch.randn(64, 4, 40, 40).to(dtype))
    share = (y == 0).float().mean().item()
    assert abs(share - rate) < 5 * (rate / y.numel()) ** 0.5  # five standard deviations
