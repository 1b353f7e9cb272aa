"""Training in stages, with a teacher: how binary networks are trained.

    stage 1   activations binary, weights real        weight decay 1e-5
    stage 2   both binary, from stage 1's weights     weight decay 0

each with a new Adam optimizer, a learning rate that falls linearly to 0, and the outputs of a
teacher in the place of labels (ReActNet, 2003.03488; BNN − BN = ?, 2104.08215). A stage is a
`Phase`; a teacher is trained by the same code, in one phase with hard labels.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normlab import data as sets
from normlab.bench.phases import SCHEDULES, Phase, distillation_loss, learning_rate, two_stages
from normlab.bench.records import write_state
from normlab.bench.train import Stopped
from normlab.networks.binary import binarize_weights
from normlab.networks.plan import ImageShape, NormFactory, Plan
from normlab.networks.weights import initialize, weight_layers

__all__ = [
    "CLASSIFIER",
    "SCHEDULES",
    "Outcome",
    "Phase",
    "Samples",
    "accuracy",
    "distillation_loss",
    "learning_rate",
    "logits_of",
    "make_optimizer",
    "start",
    "train_phases",
    "trained",
    "two_stages",
]

CLASSIFIER = "head"
_BATCH = 500
_CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True, eq=False)
class Samples:
    """What is trained on.

    Attributes:
        images: Prepared, (N, C, H, W).
        labels: (N,).
        soft: Logits of a teacher for them, (N, K); None where labels are hard.
    """

    images: Tensor
    labels: Tensor
    soft: Tensor | None = None


@dataclass
class Outcome:
    """How a training ended.

    Attributes:
        outcome: ``"finished"`` or ``"diverged"``.
        reason: Why it diverged.
        losses: Mean training loss of each phase that ended.
        steps: Optimizer steps taken.
        seconds: Time they took.
    """

    outcome: str = "finished"
    reason: str = ""
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def start(
    plan: Plan, norm: NormFactory, *, classes: int, image_shape: ImageShape, seed: int
) -> nn.Module:
    """Build a network whose weights depend on the seed alone, not on the normalizer.

    Args:
        plan: The architecture.
        norm: The normalizer's factory.
        classes: K.
        image_shape: C, H, W.
        seed: Of the weights.

    Returns:
        The network, on the CPU, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = plan.assemble(norm, classes=classes, image_shape=image_shape)
    generator = torch.Generator("cpu").manual_seed(seed)
    getattr(plan, "initialize", initialize)(network, generator)
    return network


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Outputs in evaluation mode, (N, K); the mode is put back afterwards."""
    training = network.training
    network.eval()
    found = torch.cat([network(part) for part in torch.split(images, _BATCH)])
    network.train(training)
    return found


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float | None:
    """Share of images classified as labelled; None where outputs are not finite."""
    logits = logits_of(network, images)
    if not logits.isfinite().all():
        return None
    return float((logits.argmax(1) == labels).double().mean())


class _Diverged(Exception):
    pass


class _Training:
    """Phases in progress; `train_phases` is the way to use it."""

    def __init__(
        self,
        network: nn.Module,
        phases: Sequence[Phase],
        samples: Samples,
        seed: int,
        checkpoint: Path | None,
    ) -> None:
        self.network, self.phases, self.samples = network, tuple(phases), samples
        self.seed, self.path = seed, checkpoint
        self.done, self.total, self.saved_at = Outcome(), 0.0, time.monotonic()
        self.settings = _settings(network, self.phases, samples, seed)
        torch.manual_seed(seed)
        self.network.train()
        self.enter(0)

    def enter(self, index: int) -> None:
        """Begin a phase: weights stay as they are, the optimizer is new."""
        self.index, self.step, self.total = index, 0, 0.0
        phase = self.phases[index]
        binarize_weights(self.network, phase.binary_weights)
        self.optimizer = make_optimizer(self.network, phase)
        self.epoch0 = sum(math.ceil(p.epochs) for p in self.phases[:index])
        self.order = self.shuffle(0)
        self.per_epoch = len(self.order)
        self.steps = round(phase.epochs * self.per_epoch)

    def shuffle(self, epoch: int) -> Tensor:
        """The batches of an epoch of the present phase."""
        size = self.phases[self.index].batch_size
        epoch += self.epoch0
        return sets.batches(self.samples.labels, size, seed=self.seed, epoch=epoch)

    def take_step(self) -> None:
        """One optimizer step."""
        begun, phase = time.perf_counter(), self.phases[self.index]
        epoch, i = divmod(self.step, self.per_epoch)
        if i == 0:
            self.order = self.shuffle(epoch)
        chosen, samples = self.order[i], self.samples
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(phase, self.step, self.steps, self.per_epoch)
        self.optimizer.zero_grad()
        soft = None if samples.soft is None else samples.soft[chosen]
        logits = self.network(samples.images[chosen])
        loss = distillation_loss(logits, soft, samples.labels[chosen], hard=phase.hard)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _Diverged(f"the loss became {value} at step {self.step} of {phase.name!r}")
        self.optimizer.step()
        self.total += value
        self.step += 1
        self.done.steps += 1
        self.done.seconds += time.perf_counter() - begun

    def leave(self) -> None:
        """End a phase.

        Raises:
            _Diverged: A parameter is not finite.
        """
        for name, p in self.network.named_parameters():
            if not p.isfinite().all():
                raise _Diverged(f"{name} is not finite after {self.phases[self.index].name!r}")
        self.done.losses.append(self.total / max(self.step, 1))

    def save(self) -> None:
        """Write the state that a later process goes on from, whole or not at all."""
        self.saved_at = time.monotonic()
        if self.path is None:
            return
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "index": self.index,
            "step": self.step,
            "total": self.total,
            "done": asdict(self.done),
            "random": torch.get_rng_state(),
        }
        _write(state, self.path)

    def restore(self) -> None:
        """Go on from a checkpoint of the same training, if there is a sound one."""
        state = _read(self.path, self.settings)
        if state is None:
            return
        self.enter(state["index"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.total = state["step"], state["total"]
        self.done = Outcome(**state["done"])
        torch.set_rng_state(state["random"])
        if self.step < self.steps:
            self.order = self.shuffle(self.step // self.per_epoch)


def train_phases(
    network: nn.Module,
    phases: Sequence[Phase],
    samples: Samples,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[float], None] = lambda epochs: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a network in stages; equal arguments give equal weights, interrupted or not.

    Images are taken as they are, without augmentation: the teacher's logits are those of just
    these images.

    Args:
        network: Changed in place.
        phases: The stages, in order; each begins with the weights that the last one left.
        samples: What to train on.
        seed: Of the order of samples and of random numbers in the network.
        checkpoint: Where to keep the state of an unfinished training.
        progress: Called with the part of an epoch that each step is.
        stop: Asked before each step whether to stop.

    Returns:
        How it ended. After a loss or weight that is not finite, ``"diverged"``.

    Raises:
        Stopped: If asked to stop; the same call with a network in its first state goes on there.
        ValueError: If there is no phase.
    """
    if not phases:
        raise ValueError("train_phases needs at least one phase; received none")
    run = _Training(network, phases, samples, seed, checkpoint)
    run.restore()
    progress(run.done.steps / run.per_epoch)
    try:
        while True:
            while run.step < run.steps:
                if stop():
                    run.save()
                    raise Stopped
                run.take_step()
                progress(1 / run.per_epoch)
                if time.monotonic() - run.saved_at > _CHECKPOINT_SECONDS:
                    run.save()
            run.leave()
            if run.index + 1 == len(run.phases):
                break
            run.enter(run.index + 1)
    except _Diverged as diverged:
        run.done.outcome, run.done.reason = "diverged", str(diverged)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return run.done


