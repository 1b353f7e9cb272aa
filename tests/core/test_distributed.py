"""Statistics shared between processes: two of them, with uneven shares, against one batch."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import normlab as nl
from activations.cases import sample

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)
# Float64 sums of the same terms in another order.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (8, 6, 5)
SHARES = {"3 and 5": (3, 8), "1 and 7": (1, 8)}
LAYERS = {
    "batch": lambda reduce: nl.BatchNorm(6, reduce=reduce),
    "fused": lambda reduce: nl.BatchNorm(6, activation="tlu", momentum=0.3, reduce=reduce),
    "renormalized": lambda reduce: nl.BatchRenorm(6, rmax=1.2, dmax=0.1, reduce=reduce),
    "l3": lambda reduce: nl.Normalize(
        6, "n c * -> c (n *)", operation=nl.Standardize(p=3.0), statistics=nl.Running(0.1, reduce)
    ),
    "plain formulas": lambda reduce: nl.BatchNorm(6, activation="silu", reduce=reduce),
    "current": lambda reduce: nl.BatchNorm(6, track_running_stats=False, reduce=reduce),
}


def one_pass(layer, x, dy, mask=None):
    """What a training pass gives: output, gradients, and the gradient of a gradient's size."""
    layer = layer.double()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(torch.linspace(-0.5, 0.4 + 0.1 * i, 6, dtype=torch.float64))
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    y.backward(dy)
    grads = {k: p.grad for k, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad}, grads, dict(layer.named_buffers())


def inputs():
    x, dy = sample(SHAPE), torch.cos(torch.arange(240.0, dtype=torch.float64)).view(SHAPE)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 5, 1, 5, 3])[:, None]
    return x, dy, mask


def shared_pass(name, share, masked):
    rank = dist.get_rank()
    x, dy, mask = inputs()
    part = slice(0, share[0]) if rank == 0 else slice(share[0], share[1])
    layer = LAYERS[name](nl.AllReduce())
    with nl.kernels.backend("reference" if name == "plain formulas" else "auto"):
        return one_pass(layer, x[part], dy[part], mask[part] if masked else None)


def work(rank, folder, jobs):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=15),
    )  # fmt: skip
    found = {job: shared_pass(*job) for job in jobs}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


JOBS = [(name, share, masked) for name in LAYERS for share in SHARES.values()
        for masked in (False, True)]  # fmt: skip


def together(folder, jobs):
    mp.spawn(work, (str(folder), jobs), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two"), JOBS)


def compare(name, masked, found):
    x, dy, mask = inputs()
    whole, grads, buffers = one_pass(LAYERS[name](None), x, dy, mask if masked else None)
    for key, value in whole.items():
        both = torch.cat([found[rank][0][key] for rank in range(2)])
        torch.testing.assert_close(both, value, **TIGHT)
    for key, value in grads.items():
        both = found[0][1][key] + found[1][1][key]
        torch.testing.assert_close(both, value, **TIGHT)
    for key, value in buffers.items():
        for rank in range(2):  # the same on every process
            torch.testing.assert_close(found[rank][2][key], value, **TIGHT)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_two_processes_equal_one_batch(results, name, share, masked):
    compare(name, masked, [results[rank][name, SHARES[share], masked] for rank in range(2)])


def test_a_process_without_samples_takes_part(tmp_path):
    """It must not leave the others waiting for its share of the sum."""
    job = ("batch", (0, 8), False)
    found = [part[job] for part in together(tmp_path, [job])]
    compare("batch", False, found)


def test_the_maximum_has_no_synchronized_form():
    layer = nl.Normalize(
        6, "n c * -> c (n *)", operation=nl.Scale(p=float("inf")),
        statistics=nl.Current(reduce=lambda t: t),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no synchronized form"):
        layer(torch.randn(4, 6))


def test_reduce_need_not_be_distributed():
    """Any differentiable sum will do: here a batch that is doubled in thought."""
    doubled = nl.BatchNorm(6, reduce=lambda t: 2 * t).double()
    x = sample(SHAPE)
    torch.testing.assert_close(doubled(x), nl.BatchNorm(6).double()(x), **TIGHT)
