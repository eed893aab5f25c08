"""Inputs, yardsticks and comparisons shared by the tests of power retention."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import retention
from retention.ops.cuda import coverage, decoding, launch, plans, shares

# Log gates that end a document: from one whose sums lose digits to those that have none.
RESETS = (-1e4, -1e6, -1e9, torch.finfo(torch.float32).min, -torch.inf)

INPUTS = ("Q", "K", "V", "log_G", "initial_state", "sum_of_keys")


@dataclass(frozen=True)
class Case:
    """The shape of one call. ``gate`` is the most negative log gate; None: no gates. Where there is
    a ``reset``, tokens ``every - 1``, ``2 every - 1``, .. have that log gate instead."""

    t: int
    b: int = 2
    hq: int = 4
    h: int = 2
    d: int = 16
    dv: int = 12
    deg: int = 2
    gate: float | None = -1.0
    state: bool = False
    chunk: int | None = 8
    switch_over: int | None = 0
    magnitude: float = 1.0
    zero_rows: bool = False
    reset: float | None = None
    every: int = 1

    def __str__(self) -> str:
        changed = [f"{k}{v}" for k, v in vars(self).items() if v != getattr(Case(t=-1), k)]
        return "-".join(changed)

    def __hash__(self) -> int:
        return hash(str(self))


def make(case: Case, seed: int = 0, sequences: int | None = None) -> dict[str, Tensor | None]:
    """Float64 inputs; what a lower dtype cannot hold is rounded away where it is asked for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, t, h = case.b, case.t, case.h
    Q = normal(b, t, case.hq, case.d) * case.magnitude
    K = normal(b, t, h, case.d) * case.magnitude
    V = normal(b, t, h, case.dv) * case.magnitude
    if case.zero_rows:
        Q[:, ::5] = 0
        K[:, 1::4] = 0
        V[:, ::7] = 0
    log_G = None
    if case.gate is not None:
        log_G = case.gate * torch.rand(b, t, h, generator=generator, dtype=torch.float64)
        if case.reset is not None:
            log_G[:, case.every - 1 :: case.every] = case.reset
    state = keys = None
    if case.state:
        # A state that is one: made of keys and values, a few tokens long.
        past = normal(sequences or b, h, 3, case.d) * case.magnitude
        phi = retention.expand(past, case.deg)
        state = phi.mT @ normal(sequences or b, h, 3, case.dv)
        keys = phi.sum(2)
    return dict(zip(INPUTS, (Q, K, V, log_G, state, keys), strict=True))


def cast(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Leaves in the dtypes that a call takes: gates and states in float32, or float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: None
        if x is None
        else x.to(dtype if name in ("Q", "K", "V") else wide).detach().requires_grad_()
        for name, x in inputs.items()
    }


def call(function, inputs, case: Case, **options):
    """``function`` on the inputs, chunked as the case says where it is power_retention."""
    if function is retention.power_retention:
        options = {
            "chunk_size": case.chunk,
            "switch_over_seq_len": case.switch_over,
            **options,
        }
    return function(**inputs, deg=case.deg, **options)


def run(
    function, inputs, case: Case, dtype: torch.dtype, *, states_in_sum: bool = True, **options
) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed random sum of out, state and sum_of_keys, as float64.

    The sum's weights are eighths, which every dtype holds: all dtypes differentiate the same sum.
    """
    leaves = cast(inputs, dtype)
    results = call(function, leaves, case, return_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for x in results if states_in_sum else results[:1]:
        weight = torch.randint(-8, 9, x.shape, generator=generator, dtype=torch.float64) / 8
        loss = loss + (x.double() * weight.to(x.device)).sum()
    names = [name for name, x in leaves.items() if x is not None]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names], allow_unused=True)
    outcome = dict(zip(("out", "state", "sum_of_keys_out"), results, strict=True))
    for name, gradient in zip(names, gradients, strict=True):
        outcome[f"d_{name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return {name: x.detach().double() for name, x in outcome.items()}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected magnitude.

    A gradient that cancels to nothing (one token alone, a strong gate) leaves only the rounding of
    terms of order 1: what is below 0.1 counts as 0.1.
    """
    assert actual.shape == expected.shape, f"{list(actual.shape)} for {list(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (actual - expected).abs()
    assert difference.isfinite().all(), "not finite"
    return (difference.max() / expected.abs().max().clamp(min=0.1)).item()


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert all(e <= tolerance for e in errors.values()), f"over {tolerance:.1e}: {errors}"


def use_kernels(monkeypatch: pytest.MonkeyPatch, binding: Any) -> None:
    """Have calls take the kernels of ``binding`` in the compiled module's place, on any device."""
    for module in (coverage, plans, launch, decoding, shares):
        monkeypatch.setattr(module, "_C", binding)
    for module in (plans, decoding):
        monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(coverage, "_reason_of_device", lambda kind, index: None)
    uncached = coverage.kernel_dims.__wrapped__
    monkeypatch.setattr(coverage, "kernel_dims", functools.cache(uncached))
