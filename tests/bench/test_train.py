import dataclasses

import pytest
import torch
from torch import nn

from normlab.bench.probe import initial_statistics, saved_bytes
from normlab.bench.recipe import Condition
from normlab.bench.records import Store
from normlab.bench.train import (
    Run,
    Stopped,
    Task,
    build_network,
    learning_rate,
    make_optimizer,
    start_line,
    train,
)

from .conftest import RECIPE


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def numbers(record):
    """What must repeat exactly; times and memory do not."""
    keys = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "lr")
    points = [tuple(point[k] for k in keys) for point in record.points]
    return points, record.final("test_accuracy"), record.final("test_loss")


def test_a_run_learns_and_is_recorded(spec, task, store):
    seen = []
    record = train(spec, task, store, progress=seen.append)
    assert record.outcome == "finished"
    assert [p["step"] for p in record.points] == [4, 9]
    assert record.points[-1]["epoch"] == pytest.approx(1.0)
    assert sum(seen) == pytest.approx(1.0)
    assert record.final("test_accuracy") > 0.2  # guessing gives 0.1
    assert record.environment["torch"] == torch.__version__
    assert record.start["steps"] == 9  # 180 training images in batches of 20
    assert len(record.start["initial"]) == 3  # two convolutions and the classifier
    assert all(row["output_std"] > 0 for row in record.start["initial"])
    assert record.start["saved_for_backward_bytes"] > 20 * 28 * 28 * 4
    assert not store.checkpoint(spec.id).exists()


def test_equal_seeds_repeat_and_others_differ(spec, task, tmp_path):
    one = train(spec, task, Store(tmp_path / "a"))
    two = train(spec, task, Store(tmp_path / "b"))
    other = train(dataclasses.replace(spec, seed=1), task, Store(tmp_path / "c"))
    assert numbers(one) == numbers(two)
    assert numbers(one) != numbers(other)


