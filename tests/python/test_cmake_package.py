"""What the package holds for C++: the library, its headers, a CMake package. How it is built."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmake_project import ROOT, run_cmake
from retention import _C, cli

INSTALLED = Path(_C.__file__).parent  # not the source tree, even where the package is editable
PACKAGE = INSTALLED / "lib" / "cmake" / "retention"


def test_one_library_all_headers_one_cmake_package():
    binaries = [x for x in INSTALLED.rglob("*") if re.search(r"\.(so|dylib|a)(\.|$)", x.name)]
    assert sorted(path.parent for path in binaries) == [INSTALLED, INSTALLED / "lib"]
    headers = {
        path.relative_to(ROOT) for path in (ROOT / "include").rglob("*") if path.suffix == ".hpp"
    }
    include = INSTALLED / "include"
    assert headers == {path.relative_to(INSTALLED) for path in include.rglob("*") if path.is_file()}
    assert {path.name for path in PACKAGE.iterdir()} == {
        "FindCUTLASS.cmake",
        "retention-config-version.cmake",
        "retention-config.cmake",
        "retention-kernels.cmake",
        "retention-targets-release.cmake",
        "retention-targets.cmake",
    }


def test_every_file_of_the_installation_belongs_to_the_package():
    """Nothing is left in site-packages beside the package's folder, and no build tool in it."""
    files = importlib.metadata.files("power-retention")
    folders = {file.parts[0] for file in files if not {"..", "__pycache__"} & set(file.parts)}
    assert {x for x in folders if not x.endswith((".dist-info", ".pth", ".py"))} <= {"retention"}
    assert not [file for file in files if file.name == "build_backend.py"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads an ELF file")
def test_library_needs_no_cuda_and_shows_its_own_names_alone():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    library = INSTALLED / "lib" / "libretention.so"

    def read(option):
        command = [readelf, "--wide", option, library]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read("--dynamic"))
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if "cuda" in name or "torch" in name]
    defined = re.findall(r"GLOBAL +DEFAULT +\d+ (\w+)", read("--dyn-syms"))
    assert any("can_implement" in name for name in defined)
    assert not [name for name in defined if "9retention" not in name]


def test_the_command_line_names_the_cmake_package(capsys):
    assert cli.main(["--cmake-dir"]) == 0
    assert capsys.readouterr().out == f"{PACKAGE}\n"
    said = subprocess.run(
        [sys.executable, "-m", "retention", "--cmake-dir"], capture_output=True, check=True
    ).stdout
    assert said.decode() == f"{PACKAGE}\n"


def test_site_packages_is_a_prefix_that_cmake_finds_the_package_in(tmp_path):
    """scikit-build-core gives it to CMake. An entry point for that would import the package."""
    assert not importlib.metadata.entry_points(group="cmake.root", name="retention")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(finder LANGUAGES CXX)\n"
        "find_package(retention REQUIRED)\n"
        'message(STATUS "in ${retention_DIR}.")\n'
    )
    prefix = f"-DCMAKE_PREFIX_PATH={INSTALLED.parent}"
    result = run_cmake("-S", tmp_path, "-B", tmp_path / "build", prefix)
    assert result.returncode == 0, result.stdout
    assert f"in {PACKAGE}." in result.message


