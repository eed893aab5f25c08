"""Everything private of PyTorch that this package uses, and what does without it.

A call of small tensors waits for the host, and the public ways to these take microseconds each, or
do not exist. Private names may change in any release: where one is missing, its public stand-in is
slower or more careful, and gives the same results.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# ---- devices ------------------------------------------------------------------------------------


def _current_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def _find(path: str, otherwise: Any) -> Any:
    """``torch._C.<path>``; ``otherwise`` where there is none, as in a PyTorch without CUDA."""
    found: Any = torch._C
    for name in path.split("."):
        found = getattr(found, name, None)
    return otherwise if found is None else found


current_device: Callable[[], int] = _find("_cuda_getDevice", torch.cuda.current_device)
# The handle of a device's current stream.
current_stream: Callable[[int], int] = _find("_cuda_getCurrentRawStream", _current_raw_stream)
# A tensor on the current CUDA device, of a shape, strides and a dtype.
allocate: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = _find(
    "_dynamo.guards._empty_strided_cuda", _empty_strided
)


# ---- the dispatcher -----------------------------------------------------------------------------


def _raw_keys(*names: str) -> int | None:
    """The bits of a set of dispatch keys; None where PyTorch has another way to say it."""
    try:
        sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
        return functools.reduce(operator.or_, sets).raw_repr()
    except (AttributeError, TypeError):
        return None


# The keys of a call at the Autograd key where the CUDA kernel is the next one: tensors of a CUDA
# device without subclasses, modes or tracing.
_CUDA_IS_NEXT = _raw_keys("AutogradCUDA", "CUDA")
# Where PyTorch does not tell, a level of forward-mode differentiation may be active.
_levels: Any = (
    forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
)


def cuda_is_next(keys: Any) -> bool:
    """Whether, at the Autograd key, nothing stands between a call with ``keys`` and the kernel for
    CUDA devices, forward-mode differentiation included. No, where PyTorch does not tell."""
    # Tangents of forward mode are seen in neither the keys nor requires_grad.
    known = _CUDA_IS_NEXT is not None
    return known and keys.raw_repr() == _CUDA_IS_NEXT and _levels._current_level < 0


def forward_mode_is_active() -> bool:
    """Whether a level of forward-mode differentiation is; yes, where PyTorch does not tell."""
    return _levels._current_level >= 0


_below_autograd: Any = _find("_AutoDispatchBelowAutograd", None)
_keys_below_autograd: Any = _find("_after_autograd_keyset", None)


def call_below_autograd(overload: Any, keys: Any, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What comes after the Autograd key, for an operator whose results are new tensors."""
    if _below_autograd is not None and _keys_below_autograd is not None:
        with _below_autograd():
            return overload.redispatch(keys & _keys_below_autograd, *arguments)
    # Inference mode leaves the Autograd key out, but autograd does not record tensors made in it.
    with torch.inference_mode():
        results = overload(*arguments)
    return tuple(x.clone() for x in results)


def below_autograd(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` without gradients, and where possible without a look for them in every operation."""
    guard = torch.no_grad if _below_autograd is None else _below_autograd

    @functools.wraps(run)
    def guarded(*arguments: Any) -> Any:
        with guard():
            return run(*arguments)

    return guarded


# ---- transforms ---------------------------------------------------------------------------------

_functorch_is_active: Callable[[], bool] | None = _find("_are_functorch_transforms_active", None)


def functorch_is_active(unknown: bool) -> bool:
    """Whether a transform of ``torch.func`` is; ``unknown`` where PyTorch does not tell."""
    return unknown if _functorch_is_active is None else _functorch_is_active()


_modes_on_the_stack: Callable[[], int] | None = _find("_len_torch_dispatch_stack", None)


def nothing_intercepts() -> bool:
    """Whether calls of operators with ordinary tensors go to their kernels: nobody compiles,
    transforms, or sees them on their way. No, where PyTorch does not tell."""
    return (
        not torch.compiler.is_compiling()
        and _modes_on_the_stack is not None
        and _modes_on_the_stack() == 0
        and not functorch_is_active(unknown=True)
    )


# ---- compilation --------------------------------------------------------------------------------


def stays_in_place(x: Tensor) -> None:
    """Tells torch.compile that a tensor keeps its address, and is changed there. Where PyTorch has
    no way to, what is compiled copies it before it is captured in a CUDA graph."""
    mark = getattr(torch._dynamo, "mark_static_address", None)
    if mark is not None:
        mark(x)


# ---- process groups -----------------------------------------------------------------------------

# For where PyTorch does not find a group by its name.
_groups: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
# The process group of a name.
process_group: Callable[[str], Any] = _find(
    "_distributed_c10d._resolve_process_group", _groups.__getitem__
)


def group_name(group: Any) -> str:
    """A name by which ``process_group`` finds it."""
    if process_group == _groups.__getitem__:
        _groups[group.group_name] = group
    return group.group_name
