"""Every wrong call says which argument, what it got and what it accepts."""

import pytest
import torch

import retention

B, T, HQ, H, D, DV = 2, 6, 4, 2, 16, 8
ROWS = 192


def good(**changes):
    inputs = {
        "Q": torch.randn(B, T, HQ, D),
        "K": torch.randn(B, T, H, D),
        "V": torch.randn(B, T, H, DV),
    }
    return {**inputs, **changes}


def states(**changes):
    return {
        "initial_state": torch.zeros(B, H, ROWS, DV),
        "sum_of_keys": torch.zeros(B, H, ROWS),
        **changes,
    }


def packed(values, dtype=torch.int32, **changes):
    inputs = {
        "Q": torch.randn(1, T, HQ, D),
        "K": torch.randn(1, T, H, D),
        "V": torch.randn(1, T, H, DV),
    }
    return {**inputs, "cu_seqlens": torch.tensor(values, dtype=dtype), **changes}


TENSORS = [
    (good(Q="q"), TypeError, r"Q: expected a tensor \[b, tq?, hq, d\], got str"),
    (good(K=None), TypeError, r"K: expected a tensor"),
    (good(Q=torch.zeros(B, T, HQ, D).long()), TypeError, r"Q: expected one of .*got torch.int64"),
    (good(V=torch.zeros(B, T, H, DV, dtype=torch.complex64)), TypeError, r"V: expected one of"),
    (good(Q=torch.randn(T, HQ, D)), ValueError, r"Q: expected \[b, tq?, hq, d\], got \[6, 4, 16\]"),
    (good(K=torch.randn(B, T, H)), ValueError, r"K: expected \[b, t, h, d\], got"),
    (good(V=torch.randn(B, T, H, DV, 1)), ValueError, r"V: expected \[b, t, h, dv\], got"),
    (good(K=torch.randn(3, T, H, D)), ValueError, r"K: .* to match Q, got \[3, 6, 2, 16\]"),
    (good(K=torch.randn(B, T, H, 32)), ValueError, r"K: .* to match Q, got \[2, 6, 2, 32\]"),
    (good(V=torch.randn(3, T, H, DV)), ValueError, r"V: .* to match K, got \[3, 6, 2, 8\]"),
    (good(V=torch.randn(B, T + 1, H, DV)), ValueError, r"V: .* to match K, got \[2, 7, 2, 8\]"),
    (good(V=torch.randn(B, T, 1, DV)), ValueError, r"V: .* to match K, got \[2, 6, 1, 8\]"),
    (good(V=torch.randn(B, T, H, 0)), ValueError, r"V: .* dv of at least 1"),
    (good(K=torch.randn(B, T, H, D).double()), TypeError, r"K: expected torch.float32 as Q"),
    (good(V=torch.randn(B, T, H, DV).half()), TypeError, r"V: expected torch.float32 as Q"),
    (good(K=torch.randn(B, T, H, D, device="meta")), ValueError, r"K: expected device cpu as Q"),
    (
        good(K=torch.randn(B, T, 3, D), V=torch.randn(B, T, 3, DV)),
        ValueError,
        r"Q: expected a number of heads that is a multiple of K's 3, got 4",
    ),
    (
        good(K=torch.randn(B, T, 0, D), V=torch.randn(B, T, 0, DV)),
        ValueError,
        r"Q: expected a number of heads",
    ),
    (
        good(Q=torch.randn(B, T, HQ, 12), K=torch.randn(B, T, H, 12)),
        ValueError,
        r"Q: head dim: expected a positive multiple of 8, got 12",
    ),
    (good(log_G=torch.zeros(B, T, HQ)), ValueError, r"log_G: expected \[b, t, h\] = \[2, 6, 2\]"),
    (good(log_G=torch.zeros(B, T, H, 1)), ValueError, r"log_G: expected \[b, t, h\], got"),
    (good(log_G=torch.zeros(B, T, H).bfloat16()), TypeError, r"log_G: expected torch.float32"),
    (good(log_G=torch.zeros(B, T, H).double()), TypeError, r"log_G: expected torch.float32"),
    (good(log_G=torch.zeros(B, T, H).int()), TypeError, r"log_G: expected one of"),
    (good(log_G=torch.zeros(B, T, H, device="meta")), ValueError, r"log_G: expected device cpu"),
    (good(deg=3), ValueError, r"deg: expected a positive even integer, got 3"),
    (good(deg=0), ValueError, r"deg: expected a positive even integer, got 0"),
    (good(deg=-2), ValueError, r"deg: expected a positive even integer, got -2"),
    (good(deg=2.0), TypeError, r"deg: expected an integer, got float"),
    (good(deg=True), TypeError, r"deg: expected an integer, got bool"),
    (good(scale=0.0), ValueError, r"scale: expected a finite number other than 0, got 0.0"),
    (good(scale=float("nan")), ValueError, r"scale: expected a finite number"),
    (good(scale="1"), TypeError, r"scale: expected a number or None, got str"),
    (
        good(initial_state=states()["initial_state"]),
        ValueError,
        r"sum_of_keys: expected \[n, h, D\] beside initial_state, got None",
    ),
    (
        good(sum_of_keys=states()["sum_of_keys"]),
        ValueError,
        r"initial_state: expected a state beside sum_of_keys, got None",
    ),
    (
        good(**states(initial_state=torch.zeros(B, H, ROWS - 1, DV))),
        ValueError,
        r"initial_state: .* = \[2, 2, 192, 8\] to match Q, K, V and deg, got \[2, 2, 191, 8\]",
    ),
    (good(**states(sum_of_keys=torch.zeros(B, 1, ROWS))), ValueError, r"sum_of_keys: .* got"),
    (good(**states(), deg=4), ValueError, r"initial_state: .* = \[2, 2, 5280, 8\]"),
    (
        good(**states(initial_state=torch.zeros(B, H, ROWS, DV).half())),
        TypeError,
        r"initial_state: expected torch.float32 with torch.float32 inputs, got torch.float16",
    ),
    (
        good(**states(sum_of_keys=torch.zeros(B, H, ROWS, device="meta"))),
        ValueError,
        r"sum_of_keys: expected device cpu",
    ),
]

