"""Errors against float64, measured against those of the plain formula in the same dtype."""

import pytest
import torch

import retention
from cases import Case, error, make, run

LENGTH = 200


def rounded(inputs, dtype):
    """The float64 values that an input of this dtype holds: both sides start from them."""
    return {
        name: x if x is None else x.to(dtype if name in "QKV" else torch.float32).double()
        for name, x in inputs.items()
    }


def errors(outcome, exact):
    """Errors as a share of the largest value, without the floor of float64 comparisons."""
    scaled = {name: x.abs().max().clamp(min=1e-300) for name, x in exact.items()}
    return {name: error(outcome[name] / scaled[name], exact[name] / scaled[name]) for name in exact}


@pytest.mark.parametrize("magnitude", [2.0**-10, 1.0, 2.0**5])
@pytest.mark.parametrize("gate", [None, -0.05, -60.0])
@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_the_plain_formula(dtype, d, gate, magnitude):
    case = Case(t=LENGTH, b=1, d=d, dv=32, gate=gate, chunk=64, zero_rows=True)
    inputs = make(case)
    inputs = rounded(inputs | {name: inputs[name] * magnitude for name in ("Q", "K")}, dtype)
    # A power of two on Q and K changes no output and no relative error; at magnitude 1 the plain
    # formula is at its best, where elsewhere its own weights underflow.
    unit = inputs | {name: inputs[name] / magnitude for name in ("Q", "K")}
    exact = run(retention.reference, inputs, case, torch.float64, states_in_sum=False)
    chunked = run(retention.power_retention, inputs, case, dtype, states_in_sum=False)
    exact_unit = run(retention.reference, unit, case, torch.float64, states_in_sum=False)
    plain = run(retention.reference, unit, case, torch.float32, states_in_sum=False)
    chunked, plain = errors(chunked, exact), errors(plain, exact_unit)
    one_rounding = torch.finfo(dtype).eps
    for name, value in chunked.items():
        # States and their sums stay in float32 whatever the inputs.
        rounding = one_rounding if name in ("out", "d_Q", "d_K", "d_V") else 2.0**-23
        if name in ("state", "sum_of_keys_out", "d_log_G"):
            # Sums of terms of either sign, carried from chunk to chunk: one rounding each.
            rounding *= LENGTH / case.chunk
        assert value <= 2 * plain[name] + rounding, f"{name}: {value:.1e}, plain {plain[name]:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_keys_over_a_long_ungated_sequence(dtype):
    case = Case(t=4096, b=1, hq=1, h=1, d=16, dv=8, gate=None, chunk=256, magnitude=100.0)
    inputs = rounded(make(case), dtype)
    leaves = {name: x if x is None else x.to(dtype) for name, x in inputs.items()}
    out, state, _ = retention.power_retention(
        **leaves, return_final_state=True, chunk_size=256, switch_over_seq_len=0
    )
    expected, final, _ = retention.reference(**inputs, return_final_state=True)
    # 4096 additions in float32, and one rounding to the output's dtype.
    assert error(out.double(), expected) < torch.finfo(dtype).eps + 1e-5
    assert error(state.double(), final) < 1e-5


def test_the_output_does_not_depend_on_a_querys_magnitude():
    inputs = make(Case(t=40, gate=-0.1, chunk=8))
    single = {name: x if x is None else x.float() for name, x in inputs.items()}
    expected = retention.power_retention(**single, chunk_size=8)
    for power in (-100, 100):
        scaled = single | {"Q": torch.ldexp(single["Q"], torch.tensor(power))}
        assert torch.equal(retention.power_retention(**scaled, chunk_size=8), expected)
