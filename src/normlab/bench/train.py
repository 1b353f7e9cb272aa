"""One training run, from spec to record: resumable, seeded, and honest about failure."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normlab import data as sets
from normlab.bench import choice
from normlab.bench.environment import environment, peak_memory, reset_peak_memory
from normlab.bench.probe import initial_statistics
from normlab.bench.recipe import RunSpec
from normlab.bench.records import SCHEMA, Record, Store, StoreError, write_state

_EVALUATION_BATCH = 500
_CHECKPOINT_SECONDS = 20.0
_EXAMPLE = 16


class Stopped(Exception):
    """The run was interrupted; its checkpoint lets it go on."""


class _Diverged(Exception):
    pass


@dataclass
class _Totals:
    """Sums since the last measurement point."""

    loss: float = 0.0
    correct: float = 0.0
    samples: int = 0
    step_seconds: list[float] = field(default_factory=list)


class Task:
    """The data of a run, split and limited as its spec says; shared by runs with equal ones."""

    def __init__(self, data: sets.ImageData, spec: RunSpec) -> None:
        recipe, labels = spec.recipe, data.train_labels
        chosen = torch.arange(len(labels))
        # The split's seed is fixed: every arm and every seed is tuned and trained on equal data.
        if recipe.train_limit is not None and recipe.train_limit < len(labels):
            _, chosen = sets.split(labels, recipe.train_limit, 0)
        train, valid = chosen, chosen[:0]
        if recipe.validation:
            a, b = sets.split(labels[chosen], recipe.validation, 0)
            train, valid = chosen[a], chosen[b]
        self.data = data
        self.train_images, self.train_labels = data.train_images[train], labels[train]
        self.valid_images, self.valid_labels = data.train_images[valid], labels[valid]

    def order(self, spec: RunSpec, epoch: int) -> Tensor:
        """Indices of an epoch's batches, (steps, batch_size)."""
        return sets.batches(
            self.train_labels,
            spec.condition.batch_size,
            seed=spec.seed,
            epoch=epoch,
            grain=spec.grain,
        )


def steps_of(spec: RunSpec, task: Task) -> tuple[int, int]:
    """Return the steps of the run and of one epoch."""
    per_epoch = len(task.order(spec, 0))
    return max(1, round(spec.epochs * per_epoch)), per_epoch


def build_network(spec: RunSpec, data: sets.ImageData, passes: int) -> nn.Module:
    """Build the run's network; equal seeds start from equal weights whatever the normalizer."""
    from normlab import networks

    def build(normalizer: str) -> nn.Module:
        return _built(spec.network, normalizer, data, spec.seed, passes)

    network = build(spec.normalizer)
    if networks.parse(spec.network) is None and spec.reference != spec.normalizer:
        networks.align(network, build(spec.reference), weights_only=True)
    choice.parse(spec.normalizer).prepare(network, example(data))
    torch.manual_seed(spec.seed)
    return network


def initial_network(network: str, normalizer: str, data: sets.ImageData, seed: int) -> nn.Module:
    """Build a network that is part of no comparison, at its initial weights."""
    built = _built(network, normalizer, data, seed)
    choice.parse(normalizer).prepare(built, example(data))
    return built


def _built(
    network: str, normalizer: str, data: sets.ImageData, seed: int, passes: int | None = None
) -> nn.Module:
    from normlab import networks

    torch.manual_seed(seed)
    factory = choice.parse(normalizer).factory(passes)
    return networks.build(network, factory, classes=data.num_classes, image_shape=data.image_shape)


