"""Measuring leaves no trace: parameters, buffers, gradients, modes, attributes, random state."""

import random
import weakref
from collections import deque

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import normlab as nl
from normlab.core.stored import keeps_statistics
from normlab.diagnostics.held import held
from normlab.diagnostics.subject import Subject
from normlab.diagnostics.watch import watched


class Odd(nn.Module):
    """State of every kind that a module may change in a forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("low", torch.tensor([float("nan"), -0.0], dtype=torch.bfloat16))
        self.seen, self.recent, self.names = [], deque([1], maxlen=2), {"a": 1}
        self.cache = torch.zeros(2)
        self.flag = False
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.count += 1
        self.low.fill_(1.0)
        self.seen.append(len(self.seen))
        self.recent.append(2)
        self.names["b"] = 2
        self.cache.add_(1)
        self.flag = True
        self.late = "set"
        if "extra" not in self._buffers:
            self.register_buffer("extra", torch.ones(1))
        random.random()
        np.random.random()  # noqa: NPY002
        return x * self.w + torch.randn(3)


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), Odd(), nl.BatchNorm(3), nn.Dropout(0.5),
        nl.norm("batch_renorm", 3), nl.norm("cross_iteration_batch", 3), nn.Linear(3, 2),
    )  # fmt: skip


def traces(model):
    """All that a model holds, as bytes and words."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                value = value.numpy().tobytes()
            elif key in ("_parameters", "_buffers"):
                value = {
                    k: None
                    if t is None
                    else t.detach().view(torch.uint8).numpy().tobytes()
                    if t.ndim
                    else t.detach().clone()
                    for k, t in value.items()
                }
            else:
                value = repr(value)
            found[name, key] = value
    found["grads"] = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    found["identity"] = [id(p.grad) for p in model.parameters()]
    found["random"] = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002
    )
    return found


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert str(a[key]) == str(b[key]), key


@pytest.fixture
def model():
    model = network()
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    nn.functional.cross_entropy(model(x), y).backward()  # gradients that must stay
    model[1].eval()  # a mode of its own
    return model


@pytest.mark.parametrize("mode", ["train", "stored", "eval", "as_is"])
def test_nothing_changes(model, mode):
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    before = traces(model)
    with Subject(model, nn.functional.cross_entropy, [(x, y)] * 2, mode=mode) as subject:
        subject.gradient()
        subject.loss()
    same(traces(model), before)


def test_nothing_changes_where_the_loss_fails(model):
    def fails(output, target):
        raise RuntimeError("mine")

    batch = torch.randn(8, 3), None
    before = traces(model)
    with (
        pytest.raises(RuntimeError, match="mine"),
        Subject(model, fails, [batch]) as subject,
    ):
        subject.loss()
    same(traces(model), before)


def test_buffers_shared_with_a_graph_stay_usable():
    """Nothing is written where nothing changed, so a waiting backward pass still works."""
    layer = nn.BatchNorm1d(3).eval()
    loss = layer(torch.randn(4, 3)).sum()
    with held(layer, "eval"):
        layer(torch.randn(4, 3))
    loss.backward()


def test_evaluations_repeat(model):
    """The same statistics and random numbers each time: a function of the parameters."""
    batch = torch.randn(8, 3), torch.randint(0, 2, (8,))
    with Subject(model, nn.functional.cross_entropy, [batch]) as subject:
        assert subject.loss() == subject.loss()
        moved = {k: p + 0.1 for k, p in subject.parameters.items()}
        assert subject.loss(moved) != subject.loss()


def test_modes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
    x = torch.randn(64, 2) * 3 + 5

    def mean(mode):
        with held(model, mode):
            y = model(x)
        return bool((y == 0).any()), float(y.detach().abs().mean())

    dropped, size = mean("train")
    assert dropped
    assert size < 1.5
    dropped, size = mean("stored")
    assert dropped
    assert size > 3
    dropped, size = mean("eval")
    assert not dropped
    assert size > 3
    assert mean("as_is") == mean("eval")
    with pytest.raises(ValueError, match="'batch'"), held(model, "batch"):
        pass


