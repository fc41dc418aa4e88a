"""Arrangements: einops is the oracle, and what cannot be read is refused with the pattern quoted."""

import dataclasses
import math
import pickle
import re

import einops
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_tensor import Arrangement
from support import EVERY_DTYPE, Sample, for_all, same_bits, samples

# Patterns of the literature, each with a weight that it fits.
KNOWN = [
    ("o i h w", {}, (4, 3, 2, 5), (4, 3, 2, 5)),
    ("o (i h w)", {}, (4, 3, 2, 5), (4, 30)),
    ("(o h) (i w)", {}, (4, 3, 2, 5), (8, 15)),
    ("(o d) (i h w)", {}, (4, 3, 2, 5, 3), (8, 45)),
    ("(heads d) i -> heads d i", {"heads": 2}, (8, 3), (2, 4, 3)),
    ("(three heads d) i -> three heads d i", {"three": 3, "heads": 2}, (24, 5), (3, 2, 4, 5)),
    ("layer o i", {}, (6, 4, 3), (6, 4, 3)),
    ("layer o i -> o i layer", {}, (6, 4, 3), (4, 3, 6)),
    ("o i -> (o i)", {}, (4, 3), (12,)),
    ("(a b) (c d) -> (a c) (b d)", {"a": 2, "c": 3}, (4, 9), (6, 6)),
    ("o", {}, (5,), (5,)),
]


@st.composite
def arranged(draw: st.DrawFn) -> tuple[Arrangement, Sample]:
    """Draw an arrangement with random groups on both sides, and a weight that it fits."""
    names = "abcdef"[: draw(st.integers(1, 6))]
    sizes = {name: draw(st.integers(1, 3)) for name in names}

    def groups(order: list[str]) -> list[list[str]]:
        cuts = [draw(st.booleans()) for _ in order[1:]]
        result = [[order[0]]]
        for name, cut in zip(order[1:], cuts):
            if cut:
                result.append([name])
            else:
                result[-1].append(name)
        return result

    def written(side: list[list[str]]) -> str:
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in side)

    left, right = groups(list(names)), groups(draw(st.permutations(list(names))))
    shape = tuple(math.prod(sizes[name] for name in group) for group in left)
    given_sizes = {name: sizes[name] for group in left for name in group[1:]}
    sample = Sample(
        shape, layout=draw(st.sampled_from(("C", "F", "permuted", "strided"))), seed=draw(st.integers(0, 99))
    )
    return Arrangement(f"{written(left)} -> {written(right)}", given_sizes), sample


@for_all(case=arranged())
def test_arrange_equals_einops_and_restore_inverts_it(xp, case):
    arrangement, sample = case
    x = sample.to(xp)
    tensor = arrangement.arrange(x)
    expected = einops.rearrange(sample.values, arrangement.pattern, **arrangement.sizes)
    assert same_bits(tensor, expected)
    assert arrangement.shape(sample.shape) == expected.shape
    assert (arrangement.n_axes, arrangement.n_modes) == (len(sample.shape), expected.ndim)
    assert same_bits(arrangement.restore(tensor, sample.shape), sample.values)
    assert same_bits(x, sample.values), "the input was changed"


@for_all(sample=samples(dtypes=EVERY_DTYPE, max_ndim=6))
def test_candidates_fit_every_weight_of_their_order(xp, sample):
    x = sample.to(xp)
    candidates = Arrangement.candidates(len(sample.shape))
    assert candidates[0] == Arrangement.native(len(sample.shape))
    assert len(set(candidates)) == len(candidates)
    for arrangement in candidates:
        tensor = arrangement.arrange(x)
        assert tuple(tensor.shape) == arrangement.shape(sample.shape)
        assert tensor.dtype == x.dtype
        assert same_bits(arrangement.restore(tensor, sample.shape), sample.values)


@pytest.mark.parametrize(("pattern", "sizes", "shape", "arranged_shape"), KNOWN)
def test_known_patterns(xp, pattern, sizes, shape, arranged_shape):
    arrangement = Arrangement(pattern, sizes)
    sample = Sample(shape)
    tensor = arrangement.arrange(sample.to(xp))
    assert tuple(tensor.shape) == arranged_shape == arrangement.shape(shape)
    assert same_bits(arrangement.restore(tensor, shape), sample.values)


