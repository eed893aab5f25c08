"""Tests marked ``gpu`` run where there is a CUDA device that the build has kernels for."""

import pytest
import torch

from retention import _kernels


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _kernels.device_reason("cuda", 0)


def pytest_collection_modifyitems(items):
    reason = missing()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU with kernels: {reason}"))