def test_a_project_finds_the_package(tmp_path):
    build = tmp_path / "build"
    result = run_cmake(
        *("-S", ROOT / "tests" / "consumer", "-B", build),
        *(f"-Dretention_DIR={PACKAGE}", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DRETENTION_VERSION={_C.build_info()['version']}",
    )
    assert result.returncode == 0, result.stdout
    names = [name.removeprefix("forward_") for name in _C.build_info()["kernels"]]
    assert f"in {PACKAGE}," in result.message
    assert f"configurations: '{';'.join(names)}'" in result.message
    result = run_cmake("--build", build)
    assert result.returncode == 0, result.stdout
    for program in ("host_api", "headers"):
        result = subprocess.run([build / program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("version", "found"), [("0.1", True), ("0.0", False), ("0.2", False), ("1.0", False)]
)
def test_version_of_the_package(tmp_path, version, found):
    """A minor version may change the interface, for as long as there is no 1.0."""
    if not _C.build_info()["version"].startswith("0.1."):
        pytest.fail("the versions above are those around 0.1")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(finder LANGUAGES CXX)\n"
        f"find_package(retention {version} QUIET)\n"
        'message(STATUS "found: ${retention_FOUND}")\n'
    )
    result = run_cmake("-S", tmp_path, "-B", tmp_path / "build", f"-Dretention_ROOT={INSTALLED}")
    assert result.returncode == 0, result.stdout
    assert f"found: {int(found)}" in result.message


def test_a_missing_component_is_an_error_and_says_why(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        "project(finder LANGUAGES CXX)\n"
        "set(Python_EXECUTABLE /nonexistent/python3)\n"
        "find_package(retention REQUIRED ${options})\n"
        "get_target_property(include retention::kernels INTERFACE_LINK_LIBRARIES)\n"
        'message(STATUS "kernels: ${include}")\n'
    )

    def find(*options):
        return run_cmake(
            *("-S", tmp_path, "-B", tmp_path / "build", f"-Dretention_ROOT={INSTALLED}", *options),
            unset=("CUTLASS_ROOT",),
        )

    result = find("-Doptions=COMPONENTS;kernels")
    assert result.returncode != 0
    assert "give CUTLASS_ROOT, or install the wheel nvidia-cutlass" in result.message
    assert 'package "retention" is considered to be NOT FOUND' in result.message
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"
    )
    result = find("-Doptions=COMPONENTS;kernels", f"-DCUTLASS_ROOT={tmp_path}")
    assert result.returncode == 0, result.stdout
    assert "kernels: retention::headers;nvidia::cutlass::cutlass" in result.message


def test_the_programs_of_the_documentation_are_those_that_are_compiled():
    shown = re.findall(r"```cpp\n(// .*?)```", (ROOT / "docs/cpp.md").read_text(), re.S)
    compiled = (ROOT / "tests/consumer" / name for name in ("forward.cpp", "decode.cpp"))
    assert shown == [file.read_text() for file in compiled]


CUTLASS = "nvidia-cutlass"


@pytest.mark.parametrize(
    ("environment", "settings", "asked_for"),
    [
        ({}, {}, False),
        ({"nvcc": "on PATH"}, {}, True),
        ({"nvcc": "on PATH"}, None, True),
        ({"nvcc": "on PATH"}, {"cmake.define.RETENTION_CUDA": "AUTO"}, True),
        ({"nvcc": "on PATH"}, {"cmake.define.RETENTION_CUDA": "OFF"}, False),
        ({"nvcc": "on PATH", "CMAKE_ARGS": "-DRETENTION_CUDA:STRING=OFF"}, {}, False),
        ({"nvcc": "on PATH", "SKBUILD_CMAKE_DEFINE": "A=1;RETENTION_CUDA=OFF"}, {}, False),
        ({"nvcc": "on PATH", "CUTLASS_ROOT": "/somewhere"}, {}, False),
        ({"nvcc": "on PATH"}, {"cmake.define.CUTLASS_ROOT": "/somewhere"}, False),
        ({"CUDACXX": "/somewhere/nvcc"}, {}, True),
        ({}, {"cmake.define.CMAKE_CUDA_COMPILER": "/somewhere/nvcc"}, True),
    ],
)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_build_asks_for_cutlass_where_it_compiles_kernels(
    tmp_path, monkeypatch, kind, environment, settings, asked_for
):
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("no scikit-build-core")
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "cmake" / "build_backend.py"
    )
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    for name in ("CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE", "CUTLASS_ROOT", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in environment.items():
        if name == "nvcc":
            (tmp_path / "nvcc").touch(mode=0o755)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)  # as a front end does
    needed = getattr(backend, f"get_requires_for_build_{kind}")(settings)
    assert any(requirement.startswith(CUTLASS) for requirement in needed) is asked_for
