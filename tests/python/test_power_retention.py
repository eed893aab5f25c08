"""power_retention against the definition, in float64: outputs, states and every gradient."""

import pytest
import torch

import retention
from cases import RESETS, Case, assert_close, make, run
from retention.ops.pytorch import chunked

# Both sides are float64; the chunked form adds the products in another order, over D terms instead
# of d. The largest condition number in the grid costs about three digits.
TOLERANCE = 1e-11

WIDE = torch.float64
LENGTHS = [0, 1, 2, 7, 8, 9, 16, 17, 37]


def check(case: Case, tolerance: float = TOLERANCE) -> None:
    inputs = make(case)
    expected = run(retention.reference, inputs, case, torch.float64)
    assert_close(run(retention.power_retention, inputs, case, torch.float64), expected, tolerance)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("gate", [None, -0.1, -3.0])
@pytest.mark.parametrize("t", LENGTHS)
def test_lengths_gates_and_states(t, gate, state):
    check(Case(t=t, gate=gate, state=state))


@pytest.mark.parametrize(("hq", "h"), [(1, 1), (2, 1), (3, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_grouped_query_heads(hq, h, state):
    check(Case(t=19, hq=hq, h=h, state=state))


@pytest.mark.parametrize(
    "case",
    [
        Case(t=21, d=8, dv=1, state=True),
        Case(t=21, d=24, dv=40, state=True),
        Case(t=21, d=64, dv=8, hq=2, h=1),
        Case(t=21, d=16, dv=8, deg=4, state=True),
        Case(t=21, d=24, dv=8, deg=4, hq=2, h=1, b=1),
        Case(t=11, d=8, dv=8, deg=6, hq=2, h=1, b=1, chunk=4),
        Case(t=11, d=8, dv=8, deg=8, hq=1, h=1, b=1, chunk=4),
    ],
    ids=str,
)
def test_head_dims_and_degrees(case):
    check(case)


@pytest.mark.parametrize("chunk", [1, 3, 8, 21, 22, 1000, None])
@pytest.mark.parametrize("switch_over", [0, 20, 21, None])
def test_every_chunking_is_the_same_function(chunk, switch_over):
    check(Case(t=21, chunk=chunk, switch_over=switch_over, state=True))


def test_chunks_wider_than_a_block_of_query_rows():
    check(Case(t=300, b=1, hq=2, h=1, d=8, dv=8, chunk=150, gate=-0.1, state=True))
    check(Case(t=300, b=1, hq=2, h=1, d=8, dv=8, chunk=150, gate=None))


def test_many_rows_are_worked_on_in_groups(monkeypatch):
    monkeypatch.setattr(chunked, "_CPU_BLOCK", 2000)
    assert len(list(chunked._groups(torch.empty(8, 16, 8), 2))) > 1
    check(Case(t=20, b=4, state=True))


@pytest.mark.parametrize("gate", [-10.0, -60.0])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_strong_gates(gate, state):
    check(Case(t=37, gate=gate, state=state))


def token_by_token(Q, K, V, log_G, initial_state, sum_of_keys):
    """The definition as a recurrence, which has no sum of gates in it."""
    r = Q.shape[2] // K.shape[2]
    S, z, outs = initial_state, sum_of_keys, []
    for i in range(Q.shape[1]):
        phi, decay = retention.expand(K[:, i]), log_G[:, i].exp()
        S = decay[..., None, None] * S + phi[..., None] * V[:, i, :, None]
        z = decay[..., None] * z + phi
        q = retention.expand(Q[:, i], side="query").unflatten(1, (-1, r))
        out = (q @ S) / (q @ z[..., None])
        outs.append(out.flatten(1, 2))
    return torch.stack(outs, 1), S, z


@pytest.mark.parametrize("every", [1, 3, 17])
@pytest.mark.parametrize("reset", RESETS)
def test_gates_that_reset(reset, every):
    case = Case(t=50, gate=-0.05, reset=reset, every=every, state=True, chunk=20)
    inputs = make(case)
    # Every query sees few keys: one orthogonal to them all is noise where a state is read.
    inputs["Q"] += inputs["K"].repeat_interleave(case.hq // case.h, 2)
    expected = run(lambda *, deg, return_final_state, **x: token_by_token(**x), inputs, case, WIDE)
    assert_close(run(retention.reference, inputs, case, WIDE), expected, TOLERANCE)
    assert_close(run(retention.power_retention, inputs, case, WIDE), expected, TOLERANCE)


def test_thousands_of_packed_sequences_are_not_thousands_of_calls(monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        function = getattr(chunked, name)
        monkeypatch.setattr(
            chunked, name, lambda *x, function=function: calls.append(0) or function(*x)
        )
    lengths = [0, 5, 1, 0, 0, 16, 33] * 600
    case = Case(t=sum(lengths) + 9, b=1, hq=1, h=1, d=8, dv=8, chunk=None, switch_over=None)
    inputs, cu_seqlens = packed(case, lengths)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}
    out = retention.power_retention(**leaves, cu_seqlens=cu_seqlens)
    out.square().sum().backward()
    assert len(calls) <= 40

    # The last seven, one by one.
    last = slice(case.t - 9 - 55, case.t - 9)
    few = {n: None if x is None else x.detach()[:, last].clone() for n, x in inputs.items()}
    few = {n: None if x is None else x.requires_grad_() for n, x in few.items()}
    bounds = torch.tensor([0, *lengths[:7]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wanted = retention.reference(**few, cu_seqlens=bounds)
    wanted.square().sum().backward()
    torch.testing.assert_close(out[:, last], wanted)
    for name in ("Q", "K", "V", "log_G"):
        torch.testing.assert_close(leaves[name].grad[:, last], few[name].grad)
        assert not leaves[name].grad[:, case.t - 9 :].any()


def test_rows_without_weight():
    case = Case(t=23, gate=-0.1, zero_rows=True)
    check(case)
    check(Case(t=23, gate=None, zero_rows=True, state=True))
    inputs = make(case)
    inputs["K"].zero_()
    outcome = run(retention.power_retention, inputs, case, torch.float64)
    assert not outcome["out"].any()
    assert not outcome["d_Q"].any()
    assert not outcome["d_V"].isnan().any()


def test_non_contiguous_inputs():
    case = Case(t=20, state=True)
    inputs = make(case)
    expected = run(retention.reference, inputs, case, torch.float64)
    strided = {
        name: None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)
        for name, x in inputs.items()
    }
    assert not strided["Q"].is_contiguous()
    assert_close(run(retention.power_retention, strided, case, torch.float64), expected, TOLERANCE)


def test_broadcast_inputs():
    case = Case(t=20)
    inputs = make(case)
    inputs["log_G"] = torch.full((1, 1, 1), -0.5, dtype=torch.float64).expand(2, 20, 2)
    expected = run(retention.reference, inputs, case, torch.float64)
    assert_close(run(retention.power_retention, inputs, case, torch.float64), expected, TOLERANCE)


def packed(case: Case, lengths: list[int]):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return make(case, sequences=len(lengths)), cu_seqlens


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("lengths", [[30], [0, 30, 0], [1, 8, 0, 17, 4], [9, 21], [0, 0]])
def test_packed_sequences(lengths, state):
    case = Case(t=sum(lengths), b=1, state=state)
    inputs, cu_seqlens = packed(case, lengths)
    expected = run(retention.reference, inputs, case, torch.float64, cu_seqlens=cu_seqlens)
    actual = run(retention.power_retention, inputs, case, torch.float64, cu_seqlens=cu_seqlens)
    assert_close(actual, expected, TOLERANCE)

    # The definition's own cutting is checked too: each sequence alone.
    start = 0
    for n, length in enumerate(lengths):
        alone = {k: x if x is None else x[:, start : start + length] for k, x in inputs.items()}
        for name in ("initial_state", "sum_of_keys"):
            alone[name] = None if inputs[name] is None else inputs[name][n : n + 1]
        out, final, keys = retention.power_retention(
            **alone, return_final_state=True, chunk_size=8, switch_over_seq_len=0
        )
        torch.testing.assert_close(out, actual["out"][:, start : start + length])
        torch.testing.assert_close(final, actual["state"][n : n + 1])
        torch.testing.assert_close(keys, actual["sum_of_keys_out"][n : n + 1])
        start += length


def test_an_empty_sequence_hands_its_state_through():
    inputs, cu_seqlens = packed(Case(t=5, b=1, state=True), [0, 5, 0])
    _, state, keys = retention.power_retention(
        **inputs, return_final_state=True, cu_seqlens=cu_seqlens
    )
    assert torch.equal(state[[0, 2]], inputs["initial_state"][[0, 2]])
    assert torch.equal(keys[[0, 2]], inputs["sum_of_keys"][[0, 2]])
    inputs.update(initial_state=None, sum_of_keys=None)
    _, state, keys = retention.power_retention(
        **inputs, return_final_state=True, cu_seqlens=cu_seqlens
    )
    assert not state[[0, 2]].any()
    assert not keys[[0, 2]].any()


def test_gradients_through_a_returned_state():
    case = Case(t=24, state=True)
    inputs = make(case)
    expected = run(retention.reference, inputs, case, torch.float64)

    def in_two_calls(Q, K, V, log_G, initial_state, sum_of_keys, return_final_state, **options):
        first, second = slice(0, 10), slice(10, None)
        out, state, keys = retention.power_retention(
            *(x[:, first] for x in (Q, K, V, log_G)),
            initial_state,
            True,
            sum_of_keys=sum_of_keys,
            chunk_size=4,
            **options,
        )
        rest, state, keys = retention.power_retention(
            *(x[:, second] for x in (Q, K, V, log_G)),
            state,
            True,
            sum_of_keys=keys,
            chunk_size=5,
            **options,
        )
        return torch.cat([out, rest], 1), state, keys

    assert_close(run(in_two_calls, inputs, case, torch.float64), expected, TOLERANCE)


def test_scale_cancels_and_is_no_part_of_the_state():
    case = Case(t=20, state=True)
    inputs = make(case)
    expected = run(retention.reference, inputs, case, torch.float64, scale=0.3)
    for scale in (None, 0.3, -2.0):
        actual = run(retention.power_retention, inputs, case, torch.float64, scale=scale)
        assert_close(actual, expected, TOLERANCE)


def test_results_do_not_share_memory_with_inputs():
    inputs = make(Case(t=0, state=True))
    before = {name: x if x is None else x.clone() for name, x in inputs.items()}
    _, state, keys = retention.power_retention(**inputs, return_final_state=True)
    assert torch.equal(state, inputs["initial_state"])
    state.add_(1)
    keys.add_(1)
    assert all(x is None or torch.equal(x, before[name]) for name, x in inputs.items())


def test_no_input_is_modified():
    case = Case(t=20, state=True, chunk=4)
    inputs = make(case)
    before = {name: x.clone() for name, x in inputs.items()}
    run(retention.power_retention, inputs, case, torch.float64)
    retention.power_retention_inference(
        **inputs | {"Q": inputs["Q"][:, -2:]}, switch_over_seq_len=1
    )
    assert all(torch.equal(x, before[name]) for name, x in inputs.items())


def test_bit_identical_from_run_to_run():
    case = Case(t=300, chunk=64, state=True, d=32, dv=32)
    inputs = make(case)
    first = run(retention.power_retention, inputs, case, torch.float32)
    for _ in range(5):
        again = run(retention.power_retention, inputs, case, torch.float32)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_state_dtypes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        Q = torch.randn(1, 20, 2, 16).to(dtype)
        out, state, keys = retention.power_retention(Q, Q, Q, return_final_state=True, chunk_size=8)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert (out.dtype, state.dtype, keys.dtype) == (dtype, wide, wide)


@pytest.mark.parametrize(
    ("head_dim", "quadratic", "chunked", "chunk"),
    [(32, 512, 2048, 256), (64, 2048, 4096, 512), (128, 8192, 16384, 1024)],
)
def test_chunks_are_chosen_by_shape(head_dim, quadratic, chunked, chunk):
    from retention.ops.pytorch.run import choose_chunk

    assert choose_chunk(quadratic, head_dim, head_dim, 2, None, None) == quadratic
    assert choose_chunk(chunked, head_dim, head_dim, 2, None, None) == chunk
    assert choose_chunk(chunked, head_dim, head_dim, 2, None, chunked) == chunked
    assert choose_chunk(chunked, head_dim, head_dim, 2, 100, None) == 100
    assert choose_chunk(100, head_dim, head_dim, 2, 100, None) == 100


@pytest.mark.parametrize("gate", [None, -0.1])
def test_a_later_token_changes_nothing_however_large(gate):
    inputs = {n: x if x is None else x.float() for n, x in make(Case(t=20, gate=gate)).items()}
    expected = retention.power_retention(**inputs)[:, :10]
    inputs["K"][:, 10:] = 1e30  # whose square is not finite
    assert torch.equal(retention.power_retention(**inputs)[:, :10], expected)
