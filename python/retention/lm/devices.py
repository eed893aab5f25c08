"""Devices and dtypes as the command line names them, and how to tell that memory ran out."""

from __future__ import annotations

import contextlib

import torch

from retention.lm.errors import UsageError

_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED", "Storage size calculation")


def default_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: where PyTorch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name)
        # Asking for a number back proves that the device computes; "meta" does not.
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        found = ", ".join(there)
        raise UsageError(f"--device: {name!r} is not available here; found: {found}") from None
    return device


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Products in `dtype`; parameters and everything that adds up stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, streams and events are that device's, where it is a CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there is not as much memory as was asked for, or could not be anywhere."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Other allocators, libraries and sizes beyond 2^63 have no type of their own.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
