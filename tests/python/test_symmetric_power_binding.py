"""The C++ state order, through the binding, against an enumeration here and the Python mirror."""

import itertools
import math
from collections import Counter

import pytest
import torch

import retention
from retention import _C

SHAPES = [(8, 2), (16, 2), (32, 2), (64, 2), (8, 4), (16, 4), (8, 6), (16, 6), (8, 8)]
WIDTH = {2: 8, 4: 2, 6: 1, 8: 1}


def enumerate_rows(head_dim, degree):
    """Factors and multiplicity of each row, from the definition and no rank formula."""
    width = WIDTH[degree]
    tuples = itertools.combinations_with_replacement(range(head_dim // width), degree)
    for blocks in sorted(tuples, key=lambda blocks: blocks[::-1]):
        multiplicity = math.factorial(degree)
        for count in Counter(blocks).values():
            multiplicity //= math.factorial(count)
        for offsets in itertools.product(range(width), repeat=degree):
            yield tuple(width * b + a for b, a in zip(blocks, offsets, strict=True)), multiplicity


@pytest.mark.parametrize(("head_dim", "degree"), SHAPES)
def test_rows_follow_the_definition(head_dim, degree):
    expected = list(enumerate_rows(head_dim, degree))
    assert _C.block_width(degree) == WIDTH[degree]
    assert _C.state_dim(head_dim, degree) == len(expected)
    # Past this many rows, a stride that is prime to every period in the order.
    step = 1 if len(expected) <= 10_000 else 7
    for row in range(0, len(expected), step):
        assert _C.symmetric_power_row(row, head_dim, degree) == expected[row], row


@pytest.mark.parametrize(("head_dim", "degree"), SHAPES)
def test_python_expands_the_same_rows(head_dim, degree):
    rows = [
        _C.symmetric_power_row(row, head_dim, degree)
        for row in range(_C.state_dim(head_dim, degree))
    ]
    factors = torch.tensor([factors for factors, _ in rows])
    multiplicity = torch.tensor([multiplicity for _, multiplicity in rows], dtype=torch.float64)
    x = torch.randn(head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query = x[factors].prod(dim=-1)
    # Products of at most 8 doubles in another order: a few roundings of 1.1e-16 each.
    close = {"rtol": 4e-15, "atol": 0.0}
    assert retention.state_dim(head_dim, degree) == len(rows)
    torch.testing.assert_close(retention.expand(x, degree, side="query"), query, **close)
    torch.testing.assert_close(
        retention.expand(x, degree, side="key"), multiplicity * query, **close
    )


@pytest.mark.parametrize(
    ("head_dim", "degree", "rows"),
    [
        (16, 2, 192),
        (32, 2, 640),
        (64, 2, 2304),
        (128, 2, 8704),
        (256, 2, 33792),
        (16, 4, 5280),
        (8, 6, 1716),
    ],
)
def test_state_dim_is_as_documented(head_dim, degree, rows):
    assert _C.state_dim(head_dim, degree) == rows
    assert retention.state_dim(head_dim, degree) == rows


def test_row_of_a_large_state():
    """Ranks past 32 bits: the last row is the last feature, degree times."""
    rows = _C.state_dim(128, 8)
    assert rows == math.comb(128 + 8 - 1, 8) > 2**32
    assert _C.symmetric_power_row(rows - 1, 128, 8) == ((127,) * 8, 1)


@pytest.mark.parametrize("head_dim", [-8, 0, 4, 12, 2**40])
def test_head_dim_is_checked(head_dim):
    expected = f"head_dim: expected a positive multiple of 8, got {head_dim}$"
    with pytest.raises(ValueError, match=expected):
        _C.state_dim(head_dim, 2)
    with pytest.raises(ValueError, match=expected):
        _C.symmetric_power_row(0, head_dim, 2)


@pytest.mark.parametrize("degree", [-2, 0, 1, 3, 2**40])
def test_degree_is_checked(degree):
    expected = f"degree: expected a positive even integer, got {degree}$"
    for call in (
        lambda: _C.block_width(degree),
        lambda: _C.state_dim(16, degree),
        lambda: _C.symmetric_power_row(0, 16, degree),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize("row", [-1, 192, 2**62])
def test_row_is_checked(row):
    with pytest.raises(ValueError, match=f"row: expected 0 <= row < 192, got {row}$"):
        _C.symmetric_power_row(row, 16, 2)


@pytest.mark.parametrize(("head_dim", "degree"), [(256, 14), (8, 26), (8, 2**31 - 2)])
def test_states_past_64_bits_are_refused(head_dim, degree):
    with pytest.raises(ValueError, match=rf"rows fit 64-bit .*, got {head_dim} and {degree}$"):
        _C.state_dim(head_dim, degree)


def test_arguments_must_be_integers():
    with pytest.raises(TypeError):
        _C.state_dim(16.0, 2)
    with pytest.raises(TypeError):
        _C.state_dim(16, deg=2)
