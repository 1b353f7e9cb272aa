"""Every layer saved, compiled and exported: torch.compile, torch.export, TorchScript, ONNX."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import normlab as nl
from activations.cases import EVERY, build, sample

CATALOGUE = nl.catalogue("activation")
SHAPE = (8, 6, 5, 3)


def trained(name, options):
    """A float32 layer with stored statistics of its own, in evaluation mode."""
    layer = build(name, options).float()
    for seed in range(2):
        layer(sample(SHAPE, seed=seed).float())
    return layer.eval()


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_state_dicts_go_through_a_file_without_pickled_code(name, options):
    layer, file = trained(name, options), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nl.norm(name, 6, **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = sample(SHAPE, seed=7).float()
    assert torch.equal(fresh.eval()(x), layer(x))


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_compiled_gradients_and_statistics_are_the_eager_ones(name, options):
    """One whole graph. The tracer and autograd's partitioner run; the code generator has a test
    of its own, over fewer layers."""
    torch._dynamo.reset()
    eager = build(name, options)
    traced = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
        for step in range(2):
            x, z = (sample(SHAPE, seed=step).requires_grad_() for _ in range(2))
            weights = sample(SHAPE, seed=20)
            torch.manual_seed(step)
            y = eager(x)
            torch.manual_seed(step)
            t = compiled(z)
            # Float64 rounding: traced formulas may sum in another order.
            torch.testing.assert_close(t, y, rtol=1e-9, atol=1e-10)
            (y * weights).sum().backward()
            (t * weights).sum().backward()
            torch.testing.assert_close(z.grad, x.grad, rtol=1e-8, atol=1e-9)
            for (key, p), q in zip(eager.named_parameters(), traced.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-9, msg=key)
            for (key, b), c in zip(eager.named_buffers(), traced.buffers(), strict=True):
                torch.testing.assert_close(c, b, rtol=1e-9, atol=1e-10, msg=key)


class Net(nn.Module):
    """The layer between two convolutions, as it is deployed."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(2, 6, 1), layer, nn.Conv2d(6, 2, 1)

    def forward(self, x):
        """Apply them."""
        return self.last(self.layer(self.first(x)))


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_exported_evaluation_is_evaluation(name, options):
    net = Net(trained(name, options)).eval()
    samples = {0: torch.export.Dim("samples", min=2, max=64)}
    exported = torch.export.export(net, (torch.randn(4, 2, 5, 3),), dynamic_shapes=(samples,))
    x = torch.randn(7, 2, 5, 3)
    # Float32 rounding of the same operations.
    torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_torchscript_traces_evaluation(name, options):
    net = Net(trained(name, options)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lengths become constants, and that it is old
        # Unchecked: the check compares texts of graphs, where functions stand with an address.
        traced = torch.jit.trace(net, (torch.randn(4, 2, 5, 3),), check_trace=False)
    x = torch.randn(4, 2, 5, 3)
    # Float32 rounding of the same operations, where eager passes have kernels.
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_onnx_computes_the_same(name, options, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, path = Net(trained(name, options)).eval(), tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter itself
        torch.onnx.export(
            net, (torch.randn(4, 2, 5, 3),), path, dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("samples", min=2, max=64)},),
        )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(7, 2, 5, 3)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Float32, another library's sums and exponentials.
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-5)