CHUNKED = [
    (good(Q=torch.randn(B, T + 1, HQ, D)), ValueError, r"K: .* to match Q"),
    (good(chunk_size=0), ValueError, r"chunk_size: expected an integer of at least 1, got 0"),
    (good(chunk_size=-4), ValueError, r"chunk_size: expected an integer of at least 1, got -4"),
    (good(chunk_size=8.0), TypeError, r"chunk_size: expected an integer, got float"),
    (good(switch_over_seq_len=-1), ValueError, r"switch_over_seq_len: .* at least 0, got -1"),
    (good(switch_over_seq_len="8"), TypeError, r"switch_over_seq_len: expected an integer"),
]

PACKED = [
    (packed([-1, T]), ValueError, r"cu_seqlens: expected to start at 0 or later, got -1"),
    (
        packed([*range(4), *[4] * 9000, 2, T]),
        ValueError,
        r"^cu_seqlens: expected values that never decrease, got 2 after 4 at index 9004$",
    ),
    (
        packed([0, T + 1]),
        ValueError,
        r"^cu_seqlens: expected to end at t = 6 or before, got 7$",
    ),
    (packed([0]), ValueError, r"cu_seqlens: expected \[n \+ 1\] with n of at least 1, got \[1\]"),
    (packed([[0, T]]), ValueError, r"cu_seqlens: expected \[n \+ 1\]"),
    (packed([0, T], torch.int64), TypeError, r"cu_seqlens: expected torch.int32, got torch.int64"),
    (packed([0, T], cu_seqlens=[0, T]), TypeError, r"cu_seqlens: .* got list"),
    (
        packed([0, T], cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
        ValueError,
        r"cu_seqlens: expected device cpu",
    ),
    (
        good(cu_seqlens=torch.tensor([0, T], dtype=torch.int32)),
        ValueError,
        r"Q: expected a batch of 1 with cu_seqlens, got 2",
    ),
    (
        packed([0, 3, T], **states(initial_state=torch.zeros(1, H, ROWS, DV))),
        ValueError,
        r"initial_state: .* = \[2, 2, 192, 8\]",
    ),
]


def check(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), TENSORS)
@pytest.mark.parametrize(
    "function",
    [retention.power_retention, retention.reference, retention.power_retention_inference],
    ids=lambda function: function.__name__,
)
def test_tensor_arguments(function, arguments, error, message):
    if function is retention.power_retention_inference and arguments.get("K", 0) is None:
        error, message = ValueError, "K: expected a tensor beside V, got None"
    check(function, arguments, error, message)


@pytest.mark.parametrize(("arguments", "error", "message"), CHUNKED)
def test_chunking_arguments(arguments, error, message):
    check(retention.power_retention, arguments, error, message)


@pytest.mark.parametrize(("arguments", "error", "message"), PACKED)
@pytest.mark.parametrize(
    "function", [retention.power_retention, retention.reference], ids=lambda f: f.__name__
)
def test_packed_arguments(function, arguments, error, message):
    check(function, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (good(Q=torch.randn(B, 0, HQ, D)), ValueError, r"Q: expected at least 1 query"),
        (good(Q=torch.randn(B, T + 1, HQ, D)), ValueError, r"K: .* the 7 tokens of Q, got 6"),
        (good(V=None), ValueError, r"V: expected a tensor beside K, got None"),
        (good(K=None, V=None), ValueError, r"K: expected a tensor where initial_state is None"),
        (
            good(K=None, V=None, log_G=torch.zeros(B, T, H), **states()),
            ValueError,
            r"log_G: expected None where K is None",
        ),
        (good(switch_over_seq_len=-1), ValueError, r"switch_over_seq_len: .* at least 0"),
    ],
)
def test_inference_arguments(arguments, error, message):
    check(retention.power_retention_inference, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head_dim": 12}, ValueError, r"head_dim: expected a positive multiple of 8, got 12"),
        ({"head_dim": 0}, ValueError, r"head_dim: expected a positive multiple of 8, got 0"),
        ({"head_dim": 8.0}, TypeError, r"head_dim: expected an integer, got float"),
        ({"head_dim": 8, "deg": 1}, ValueError, r"deg: expected a positive even integer, got 1"),
    ],
)
def test_state_dim_arguments(arguments, error, message):
    check(retention.state_dim, arguments, error, message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x: expected a floating point tensor, got list"),
        ({"x": torch.zeros(8).int()}, TypeError, r"x: expected a floating point tensor, got \[8\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected \[..., d\]"),
        ({"x": torch.zeros(9)}, ValueError, r"x: last dimension: .* multiple of 8, got 9"),
        ({"x": torch.zeros(8), "side": "value"}, ValueError, r"side: expected 'key' or 'query'"),
        ({"x": torch.zeros(8), "deg": 5}, ValueError, r"deg: expected a positive even integer"),
    ],
)
def test_expand_arguments(arguments, error, message):
    check(retention.expand, arguments, error, message)


@pytest.mark.parametrize(
    "function", [retention.power_retention, retention.power_retention_inference]
)
def test_unknown_keywords(function):
    check(function, good(chunk=4), TypeError, "unexpected keyword argument 'chunk'")
