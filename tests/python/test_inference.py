"""power_retention_inference against the definition, and decoding loops built from it."""

import pytest
import torch

import retention
from cases import RESETS, Case, error, make
from retention.ops import decoding, numerics
from test_cache import BF16, F16, F32, Config, Sequence

# Float64 on both sides; see test_power_retention.
TOLERANCE = 1e-11


def tail(inputs, tq):
    return inputs | {"Q": inputs["Q"][:, -tq:]}


@pytest.mark.parametrize("gate", [None, -0.5, -30.0])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 9), (3, 9), (9, 9)])
@pytest.mark.parametrize(("hq", "h"), [(4, 2), (3, 1)])
def test_queries_are_the_last_tokens(tq, tk, state, gate, hq, h):
    case = Case(t=tk, state=state, gate=gate, hq=hq, h=h)
    inputs = make(case)
    expected, final, keys = retention.reference(**inputs, return_final_state=True)
    for switch_over in (tk, tk + 1, None):
        out, new_state, new_keys = retention.power_retention_inference(
            **tail(inputs, tq), switch_over_seq_len=switch_over
        )
        assert error(out, expected[:, -tq:]) < TOLERANCE
        if switch_over == tk:
            assert error(new_state, final) < TOLERANCE
            assert error(new_keys, keys) < TOLERANCE
        else:
            assert new_state is inputs["initial_state"]
            assert new_keys is inputs["sum_of_keys"]


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("tq", [1, 4, 30])
def test_gates_that_reset(tq, reset, every):
    """Outputs, the folded state and gradients, as with other gates."""
    case = Case(t=30, state=True, gate=-0.05, reset=reset, every=every)
    inputs = {name: x.requires_grad_() for name, x in make(case).items()}
    expected = list(retention.reference(**inputs, return_final_state=True))
    expected[0] = expected[0][:, -tq:]
    actual = retention.power_retention_inference(**tail(inputs, tq), switch_over_seq_len=30)
    gradients = [
        torch.autograd.grad(sum(x.square().sum() for x in results), list(inputs.values()))
        for results in (actual, expected)
    ]
    for x, wanted in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert error(x, wanted) < TOLERANCE


def test_state_alone():
    case = Case(t=6, state=True, gate=None)
    inputs = make(case)
    state = {name: inputs[name] for name in ("initial_state", "sum_of_keys")}
    out, *same = retention.power_retention_inference(inputs["Q"], None, None, **state)
    assert same[0] is state["initial_state"]
    assert same[1] is state["sum_of_keys"]
    # A key and value of zero weigh nothing: the definition then reads the state alone.
    zero = torch.zeros_like(inputs["K"]), torch.zeros_like(inputs["V"])
    assert error(out, retention.reference(inputs["Q"], *zero, **state)) < TOLERANCE
    empty = {name: torch.zeros_like(x) for name, x in state.items()}
    out, *_ = retention.power_retention_inference(inputs["Q"], None, None, **empty)
    assert not out.any()


def test_many_queries_read_the_state_in_parts(monkeypatch):
    case = Case(t=9, state=True)
    inputs = make(case)
    # Three rows of phi at a time, of 2 sequences and 2 key heads.
    rows = 3 * case.b * case.h * retention.state_dim(case.d)
    monkeypatch.setattr(decoding, "_PHI_ELEMENTS", rows)
    out, *_ = retention.power_retention_inference(**tail(inputs, 7), switch_over_seq_len=None)
    assert error(out, retention.reference(**inputs)[:, -7:]) < TOLERANCE


@pytest.mark.parametrize("deg", [2, 4])
@pytest.mark.parametrize("switch_over", [1, 4, 100])
def test_token_by_token_is_the_whole(deg, switch_over):
    case = Case(t=23, gate=-0.5, deg=deg, d=8)
    inputs = make(case)
    expected = retention.reference(**inputs, deg=deg)
    state = keys = None
    start = 0
    for i in range(case.t):
        cache = (inputs[name][:, start : i + 1] for name in ("K", "V", "log_G"))
        out, state, keys = retention.power_retention_inference(
            inputs["Q"][:, i : i + 1], *cache, state, keys, deg, None, switch_over
        )
        assert error(out, expected[:, i : i + 1]) < TOLERANCE
        if i + 1 - start >= switch_over:
            start = i + 1


