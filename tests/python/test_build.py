"""The compiled part, what it says about itself, and the build's options."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import retention
from cmake_project import ROOT, run_cmake
from retention import _C
from retention.installation import format_info

INSTALLED = Path(_C.__file__).parent  # not the source tree, even where the package is editable


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert _C.build_info()["version"] == project["version"]
    assert importlib.metadata.version("power-retention") == project["version"]
    assert retention.info()["version"] == project["version"]


def test_build_info_is_complete_and_consistent():
    build = _C.build_info()
    assert set(build) == {
        "version",
        "compiler",
        "cuda",
        "cuda_toolkit",
        "cuda_architectures",
        "cutlass",
        "kernels",
    }
    assert re.fullmatch(r"\w+ \d+(\.\d+)+", build["compiler"])
    assert bool(build["kernels"]) is build["cuda"]
    for name in build["kernels"]:
        assert re.fullmatch(r"[a-z]+_(bf16|fp16)_d\d+_dv\d+_p2", name)
    if build["cuda"]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", build["cuda_toolkit"])
        assert build["cuda_architectures"]
        for architecture in build["cuda_architectures"]:
            assert re.fullmatch(r"(sm|compute)_\d+[af]?", architecture)
        assert build["cutlass"] is None or re.fullmatch(r"\d+\.\d+\.\d+", build["cutlass"])
    else:
        assert build["cuda_toolkit"] is None
        assert build["cuda_architectures"] == []
        assert build["cutlass"] is None


def test_info_lists_every_device_and_its_path():
    info = retention.info()
    assert json.loads(json.dumps(info)) == info
    assert info["torch"] == torch.__version__
    assert info["build"] == _C.build_info()
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    assert len(info["devices"]) == 1 + accelerators
    assert info["devices"][0]["device"] == "cpu"
    for device in info["devices"]:
        torch.device(device["device"])
        assert device["name"]
        assert device["memory"] is None or device["memory"] > 2**20
        kernels = device["device"].startswith("cuda") and info["build"]["kernels"]
        assert device["path"] in (("kernels", "pytorch") if kernels else ("pytorch",))
        assert device["reason"]


def test_info_is_laid_out_in_aligned_lines():
    info = {
        "version": "1.2.3",
        "torch": "2.6.0",
        "build": {
            "version": "1.2.3",
            "compiler": "GNU 12.2.0",
            "cuda": True,
            "cuda_toolkit": "13.0.88",
            "cuda_architectures": ["sm_80", "compute_90"],
            "cutlass": "4.2.0",
            "kernels": [],
        },
        "devices": [
            {
                "device": "cpu",
                "name": "A CPU",
                "memory": None,
                "compute_capability": None,
                "path": "pytorch",
                "reason": "because",
            },
            {
                "device": "cuda:0",
                "name": "A GPU",
                "memory": 80 * 2**30,
                "compute_capability": "9.0",
                "path": "pytorch",
                "reason": "because",
            },
        ],
    }
    assert format_info(info).split("\n") == [
        "retention  1.2.3",
        "torch      2.6.0",
        "compiler   GNU 12.2.0",
        "CUDA       toolkit 13.0.88 for sm_80, compute_90",
        "CUTLASS    4.2.0",
        "kernels    none compiled",
        "cpu        A CPU",
        "           path: pytorch (because)",
        "cuda:0     A GPU, 80.0 GiB, compute capability 9.0",
        "           path: pytorch (because)",
    ]
    info["build"] |= {
        "kernels": [
            f"{kind}_{element}_d{d}_dv{dv}_p2"
            for kind in ("backward", "decode", "forward")
            for element in ("bf16", "fp16")
            for d, dv in ((32, 32), (128, 32), (128, 64))
            if (kind, element, d) != ("backward", "fp16", 32)
        ]
    }
    assert format_info(info).split("\n")[5:11] == [
        "kernels    element  degree  d    dv 32  dv 64",
        "           bf16     2       32   fdb    -",
        "           bf16     2       128  fdb    fdb",
        "           fp16     2       32   fd     -",
        "           fp16     2       128  fdb    fdb",
        "           f: forward, d: decode, b: backward",
    ]
    info["build"] |= {"cuda": False, "cuda_toolkit": None, "cutlass": None}
    assert "CUDA       not built\nCUTLASS    none\n" in format_info(info)
    assert format_info(retention.info()).startswith(f"retention  {retention.info()['version']}\n")


def test_types_are_shipped():
    assert (INSTALLED / "py.typed").exists()
    stub = (INSTALLED / "_C.pyi").read_text()
    functions = ["block_width", "state_dim", "symmetric_power_row", "build_info"]
    functions += ["forward_chunk_size"]
    for run in ("forward", "backward"):
        functions += [run, f"{run}_can_implement", f"{run}_workspace_size"]
    for name in functions:
        assert f"def {name}(" in stub
        assert getattr(_C, name).__doc__


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
def test_import_needs_neither_cuda_runtime_nor_driver():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(
        [readelf, "--dynamic", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if "cuda" in name or "torch" in name]


def configure(build, *options, env=None):
    return run_cmake("-S", ROOT, "-B", build, *options, env=env)


NO_CUDA_COMPILER = {"CUDACXX": "/nonexistent/nvcc"}


def test_cuda_on_without_a_compiler_is_an_error(tmp_path):
    result = configure(tmp_path, "-DRETENTION_CUDA=ON", env=NO_CUDA_COMPILER)
    assert result.returncode != 0
    assert "RETENTION_CUDA=ON, but no working CUDA compiler was found" in result.message
    assert "-DRETENTION_CUDA=OFF" in result.message


def test_cuda_auto_does_without_a_compiler(tmp_path):
    result = configure(tmp_path, "-DRETENTION_CUDA=AUTO", env=NO_CUDA_COMPILER)
    assert result.returncode == 0, result.stdout
    assert "Looking for a CUDA compiler - NOTFOUND" in result.message
    assert "CUDA AUTO -> FALSE" in result.message


def test_cuda_off_does_not_look_for_a_compiler(tmp_path):
    result = configure(tmp_path, "-DRETENTION_CUDA=OFF")
    assert result.returncode == 0, result.stdout
    assert "CUDA compiler" not in result.message
    assert "CUDA OFF -> FALSE" in result.message


@pytest.mark.parametrize("mode", ["on", "", "YES", "AUTOMATIC"])
def test_unknown_cuda_mode_is_an_error(tmp_path, mode):
    result = configure(tmp_path, f"-DRETENTION_CUDA={mode}")
    assert result.returncode != 0
    assert f"RETENTION_CUDA: expected AUTO, ON or OFF, got '{mode}'" in result.message


def test_headers_serve_a_cmake_project(tmp_path):
    """A project that adds this one as a subdirectory needs neither Python nor CUDA."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(consumer LANGUAGES CXX)\n"
        "set(RETENTION_CUDA OFF)\n"
        f'add_subdirectory("{ROOT.as_posix()}" retention)\n'
        "add_executable(consumer main.cpp)\n"
        "target_link_libraries(consumer PRIVATE retention::headers)\n"
    )
    (tmp_path / "main.cpp").write_text(
        "#include <retention/symmetric_power.hpp>\n"
        "int main() { return retention::state_dim(64, 2) == 2304 ? 0 : 1; }\n"
    )
    result = run_cmake("-S", tmp_path, "-B", tmp_path / "build")
    assert result.returncode == 0, result.stdout
    result = run_cmake("--build", tmp_path / "build")
    assert result.returncode == 0, result.stdout
    assert subprocess.run([tmp_path / "build" / "consumer"], check=False).returncode == 0