def test_implied_left_sides_are_the_standard_axes():
    x = Sample((4, 3, 2, 5)).values
    assert same_bits(Arrangement("(o h) (i w)").arrange(x), einops.rearrange(x, "o i h w -> (o h) (i w)"))
    x = Sample((4, 3, 2)).values
    assert same_bits(Arrangement("(o w) i").arrange(x), einops.rearrange(x, "o i w -> (o w) i"))


@pytest.mark.parametrize("ndim", range(1, 9))
def test_native_leaves_a_weight_as_it_is(ndim):
    arrangement = Arrangement.native(ndim)
    x = np.zeros((2,) * ndim)
    assert arrangement.is_native
    assert arrangement.n_axes == arrangement.n_modes == ndim
    assert arrangement.arrange(x) is x
    assert arrangement.restore(x, x.shape) is x


def test_what_moves_or_joins_axes_is_not_native():
    assert not Arrangement("o i -> i o").is_native
    assert not Arrangement("o (i h w)").is_native


def test_candidates_of_the_convolutions():
    assert [a.pattern for a in Arrangement.candidates(2)] == ["o i"]
    assert [a.pattern for a in Arrangement.candidates(3)] == ["o i w", "o (i w)"]
    assert [a.pattern for a in Arrangement.candidates(4)] == ["o i h w", "o (i h w)", "(o h) (i w)"]
    assert [a.pattern for a in Arrangement.candidates(5)] == ["o i d h w", "o (i d h w)", "(o d) (i h w)"]


def test_arrangements_are_values():
    one, other = Arrangement("(h d) i -> h d i", {"h": 2}), Arrangement("(h d) i -> h d i", {"h": 2})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Arrangement("(h d) i -> h d i", {"h": 4})
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.pattern = "o i"  # type: ignore[misc]


def test_sizes_are_copied():
    sizes = {"h": 2}
    arrangement = Arrangement("(h d) i -> h d i", sizes)
    sizes["h"] = 3
    assert arrangement.shape((4, 3)) == (2, 2, 3)


