"""The build backend: scikit-build-core, which also asks for CUTLASS where kernels are compiled.

CUTLASS's wheel brings 300 MB of others, scipy and the bindings of CUDA among them, which do not
exist for every platform. A build without CUDA must not need it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_CUTLASS = "nvidia-cutlass>=4.2,<4.3"
_Settings = Mapping[str, str | list[str]] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *_kernels_need(config_settings)]


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    needed = _build.get_requires_for_build_editable(config_settings)
    return [*needed, *_kernels_need(config_settings)]


def _kernels_need(config_settings: _Settings) -> list[str]:
    environment = [os.environ.get(x, "") for x in ("CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")]
    settings = [f"{name}={value}" for name, value in (config_settings or {}).items()]
    given = " ".join(environment + settings)

    def defines(name: str, value: str = "") -> bool:
        return re.search(rf"(\b|-D){name}(:\w+)?={value}", given) is not None

    if defines("RETENTION_CUDA", "OFF"):
        return []
    if defines("CUTLASS_ROOT") or os.environ.get("CUTLASS_ROOT"):
        return []
    compiler = defines("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX") or shutil.which("nvcc")
    return [_CUTLASS] if compiler else []
