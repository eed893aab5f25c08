"""What is installed: versions, the compiled part, the devices, and the path each would take."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import retention._C as _C
from retention.ops.cuda import coverage

_GIB = 1024**3
_KERNEL_NAME = r"([a-z]+)_([a-z0-9]+)_d(\d+)_dv(\d+)_p(\d+)"


def info() -> dict[str, Any]:
    """Describe this installation of retention.

    Returns:
        A dict of plain values, fit for ``json.dumps``:

        - ``version``: of the package.
        - ``torch``: version of PyTorch.
        - ``build``: how the compiled part was built: ``version``, ``compiler``, ``cuda`` (whether
          the CUDA part was built), ``cuda_toolkit`` and ``cutlass`` (a version or None),
          ``cuda_architectures`` (``sm_NN`` is machine code, ``compute_NN`` is PTX) and ``kernels``
          (names of the compiled kernels).
        - ``devices``: a list with a dict for the CPU and one for each visible accelerator:
          ``device`` (as ``torch.device`` takes it), ``name``, ``memory`` (bytes, or None where
          unknown), ``compute_capability`` (such as "9.0", CUDA devices only, else None),
          ``path`` (what ``power_retention`` runs there: "kernels", the compiled ones, for the calls
          that they cover, padded where their heads are wider, or "pytorch", the chunked algorithm
          in PyTorch operations) and ``reason`` (why that path).
    """
    build = _C.build_info()
    return {
        "version": build["version"],
        "torch": torch.__version__,
        "build": build,
        "devices": [_cpu(build), *_accelerators(build)],
    }


def format_info(info: dict[str, Any]) -> str:
    """Lay out what `info` returned as lines of aligned text, without a newline at the end."""
    build = info["build"]
    cuda = "not built"
    if build["cuda"]:
        cuda = f"toolkit {build['cuda_toolkit']} for {', '.join(build['cuda_architectures'])}"
    lines = [
        ("retention", info["version"]),
        ("torch", info["torch"]),
        ("compiler", build["compiler"]),
        ("CUDA", cuda),
        ("CUTLASS", build["cutlass"] or "none"),
    ]
    table = _kernel_table(build["kernels"])
    lines += [("" if n else "kernels", row) for n, row in enumerate(table)]
    for device in info["devices"]:
        parts = [device["name"]]
        if device["memory"] is not None:
            parts.append(f"{device['memory'] / _GIB:.1f} GiB")
        if device["compute_capability"] is not None:
            parts.append(f"compute capability {device['compute_capability']}")
        lines.append((device["device"], ", ".join(parts)))
        lines.append(("", f"path: {device['path']} ({device['reason']})"))
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _kernel_table(names: list[str]) -> list[str]:
    """Lines of a table: a row for every element type, degree and d, a column for every dv."""
    if not names:
        return ["none compiled"]
    passes: dict[tuple[str, int, int, int], str] = {}
    for name in sorted(names, reverse=True):  # forward, decode, backward
        kind, element, d, dv, deg = re.fullmatch(_KERNEL_NAME, name).groups()
        cell = (element, int(deg), int(d), int(dv))
        passes[cell] = passes.get(cell, "") + kind[0]
    columns = sorted({dv for *_, dv in passes})
    cells = [["element", "degree", "d", *(f"dv {dv}" for dv in columns)]]
    for row in sorted({cell[:3] for cell in passes}):
        cells.append([*map(str, row), *(passes.get((*row, dv), "-") for dv in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return [*lines, "f: forward, d: decode, b: backward"]


def _path(kind: str, index: int | None, build: dict[str, Any]) -> dict[str, str]:
    reason = coverage.device_reason(kind, index)
    if reason is not None:
        return {"path": "pytorch", "reason": reason}
    code = coverage.code_for(torch.cuda.get_device_capability(index), build["cuda_architectures"])
    count = sum(name.startswith("forward_") for name in build["kernels"])
    return {
        "path": "kernels",
        "reason": f"{count} configurations for {code}, narrower heads padded to the next; other "
        "calls take the PyTorch path",
    }


def _cpu(build: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": "cpu",
        "name": _cpu_name(),
        "memory": _cpu_memory(),
        "compute_capability": None,
        **_path("cpu", None, build),
    }


def _cpu_name() -> str:
    # platform.processor() is empty on many Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _cpu_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return None


def _accelerators(build: dict[str, Any]) -> list[dict[str, Any]]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    # Backends differ in what they tell about a device; each missing answer is left out.
    get_properties = getattr(torch.get_device_module(kind), "get_device_properties", None)
    devices = []
    for index in range(torch.accelerator.device_count()):
        properties = get_properties(index) if get_properties else None
        capability = None
        if kind == "cuda" and torch.version.cuda:  # not ROCm, which calls its devices cuda too
            capability = f"{properties.major}.{properties.minor}"
        devices.append(
            {
                "device": f"{kind}:{index}",
                "name": getattr(properties, "name", kind),
                "memory": getattr(properties, "total_memory", None),
                "compute_capability": capability,
                **_path(kind, index, build),
            }
        )
    return devices
