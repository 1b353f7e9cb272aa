"""Which training steps are timed against which, and how. A new case is one line of `CASES`."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normlab as nl
from _record import header, load, replace, same, stem
from _timing import now, spread
from normlab.activations._areas import default_groups
from normlab.networks import NormFactory

Method = Callable[[nn.Module, torch.optim.Optimizer], object]
"""Puts a method into a network and its optimizer. Adds no parameters that are not in it yet."""

NETWORK, TINY = "resnet20", "resnet:depth=8,width=4"
BINARY = "bireal:width=16,stages=3,blocks=2"
FREE = BINARY + ",norm_free=true"


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        name: Its name in the table, and on the command line.
        against: Name of the case whose step it is divided by; its own where there is none.
        norm: Normalizer of the network: a name, or a factory as networks take them.
        target: What the step may cost, in multiples of the other; None where nothing is set.
        network: Spec of the network; None for the common one.
        before: Changes the network before the optimizer takes its parameters.
        after: Attaches something to the optimizer.
    """

    name: str
    against: str
    norm: str | NormFactory = "none"
    target: float | None = None
    network: str | None = None
    before: Callable[[nn.Module], object] | None = None
    after: Method | None = None


def _weight(name: str, **options: Any) -> Callable[[nn.Module], object]:
    # The classifier keeps its weights, as in the papers.
    return lambda model: nl.weight(name, model, skip=["head"], **options)


def _gradient(name: str, **options: Any) -> Method:
    return lambda model, optimizer: nl.gradient(name, model, **options).attach(optimizer)