# ---- Options that depend on the compiler, the architecture and the platform ---------------------


@pytest.fixture(scope="module")
def nvcc_build(tmp_path_factory):
    """Configures again and again in one folder: asking nvcc what it is takes the most time."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    # What passes for a checkout of CUTLASS while nothing is compiled.
    (folder / "cutlass").mkdir()
    (folder / "cutlass" / "version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"
    )

    def run(version, architectures):
        # Read after the compiler was asked for its version.
        (folder / "version.cmake").write_text(f"set(CMAKE_CUDA_COMPILER_VERSION {version})\n")
        given = "-UCMAKE_CUDA_ARCHITECTURES"
        if architectures is not None:
            given = f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"
        result = configure(
            folder / "build",
            *("-DRETENTION_CUDA=ON", f"-DCUTLASS_ROOT={folder}", given),
            f"-DCMAKE_USER_MAKE_RULES_OVERRIDE_CUDA={folder / 'version.cmake'}",
            *("-DCMAKE_CUDA_COMPILER_WORKS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        )
        assert result.returncode == 0, result.stdout
        commands = json.loads((folder / "build" / "compile_commands.json").read_text())
        return [x["command"] for x in commands if x["file"].endswith(".cu")], result.message

    return run


@pytest.mark.parametrize(
    ("version", "compressed", "architectures", "warned"),
    [
        ("12.8.61", True, None, False),
        ("12.6.85", False, "80-real;90", True),
        ("12.8.61", True, "native", True),
        ("12.8.61", True, "90-real;90a-real", False),
    ],
)
def test_options_of_nvcc(nvcc_build, version, compressed, architectures, warned):
    kernels, message = nvcc_build(version, architectures)
    assert len(kernels) == 18
    assert {"--compress-mode=size" in command for command in kernels} == {compressed}
    warning = f"got '{architectures}', expected 90a-real among them for an H100 or H200"
    assert (warning in message) is warned
    assert ("Warning" in message) is warned


OTHER_SYSTEM = ("-DCMAKE_CXX_COMPILER_WORKS=ON", "-DRETENTION_CUDA=OFF")


def test_windows_is_refused(tmp_path):
    result = configure(tmp_path, "-DCMAKE_SYSTEM_NAME=Windows", *OTHER_SYSTEM)
    assert result.returncode != 0
    assert "retention does not support Windows" in result.message


@pytest.mark.parametrize(
    ("system", "beside"), [("Darwin", "@loader_path/lib"), ("Linux", "$ORIGIN/lib")]
)
def test_the_module_finds_the_library_beside_it(tmp_path, system, beside):
    pytest.importorskip("nanobind")
    result = configure(
        tmp_path,
        *(f"-DCMAKE_SYSTEM_NAME={system}", *OTHER_SYSTEM, "-DRETENTION_PYTHON=ON"),
        # The Python of this machine stands for that of the other.
        *("-DCMAKE_CROSSCOMPILING_EMULATOR=/usr/bin/env", f"-DPython_EXECUTABLE={sys.executable}"),
    )
    assert result.returncode == 0, result.stdout
    rules = (tmp_path / "src" / "cmake_install.cmake").read_text()
    assert set(re.findall(r"@loader_path/lib|\$ORIGIN/lib", rules)) == {beside}


def test_licences_of_what_is_compiled_in_are_in_the_distribution():
    files = importlib.metadata.files("power-retention")
    shipped = {file.name for file in files if "licenses" in file.parts}
    assert shipped >= {"LICENSE", "CUTLASS.txt", "nanobind.txt", "robin_map.txt"}
