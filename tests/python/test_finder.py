"""FindCUTLASS.cmake: where it looks, in which order, and what it says where there is nothing."""

import sys

import pytest

from cmake_project import ROOT, run_cmake

VERSION_H = """\
#define CUTLASS_MAJOR {0}
#define CUTLASS_MINOR {1}
#define CUTLASS_PATCH {2}
#define CUTLASS_VERSION ((CUTLASS_MAJOR)*100 + (CUTLASS_MINOR)*10 + CUTLASS_PATCH)
"""


def write_headers(include, version):
    (include / "cutlass").mkdir(parents=True)
    # The trailing space is as in the real file.
    text = VERSION_H.format(*version.split(".")).replace("PATCH 0\n", "PATCH 0 \n")
    (include / "cutlass" / "version.h").write_text(text)
    return include


def write_package(folder, version):
    """A stand-in for the wheel's package, which must be found without being imported."""
    package = folder / "cutlass_library"
    include = write_headers(package / "source" / "include", version)
    (package / "__init__.py").write_text(
        f"open({str(folder / 'imported')!r}, 'w').close()\nraise RuntimeError('imported')\n"
    )
    return include


@pytest.fixture
def find(tmp_path):
    """Run find_package(CUTLASS ...) in a project of its own; returns the completed process."""

    def find(*options, arguments="", before="", env=None):
        source = tmp_path / "project"
        source.mkdir(exist_ok=True)
        (source / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.24)\n"
            "project(finder LANGUAGES NONE)\n"
            f'list(APPEND CMAKE_MODULE_PATH "{(ROOT / "third_party").as_posix()}")\n'
            f"{before}\n"
            f"find_package(CUTLASS {arguments})\n"
            'message(STATUS "found=[${CUTLASS_FOUND}] version=[${CUTLASS_VERSION}]")\n'
            "if(TARGET nvidia::cutlass::cutlass)\n"
            "  set(target nvidia::cutlass::cutlass)\n"
            "  get_target_property(include ${target} INTERFACE_INCLUDE_DIRECTORIES)\n"
            '  message(STATUS "target=[${include}]")\n'
            "endif()\n"
            'message(STATUS "include=[${CUTLASS_INCLUDE_DIR}]")\n'
        )
        return run_cmake(
            "-S",
            source,
            "-B",
            tmp_path / "build",
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
            env={"PYTHONPATH": ""} | (env or {}),
            unset=("CUTLASS_ROOT",),
        )

    return find


def assert_found(result, version, include):
    assert result.returncode == 0, result.stdout
    # CMake spells true as whichever word set it.
    assert f"version=[{version}]" in result.message
    assert "found=[TRUE]" in result.message or "found=[1]" in result.message
    assert f"include=[{include.as_posix()}]" in result.message
    assert "target=[" in result.message


@pytest.mark.parametrize("given_by", ["variable", "environment"])
@pytest.mark.parametrize("names", ["checkout", "include"])
def test_cutlass_root(tmp_path, find, given_by, names):
    root = tmp_path / "cutlass checkout"
    include = write_headers(root / "include", "4.2.0")
    value = root if names == "checkout" else include
    if given_by == "variable":
        result = find(f"-DCUTLASS_ROOT={value}")
    else:
        result = find(env={"CUTLASS_ROOT": str(value)})
    assert_found(result, "4.2.0", include)
    assert f"target=[{include.as_posix()}]" in result.message


def test_wheel_is_found_and_never_imported(tmp_path, find):
    packages = tmp_path / "packages"
    include = write_package(packages, "4.2.0")
    result = find(env={"PYTHONPATH": str(packages)})
    assert_found(result, "4.2.0", include)
    assert f"target=[{include.as_posix()}]" in result.message
    assert not (packages / "imported").exists()


def test_cutlass_root_comes_before_the_wheel(tmp_path, find):
    write_package(tmp_path / "packages", "4.2.0")
    include = write_headers(tmp_path / "root" / "include", "4.1.3")
    result = find(
        f"-DCUTLASS_ROOT={tmp_path / 'root'}", env={"PYTHONPATH": str(tmp_path / "packages")}
    )
    assert_found(result, "4.1.3", include)


def test_cmake_variable_comes_before_the_environment(tmp_path, find):
    include = write_headers(tmp_path / "variable" / "include", "4.1.3")
    write_headers(tmp_path / "environment" / "include", "4.2.0")
    result = find(
        f"-DCUTLASS_ROOT={tmp_path / 'variable'}",
        env={"CUTLASS_ROOT": str(tmp_path / "environment")},
    )
    assert_found(result, "4.1.3", include)


@pytest.mark.parametrize("wrapping", ["{}", "$<BUILD_INTERFACE:{}>"])
def test_existing_target_comes_first(tmp_path, find, wrapping):
    include = write_headers(tmp_path / "preset" / "include", "4.3.1")
    write_headers(tmp_path / "root" / "include", "4.2.0")
    before = (
        "add_library(nvidia::cutlass::cutlass INTERFACE IMPORTED)\n"
        "set_target_properties(nvidia::cutlass::cutlass PROPERTIES "
        f'INTERFACE_INCLUDE_DIRECTORIES "{wrapping.format(include.as_posix())}")'
    )
    result = find(f"-DCUTLASS_ROOT={tmp_path / 'root'}", before=before)
    assert_found(result, "4.3.1", include)


def test_reconfigure_follows_a_changed_root(tmp_path, find):
    first = write_headers(tmp_path / "first" / "include", "4.1.3")
    second = write_headers(tmp_path / "second" / "include", "4.2.0")
    assert_found(find(f"-DCUTLASS_ROOT={tmp_path / 'first'}"), "4.1.3", first)
    assert_found(find(f"-DCUTLASS_ROOT={tmp_path / 'second'}"), "4.2.0", second)


def test_too_old_a_version_is_refused(tmp_path, find):
    write_headers(tmp_path / "root" / "include", "3.9.2")
    result = find(f"-DCUTLASS_ROOT={tmp_path / 'root'}", arguments="4.2 REQUIRED")
    assert result.returncode != 0
    assert 'Found unsuitable version "3.9.2", but required is at least "4.2"' in result.message


def test_a_root_without_headers_is_not_passed_over(tmp_path, find):
    write_package(tmp_path / "packages", "4.2.0")
    (tmp_path / "empty").mkdir()
    result = find(
        f"-DCUTLASS_ROOT={tmp_path / 'empty'}",
        arguments="REQUIRED",
        env={"PYTHONPATH": str(tmp_path / "packages")},
    )
    assert result.returncode != 0
    assert f"CUTLASS_ROOT is '{tmp_path / 'empty'}', which has neither" in result.message


# A Python that cannot run, because the one that runs the tests may well have the wheel.
NO_PYTHON = "set(Python_EXECUTABLE /nonexistent/python3)"


def test_not_found_says_what_to_do(find):
    result = find(arguments="REQUIRED", before=NO_PYTHON)
    assert result.returncode != 0
    assert "give CUTLASS_ROOT, or install the wheel nvidia-cutlass" in result.message
    assert "/nonexistent/python3" in result.message


def test_not_found_quietly(find):
    result = find(arguments="QUIET", before=NO_PYTHON)
    assert result.returncode == 0, result.stdout
    assert "version=[]" in result.message
    assert "target=[" not in result.message
    assert "Could NOT" not in result.message
