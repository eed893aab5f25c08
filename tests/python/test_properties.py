"""What must hold for any sequence, whatever Hypothesis makes of it."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import retention
from cases import RESETS, Case, assert_close, error, make, run

# Float64 on both sides; see test_power_retention.
TOLERANCE = 1e-10

settings.register_profile("retention", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("retention")


@st.composite
def cases(draw):
    h = draw(st.integers(1, 3))
    return Case(
        t=draw(st.integers(0, 40)),
        b=draw(st.integers(1, 3)),
        h=h,
        hq=h * draw(st.integers(1, 3)),
        d=8 * draw(st.integers(1, 3)),
        dv=draw(st.integers(1, 9)),
        deg=draw(st.sampled_from([2, 2, 2, 4])),
        gate=draw(st.sampled_from([None, -0.01, -1.0, -20.0])),
        reset=draw(st.sampled_from([None, None, *RESETS])),
        every=draw(st.integers(1, 12)),
        state=draw(st.booleans()),
        chunk=draw(st.integers(1, 50)),
    )


@given(cases(), st.integers(0, 2**31), st.data())
def test_any_split_into_calls_is_the_same(case, seed, data):
    inputs = make(case, seed)
    expected = retention.power_retention(**inputs, return_final_state=True, deg=case.deg)
    cuts = sorted(data.draw(st.lists(st.integers(0, case.t), max_size=4)))
    state, keys = inputs.pop("initial_state"), inputs.pop("sum_of_keys")
    outs = []
    for start, stop in zip([0, *cuts], [*cuts, case.t], strict=True):
        part = {name: x if x is None else x[:, start:stop] for name, x in inputs.items()}
        out, state, keys = retention.power_retention(
            **part,
            initial_state=state,
            sum_of_keys=keys,
            return_final_state=True,
            deg=case.deg,
            chunk_size=case.chunk,
        )
        outs.append(out)
    for actual, wanted in zip((torch.cat(outs, 1), state, keys), expected, strict=True):
        assert error(actual, wanted) < TOLERANCE


@given(cases(), st.integers(0, 2**31), st.randoms())
def test_permuting_the_batch_permutes_the_result(case, seed, random):
    inputs = make(case, seed)
    order = list(range(case.b))
    random.shuffle(order)
    options = {"return_final_state": True, "deg": case.deg, "chunk_size": case.chunk}
    expected = retention.power_retention(**inputs, **options)
    permuted = {name: x if x is None else x[order] for name, x in inputs.items()}
    actual = retention.power_retention(**permuted, **options)
    for x, wanted in zip(actual, expected, strict=True):
        assert error(x, wanted[order]) < TOLERANCE


@given(cases(), st.integers(0, 2**31), st.integers(1, 12))
def test_quadratic_chunked_and_token_by_token_agree(case, seed, switch_over):
    inputs = make(case, seed)
    options = {"return_final_state": True, "deg": case.deg}
    quadratic = retention.power_retention(**inputs, **options, switch_over_seq_len=case.t)
    chunked = retention.power_retention(
        **inputs, **options, chunk_size=case.chunk, switch_over_seq_len=0
    )
    for actual, wanted in zip(chunked, quadratic, strict=True):
        assert error(actual, wanted) < TOLERANCE

    state, keys = inputs["initial_state"], inputs["sum_of_keys"]
    start = 0
    for i in range(case.t):
        cache = (x if x is None else x[:, start : i + 1] for x in list(inputs.values())[1:4])
        last = switch_over if i + 1 < case.t else 1  # the last call folds what is left
        out, state, keys = retention.power_retention_inference(
            inputs["Q"][:, i : i + 1],
            *cache,
            state,
            keys,
            case.deg,
            switch_over_seq_len=last,
        )
        assert error(out, quadratic[0][:, i : i + 1]) < TOLERANCE
        if i + 1 - start >= last:
            start = i + 1
    if case.t:
        assert error(state, quadratic[1]) < TOLERANCE
        assert error(keys, quadratic[2]) < TOLERANCE


@given(
    cases(),
    st.integers(0, 2**31),
    st.lists(st.integers(0, 12) | st.just(0), min_size=1, max_size=9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_packed_sequences_know_nothing_of_each_other_nor_of_what_lies_around(
    case, seed, lengths, first, tail
):
    end = first + sum(lengths)
    case = dataclasses.replace(case, t=end + tail, b=1)
    inputs = make(case, seed, sequences=len(lengths))
    for name in ("Q", "K", "V", "log_G"):
        if inputs[name] is not None:
            inputs[name][:, :first] = torch.nan
            inputs[name][:, end:] = torch.nan
    bounds = torch.tensor([first, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    actual = run(retention.power_retention, inputs, case, torch.float64, cu_seqlens=bounds)
    expected = run(retention.reference, inputs, case, torch.float64, cu_seqlens=bounds)
    assert_close(actual, expected, TOLERANCE)
    for name in ("out", "d_Q", "d_K", "d_V", "d_log_G"):
        assert name not in actual or not actual[name][:, :first].any()
        assert name not in actual or not actual[name][:, end:].any()
    # Cut by the test, not by what it tests.
    for n, start in enumerate(bounds[:-1].tolist()):
        tokens = slice(start, start + lengths[n])
        alone = {
            name: x if x is None else (x[n : n + 1] if "s" in name else x[:, tokens])
            for name, x in inputs.items()
        }
        out, state, _ = retention.power_retention(
            **alone, return_final_state=True, deg=case.deg, chunk_size=case.chunk
        )
        assert error(actual["out"][:, tokens], out) < TOLERANCE
        assert error(actual["state"][n : n + 1], state) < TOLERANCE


@given(cases(), st.integers(0, 2**31))
def test_outputs_are_averages_of_values(case, seed):
    inputs = make(Case(**{**vars(case), "state": False}), seed)
    inputs["V"] = inputs["V"].abs()
    out = retention.power_retention(**inputs, deg=case.deg, chunk_size=case.chunk)
    largest = inputs["V"].amax((1, 3)).repeat_interleave(case.hq // case.h, 1) if case.t else None
    if case.t:
        assert (out >= -1e-9).all()
        assert (out <= largest[:, None, :, None] + 1e-9).all()
