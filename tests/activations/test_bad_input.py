"""Inputs and options at and beyond the edge: defined results, or errors that say what to do."""

import math
import warnings

import pytest
import torch

import normlab as nl
from activations.cases import EVERY, STORING, build, sample

CATALOGUE = nl.catalogue("activation")


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_one_sample_without_positions(name, options):
    layer, x = build(name, options), sample((1, 6))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if CATALOGUE[name].batch_of_one == "error":
            with pytest.raises(ValueError, match=r"more than one member.*\(1, 6\).*Use larger"):
                layer(x)
            assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        else:
            assert layer(x).isfinite().all()
        assert layer.eval()(x).isfinite().all()


def test_a_ragged_batch_that_is_refused_changes_nothing():
    """5 samples are ghost batches of 2, 2 and 1; the last one has no result without positions."""
    layer = build("ghost_batch", {"batch_size": 2})
    with pytest.raises(ValueError, match="more than one member"):
        layer(sample((5, 6)))
    assert layer.running_mean.eq(0).all()
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize(("name", "options"), STORING)
def test_one_sample_with_stored_statistics_in_training_mode(name, options):
    layer = build(name, options)
    nl.statistics(layer, use="stored", update=False)
    assert layer.train()(sample((1, 6))).isfinite().all()


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_one_sample_with_positions_is_defined(name, options):
    assert build(name, options)(sample((1, 6, 4, 2))).isfinite().all()


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_maps_of_one_position_equal_no_positions(name, options):
    flat, maps, x = build(name, options), build(name, options), sample((8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # The same numbers through other shapes.
        torch.testing.assert_close(
            maps(x[:, :, None, None])[:, :, 0, 0], flat(x), rtol=1e-12, atol=1e-12
        )


def test_areas_of_one_member_warn_once():
    layer = nl.InstanceNorm(6)
    with pytest.warns(RuntimeWarning, match="one member"):
        y = layer(torch.randn(4, 6, 1, 1))
    assert (y == 0).all()
    layer(torch.randn(4, 6, 1, 1))  # warnings are errors here


EMPTY = [(0, 6), (0, 6, 5), (0, 6, 5, 3), (4, 6, 0), (4, 6, 0, 3)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_empty_batches(name, options, shape, training):
    layer = build(name, options).train(training)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for p in layer.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_empty_batches_keep_their_dtype(name, options, dtype):
    assert nl.norm(name, 6, **options)(torch.zeros(0, 6, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("shape", [(8, 5, 4), (8, 7), (6,), (0, 5)])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_wrong_channels(name, options, shape, channel_dim):
    layer = build(name, options, channel_dim=channel_dim)
    with pytest.raises(ValueError, match="6 channels.*received shape " + str(shape).replace(
        "(", r"\(").replace(")", r"\)")):  # fmt: skip
        layer(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_integers_are_refused(name, options, dtype):
    with pytest.raises(TypeError, match=r"floating-point.*received torch"):
        build(name, options)(torch.ones(8, 6, 5).to(dtype))


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_no_channels(name):
    with pytest.raises(ValueError, match="at least 1 channel"):
        nl.norm(name, 0)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(KeyError, match=r"no method is called 'bacth'.*batch"):
        nl.norm("bacth", 6)
    with pytest.raises(KeyError, match=r"There are: .*batch_renorm"):
        nl.norm("qqqqqq", 6)
    with pytest.raises(KeyError, match="filter_response"):
        nl.catalogue()["filter_respons"]
    with pytest.raises(ValueError, match="received 'planet'"):
        nl.catalogue(site="planet")


MISSPELT = {"epz": "eps", "momentun": "momentum", "afine": "affine", "activaton": "activation",
            "chanel_dim": "channel_dim", "group": "groups", "batchsize": "batch_size",
            "r_max": "rmax", "drop_out": "dropout", "ovr": "over"}  # fmt: skip


@pytest.mark.parametrize("name", list(CATALOGUE))
@pytest.mark.parametrize("wrong", list(MISSPELT))
def test_misspelt_options_suggest_the_right_one(name, wrong):
    card = CATALOGUE[name]
    hint = f"Did you mean .*{MISSPELT[wrong]}" if MISSPELT[wrong] in card.options else "options"
    with pytest.raises(TypeError, match=f"no option '{wrong}'.*{hint}"):
        nl.norm(name, 6, **{wrong: 1})


@pytest.mark.parametrize(("name", "groups"), [("group", 4), ("batch_group", 4), ("group", 0),
                                              ("group", 12), ("group", -2)])  # fmt: skip
def test_groups_that_do_not_divide(name, groups):
    with pytest.raises(nl.PartitionError, match=rf"channel axis of length 6.*g={groups}\b"):
        nl.norm(name, 6, groups=groups)


def test_groups_that_do_not_divide_name_the_nearest():
    with pytest.raises(nl.PartitionError, match="Nearest sizes that divide 12: 4 or 6"):
        nl.GroupNorm(5, 12)


BAD = [
    ("batch", {"eps": -1e-5}, "eps is .*received eps=-1e-05"),
    ("batch", {"eps": math.nan}, "eps is .*received eps=nan"),
    ("batch", {"eps": math.inf}, "eps is .*received eps=inf"),
    ("filter_response", {"eps": -1.0, "learned_eps": True}, "received .*-1"),
    ("batch", {"momentum": 1.5}, r"momentum is .*\[0, 1\].*received 1.5"),
    ("batch", {"momentum": -0.1}, "momentum is .*received -0.1"),
    ("batch", {"momentum": math.nan}, "momentum is .*received nan"),
    ("batch_renorm", {"momentum": 2.0}, "momentum is .*received 2.0"),
    ("batch_renorm", {"rmax": 0.5}, "rmax is at least 1; received 0.5"),
    ("batch_renorm", {"rmax": math.nan}, "rmax is at least 1; received nan"),
    ("batch_renorm", {"dmax": -1.0}, "dmax is at least 0; received -1.0"),
    ("batch_renorm", {"dmax": math.nan}, "dmax is at least 0; received nan"),
    ("lp_batch", {"p": 0.5}, "p is at least 1.*received p=0.5"),
    ("lp_batch", {"p": math.nan}, "p is .*received p=nan"),
    ("lp_batch", {"p": "maximum"}, "p is a number .*received 'maximum'"),
    ("lp_batch", {"about": "median"}, "about is .*received 'median'"),
    ("ic", {"dropout": 1.0}, r"dropout is a rate in \[0, 1\); received 1.0"),
    ("ic", {"dropout": -0.1}, "dropout is .*received -0.1"),
    ("ic", {"dropout": math.nan}, "dropout is .*received nan"),
    ("batch", {"activation": "gelu"}, "activation is one of relu, silu, tlu.*received 'gelu'"),
    ("layer", {"over": "batch"}, "over is .*received 'batch'"),
    ("layer", {"over": ""}, "over is .*received ''"),
    ("rms", {"over": "channel"}, "over is .*received 'channel'"),
    ("ghost_batch", {"batch_size": 0}, "batch_size is at least 1; received 0"),
    ("batch", {"channel_dim": 2}, "channel_dim is 1 or -1; received 2"),
    ("none", {"channel_dim": 0}, "channel_dim is 1 or -1; received 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        nl.norm(name, 6, **options)


def test_samples_that_are_split_need_a_length():
    with pytest.raises(nl.PartitionError, match="give batch_size"):
        nl.Normalize(6, "(b n) c * -> (b c) (n *)", operation=nl.Standardize())


def test_a_backend_that_is_not_there():
    with pytest.raises(ValueError, match=r"'abacus' is not part .*auto, reference"):
        nl.kernels.backend("abacus")
