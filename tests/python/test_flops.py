"""What FlopCounterMode counts of the operators, against counting one product at a time."""

import subprocess
import sys

import pytest
import torch
from retention.bench.problem import Problem, retention_work
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import retention
from cases import Case, make
from retention.ops.cuda import coverage, plans
from retention.ops.flops import flops as flops_of
from retention.ops.pytorch.run import choose_chunk


def products_by_hand(case, chunk, final, backward=False, kept=False):
    """Token by token: which products it has part in."""
    state = 2 * retention.state_dim(case.d, case.deg) * case.dv
    chunks = [range(n, min(n + chunk, case.t)) for n in range(0, case.t, chunk)]
    total = 0
    for n, tokens in enumerate(chunks):
        reads = n > 0 or case.state
        is_last = n == len(chunks) - 1
        for i in tokens:
            pairs = (i - tokens[0] + 1) * case.hq
            if backward:
                total += 2 * state * case.hq * reads  # dq and dS
                total += 2 * state * case.h * (not is_last or final)  # dk and dv
                total += state * case.h * (not is_last and not kept)  # the states again
                # The scores again, dq and dk; do . v and dv.
                total += 2 * (3 * case.d + 2 * case.dv) * pairs
            else:
                total += state * (case.hq * reads + case.h * (not is_last or final))
                total += 2 * (case.d + case.dv) * pairs  # the scores, and weights times values
    return case.b * total


@pytest.mark.parametrize(
    ("wanted", "state_products", "inside"),
    [
        # (of queries, of keys), beside the states themselves; (d, dv) of a pair
        ({0}, (1, 0), (2, 1)),
        ({1}, (1, 1), (2, 1)),
        ({2}, (1, 1), (1, 1)),
        ({3}, (2, 1), (3, 1)),
        ({4, 5}, (1, 0), (0, 0)),
        ({0, 2}, (2, 1), (2, 2)),
    ],
)
def test_gradients_that_nobody_wants_are_not_counted(wanted, state_products, inside):
    case = Case(t=20, b=2)
    sizes = {"b": 2, "t": 20, "hq": 4, "h": 2, "d": 16, "dv": 12, "deg": 2, "chunk": 8}
    flags = [n in wanted for n in range(6)]
    flops = flops_of(**sizes, before=True, after=True, backward=True, wanted=flags)
    state = 2 * retention.state_dim(16) * 12
    again = 16 * 2 if wanted & {0, 3} else 0  # tokens and heads whose keys make the states again
    products = state * (state_products[0] * 20 * 4 + state_products[1] * 20 * 2 + again)
    pairs = 4 * sum(n % 8 + 1 for n in range(20))
    products += 2 * (inside[0] * case.d + inside[1] * case.dv) * pairs
    assert flops == 2 * products


def counted(function):
    counter = FlopCounterMode(display=False)
    with counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize(("t", "chunk"), [(24, 8), (25, 8), (8, 8), (5, 8), (1, 1)])
@pytest.mark.parametrize("deg", [2, 4])
def test_forward_and_backward(t, chunk, state, final, deg):
    case = Case(t=t, d=16, dv=12, deg=deg, state=state)
    inputs = {n: x if x is None else x.requires_grad_() for n, x in make(case).items()}

    def forward():
        options = {"deg": deg, "chunk_size": chunk, "return_final_state": final}
        results = retention.power_retention(**inputs, switch_over_seq_len=0, **options)
        return torch.cat([x.flatten() for x in results]) if final else results

    flops, out = counted(forward)
    assert flops == products_by_hand(case, chunk, final)
    flops, _ = counted(lambda: out.backward(torch.ones_like(out)))
    assert flops == products_by_hand(case, chunk, final, backward=True)


def test_no_tokens():
    inputs = make(Case(t=0))
    assert counted(lambda: retention.power_retention(**inputs))[0] == 0


@pytest.mark.parametrize("t", [100, 4096])
def test_the_chunk_that_is_chosen(t):
    case = Case(t=t, b=1, hq=2, h=1, d=32, dv=32)
    chunk = choose_chunk(t, 32, 32, 2, None, None)
    inputs = {name: x if x is None else x.to("meta") for name, x in make(case).items()}
    flops, _ = counted(lambda: retention.power_retention(**inputs))
    assert flops == products_by_hand(case, chunk, False)


def test_packed_sequences_are_one_of_all_tokens():
    case = Case(t=30, b=1)
    cu_seqlens = torch.tensor([0, 9, 9, 30], dtype=torch.int32)
    options = {"chunk_size": 8, "switch_over_seq_len": 0}
    flops, _ = counted(
        lambda: retention.power_retention(**make(case), cu_seqlens=cu_seqlens, **options)
    )
    assert flops == products_by_hand(case, 8, False)


def test_fakes_on_a_device_that_is_not_there():
    case = Case(t=40, d=64, dv=32)
    with FakeTensorMode():
        inputs = [
            torch.empty(x.shape, dtype=torch.bfloat16 if n < 3 else torch.float32, device="cuda")
            for n, x in enumerate(make(case).values())
            if x is not None
        ]
        flops, _ = counted(lambda: retention.power_retention(*inputs, chunk_size=8))
    assert flops == products_by_hand(case, 8, False)


def test_the_chunk_that_kernels_take(monkeypatch):
    monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(
        plans, "chunk_taken", lambda operands, options: 8 if options.keep_states else 16
    )
    case = Case(t=40)
    inputs = {n: x if x is None else x.requires_grad_() for n, x in make(case).items()}
    flops, out = counted(lambda: retention.power_retention(**inputs, chunk_size=4))
    assert flops == products_by_hand(case, 16, False)
    flops, _ = counted(lambda: out.backward(torch.ones_like(out)))
    assert flops == products_by_hand(case, 8, False, backward=True)


def test_states_that_were_kept_are_not_made_again():
    sizes = {"b": 2, "t": 20, "hq": 4, "h": 2, "d": 16, "dv": 12, "deg": 2, "chunk": 8}
    flops = flops_of(**sizes, before=False, after=False, backward=True, kept=True)
    assert flops == products_by_hand(Case(t=20), 8, False, backward=True, kept=True)


@pytest.mark.parametrize("chunk", [256, 4096])
def test_retention_bench_counts_the_same(chunk):
    """But for the first and the last chunk, which it counts as all others."""
    p = Problem(t=4096, chunk=chunk)
    sizes = {"b": p.b, "t": p.t, "hq": p.hq, "h": p.h, "d": p.d, "dv": p.d, "deg": 2}
    rows = retention.state_dim(p.d)
    ours = [
        flops_of(**sizes, chunk=chunk, before=chunk < p.t, after=chunk < p.t, backward=backward)
        for backward in (False, True)
    ]
    again = 2 * rows * p.d * chunk * p.h * (chunk < p.t)  # of the last chunk
    assert ours[0] == retention_work(p, False, rows).flops
    assert sum(ours) + again == retention_work(p, True, rows).flops


@pytest.mark.parametrize("first", ["retention", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    program = f"""
import {first}
import retention, torch
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 4, 1, 8)
with FlopCounterMode(display=False) as counter:
    retention.power_retention(x, x, x)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{2 * 16 * 10}\n"), done.stderr