def trained(
    build: Callable[[], nn.Module],
    phases: Sequence[Phase],
    samples: Samples,
    *,
    seed: int,
    cache: Path,
    **watchers: Any,
) -> nn.Module:
    """A trained network, such as a teacher: from the cache, or else trained and put there.

    Args:
        build: Returns it untrained, with the same weights at each call.
        phases: How to train it.
        samples: What on.
        seed: Of the training.
        cache: File of its weights; an unfinished training leaves its state beside it.
        **watchers: ``progress`` and ``stop`` of `train_phases`.

    Returns:
        The network, in evaluation mode.

    Raises:
        RuntimeError: If the training diverged.
        Stopped: If asked to stop.
    """
    network = build()
    settings = _settings(network, tuple(phases), samples, seed)
    state = _read(cache, settings)
    if state is None:
        unfinished = cache.with_name(f"{cache.name}.ckpt")
        outcome = train_phases(
            network, phases, samples, seed=seed, checkpoint=unfinished, **watchers
        )
        if outcome.outcome != "finished":
            raise RuntimeError(f"the network to cache diverged: {outcome.reason}; lower its lr")
        _write({"settings": settings, "network": network.state_dict()}, cache)
    else:
        network.load_state_dict(state["network"])
        binarize_weights(network, phases[-1].binary_weights)
    return network.eval()


def make_optimizer(network: nn.Module, phase: Phase) -> torch.optim.Adam:
    """Adam; only weights of convolutions and linear layers decay. Clips where the phase says so."""
    decayed = [layer.weight for _, layer in weight_layers(network)]
    known = {id(weight) for weight in decayed}
    rest = [p for p in network.parameters() if id(p) not in known]
    groups = [
        {"params": decayed, "weight_decay": phase.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam(groups, lr=phase.lr)
    if phase.clip:
        import normlab

        clipper = normlab.gradient("adaptive_clip", network, clip=phase.clip, skip=CLASSIFIER)
        clipper.attach(optimizer)
    return optimizer


def _settings(network: nn.Module, phases: Iterable[Phase], samples: Samples, seed: int) -> str:
    """Digest of what decides a training: a checkpoint of another one is not gone on from."""
    digest = hashlib.sha256(repr((list(phases), seed, network)).encode())
    for tensor in [*network.state_dict().values(), samples.images, samples.labels, samples.soft]:
        if tensor is not None:
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


def _write(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, state)


def _read(path: Path | None, settings: str) -> dict[str, Any] | None:
    """A file's state; None where it is absent, damaged or of another training."""
    if path is None:
        return None
    try:
        state = torch.load(path, weights_only=True)
        sound = isinstance(state, dict) and state.get("settings") == settings
    except Exception:
        return None
    return state if sound else None
