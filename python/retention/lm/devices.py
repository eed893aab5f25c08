"""Devices and dtypes as the command line names them."""

from __future__ import annotations

import contextlib

import torch

from retention.lm.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    except (RuntimeError, AssertionError, NotImplementedError):
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
    return torch.autocast(device.type, dtype=DTYPES[dtype])
