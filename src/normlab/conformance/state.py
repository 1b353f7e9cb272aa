"""Laws about what a layer keeps: evaluation, state dicts, copies, stored statistics."""

from __future__ import annotations

import copy
import math
import pickle

import torch
from torch import nn

from normlab.conformance.measure import changes, gap, state
from normlab.conformance.report import Finding, NotApplicable, Worst, violations
from normlab.conformance.subject import Subject

_EXACT = "the same computation on the same numbers"


def evaluation_repeatable(s: Subject) -> Finding:
    """Evaluation gives the same twice, whatever the state of the random generators."""
    layer, x = s.warm(s.layer()).eval(), s.x()
    difference = gap(s.run(layer, x, seed=1), s.run(layer, x, seed=2))
    return Finding(difference, 0.0, _EXACT, "between two calls with different seeds")


def evaluation_state(s: Subject) -> Finding:
    """Evaluation changes no parameter and no buffer."""
    layer = s.warm(s.layer()).eval()
    before = state(layer)
    for seed in (1, 2):
        s.run(layer, 5 * s.x(seed=seed))
    found = changes(before, state(layer))
    return violations(found, f"{len(before)} tensors unchanged by two passes")


def evaluation_batch_mates(s: Subject) -> Finding:
    """In evaluation a sample's result does not depend on the samples beside it."""
    if s.batch_dependent:
        raise NotApplicable("evaluation uses the batch, as declared")
    layer, x = s.warm(s.layer()).eval(), s.x()
    y = s.run(layer, x)[:1]
    others = torch.cat([x[:1], 5 * s.x(seed=2)[1:]])
    worst = Worst()
    worst.see("alone", gap(s.run(layer, x[:1]), y))
    worst.see("beside others", gap(s.run(layer, others)[:1], y))
    return worst.finding(1e-12, "float64, the same sums in another order")


def no_grad(s: Subject) -> Finding:
    """Training under torch.no_grad gives the same values and changes buffers alone."""
    layer, x = s.layer(), s.x()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        y = s.run(layer, x)
    after = {name: p.detach() for name, p in layer.named_parameters()}
    worst = Worst()
    found = changes(before, after)
    worst.see(f"changed: {', '.join(found)}" if found else "parameters", math.inf if found else 0.0)
    worst.see("y with and without a graph", gap(y, s.run(s.layer(), x)))
    return worst.finding(1e-12, "float64, the same sums in another order")


def state_dict(s: Subject) -> Finding:
    """A fresh layer that loads the state dict, strictly, evaluates to the same."""
    layer = s.warm(s.layer())
    fresh = s.layer(plain=True, seed=5)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    return _same_evaluation(s, layer, fresh, f"{len(layer.state_dict())} entries")


def deep_copy(s: Subject) -> Finding:
    """copy.deepcopy gives a layer that computes the same."""
    layer = s.warm(s.layer())
    return _same_evaluation(s, layer, copy.deepcopy(layer), "copy.deepcopy")


def pickled(s: Subject) -> Finding:
    """Pickle gives a layer that computes the same."""
    layer = s.warm(s.layer())
    data = pickle.dumps(layer)
    again = pickle.loads(data)
    return _same_evaluation(s, layer, again, f"{len(data)} bytes")


def _same_evaluation(s: Subject, layer: nn.Module, other: nn.Module, label: str) -> Finding:
    """Compare two layers, in evaluation first, which training would change."""
    worst = Worst()
    x = s.x(seed=4)
    for mode in ("evaluation", "training"):
        for module in (layer, other):
            module.train(mode == "training")
        difference = gap(s.run(other, x), s.run(layer, x))
        worst.see(f"y in {mode}, {label}", difference)
    return worst.finding(0.0, _EXACT)


def not_finite(s: Subject) -> Finding:
    """NaN and infinity in an input do not enter the stored statistics."""
    layer = s.warm(s.layer())
    stored = [name for name, b in layer.named_buffers() if b.is_floating_point()]
    if not stored:
        raise NotApplicable("no floating-point statistics are stored")
    found = []
    for value in (math.nan, math.inf):
        x = s.x()
        x.view(-1)[0] = value
        s.run(layer, x)
        for name, buffer in layer.named_buffers():
            bad = int((~buffer.isfinite()).sum())
            if bad:
                found.append(f"{bad} of {buffer.numel()} in {name} after {value} in the input")
    s.run(layer, s.x())
    return violations(found, f"{', '.join(stored)} stay finite")
