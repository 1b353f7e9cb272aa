"""Π: regrouping and its undoing, reductions over either form, and patterns that are refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normlab as nl

PATTERNS = {
    "batch": "n c * -> c (n *)",
    "layer": "n c * -> n (c *)",
    "instance": "n c * -> (n c) (*)",
    "group": "n (g c) * -> (n g) (c *)",
    "position": "n c * -> (n *) (c)",
    "ghost batch": "(b n) c * -> (b c) (n *)",
    "batch-group": "(b n) (g c) * -> (b g) (c n *)",
    "channel whitening": "n c * -> () c (n *)",
    "whitening in channel groups": "n (g c) * -> g c (n *)",
    "group whitening": "n (g c) * -> n g (c *)",
    "one area": "n c * -> () (n c *)",
}


@st.composite
def bound(draw):
    """A layout of random rank, lengths and layout, and a tensor of its shape."""
    pattern = draw(st.sampled_from(sorted(PATTERNS.values())))
    b, n, g, c = (draw(st.integers(1, 4)) for _ in range(4))
    positions = draw(st.lists(st.integers(1, 4), max_size=3))
    last = draw(st.booleans())
    samples = b * n if "(b n)" in pattern else n
    channels = g * c if "(g c)" in pattern else c
    shape = (samples, *positions, channels) if last else (samples, channels, *positions)
    outer = draw(st.booleans())  # one name of a split is enough, whichever
    sizes = {"b": b, "g": g} if outer else {"n": n, "c": c}
    layout = nl.partition(pattern).bind(shape, channel_dim=-1 if last else 1, sizes=sizes)
    x = torch.arange(math.prod(shape)).view(shape)
    if draw(st.booleans()):  # other strides, same values
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    return layout, x


@given(bound())
def test_undo_is_exact(case):
    layout, x = case
    z = layout.regroup(x)
    assert torch.equal(layout.undo(z), x)
    assert z.numel() == x.numel()
    assert sorted(z.flatten().tolist()) == sorted(x.flatten().tolist())
    assert torch.equal(layout.regroup(layout.undo(z)), z)


@given(bound())
def test_reductions_over_the_view_equal_those_over_the_matrix(case):
    layout, x = case
    whole = layout.split(x).sum(layout.member_dims, keepdim=True) if layout.member_dims else x
    spread = layout.join(whole.expand(layout.split_shape).contiguous())
    matrix = layout.regroup(x)
    want = layout.undo(matrix.sum(-1, keepdim=True).expand(matrix.shape))
    assert torch.equal(spread, want)
    assert layout.members == matrix.shape[-1] or 0 in matrix.shape


@given(bound())
def test_splitting_copies_nothing_and_joins_back(case):
    layout, x = case
    view = layout.split(x)
    assert view.data_ptr() == x.data_ptr()
    assert torch.equal(layout.join(view), x)


def members_of(pattern, shape, **more):
    """For each element, the set of elements that share its area (and variable)."""
    x = torch.arange(math.prod(shape)).view(shape)
    z = nl.partition(pattern).bind(shape, **more).regroup(x)
    return {frozenset(row.tolist()) for row in z.reshape(-1, z.shape[-1])}, z.shape


def by_hand(key, shape=(4, 6, 5)):
    """Areas by a key of (sample, channel, position), for a contiguous tensor."""
    areas = {}
    for i in range(math.prod(shape)):
        n, c, p = i // (shape[1] * shape[2]), i // shape[2] % shape[1], i % shape[2]
        areas.setdefault(key(n, c, p), []).append(i)
    return {frozenset(v) for v in areas.values()}


# Sub-batches of 2 samples in a row, groups of 2 channels in a row (3 groups).
EXPECTED = {
    "batch": (lambda n, c, p: c, (6, 20)),
    "layer": (lambda n, c, p: n, (4, 30)),
    "instance": (lambda n, c, p: (n, c), (24, 5)),
    "group": (lambda n, c, p: (n, c // 2), (12, 10)),
    "position": (lambda n, c, p: (n, p), (20, 6)),
    "ghost batch": (lambda n, c, p: (n // 2, c), (12, 10)),
    "batch-group": (lambda n, c, p: (n // 2, c // 2), (6, 20)),
    "channel whitening": (lambda n, c, p: c, (1, 6, 20)),
    "whitening in channel groups": (lambda n, c, p: c, (3, 2, 20)),
    "group whitening": (lambda n, c, p: (n, c // 2), (4, 3, 10)),
    "one area": (lambda n, c, p: 0, (1, 120)),
}


@pytest.mark.parametrize("name", list(PATTERNS))
def test_each_pattern_groups_what_it_says(name):
    key, grouped = EXPECTED[name]
    sets, shape = members_of(PATTERNS[name], (4, 6, 5), sizes={"g": 3, "b": 2})
    assert sets == by_hand(key)
    assert shape == grouped


def test_parts_are_in_the_order_they_are_written():
    x = torch.arange(24).view(2, 3, 4)
    z = nl.partition("n c * -> c (* n)").bind((2, 3, 4)).regroup(x)
    assert z[1].tolist() == x[:, 1].T.reshape(-1).tolist()
    z = nl.partition("n c * -> (c n) (*)").bind((2, 3, 4)).regroup(x)
    assert z[1].tolist() == x[1, 0].tolist()


def test_whitening_variables_keep_their_order():
    x = torch.arange(2 * 4 * 3).view(2, 4, 3)
    z = nl.partition("n (g c) * -> g c (n *)").bind((2, 4, 3), sizes={"g": 2}).regroup(x)
    for g in range(2):
        for c in range(2):
            assert z[g, c].tolist() == x[:, 2 * g + c].reshape(-1).tolist()


@pytest.mark.parametrize(("pattern", "mixes", "stored"), [
    ("n c * -> c (n *)", True, 6), ("n c * -> n (c *)", False, 1),
    ("n c * -> (n c) (*)", False, 6), ("(b n) (g c) * -> (b g) (c n *)", True, 3),
    ("n (g c) * -> g c (n *)", True, 3), ("n c * -> (n *) (c)", False, 1),
])  # fmt: skip
def test_what_is_shared_and_how_much_is_stored(pattern, mixes, stored):
    parsed = nl.partition(pattern)
    assert parsed.mixes_samples() is mixes
    assert parsed.stored_size(6, {"g": 3}) == stored


def test_white_space_is_regular_and_parsing_is_shared():
    assert str(nl.partition("  n  c *   ->  c ( n * ) ").pattern).startswith("n c * -> c (")
    assert nl.partition("n c * -> c (n *)") is nl.partition("n c * -> c (n *)")


WRONG = {
    "n c * c (n *)": "needs one arrow",
    "n c * -> c -> (n *)": "needs one arrow",
    "n c -> c (n)": "left side",
    "n * c -> c (n *)": "left side",
    "n c * x -> c (n * x)": "left side",
    "(n *) c * -> c (n *)": "left side",
    "() c * -> c (*)": "left side",
    "n c * -> (c n *)": "two parts.*received 1",
    "n c * -> n c *": "",  # three parts: areas, variables, members
    "n c * -> (n) (c) (*) ()": "received 4",
    "n c * -> c (n x)": r"x only right, \* only left",
    "n c * -> c (n)": r"\* only left",
    "n c * -> c (n n *)": "'n' stands twice on the right",
    "n (n c) * -> c (n *)": "'n' stands twice on the left",
    "n C * -> C (n *)": "'C' is not an axis name",
    "n c * -> c ((n) *)": "is not an axis name",
    "n c * -> (c n *) ()": "members are empty",
    "": "needs one arrow",
}


@pytest.mark.parametrize("pattern", list(WRONG))
def test_wrong_patterns_say_what_is_wrong(pattern):
    if not WRONG[pattern]:
        assert nl.partition(pattern).variables == ("c",)
        return
    with pytest.raises(nl.PartitionError, match=WRONG[pattern]) as error:
        nl.partition(pattern)
    assert repr(" ".join(pattern.split())) in str(error.value)


def test_shapes_that_do_not_fit():
    group = nl.partition("n (g c) * -> (n g) (c *)")
    with pytest.raises(nl.PartitionError, match=r"channel axis of length 6.*g=4.*3 or 6"):
        group.bind((2, 6, 5), sizes={"g": 4})
    with pytest.raises(nl.PartitionError, match=r"channel axis of length 6.*none given"):
        group.bind((2, 6, 5))
    with pytest.raises(nl.PartitionError, match="g=2, c=2"):
        group.bind((2, 6, 5), sizes={"g": 2, "c": 2})
    ghost = nl.partition("(b n) c * -> (b c) (n *)")
    with pytest.raises(nl.PartitionError, match=r"sample axis of length 7.*n=2"):
        ghost.bind((7, 6), sizes={"n": 2})
    with pytest.raises(nl.PartitionError, match=r"received shape \(6,\).*unsqueeze"):
        ghost.bind((6,), sizes={"n": 2})
    with pytest.raises(nl.PartitionError, match="channel_dim is 1 or -1; received 2"):
        ghost.bind((4, 6), channel_dim=2, sizes={"n": 2})
    layout = group.bind((2, 6, 5), sizes={"g": 3})
    with pytest.raises(
        nl.PartitionError, match=r"bound to shape \(2, 6, 5\); received \(2, 6, 4\)"
    ):
        layout.split(torch.zeros(2, 6, 4))


def test_partition_errors_are_value_errors():
    assert issubclass(nl.PartitionError, ValueError)