@pytest.mark.parametrize("normalizer", ["batch", "ic"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(spec, task, tmp_path, normalizer):
    spec = dataclasses.replace(spec, normalizer=normalizer)
    whole = train(spec, task, Store(tmp_path / "whole"))
    store, asked = Store(tmp_path / "parts"), iter([False] * 6 + [True])
    with pytest.raises(Stopped):
        train(spec, task, store, stop=lambda: next(asked))
    assert store.checkpoint(spec.id).exists()
    assert store.read(spec.id).outcome is None
    seen = []
    again = train(spec, task, store, progress=seen.append)
    assert numbers(again) == numbers(whole)
    assert seen[0] == pytest.approx(6 / 9)  # what was done before is not done again
    assert len(seen) == 4


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_starts_the_run_afresh(spec, task, tmp_path, damage):
    whole = train(spec, task, Store(tmp_path / "whole"))
    store, asked = Store(tmp_path / "parts"), iter([False] * 6 + [True])
    with pytest.raises(Stopped):
        train(spec, task, store, stop=lambda: next(asked))
    path = store.checkpoint(spec.id)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert numbers(train(spec, task, store)) == numbers(whole)


def test_points_after_the_checkpoint_are_not_kept_twice(spec, task, tmp_path):
    store = Store(tmp_path)
    asked = iter([False] * 3 + [True])
    with pytest.raises(Stopped):
        train(spec, task, store, stop=lambda: next(asked))
    store.append(spec.id, {"event": "point", "step": 4, "train_loss": 99.0})  # then killed
    record = train(spec, task, store)
    assert [p["step"] for p in record.points] == [4, 9]
    assert record.points[0]["train_loss"] < 99


def test_a_checkpoint_without_its_record_starts_the_run_afresh(spec, task, tmp_path):
    whole = train(spec, task, Store(tmp_path / "whole"))
    store, asked = Store(tmp_path / "parts"), iter([False] * 6 + [True])
    with pytest.raises(Stopped):
        train(spec, task, store, stop=lambda: next(asked))
    store.path(spec.id).unlink()
    again = train(spec, task, store)
    assert numbers(again) == numbers(whole)
    assert again.start["initial"] == whole.start["initial"]


def test_a_failed_run_is_tried_again(task, spec, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    network = "from torch import nn\ndef net(norm):\n    return nn.Sequential(nn.Flatten(), {})\n"
    (tmp_path / "mended.py").write_text(network.format("nn.Linear(3, 10)"))
    spec, store = dataclasses.replace(spec, network="mended:net"), Store(tmp_path / "out")
    assert train(spec, task, store).outcome == "failed"
    import mended

    mended.net = lambda norm: nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    again = train(spec, task, store)
    assert again.outcome == "finished"
    assert again.start["steps"] == 9


def test_a_finished_run_is_not_repeated(spec, task, store):
    first = train(spec, task, store)
    before = store.path(spec.id).read_text()

    def forbidden(share):
        raise AssertionError("trained again")

    assert train(spec, task, store, progress=forbidden).end == first.end
    assert store.path(spec.id).read_text() == before


def test_divergence_is_an_outcome_that_counts_as_guessing(spec, task, store):
    record = train(dataclasses.replace(spec, normalizer="none", lr=1e12), task, store)
    assert record.outcome == "diverged"
    assert record.final("test_accuracy") == 0.1
    assert "loss became" in record.end["reason"]


def test_a_method_that_cannot_run_is_an_outcome_with_its_reason(spec, task, store):
    spec = dataclasses.replace(spec, network="mlp:depth=1,width=4", condition=Condition(20, 1))
    record = train(spec, task, store)
    assert record.outcome == "failed"
    assert "more than one member" in record.end["reason"]
    broken = dataclasses.replace(spec, normalizer="group:groups=3")
    assert "does not fit" in train(broken, task, store).end["reason"]


@pytest.mark.parametrize("normalizer", ["group", "instance", "layer", "filter_response", "none"])
def test_who_shares_statistics_does_not_matter_to_methods_without_batch_statistics(
    spec, task, tmp_path, normalizer
):
    accuracies = []
    for condition in (Condition(20, 20), Condition(20, 2), Condition(20, 2, "class")):
        run = Run(
            dataclasses.replace(spec, normalizer=normalizer, condition=condition, grain=2),
            task,
            Store(tmp_path / condition.id),
        )
        for _ in range(3):
            run.take_step()
        accuracies.append(torch.cat([p.detach().flatten() for p in run.network.parameters()]))
    # Equal up to the order of float32 sums, over three steps at a rate of 0.1.
    torch.testing.assert_close(accuracies[1], accuracies[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(accuracies[2], accuracies[0], rtol=1e-3, atol=1e-4)


def test_who_shares_statistics_matters_to_batch_normalization(spec, task, tmp_path):
    weights = []
    for condition in (Condition(20, 20), Condition(20, 2, "class")):
        changed = dataclasses.replace(spec, condition=condition, grain=2)
        run = Run(changed, task, Store(tmp_path / condition.id))
        run.take_step()
        weights.append(torch.cat([p.detach().flatten() for p in run.network.parameters()]))
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_conditions_share_the_optimizers_batches(spec, task, tmp_path):
    batches = []
    for condition in (Condition(20, 20), Condition(20, 4, "class")):
        changed = dataclasses.replace(spec, condition=condition, grain=4)
        run = Run(changed, task, Store(tmp_path / condition.id))
        images, labels, parts = run.batch()
        assert sorted(parts.flatten().tolist()) == list(range(20))
        if condition.composition == "class":
            assert all(len(set(labels[part].tolist())) == 1 for part in parts)
        batches.append(images)
    assert torch.equal(*batches)


def test_arms_start_from_equal_weights(spec, task):
    def convolutions(normalizer):
        network = build_network(dataclasses.replace(spec, normalizer=normalizer), task.data, 9)
        return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    base = convolutions("batch")
    for normalizer in ("none", "ic", "filter_response", "batch_renorm"):
        for a, b in zip(base, convolutions(normalizer), strict=True):
            assert torch.equal(a, b)


def test_validation_and_training_images_are_disjoint_and_balanced(task):
    assert len(task.train_labels) == 180
    assert len(task.valid_labels) == 20
    assert task.train_labels.bincount().tolist() == [18] * 10
    flat = torch.cat([task.train_images, task.valid_images]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 200


def test_the_learning_rate_warms_up_and_decays(spec):
    rates = [learning_rate(spec, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(spec.lr / 10)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(spec.lr)
    assert rates[-1] < spec.lr / 1000
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_scales_and_shifts_have_no_weight_decay(spec, task):
    network = build_network(spec, task.data, 9)
    decayed, rest = make_optimizer(network, spec).param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert decayed["weight_decay"] == RECIPE.weight_decay
    assert all(p.ndim == 1 for p in rest["params"])
    assert rest["weight_decay"] == 0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(network.parameters()))


def test_the_probe_leaves_the_network_and_the_random_state_alone(spec, task):
    network = build_network(dataclasses.replace(spec, normalizer="ic"), task.data, 9)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    images = task.data.prepare(task.train_images[:8])
    initial_statistics(network, images, task.train_labels[:8])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 4000  # x twice, but one storage
    assert saved_bytes(lambda: x.exp().sum()) == 4000


def test_imported_networks_start_from_the_references_weights(task, spec, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net(norm):\n"
        "    first = norm(4)\n"
        "    torch.rand(len(list(first.parameters())))\n"  # draws more for some normalizers
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), first, nn.ReLU(), nn.Flatten(),"
        " nn.Linear(4 * 26 * 26, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = dataclasses.replace(spec, network="mine:net", reference="batch")
    one = build_network(spec, task.data, 9)
    two = build_network(dataclasses.replace(spec, normalizer="none"), task.data, 9)
    assert torch.equal(one[0].weight, two[0].weight)
    assert torch.equal(one[4].weight, two[4].weight)


def test_augmentation_is_seeded_by_step(task, spec, tmp_path):
    recipe = dataclasses.replace(RECIPE, crop=4, flip=True)
    spec = dataclasses.replace(spec, recipe=recipe)
    run = Run(spec, Task(task.data, spec), Store(tmp_path))
    first, again = run.batch()[0], run.batch()[0]
    plain = Run(dataclasses.replace(spec, recipe=RECIPE), run.task, Store(tmp_path)).batch()[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("normalizer", ["batch", "ic", "none", "filter_response"])
def test_all_of_a_step_is_on_the_device(data, spec, store, normalizer):
    """``meta`` stands in for a GPU: it computes nothing, and refuses tensors of the processor."""
    recipe = dataclasses.replace(spec.recipe, crop=4, flip=True)
    spec = dataclasses.replace(
        spec, normalizer=normalizer, recipe=recipe, condition=Condition(20, 10)
    )
    run = Run(spec, Task(data, spec), store, "meta")
    images, labels, parts = run.batch()
    assert {t.device.type for t in (images, labels, parts)} == {"meta"}
    assert all(p.device.type == "meta" for p in run.network.parameters())
    for part in parts:
        nn.functional.cross_entropy(run.network(images[part]), labels[part]).backward()
    run.optimizer.step()
    assert all(p.grad.device.type == "meta" for p in run.network.parameters())


def test_the_device_is_on_record(spec):
    assert "device" not in start_line(spec)["environment"]
    assert start_line(spec, "cuda:1")["environment"]["device"] == "cuda:1"
    assert start_line(spec, "cuda:1")["spec"] == start_line(spec)["spec"]
