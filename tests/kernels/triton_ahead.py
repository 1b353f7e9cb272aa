"""Compile the Triton kernels for sm_90 without a device; `test_triton.py` runs it.

Real compile errors, which the interpreter does not know, show here, and registers that do not
suffice. Arguments are those of the launches: a stand-in takes the place of each kernel.
"""

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import normlab as nl
from normlab.kernels.reference import Spec
from normlab.kernels.triton import areas, call, lines

warnings.simplefilter("ignore")
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SPILL = 256  # bytes a thread: a few registers, in tiles of odd lengths


@dataclass
class Recorder:
    """In the place of a kernel: what it is launched with is compiled, not run."""

    kernel: object
    seen: dict = field(default_factory=dict)

    def __getitem__(self, grid):
        assert len(grid) == 1
        assert 0 < grid[0] < 1 << 31
        return self.launch

    def launch(self, *args, num_warps, **meta):
        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False)) | meta
        assert set(given) == set(names), set(names) ^ set(given)
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = given[name]
            if value is None or name.isupper():
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if value >= 1 << 31 else "i32"
        key = (
            tuple(signature.items()),
            tuple((k, str(v)) for k, v in constants.items()),
            num_warps,
        )
        if key not in self.seen:
            source = ASTSource(self.kernel, signature, constants, attributes)
            self.seen[key] = triton.compile(source, TARGET, {"num_warps": num_warps})
            self.check(self.seen[key], key)

    def check(self, compiled, key):
        assert compiled.metadata.shared <= 48 << 10, key
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            assembler = get_ptxas(90).path
            line = [assembler, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", file.name]
            said = subprocess.run(line, capture_output=True, text=True, check=True).stderr
        found = re.search(r"(\d+) bytes spill stores", said)
        assert found, said
        assert int(found[1]) <= SPILL, (self.kernel.__name__, key, said)


def record():
    """Take the place of all kernels."""
    recorders = []
    for module in (areas, lines):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and kernel.__module__ == module.__name__:
                if name.startswith("_"):
                    continue
                recorders.append(Recorder(kernel))
                setattr(module, name, recorders[-1])
    return recorders


CASES = [
    ("batch", {}, (64, 64, 32, 32), torch.float32),
    ("batch", {"activation": "relu"}, (128, 512, 7, 7), torch.bfloat16),
    ("instance", {}, (4, 64, 112, 112), torch.float32),
    ("instance", {"activation": "silu"}, (4, 64, 14, 14), torch.bfloat16),
    ("filter_response", {"learned_eps": True}, (4, 64, 32, 32), torch.float16),
    ("group", {}, (8, 64, 14, 14), torch.float32),
    ("layer", {}, (8, 64, 56, 56), torch.bfloat16),
    ("layer", {"over": "position"}, (8, 1024, 768), torch.bfloat16),
    ("rms", {"over": "position"}, (4, 128, 4096), torch.float32),
    ("position", {}, (4, 64, 14, 14), torch.float32),
    ("ghost_batch", {"batch_size": 16}, (64, 64, 14, 14), torch.float32),
]


def main():
    recorders = record()
    for name, options, shape, dtype in CASES:
        channel_dim = -1 if len(shape) == 3 else 1
        layer = nl.norm(name, shape[channel_dim], channel_dim=channel_dim, **options).to(dtype)
        orders = ["rows", "columns"] if len(shape) == 4 else ["rows"]
        for order in orders:
            x = torch.empty(shape, dtype=dtype)
            if order == "columns":
                x = x.contiguous(memory_format=torch.channels_last)
            trace(layer, x)
    count = sum(len(r.seen) for r in recorders)
    assert all(r.seen for r in recorders), [r.kernel.__name__ for r in recorders if not r.seen]
    print(f"compiled {count} forms of {len(recorders)} kernels for sm_90")


def trace(layer, x):
    """The launches of both passes with the batch's statistics and, where there are any, stored."""
    for stored in (False, True) if layer.stored_names else (False,):
        sizes = layer._sizes(x.shape[0], ghosts=not stored)
        layout = layer.partition.bind(x.shape, channel_dim=layer.channel_dim, sizes=sizes)
        spec = Spec(layout.member_dims, layer.operation, layer.activation)
        given, eps = layer._from_stored(layout, layer.eps) if stored else (None, layer.eps)
        y, _ = call.normalize(
            x.requires_grad_(), layout, spec, layer.weight, layer.bias, layer.threshold, eps,
            given, from_batch=not stored,
        )  # fmt: skip
        torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))


if __name__ == "__main__":
    main()
