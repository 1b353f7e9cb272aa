"""Use and update of stored statistics: two policies, neither of which train and eval undo."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normlab as nl
from activations.cases import ONE_EACH, STORING, build, sample

# The same sums grouped otherwise, in float64.
TIGHT = {"rtol": 1e-12, "atol": 1e-13}


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def trained(name, options):
    layer = build(name, options)
    for seed in range(3):
        layer(sample((8, 6, 5), seed=seed))
    return layer


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("update", [True, False, "auto"])
@pytest.mark.parametrize("use", ["batch", "stored", "auto"])
@pytest.mark.parametrize(("name", "options"), STORING)
def test_use_and_update_are_independent(name, options, use, update, mode):
    layer, x = trained(name, options), sample((8, 6, 5), seed=9)
    from_batch, from_stored = copy.deepcopy(layer).train()(x), copy.deepcopy(layer).eval()(x)
    updated = copy.deepcopy(layer).train()
    updated(x)
    before = state(layer)
    layer.use, layer.update = use, update
    layer.eval().train().train(mode)
    assert (layer.use, layer.update) == (use, update)
    y = layer(x)
    batch = mode if use == "auto" else use == "batch"
    assert torch.equal(y, from_batch if batch else from_stored)
    writes = mode if update == "auto" else update
    if batch or not writes:
        assert same(state(layer), state(updated) if writes else before)


@pytest.mark.parametrize(("name", "options"), STORING)
def test_updating_while_using_what_is_stored(name, options):
    """use="stored" with update=True follows the batches, as its words say."""
    layer, x = trained(name, options), sample((8, 6, 5), seed=9)
    updated = copy.deepcopy(layer).train()
    updated(x)
    expected = copy.deepcopy(layer).eval()(x)
    layer.use, layer.update = "stored", True
    assert torch.equal(layer(x), expected)
    assert same(state(layer), state(updated))


@pytest.mark.parametrize(("name", "options"), STORING)
def test_policies_are_copied_with_the_layer(name, options):
    layer = build(name, options)
    layer.use, layer.update = "stored", False
    other = copy.deepcopy(layer)
    assert (other.use, other.update) == ("stored", False)
    assert "use=stored" in repr(other)
    assert "update=False" in repr(other)


def network():
    return nn.Sequential(nn.Linear(4, 6), nl.BatchNorm(6), nl.LayerNorm(6), nl.BatchRenorm(6))


def test_statistics_sets_a_whole_model():
    model = network()
    nl.statistics(model, use="stored", update=False)
    model.train()
    for layer in (model[1], model[3]):
        assert (layer.use, layer.update) == ("stored", False)
    nl.statistics(model, use="auto")
    assert (model[1].use, model[1].update) == ("auto", False)


def test_statistics_is_undone_on_leaving_even_by_an_exception():
    model = network()
    model[1].use = "batch"
    with nl.statistics(model, use="stored", update=False):
        assert model[1].use == "stored"
        model.train()
    assert [(m.use, m.update) for m in (model[1], model[3])] == [
        ("batch", "auto"),
        ("auto", "auto"),
    ]
    with pytest.raises(KeyError), nl.statistics(model, update=False):
        raise KeyError
    assert model[3].update == "auto"


def test_nested_contexts_restore_in_turn():
    model = network()
    with nl.statistics(model, update=False):
        with nl.statistics(model, update="accumulate", use="batch"):
            assert (model[1].use, model[1].update) == ("batch", "accumulate")
        assert (model[1].use, model[1].update) == ("auto", False)
    assert (model[1].use, model[1].update) == ("auto", "auto")


WRONG = [{"use": "sored"}, {"update": "never"}, {"use": "batch", "update": "never"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_unknown_policy_is_refused_and_sets_nothing(wrong):
    model = network()
    with pytest.raises(ValueError, match=r"(use|update) is .*received '(sored|never)'"):
        nl.statistics(model, **wrong)
    assert [(m.use, m.update) for m in (model[1], model[3])] == [("auto", "auto")] * 2


def test_a_model_without_stored_statistics_is_told_so():
    with pytest.warns(UserWarning, match="nothing was set"):
        nl.statistics(nn.Sequential(nl.LayerNorm(4)), update=False)


def test_stored_use_needs_something_stored():
    with pytest.raises(ValueError, match="keeps none"):
        nl.LayerNorm(4).use = "stored"


@pytest.mark.parametrize("name", ["batch", "ic", "variance", "mean_only_batch", "l1_batch",
                                  "lp_batch", "batch_renorm"])  # fmt: skip
@pytest.mark.parametrize("cuts", [(1, 3, 4), (2, 2, 2, 2), (8,), (7, 1)])
def test_accumulated_micro_batches_count_as_one_batch(name, cuts):
    options = {"dropout": 0.0} if name == "ic" else {}
    x = sample((8, 6, 5))
    whole, parts = build(name, options), build(name, options)
    if name == "l1_batch":  # deviations about different means have no exact merge
        x = x - x.mean((0, 2), keepdim=True)
        x = torch.cat([p - p.mean((0, 2), keepdim=True) for p in x.split(cuts)])
    whole(x)
    before = state(parts)
    nl.statistics(parts, update="accumulate")
    for part in x.split(cuts):
        parts(part)
    assert same(state(parts), before)  # nothing moves before the commit
    assert nl.statistics.commit(parts) == 1
    for key, value in state(whole).items():
        torch.testing.assert_close(state(parts)[key], value, **TIGHT)
    assert nl.statistics.commit(parts) == 0  # what was folded in is gone


def test_accumulation_leaves_padding_out():
    x, mask = sample((8, 6, 5)), torch.rand(8, 5) > 0.4
    mask[5:] = False
    whole, parts = build("batch", {}), build("batch", {})
    whole(x, mask)
    parts.update = "accumulate"
    for a, m in zip(x.split((2, 3, 3)), mask.split((2, 3, 3)), strict=True):
        parts(a, m)
    parts.commit()
    for key, value in state(whole).items():
        torch.testing.assert_close(state(parts)[key], value, **TIGHT)


def test_micro_batches_over_several_steps():
    whole, parts = build("batch", {"momentum": None}), build("batch", {"momentum": None})
    parts.update = "accumulate"
    for seed in range(4):
        x = sample((8, 6, 5), seed=seed)
        whole(x)
        for part in x.split(2):
            parts(part)
        parts.commit()
    for key, value in state(whole).items():
        torch.testing.assert_close(state(parts)[key], value, **TIGHT)


def test_resetting_forgets_what_was_pooled():
    layer = build("batch", {})
    layer.update = "accumulate"
    layer(sample((8, 6, 5)))
    layer.reset_running_stats()
    assert layer.commit() is False
    assert layer.running_var.eq(1).all()
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize(("name", "options"), STORING)
def test_checkpointing_recomputes_without_a_second_update(name, options):
    """The second forward pass runs under the same policy: it is switched off around the model."""
    plain, saved = build(name, options), build(name, options)
    x, z = (sample((8, 6, 5)).requires_grad_() for _ in range(2))
    plain(x).pow(2).sum().backward()
    y = checkpoint(saved, z, use_reentrant=False)
    with nl.statistics(saved, update=False):
        y.pow(2).sum().backward()
    if name != "batch_renorm":  # whose r and d come from what is stored
        torch.testing.assert_close(z.grad, x.grad, **TIGHT)
    assert same(state(plain), state(saved))


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_state_dict_round_trip(name, options):
    layer = build(name, options)
    layer(sample((8, 6, 5)))
    fresh = build(name, options, seed=5)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    x = sample((8, 6, 5), seed=3)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    assert torch.equal(fresh.train()(x), layer.train()(x))


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_reset_parameters_restores_the_start(name, options):
    start, layer = nl.norm(name, 6, **options).double(), build(name, options)
    layer(sample((8, 6, 5)))
    if not hasattr(layer, "reset_parameters"):
        pytest.skip("nothing to reset")
    layer.reset_parameters()
    for key, value in state(start).items():  # which went through float32
        torch.testing.assert_close(state(layer)[key], value, rtol=2**-24, atol=0)


def test_the_plain_average_weighs_every_batch_alike():
    layer = nl.BatchNorm(2, momentum=None).double()
    xs = [sample((8, 2, 5), seed=s) for s in range(7)]
    for x in xs:
        layer(x)
    mean = torch.stack([x.mean((0, 2)) for x in xs]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, **TIGHT)