def draw_batches(
    data: sets.ImageData, count: int, size: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images with labels, drawn without replacement; fewer if data end."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_labels), generator=draw)[: count * size]
    return [
        (data.prepare(data.train_images[part]), data.train_labels[part])
        for part in torch.split(order, size)
    ]


def example(data: sets.ImageData) -> Tensor:
    """Some images, for methods that look at what a network does with its input."""
    return data.prepare(data.train_images[:_EXAMPLE])


def learning_rate(spec: RunSpec, step: int, steps: int) -> float:
    """Linear warm-up from 0, then cosine decay to 0.

    A method whose paper asks for a warm-up gets one, however short the recipe's.
    """
    warm = round(max(spec.recipe.warmup, choice.parse(spec.normalizer).warmup) * steps)
    if step < warm:
        return spec.lr * (step + 1) / warm
    return spec.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def make_optimizer(network: nn.Module, spec: RunSpec) -> torch.optim.SGD:
    """Stochastic gradient descent; scales, shifts and biases have no weight decay."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    # Gains of parametrized weights have axes of length 1, to broadcast.
    matrices = {id(p) for p in parameters if sum(size > 1 for size in p.shape) > 1}
    decayed = [p for p in parameters if id(p) in matrices]
    rest = [p for p in parameters if id(p) not in matrices]
    groups = [
        {"params": decayed, "weight_decay": spec.recipe.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    momentum = spec.recipe.momentum
    return torch.optim.SGD([g for g in groups if g["params"]], lr=spec.lr, momentum=momentum)


@torch.no_grad()
def evaluate(
    network: nn.Module, data: sets.ImageData, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Return mean loss and accuracy in evaluation mode."""
    if not len(labels):
        return math.nan, math.nan
    network.eval()
    device = next((p.device for p in network.parameters()), images.device)
    loss = correct = 0.0
    for i in range(0, len(labels), _EVALUATION_BATCH):
        part = slice(i, i + _EVALUATION_BATCH)
        x, y = images[part].to(device), labels[part].to(device)
        logits = network(data.prepare(x))
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        correct += float((logits.argmax(1) == y).sum())
    network.train()
    return loss / len(labels), correct / len(labels)


class Run:
    """A run in progress; `train` is the way to use it."""

    def __init__(
        self, spec: RunSpec, task: Task, store: Store, device: torch.device | str = "cpu"
    ) -> None:
        self.spec, self.task, self.store = spec, task, store
        self.device = torch.device(device)
        self.steps, self.per_epoch = steps_of(spec, task)
        self.parts = spec.condition.batch_size // spec.condition.norm_batch
        # Initial weights are drawn on the processor: they are those of any other device.
        self.network = build_network(spec, task.data, self.steps * self.parts).to(self.device)
        self.optimizer = make_optimizer(self.network, spec)
        self.choice = choice.parse(spec.normalizer)
        self.choice.attach(self.network, self.optimizer, example(task.data).to(self.device))
        self.step, self.seconds, self.totals = 0, 0.0, _Totals()
        self.order = task.order(spec, 0)
        self.saved_at = time.monotonic()
        reset_peak_memory(self.device)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels, and the parts that share statistics, of the present step."""
        spec, (epoch, i) = self.spec, divmod(self.step, self.per_epoch)
        if i == 0:
            self.order = self.task.order(spec, epoch)
        chosen = self.order[i]
        labels = self.task.train_labels[chosen]
        images = self.task.data.prepare(self.task.train_images[chosen].to(self.device))
        recipe = spec.recipe
        if recipe.crop or recipe.flip:
            generator = sets.generator((spec.seed, self.step), "augment")
            images = sets.augment(images, crop=recipe.crop, flip=recipe.flip, generator=generator)
        parts = torch.arange(len(labels))[None]
        if self.parts > 1:
            parts = sets.share(
                labels,
                spec.condition.norm_batch,
                spec.condition.composition,
                seed=(spec.seed, self.step),
            )
        return images, labels.to(self.device), parts.to(self.device)

    def take_step(self) -> None:
        """One optimizer step over all parts of a batch.

        Raises:
            _Diverged: If the loss is not finite.
        """
        started = time.perf_counter()
        images, labels, parts = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, self.step, self.steps)
        self.optimizer.zero_grad()
        total = 0.0
        for part in parts:
            logits = self.network(images[part])
            loss = F.cross_entropy(logits, labels[part], reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            self.totals.correct += float((logits.detach().argmax(1) == labels[part]).sum())
        if not math.isfinite(total):
            raise _Diverged(f"the loss became {total} at step {self.step}")
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its time is part of the step's
        self.totals.loss += total * len(labels)
        self.totals.samples += len(labels)
        seconds = time.perf_counter() - started
        self.totals.step_seconds.append(seconds)
        self.seconds += seconds
        self.step += 1

    def point(self) -> None:
        """Measure, and append to the record."""
        loss, accuracy = evaluate(
            self.network, self.task.data, self.task.valid_images, self.task.valid_labels
        )
        totals = self.totals
        self.store.append(
            self.spec.id,
            {
                "event": "point",
                "step": self.step,
                "epoch": self.step / self.per_epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": totals.loss / max(totals.samples, 1),
                "train_accuracy": totals.correct / max(totals.samples, 1),
                "valid_loss": loss,
                "valid_accuracy": accuracy,
                "seconds": self.seconds,
                "seconds_per_step": statistics.median(totals.step_seconds or [math.nan]),
            },
        )
        self.totals = _Totals()

    def save(self) -> None:
        """Write the state that a later process goes on from."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "totals": vars(self.totals),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_of_device"] = torch.cuda.get_rng_state(self.device)
        write_state(self.store.checkpoint(self.spec.id), state)
        self.saved_at = time.monotonic()

    def restore(self) -> bool:
        """Go on from a checkpoint, if there is a sound one.

        Returns:
            Whether there was; the record then holds just what came before it.
        """
        path, run_id = self.store.checkpoint(self.spec.id), self.spec.id
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.totals = _Totals(**state["totals"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_of_device"], self.device)
        except FileNotFoundError:
            return False
        except Exception:
            self.__init__(self.spec, self.task, self.store, self.device)  # type: ignore[misc]
            return False
        self.order = self.task.order(self.spec, self.step // self.per_epoch)
        lines = list(self.store.lines(run_id))
        kept = [x for x in lines if x.get("event") != "point" or x.get("step", 0) <= self.step]
        kept = [x for x in kept if x.get("event") != "end"]
        if not kept or kept[0].get("event") != "start" or self.step > self.steps:
            self.__init__(self.spec, self.task, self.store, self.device)  # type: ignore[misc]
            return False
        self.store.rewrite(run_id, kept)
        return True

    def begin(self) -> None:
        """Write the first line of the record."""
        images, labels, parts = self.batch()
        # Measured on a copy, whose hooks of gradient methods are attached to nothing.
        rows, kept = initial_statistics(self.network, images[parts[0]], labels[parts[0]])
        added = self.choice.adapted(self.steps * self.parts)
        if self.choice.warmup > self.spec.recipe.warmup:
            added["warmup"] = f"{self.choice.warmup:g}"
        parameters = sum(p.numel() for p in self.network.parameters())
        line = start_line(self.spec, self.device)
        line |= {"initial": rows, "saved_for_backward_bytes": kept, "adapted_options": added}
        line |= {"parameters": parameters, "steps": self.steps}
        self.store.rewrite(self.spec.id, [line])

    def end(self, outcome: str, **more: Any) -> None:
        """Write the last line of the record, and drop the checkpoint."""
        line = {"event": "end", "outcome": outcome, "step": self.step, "seconds": self.seconds}
        line["peak_memory_bytes"] = peak_memory(self.device)
        self.store.append(self.spec.id, line | more)
        self.store.checkpoint(self.spec.id).unlink(missing_ok=True)


def start_line(spec: RunSpec, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The part of a record's first line that needs no network."""
    return {
        "event": "start",
        "schema": SCHEMA,
        "spec": spec.as_dict(),
        "environment": environment() | _elsewhere(torch.device(device)),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _elsewhere(device: torch.device) -> dict[str, str]:
    """What a record's environment says of another device than the processor."""
    return {} if device.type == "cpu" else {"device": str(device)}


def train(
    spec: RunSpec,
    task: Task,
    store: Store,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] = lambda epochs: None,
    stop: Callable[[], bool] = lambda: False,
) -> Record:
    """Train, measure and record one run; a run that ended before is returned as it is.

    Args:
        spec: The run.
        task: Its data.
        store: Where its record goes.
        device: Where it trains.
        progress: Called with the part of an epoch that each step is.
        stop: Asked before each step whether to stop.

    Returns:
        The record. A network that cannot be built or run gives the outcome ``"failed"`` with its
        reason, a loss that is not finite ``"diverged"``.

    Raises:
        Stopped: If asked to stop; the same call goes on from there.
        StoreError: If the record cannot be written.
    """
    done = store.read(spec.id)
    if done is not None and done.outcome in ("finished", "diverged"):
        return done  # one that failed is tried again: what was wrong may have been mended
    try:
        run = Run(spec, task, store, device)
        if not run.restore():
            run.begin()
        _loop(run, progress, stop)
    except (Stopped, StoreError, MemoryError):
        raise
    except Exception as error:
        if store.read(spec.id) is None:
            store.rewrite(spec.id, [start_line(spec, device)])
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        store.append(spec.id, {"event": "end", "outcome": "failed", "reason": reason})
    record = store.read(spec.id)
    assert record is not None
    return record


def _loop(run: Run, progress: Callable[[float], None], stop: Callable[[], bool]) -> None:
    """Step to the end."""
    spec = run.spec
    progress(run.step / run.per_epoch)
    marks = {round(run.steps * (i + 1) / spec.recipe.points) for i in range(spec.recipe.points)}
    try:
        while run.step < run.steps:
            if stop():
                run.save()
                raise Stopped
            run.take_step()
            progress(1 / run.per_epoch)
            if run.step in marks:
                run.point()
                if time.monotonic() - run.saved_at > _CHECKPOINT_SECONDS:
                    run.save()
    except _Diverged as diverged:
        # A network that outputs NaN decides nothing: it is counted as guessing.
        chance = 1 / run.task.data.num_classes
        run.end("diverged", reason=str(diverged), test_accuracy=chance, valid_accuracy=chance)
        return
    data = run.task.data
    loss, accuracy = evaluate(run.network, data, run.task.valid_images, run.task.valid_labels)
    final = {"valid_loss": loss, "valid_accuracy": accuracy}
    if spec.phase == "final":
        loss, accuracy = evaluate(run.network, data, data.test_images, data.test_labels)
        final |= {"test_loss": loss, "test_accuracy": accuracy}
    run.end("finished", **final)
