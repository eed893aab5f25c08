"""Tests marked ``gpu`` run where there is a CUDA device that the build has kernels for; the fixture
``emulator`` runs the kernels on the CPU where the build has the emulator."""

import functools
import importlib.machinery
import importlib.util
import itertools
import logging
import math
import os
import re
import zlib

import pytest
import torch

from cases import use_kernels
from retention.ops import decoding_operators, operators
from retention.ops.cuda import coverage, decoding, launch

EMULATED = "RETENTION_EMULATED"  # names the folder of a module _C whose kernels the emulator runs


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return coverage.device_reason("cuda", 0)


def pytest_collection_modifyitems(items):
    reason = missing()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU with kernels: {reason}"))


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def emulated_module():
    folder = os.environ.get(EMULATED)
    if folder is None:
        return None
    spec = importlib.machinery.PathFinder.find_spec("_C", [folder])
    if spec is None:
        raise FileNotFoundError(f"{EMULATED}: expected a folder with a module _C, got {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aligned(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As a device's allocator: at a multiple of 256 bytes, with something in it."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)  # NaN in all floating types
    start = -memory.data_ptr() % 256
    return memory[start : start + size].view(dtype).view(shape)


@pytest.fixture
def emulator(monkeypatch, request):
    """Calls with tensors on the CPU take the kernels, and the emulator runs them."""
    module = emulated_module()
    if module is None:
        pytest.skip(f"needs kernels on the emulator: {EMULATED} is not set (see CONTRIBUTING.md)")
    use_kernels(monkeypatch, module)
    monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu", "meta"})
    # In the stream's place: the seed of the schedule in which a kernel's threads run.
    seeds = itertools.count(zlib.crc32(request.node.name.encode()))
    for launches in (launch, decoding):
        monkeypatch.setattr(launches, "current_device", lambda: torch.empty(0).get_device())
        monkeypatch.setattr(launches, "allocate", aligned)
        monkeypatch.setattr(launches, "current_stream", lambda device: next(seeds))
    with torch.library._scoped_library("retention", "IMPL") as library:
        library.impl("forward", operators._forward_cuda, "CPU")
        library.impl("backward", operators._backward_cuda, "CPU")
        for name, run in decoding_operators.on_cuda.items():
            library.impl(name, run, "CPU")
        yield


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where tensors are for kernels: on the emulator, and on a GPU."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("emulator")
    return "cpu"


@pytest.fixture
def decoding_paths(caplog):
    """``decoding_paths()``: operators that ran since the last question, and the path of each."""
    caplog.set_level(logging.DEBUG, logger="retention")

    def asked() -> list[tuple[str, str]]:
        found = [re.match(r"(decode_\w+|forward) on .*?: (.*?);", x) for x in caplog.messages]
        caplog.clear()
        return [(x[1], x[2]) for x in found if x]

    return asked