def _rescaling(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    return nl.weight("rescaling", model, skip=["head"]).attach(optimizer)


def _bare(model: nn.Module) -> None:
    """Let the convolutions use their stored weights, neither standardized nor binarized."""
    for layer in model.modules():
        if hasattr(layer, "effective"):
            layer.effective = partial(getattr, layer, "weight")


NORMALIZERS = (
    "batch", "instance", "layer", "group", "rms", "filter_response", "evonorm_s0", "evonorm_b0",
    "batch_renorm", "ghost_batch", "variance", "switchable", "position", "l1_batch",
)  # fmt: skip
WEIGHTS = (
    "standardization", "scaled_standardization", "weight_norm", "centered", "spectral",
    "orthogonal", "newton_orthogonal",
)  # fmt: skip
BUDGETS = {"standardization": 1.05, "scaled_standardization": 1.05}
CASES = (
    Case("none", "none"),
    *(Case(name, "none", name, 1.12) for name in NORMALIZERS),
    # The activation in the same pass, where the others have a ReLU after them.
    *(
        Case(f"{name}+relu", "none", partial(nl.norm, name, activation="relu"), 1.12)
        for name in ("batch", "group")
    ),
    Case("native batch", "none", nn.BatchNorm2d),
    Case("native group", "none", lambda channels: nn.GroupNorm(default_groups(channels), channels)),
    *(Case(name, "group", "group", BUDGETS.get(name), before=_weight(name)) for name in WEIGHTS),
    Case("rescaling", "group", "group", after=_rescaling),
    Case("centralization", "group", "group", after=_gradient("centralization")),
    Case("adaptive_clip", "group", "group", 1.05, after=_gradient("adaptive_clip", skip="head")),
    # Layers need biases, which those followed by a normalizer lack.
    Case("preconditioning", "none", "none", 1.15, after=_gradient("preconditioning")),
    Case("binary: stored weights", "binary: stored weights", "none", network=FREE, before=_bare),
    Case("binary: signs", "binary: stored weights", "none", network=BINARY),
    Case("binary: standardized signs", "binary: stored weights", "none", network=FREE),
)


def chosen(only: Sequence[str] | None) -> list[Case]:
    """The cases of those names, with what they are held against in turn; all for None.

    Raises:
        KeyError: If there is no case of a name.
    """
    known = {case.name: case for case in CASES}
    for name in only or ():
        if name not in known:
            raise KeyError(f"no case is called {name!r}; there are: {', '.join(known)}")
    wanted = set(known if only is None else only)
    while more := {known[name].against for name in wanted} - wanted:
        wanted |= more
    return [case for case in CASES if case.name in wanted]


class Step:
    """A training step that can be repeated."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        spec = case.network or (TINY if options.tiny else NETWORK)
        norm = partial(nl.norm, case.norm) if isinstance(case.norm, str) else case.norm
        model = nl.networks.build(spec, norm, classes=10, image_shape=(3, 32, 32))
        dtype = getattr(torch, options.dtype)
        last = options.layout == "channels_last"
        order = torch.channels_last if last else torch.contiguous_format
        self.model = model.to(dtype=dtype, memory_format=order).train()
        if case.before is not None:
            case.before(self.model)
        # A small rate: what is timed are steps of finite numbers.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.kept = None if case.after is None else case.after(self.model, self.optimizer)
        images = torch.randn(options.batch, 3, 32, 32).to(dtype=dtype, memory_format=order)
        self.x, self.y = images, torch.randint(10, (options.batch,))

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x).float(), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass
class Timed:
    """A case with its times in milliseconds; `error` ends its measurement, not that of others."""

    case: Case
    step: Step | None = None
    error: str | None = None
    times: list[float] = field(default_factory=list)

    def attempt(self, work: Callable[[], object]) -> None:
        """Do it, unless something failed before."""
        if self.error is None:
            try:
                work()
            except Exception as error:  # whatever it is, the other cases go on
                self.error = f"{type(error).__name__}: {str(error)[:500]}"

    def once(self) -> None:
        """Time one step."""
        assert self.step is not None
        start = now()
        self.step()
        self.times.append((now() - start) * 1e3)


def measure(cases: Sequence[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the cases in interleaved rounds, each after two steps that do not count."""
    timed = [Timed(case) for case in cases]

    def start(one: Timed) -> None:
        one.step = Step(one.case, options)
        for _ in range(2):
            if not one.step().isfinite():
                raise FloatingPointError("the loss is not finite")

    for one in timed:
        one.attempt(partial(start, one))
    gc.collect()
    gc.disable()  # a collection in the middle of a measurement is noise
    try:
        for turn in range(options.rounds):
            shift = turn % len(timed)  # no case always comes after the same one
            for one in timed[shift:] + timed[:shift]:
                one.attempt(one.once)
            if sys.stderr.isatty():
                print(f"round {turn + 1} of {options.rounds}", end="\r", file=sys.stderr)
    finally:
        gc.enable()
    least = {one.case.name: min(one.times) for one in timed if one.times and one.error is None}
    return [row(one, least) for one in timed]


def row(one: Timed, least: dict[str, float]) -> dict[str, Any]:
    """Sum up a case; fields without a measurement are None."""
    case, good = one.case, one.case.name in least
    floor = least.get(case.against)
    return {
        "case": case.name, "against": case.against, "target": case.target,
        "step_ms": spread(one.times) if good else None,
        "ratio": least[case.name] / floor if good and floor else None,
        "error": one.error,
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """Return the record as text."""
    env = record["environment"]
    lines = [f"# Training steps, {record['date'][:10]}, {env['cpu']}", ""]
    lines += ["**A tiny network: these times say nothing.**", ""] if record["tiny"] else []
    kind = f"{record['network']}, batch {record['batch']}, {record['dtype']}, {record['layout']}"
    lines += [
        f"- command: `{record['command']}`", f"- network: {kind}",
        f"- threads: {record['threads']} of {env['cores']} cores",
        f"- versions: torch {env['torch']}, normlab {env['normlab']}, revision {env['revision']}",
        f"- load: {record['load_at_start']} to {record['load_at_end']}",
        f"- rounds: {record['rounds']}, {record['clock']}; least time of all",
        "", "| step with | ms | against | ratio | target |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in record["rows"]:
        if r["error"] is not None:
            lines.append(f"| {r['case']} | failed: `{r['error'].splitlines()[0]}` | | | |")
            continue
        ratio = f"{r['ratio']:.3f}" if r["case"] != r["against"] and r["ratio"] else ""
        ratio = f"**{ratio}**" if exceeds(r) else ratio
        target = "" if r["target"] is None else f"≤ {r['target']}"
        ms = f"{r['step_ms']['min']:.1f}"
        lines.append(f"| {r['case']} | {ms} | {r['against']} | {ratio} | {target} |")
    held = [r for r in record["rows"] if r["target"] is not None and r["ratio"] is not None]
    over = [r["case"] for r in held if exceeds(r)]
    lines += ["", f"Over the target, of {len(held)}: {', '.join(over) or 'none'}."] if held else []
    return "\n".join(lines) + "\n"


def exceeds(row: dict[str, Any]) -> bool:
    """Whether a step is over its target, as far as two decimals tell."""
    known = row["target"] is not None and row["ratio"] is not None
    return known and round(row["ratio"], 2) > row["target"]


def run(cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Measure, print and write the record; return the exit status."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    head = header("steps", options) | {
        "network": TINY if options.tiny else NETWORK,
        "binary_network": BINARY,
        "batch": options.batch,
        "dtype": options.dtype,
        "layout": options.layout,
    }
    done = same("steps", head, options.out) if options.resume else None
    if done is not None:
        print(f"{done[0]} holds this run; without --resume it is repeated", file=sys.stderr)
        return int(any(r["error"] is not None for r in done[1]["rows"]))
    rows = measure(cases, options)
    record = head | {"load_at_end": load(), "rows": rows}
    text = markdown(record)
    print(text)
    path = stem("steps", head, options.out)
    replace(path.with_name(path.name + ".json"), json.dumps(record, indent=1) + "\n")
    replace(path.with_name(path.name + ".md"), text)
    return int(any(r["error"] is not None for r in rows))