def test_prefill_then_decode():
    inputs = make(Case(t=30, gate=-0.5))
    expected, final, _ = retention.reference(**inputs, return_final_state=True)
    prompt = {name: x if x is None else x[:, :20] for name, x in inputs.items()}
    _, state, keys = retention.power_retention(**prompt, return_final_state=True, chunk_size=8)
    rest = {name: x[:, 20:] for name, x in inputs.items() if name in ("Q", "K", "V", "log_G")}
    out, state, keys = retention.power_retention_inference(
        **rest, initial_state=state, sum_of_keys=keys, switch_over_seq_len=10
    )
    assert error(out, expected[:, 20:]) < TOLERANCE
    assert error(state, final) < TOLERANCE


def test_gradients():
    inputs = make(Case(t=5, b=1, hq=2, h=1, d=8, dv=2, state=True))
    leaves = [inputs[name].requires_grad_() for name in inputs]

    def step(Q, *rest):
        return retention.power_retention_inference(Q[:, -2:], *rest, switch_over_seq_len=5)

    assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_queries_are_exact(dtype):
    exponents = torch.arange(-140, 128)[:, None]
    mantissas = torch.tensor([0.25, -0.75, 0.1], dtype=torch.float64)
    q = (mantissas * torch.exp2(exponents.double())).to(dtype)  # their largest is below 2^exponent
    scale = numerics.unit_scale(q)
    assert torch.equal(scale.double(), torch.exp2(-exponents.double().clamp(-125, 126)))
    assert numerics.unit_scale(torch.zeros(1, 5, dtype=dtype)) == 2.0**125


def test_low_precision_runs_in_float32():
    case = Case(t=40, state=True, gate=-0.1, magnitude=30.0)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = make(case)
        lower = {n: x.to(dtype) if n in "QKV" else x.float() for n, x in inputs.items()}
        exact = {n: x.double() for n, x in lower.items()}
        out, state, _ = retention.power_retention_inference(**tail(lower, 2), switch_over_seq_len=1)
        expected, final, _ = retention.reference(**exact, return_final_state=True)
        # One rounding of the output; the state has none but float32's.
        assert error(out.double(), expected[:, -2:]) < torch.finfo(dtype).eps
        assert error(state.double(), final) < 1e-5
        assert out.dtype == dtype
        assert state.dtype == torch.float32


# ---- by the kernels -----------------------------------------------------------------------------


def by_kernels(device, **changes):
    small = {"d": 32, "dv": 32, "by_kernels": True, "device": device}
    return Config(**{"formats": (BF16, F32), **small, **changes})


def seen(config, *parts):
    """Sequences of tokens in float64, from what ``config.tokens`` gives for all of them."""
    sequences = [Sequence(config) for _ in range(len(parts[0]["K"]))]
    for part in parts:
        for i, sequence in enumerate(sequences):
            sequence.append(*(x if x is None else x[i] for x in list(part.values())[1:]))
    return sequences


def states_of(config, sequences):
    """What was folded, in float32."""
    state, keys = (torch.stack(x) for x in zip(*(s.state() for s in sequences), strict=True))
    return {
        "initial_state": state.float().to(config.device),
        "sum_of_keys": keys.float().to(config.device),
    }


def assert_state(config, sequences, state, keys):
    for i, sequence in enumerate(sequences):
        exact = sequence.state()
        terms = exact[1].abs().max()
        for got, wanted, values in ((state, exact[0], sequence.v.abs().max()), (keys, exact[1], 1)):
            difference = (got[i].double().cpu() - wanted).abs().max()
            assert difference <= 1e-5 * (1 + wanted.abs().max()) + 2**-7 * terms * values


