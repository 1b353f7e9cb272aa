"""What tests of compiled kernels share: layers, inputs in many orders of memory, comparisons."""

import copy

import torch

import normlab as nl
from normlab.core.recovery import Affine
from normlab.kernels.cpu import function

FUSED = ("batch", "instance", "layer", "group", "rms", "ghost_batch")


def build(name, options, channels, activation=None, channel_dim=1, seed=0):
    more = {"activation": activation} if activation and name in FUSED else {}
    layer = nl.norm(name, channels, channel_dim=channel_dim, **options, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator))
        for key in getattr(layer, "stored_names", ()):
            b = getattr(layer, key)
            b.add_(0.4 * torch.rand(b.shape, generator=generator))
    return layer


def functions(y):
    """Classes of the functions in the graph of y."""
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(getattr(node, "_forward_cls", None))
        nodes += [n for n, _ in node.next_functions if n is not None]
    return found


def layout(layer, shape):
    """Of a whole batch, ragged ghost batches in one."""
    sizes = layer._sizes(shape[0], ghosts=False)
    return layer.partition.bind(shape, channel_dim=layer.channel_dim, sizes=sizes)


def run(layer, x, dy, backend):
    """y, the gradients, and the buffers after the pass."""
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    with nl.kernels.backend(backend):
        y = layer(x)
        if backend == "auto":  # that the kernels, and nothing else, are what is tested
            assert function._Normalize in functions(y)
        wanted = [x, *layer.parameters()]
        grads = torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    return [y.detach(), *[g for g in grads if g is not None], *buffers]


def close(ours, exact, tolerance):
    """Within `tolerance` of the largest value of each tensor.

    Args:
        ours: What is tested.
        exact: The same in float64.
        tolerance: Relative to the largest value: sums cancel, so that single elements may not be
            relatively exact; one number each for y, x's gradient, ..., the last for the rest.
    """
    assert len(ours) == len(exact)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        scale = float(b.abs().max()) if b.numel() else 0.0
        bound = tolerance[min(i, len(tolerance) - 1)]
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=bound * (scale + 1e-30), msg=lambda m, i=i: f"{i}: {m}"
        )


def arrange(x, order):
    """The same values in another order of memory."""
    if order == "columns":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "sliced":
        big = x.new_zeros((x.shape[0] * 2, *x.shape[1:-1], x.shape[-1] + 3))
        view = big[::2, ..., 1:-2]
        return view.copy_(x)
    if order == "reversed":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    return x.contiguous()


def values(shape, seed, channel_dim):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    per_sample = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g, dtype=torch.float64)
    x = (x + 0.7 * per_sample) * (0.5 + per_sample)
    return x, torch.randn(shape, generator=g, dtype=torch.float64)


def away_from_kinks(layer, x, dy):
    """dy without what meets the kink of ReLU or TLU, where the derivative may be either.

    Args:
        layer: In float64; a copy of it without its activation tells how far each u is.
        x: Input, as the layer under test has it.
        dy: Gradient of the output.
    """
    if layer.activation not in ("relu", "tlu"):
        return dy
    plain = copy.deepcopy(layer)
    plain.recovery = Affine(plain.recovery.scale, plain.recovery.shift)
    with nl.kernels.backend("reference"), torch.no_grad():
        u = plain(x.double())
    kink = torch.zeros(layer.num_channels, dtype=torch.float64)
    kink = layer.threshold.detach().double() if layer.activation == "tlu" else kink
    where = [1] * u.ndim
    where[layer.channel_dim] = -1
    return dy.masked_fill((u - kink.view(where)).abs() < 1e-4, 0)


def same_with_threads(results, threads):
    """Assert that tensors repeat bit for bit, and are the same with that many threads."""
    alone, again = results(), results()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = results()
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(alone, again, together, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def derivatives_of_any_order(layer, x):
    """Assert first and second derivatives, and forward mode, in float64."""
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    forward_mode(layer, x)


def forward_mode(layer, x):
    """Assert that the derivative along a direction is that of the plain formula."""
    t = torch.randn_like(x)
    _, fast = torch.func.jvp(layer, (x.detach(),), (t,))
    with nl.kernels.backend("reference"):
        _, plain = torch.func.jvp(layer, (x.detach(),), (t,))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)  # the same formula, twice