def test_stored_statistics_of_our_layers():
    layer = nl.BatchNorm(2)
    x = torch.randn(16, 2) * 3
    with held(layer, "stored"):
        assert layer.training
        torch.testing.assert_close(layer(x), x / (1 + layer.eps) ** 0.5)
    assert (layer.use, layer.update) == ("auto", "auto")
    assert keeps_statistics(layer)
    assert not keeps_statistics(nl.norm("layer", 2))


def test_gradient_is_that_of_the_mean_loss(model):
    model.eval()
    batches = [(torch.randn(5, 3), torch.randint(0, 2, (5,))) for _ in range(2)]
    with Subject(model, nn.functional.cross_entropy, batches, mode="eval") as subject:
        found = subject.gradient()
        at = subject.leaves()
        exact = torch.autograd.grad(subject.loss(at), list(at.values()))
    for g, e in zip(found.values(), exact, strict=True):
        torch.testing.assert_close(g, e)


def test_batches_of_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            return self.w * a + b

    a, b, y = torch.ones(2), torch.zeros(2), torch.ones(2)
    mse = nn.functional.mse_loss
    for batch in (((a, b), y), ({"a": a, "b": b}, y)):
        with Subject(Two(), mse, [batch]) as subject:
            assert subject.loss() == 0
    with Subject(Two(), lambda out, batch: mse(out, batch["a"]), [{"a": a, "b": b}]) as subject:
        assert subject.loss() == 0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "received none"),
        ((torch.ones(2, 3), torch.ones(2)), "received a single one"),
        ({"x": torch.ones(2)}, "received a single one"),
    ],
)
def test_wrong_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        Subject(nn.Linear(3, 1), nn.functional.mse_loss, batches)


def test_wrong_uses():
    layer, x = nn.Linear(3, 1), torch.ones(2, 3)
    subject = Subject(layer, lambda out, y: out, [(x, None)])
    with pytest.raises(RuntimeError, match="with block"):
        subject.loss()
    with subject, pytest.raises(ValueError, match=r"one number.*\(2, 1\)"):
        subject.loss()
    with pytest.raises(ValueError, match="unfreeze"):
        Subject(layer.requires_grad_(False), None, [(x, x)])
    with (
        Subject(nn.Linear(3, 1), nn.functional.mse_loss, [x]) as wrong,
        pytest.raises(ValueError, match="a batch is a pair"),
    ):
        wrong.loss()


def test_loaders_draw_and_are_read_no_further():
    """Iterating over a loader draws from torch's generator, before any module runs."""
    data = torch.utils.data.TensorDataset(torch.randn(12, 2), torch.zeros(12, 1))
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
    model = nn.Linear(2, 1)
    before = torch.get_rng_state()
    with Subject(model, nn.functional.mse_loss, loader) as subject:
        assert len(subject.batches) == 3
    assert torch.equal(torch.get_rng_state(), before)
    stream = iter([(torch.ones(1, 2), torch.ones(1, 1))] * 5)
    Subject(model, nn.functional.mse_loss, stream, limit=2)
    assert len(list(stream)) == 3


def test_copies_on_several_devices():
    model = nn.DataParallel(nn.Linear(2, 1))
    with Subject(model, nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))]) as subject:
        assert set(subject.gradient()) == {"weight", "bias"}