def test_empty_axes_are_arranged(xp):
    arrangement = Arrangement("(h d) i -> h d i", {"h": 2})
    assert arrangement.arrange(xp.zeros((0, 3))).shape == (2, 0, 3)
    assert Arrangement("o (i h w)").arrange(xp.zeros((2, 0, 3, 3))).shape == (2, 0)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a -> b -> c", "has more than one '->'"),
        ("o i i", "repeats an axis"),
        ("o i -> o (i i)", "repeats an axis"),
        ("o i -> o", "does not keep the same axes on both sides"),
        ("o -> o i", "does not keep the same axes on both sides"),
        ("", "has an empty side; name the axes, as in 'o i h w'"),
        (" -> ", "has an empty side; name the axes, as in 'o i h w'"),
        ("o (i h", "cannot be read at '('; write axes as names and groups as (a b)"),
        ("o i)", "cannot be read at ')'; write axes as names and groups as (a b)"),
        ("o () i", "cannot be read at '()'; write axes as names and groups as (a b)"),
        ("o ((i h) w)", "cannot be read at '('; write axes as names and groups as (a b)"),
        ("o ...", "cannot be read at '.'; write axes as names and groups as (a b)"),
        ("o 1", "cannot be read at '1'; write axes as names and groups as (a b)"),
        ("o (i 2)", "cannot be read at '(i 2)'; write axes as names and groups as (a b)"),
        ("o _i", "cannot be read at '_i'; write axes as names and groups as (a b)"),
        ("(a b) c", "groups axes that are not the standard ones, o i w; write 'axes -> (a b) c'"),
        ("(o q) i", "groups axes that are not the standard ones, o i w; write 'axes -> (o q) i'"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(pattern, why):
    with pytest.raises(ValueError, match="^" + re.escape(f"Arrangement {pattern!r} {why}") + "$"):
        Arrangement(pattern)


def test_a_size_for_no_axis_is_refused():
    with pytest.raises(ValueError, match="has no axis head, for which a size was given"):
        Arrangement("(heads d) i -> heads d i", {"head": 2})


@pytest.mark.parametrize("size", [0, -2])
def test_a_size_below_one_is_refused(size):
    message = rf"Arrangement '\(h d\) i -> h d i' has size {size} for the axis h; pass at least 1"
    with pytest.raises(ValueError, match=message):
        Arrangement("(h d) i -> h d i", {"h": size})


@pytest.mark.parametrize("size", [2.0, "2", None, True])
def test_a_size_that_is_no_integer_is_refused(size):
    with pytest.raises(TypeError, match=r"Arrangement: sizes\['h'\] is .*; pass an integer"):
        Arrangement("(h d) i -> h d i", {"h": size})


@pytest.mark.parametrize("pattern", [3, None, ["o", "i"]])
def test_a_pattern_that_is_no_string_is_refused(pattern):
    with pytest.raises(TypeError, match=r"Arrangement: pattern is .*; pass a string, as 'o i h w'"):
        Arrangement(pattern)


def test_a_weight_that_does_not_fit_is_refused(xp):
    heads = Arrangement("(h d) i -> h d i", {"h": 3})
    message = r"is for weights with 2 axes; the weight has shape \(8, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        heads.arrange(xp.zeros((8, 3, 2)))
    message = r"does not fit: an axis of size 8 as \(h d\) with sizes \{'h': 3\}"
    with pytest.raises(ValueError, match=message):
        heads.arrange(xp.zeros((8, 3)))
    message = "does not tell the sizes of h, d; pass all but one of them in sizes"
    with pytest.raises(ValueError, match=message):
        Arrangement("(h d) i -> h d i").shape((8, 3))
    message = r"does not fit: an axis of size 4 as \(o\) with sizes \{'o': 2\}"
    with pytest.raises(ValueError, match=message):
        Arrangement("o i", {"o": 2}).arrange(xp.zeros((4, 3)))


def test_a_tensor_that_does_not_fit_is_refused(xp):
    message = (
        r"'\(o h\) \(i w\)': a tensor of shape \(3, 8\) for a weight of shape \(4, 3, 2, 1\); pass one of shape \(8, 3"
    )
    with pytest.raises(ValueError, match=message):
        Arrangement("(o h) (i w)").restore(xp.zeros((3, 8)), (4, 3, 2, 1))


@pytest.mark.parametrize("ndim", [0, -1, 19])
def test_orders_without_names_are_refused(ndim):
    for make in (Arrangement.native, Arrangement.candidates):
        with pytest.raises(ValueError, match=rf"Arrangement: a weight with {ndim} axes; pass 1 to 18"):
            make(ndim)


@given(case=arranged())
def test_repr_rebuilds_the_arrangement(case):
    arrangement, _ = case
    assert eval(repr(arrangement), {"Arrangement": Arrangement}) == arrangement


@pytest.mark.parametrize("transformation", ["torch.compile", "torch.func.vmap", "jax.jit", "jax.vmap", "torch", "jax"])
def test_arrangements_are_traced_and_differentiated(transformation):
    name, _, verb = transformation.partition(".")
    module = pytest.importorskip(name)
    arrangement = Arrangement("(o h) (i w)")
    batch = np.arange(2 * 120.0).reshape(2, 4, 3, 2, 5)
    arrays = module.asarray(batch) if name == "torch" else module.numpy.asarray(batch)

    def there_and_back(x):
        return arrangement.restore(arrangement.arrange(x) * 2, (4, 3, 2, 5))

    if verb == "func.vmap":
        result = module.func.vmap(there_and_back)(arrays)
    elif verb == "vmap":
        result = module.vmap(there_and_back)(arrays)
    elif verb == "compile":
        compiled = module.compile(there_and_back, fullgraph=True, backend="eager")
        result = module.stack([compiled(x) for x in arrays])
    elif verb == "jit":
        result = module.numpy.stack([module.jit(there_and_back)(x) for x in arrays])
    elif name == "torch":
        leaf = arrays.requires_grad_()
        result = module.autograd.grad(sum((there_and_back(x) * x.detach()).sum() for x in leaf), leaf)[0]
    else:
        result = module.grad(lambda b: sum((there_and_back(x) * y).sum() for x, y in zip(b, arrays)))(arrays)
    assert same_bits(result, 2 * batch)
