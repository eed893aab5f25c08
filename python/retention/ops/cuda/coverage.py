"""Which calls the compiled kernels take."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

import retention._C as _C
from retention.ops.symmetric_power import state_dim

# The element types of kernels: their numbers in the host API, and their names in those of kernels.
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
_ELEMENT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DEVICE_TYPES = {"cuda"}
_MOST_FEATURES = 128  # of keys and of values
_LEAST_CAPABILITY = (8, 0)


class TensorLike(Protocol):
    """What describes a tensor, or is one."""

    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> Sequence[int]: ...


# Of this thread or task, unlike a global, which others would see change under their feet.
_turned_off: contextvars.ContextVar[bool] = contextvars.ContextVar("turned off", default=False)
_TURNED_OFF = "kernels are turned off"
# Whether `turned_off` is in force here. Not a function around it, for which every call would wait.
is_turned_off: Callable[[], bool] = _turned_off.get


@contextlib.contextmanager
def turned_off(off: bool = True) -> Iterator[None]:
    """Within, every call of this thread or task takes the PyTorch path: to compare with it.

    The backward pass of a call follows its forward pass, wherever it runs. In a graph of
    ``torch.compile`` it does not, but follows the thread that runs it.
    """
    token = _turned_off.set(off)
    try:
        yield
    finally:
        _turned_off.reset(token)


def device_reason(kind: str, index: int | None) -> str | None:
    """Why no call on this device takes the kernels; None where calls may."""
    return _TURNED_OFF if is_turned_off() else _reason_of_device(kind, index)


@functools.cache
def _reason_of_device(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"no kernels for {kind} devices"
    if torch.version.hip:
        return "no kernels for ROCm"
    build = _C.build_info()
    if not build["kernels"]:
        return "this build has no compiled kernels"
    capability = torch.cuda.get_device_capability(index)
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if capability < _LEAST_CAPABILITY:
        return f"no kernels for {shown}: expected 8.0 or more"
    if code_for(capability, build["cuda_architectures"]) is None:
        compiled = ", ".join(build["cuda_architectures"])
        return f"no kernels for {shown}: this build has {compiled}"
    return None


def dtype_reason(dtype: torch.dtype) -> str | None:
    """Why no kernel takes inputs of this dtype."""
    if dtype in ELEMENTS:
        return None
    names = {torch.float32: "fp32", torch.float64: "fp64"}
    return f"no kernel for {names[dtype]} inputs: expected bf16 or fp16"


def code_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """What of ``sm_NN`` and ``compute_NN`` a device runs: its own machine code, else PTX."""
    wanted = capability[0] * 10 + capability[1]
    usable = {}
    for architecture in architectures:
        kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", architecture).groups()
        number = int(number)
        if suffix == "a":  # of this device alone
            runs = number == wanted
        elif kind == "sm" or suffix == "f":  # of the same major version, from the minor one up
            runs = number // 10 == capability[0] and number <= wanted
        else:
            runs = number <= wanted
        if runs:
            usable[kind == "sm", number] = architecture
    return usable[max(usable)] if usable else None


@functools.cache
def kernel_dims(dtype: torch.dtype, d: int, dv: int, deg: int) -> tuple[int, int] | None:
    """Head dims (d, dv) of the cheapest compiled kernels that take tensors of these, with zeros
    behind their features where those are fewer; None where there are no such kernels.

    Zeros add nothing to a score, and the rows of a state that they have come after all others: the
    order of rows has pairs of blocks by their larger block.
    """
    name = re.compile(rf"forward_{_ELEMENT_NAMES.get(dtype)}_d(\d+)_dv(\d+)_p{deg}")
    compiled = [
        (int(match[1]), int(match[2]))
        for match in map(name.fullmatch, _C.build_info()["kernels"])
        if match
    ]
    wide_enough = [dims for dims in compiled if dims[0] >= d and dims[1] >= dv]
    return min(wide_enough, key=lambda dims: state_dim(dims[0], deg) * dims[1], default=None)


def cover(Q: Tensor, V: Tensor, deg: int) -> bool:
    """Whether there are kernels for such tensors. A call may still be too large for them."""
    if device_reason(Q.device.type, Q.device.index) is not None:
        return False
    return kernel_dims(Q.dtype, int(Q.shape[3]), int(V.shape[3]), deg) is not None


def saves_output(Q: TensorLike, V: TensorLike, deg: int) -> bool:
    """Whether forward saves the output and its residual for backward: on every path, where there
    are kernels for such tensors on some device and in some build.

    The arguments alone decide, so that a graph compiled or exported elsewhere knows the shapes.
    """
    return (
        Q.device.type in DEVICE_TYPES
        and Q.dtype in ELEMENTS
        and deg == 2
        and Q.shape[3] <= _MOST_FEATURES
        and V.shape[3] <= _MOST_FEATURES
    )