@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 40), (5, 9), (16, 16)])
@pytest.mark.parametrize(("dtype", "h", "ratio"), [(BF16, 2, 3), (F16, 3, 1)], ids=str)
def test_kernels(device, decoding_paths, dtype, tq, tk, state, gating, h, ratio):
    config = by_kernels(device, formats=(dtype, F32), h=h, ratio=ratio, gating=gating)
    past, new = config.tokens(1, 3, 7 if state else 0), config.tokens(2, 3, tk)
    inputs = tail(new, tq) | (states_of(config, seen(config, past)) if state else {})
    before = {name: x if x is None else x.clone() for name, x in inputs.items()}
    sequences = seen(config, past, new)
    for switch_over in (tk, tk + 1, None):
        folds = switch_over == tk
        out, new_state, new_keys = retention.power_retention_inference(
            **inputs, switch_over_seq_len=switch_over
        )
        ran = ["decode_step", "forward"] if folds else ["decode_step"]
        assert decoding_paths() == [(name, "kernels") for name in ran]
        assert out.dtype == dtype
        for i, sequence in enumerate(sequences):
            for j in range(tq):
                expected, allowed = sequence.output(inputs["Q"][i, j], len(sequence) - tq + j)
                assert ((out[i, j].double().cpu() - expected).abs() <= allowed).all()
        if folds:
            assert_state(config, sequences, new_state, new_keys)
        else:
            assert new_state is inputs.get("initial_state")
            assert new_keys is inputs.get("sum_of_keys")
    for name, x in inputs.items():
        assert x is None or torch.equal(x, before[name])


def test_kernels_read_a_state_alone(device, decoding_paths):
    config = by_kernels(device)
    past, queries = config.tokens(1, 2, 9), config.tokens(2, 2, 4)["Q"]
    sequences = seen(config, past)
    state = states_of(config, sequences)
    out, *same = retention.power_retention_inference(queries, None, None, **state)
    assert decoding_paths() == [("decode_step", "kernels")]
    assert all(x is y for x, y in zip(same, state.values(), strict=True))
    for i, sequence in enumerate(sequences):
        for j in range(4):
            expected, allowed = sequence.output(queries[i, j], len(sequence) - 1)
            assert ((out[i, j].double().cpu() - expected).abs() <= allowed).all()


def test_a_fold_by_kernels_keeps_the_digits_of_a_state(device):
    """Tokens that add nothing leave it as it was."""
    config = by_kernels(device, gating=False)
    state = states_of(config, seen(config, config.tokens(1, 2, 9)))
    new = config.tokens(2, 2, 3)
    new["K"].zero_()
    results = retention.power_retention_inference(**tail(new, 1), **state, switch_over_seq_len=1)
    for x, wanted in zip(results[1:], state.values(), strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    ("changes", "tokens", "grad"),
    [
        ({}, 4, True),
        ({"formats": (F32, F32)}, 4, False),
        ({"d": 24}, 4, False),
        ({"dv": 24}, 4, False),
        ({"deg": 4, "d": 8}, 4, False),
        ({}, 17, False),
        ({"h": 1, "ratio": 65}, 4, False),
    ],
    ids=str,
)
def test_what_kernels_do_not_take(device, decoding_paths, changes, tokens, grad):
    config = by_kernels(device, **changes)
    inputs = config.tokens(1, 2, tokens)
    exact = {name: x.double() for name, x in inputs.items()}
    inputs["K"].requires_grad_(grad)
    out, *_ = retention.power_retention_inference(**inputs, deg=config.deg)
    assert decoding_paths() == []
    expected, *_ = retention.power_retention_inference(**exact, deg=config.deg)
    assert torch.allclose(out.double(), expected, 2**-7, 1e-5)
    assert out.requires_grad == grad


def test_no_rows_for_kernels(device, decoding_paths):
    inputs = by_kernels(device).tokens(1, 0, 4)
    assert retention.power_retention_inference(**inputs)[0].shape == (0, 4, 2, 32)
    assert decoding_paths() == []


def test_a_transform_takes_no_kernels(device, decoding_paths):
    inputs = by_kernels(device).tokens(1, 1, 4)

    def decode(queries):
        return retention.power_retention_inference(**inputs | {"Q": queries})[0]

    out = torch.func.vmap(decode)(inputs["Q"][None])
    assert decoding_paths() == []
    with torch.no_grad():
        assert torch.allclose(out[0].double(), decode(inputs["Q"]).double(), 2**-6, 2**-8)