def test_what_modules_keep_in_nested_containers():
    """Caches of attention, counts by name: lists in dictionaries, tensors in lists."""

    class Keeps(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.kept = {"a": [torch.zeros(3)], "b": ({"n": 0},)}
            self.kept["itself"] = self.kept

        def forward(self, x):
            self.kept["a"][0].add_(1)
            self.kept["a"].append(x)
            self.kept["b"][0]["n"] += 1
            return super().forward(x)

    model = Keeps()
    with Subject(model, nn.functional.mse_loss, [(torch.ones(4, 2), torch.ones(4, 1))]) as subject:
        subject.gradient()
        assert model.kept["b"][0]["n"] == 1
    assert len(model.kept["a"]) == 1
    assert torch.equal(model.kept["a"][0], torch.zeros(3))
    assert model.kept["b"] == ({"n": 0},)


def test_models_that_write_to_their_weights():
    """Clipped or binarized weights: the actual ones stay, and each evaluation is the same."""

    class Clipped(nn.Linear):
        def forward(self, x):
            self.weight.data.mul_(0.5)
            return super().forward(x)

    model = nn.Sequential(Clipped(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    batch = torch.randn(8, 3), torch.randint(0, 2, (8,))
    before = traces(model)
    with Subject(model, nn.functional.cross_entropy, [batch]) as subject:
        first = subject.loss()
        subject.gradient()
        assert subject.loss() == first
    with held(model):
        model(batch[0])
    same(traces(model), before)


def test_generators_that_modules_keep():
    class Draws(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.own = torch.Generator().manual_seed(3)
            self.plain, self.array = random.Random(3), np.random.default_rng(3)

        def forward(self, x):
            factor = self.plain.random() + self.array.random()
            return super().forward(x + factor * torch.rand(x.shape, generator=self.own))

    def state():
        return (model.own.get_state().tolist(), model.plain.getstate(),
                str(model.array.bit_generator.state))  # fmt: skip

    model = Draws()
    before = state()
    batch = torch.randn(8, 3), torch.zeros(8, 1)
    with Subject(model, nn.functional.mse_loss, [batch]) as subject:
        assert subject.loss() == subject.loss()
        assert state() != before
    assert state() == before


def test_generators_of_loaders():
    data = torch.utils.data.TensorDataset(torch.randn(12, 2), torch.zeros(12, 1))
    own = torch.Generator().manual_seed(1)
    other = torch.Generator().manual_seed(2)
    sampler = torch.utils.data.RandomSampler(data, generator=other)
    before = own.get_state(), other.get_state()
    for loader in (
        torch.utils.data.DataLoader(data, 4, shuffle=True, generator=own),
        torch.utils.data.DataLoader(data, 4, sampler=sampler),
        torch.utils.data.DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
        ),
    ):
        Subject(nn.Linear(2, 1), nn.functional.mse_loss, loader)
        assert torch.equal(own.get_state(), before[0])
        assert torch.equal(other.get_state(), before[1])


def test_an_error_on_entering_leaves_nothing_behind():
    class Fails(nn.Linear):
        def train(self, mode=True):
            torch.rand(1)
            raise RuntimeError("mine")

    batch = torch.ones(4, 2), torch.ones(4, 1)
    subject = Subject(Fails(2, 1), nn.functional.mse_loss, [batch])
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mine"):
        subject.__enter__()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="with block"):
        subject.loss()


def test_torchscript_is_refused():
    class Inner(nn.Module):  # compiling warns of torch's own deprecation: a stand-in will do
        pass

    script = torch.jit.ScriptModule.__new__(torch.jit.ScriptModule)
    nn.Module.__init__(script)
    model = Inner()
    model._modules["part"] = script
    with pytest.raises(TypeError, match="TorchScript"):
        Subject(model, None, [(torch.ones(1), None)])


def test_hooks_keep_no_tensor_and_see_no_recomputation():
    seen, alive = [], []

    class Frees(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            last = weakref.ref(y)
            y = self.b(y.detach())
            alive.append(last() is not None)
            return y

    model = Frees()
    with watched(model, lambda name, *_: seen.append(name)):
        model(torch.ones(1, 2))
    assert seen == ["a", "b"]  # the whole returns what its last part did
    assert alive == [False]
    seen.clear()
    block = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with watched(block, lambda name, *_: seen.append(name)):
        x = torch.ones(1, 2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert seen == ["0", "1"]
