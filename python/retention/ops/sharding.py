"""How the operators take DTensors: sharded by batch, by heads, or not at all.

Every tensor of a call is cut as the others are, and a key head stays with its query heads. What is
sharded otherwise, DTensor redistributes first.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from retention.ops import call
from retention.ops.cuda.coverage import saves_output

# [n, h, D, dv] and [n, h, D]; in all others but these and those that have neither, heads are third.
_STATES = {"initial_state", "sum_of_keys", "state", "d_state", "d_keys", "d_initial_state"}
_WITHOUT = {"cu_seqlens", "kept"}


def register() -> None:
    """For all DTensors."""
    forward = _strategy(
        call.FORWARD_ARGUMENTS, call.FORWARD_DEFAULTS, call.FORWARD_RESULTS, _missing_of_forward
    )
    backward = _strategy(call.BACKWARD_ARGUMENTS, {}, call.BACKWARD_RESULTS, _missing_of_backward)
    register_sharding(torch.ops.retention.forward.default)(forward)
    register_sharding(torch.ops.retention.backward.default)(backward)


def _strategy(
    names: tuple[str, ...], defaults: dict[str, Any], results: tuple[str, ...], missing: Any
) -> Any:
    """What ``register_sharding`` asks for: a function from the operator's arguments, with specs in
    the tensors' places, to pairs of placements of results and of arguments."""

    def shardings(*arguments: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        passed = dict(zip(names, arguments, strict=False)) | named
        given = defaults | passed
        ways = ["not at all"]
        if given["cu_seqlens"] is None:
            ways.append("batch")
        if _can_be_cut(given["K"].shape[2], given["K"].mesh.shape):
            ways.append("heads")
        empty = missing(given)
        return [
            (
                [_placement(name, way, name in empty) for name in results],
                [
                    _placement(name, way, value.shape.numel() == 0)
                    if hasattr(value, "placements")
                    else None
                    for name, value in passed.items()
                ],
            )
            for way in ways
        ]

    return shardings


def _placement(name: str, way: str, empty: bool) -> Replicate | Shard:
    if empty or way == "not at all" or name in _WITHOUT:
        return Replicate()
    if way == "batch":
        return Shard(0)
    return Shard(1 if name in _STATES else 2)


def _can_be_cut(heads: int, mesh_shape: tuple[int, ...]) -> bool:
    """Into parts of as many key heads, along any dimensions of the mesh that have parts for all.

    Parts of different sizes would not have the query heads of their key heads.
    """
    sizes = itertools.chain.from_iterable(
        itertools.combinations(mesh_shape, n) for n in range(1, len(mesh_shape) + 1)
    )
    return all(heads % n == 0 for n in map(math.prod, sizes) if n <= heads)


def _missing_of_forward(given: dict[str, Any]) -> set[str]:
    """Results that are empty."""
    Q, V = (
        SimpleNamespace(
            device=torch.device(x.mesh.device_type), dtype=x.tensor_meta.dtype, shape=x.shape
        )
        for x in (given["Q"], given["V"])
    )
    missing = set() if given["return_final_state"] else {"state", "sum_of_keys"}
    if not (given["save_for_backward"] and saves_output(Q, V, given["deg"])):
        missing.add("residual")
    return missing


def _missing_of_backward(given: dict[str, Any]) -> set[str]:
    """Gradients that are empty: those of inputs that are None, and those that nobody wants."""
    return {
        name
        for name, of, want in zip(
            call.BACKWARD_RESULTS, call.Operands._fields[:6], given["wanted"], strict=True
        )
        if not want or given[of] is None
    }
