"""How tests/mutations applies its patches, and chooses those that a change touches."""

import subprocess
import textwrap

import pytest

from cmake_project import ROOT, run_cmake

HEADER = """\
int f() {
  g(1);
  h();
  return a[0];  // "text"; with \\ and ${braces}
}

int k() {
  g(1);
  h();
}
"""
REMOVED = """\
Tests: t
Caught as: race

--- a/include/retention/kernel/x.hpp
+++ b/include/retention/kernel/x.hpp
@@ -1,5 +1,4 @@ int
 int f() {
-  g(1);
   h();
   return a[0];  // "text"; with \\ and ${braces}
"""


@pytest.fixture
def project(tmp_path):
    """A project with one header, one test of it and one of something else."""
    for path, text in {
        "include/retention/kernel/x.hpp": HEADER,
        "include/retention/y.hpp": '#include "retention/y.hpp"\n',
        "tests/cpp/x_test.cpp": '#include "retention/kernel/x.hpp"\n#include "check.hpp"\n',
        "tests/cpp/y_test.cpp": '#include <vector>\n#include "check.hpp"\n',
        "tests/cpp/check.hpp": '#include "retention/y.hpp"\n',
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def run_script(project, text):
    script = project / "script.cmake"
    script.write_text(
        f"set(PROJECT_SOURCE_DIR [[{project}]])\n"
        f"include([[{ROOT / 'tests' / 'mutations' / 'mutations.cmake'}]])\n" + text
    )
    return run_cmake("-P", script)


def apply(project, patch):
    (project / "a.patch").write_text(patch)
    result = run_script(
        project,
        f"file(READ [[{project / 'a.patch'}]] patch)\n"
        'retention_patched(header text x/a.patch "${patch}")\n'
        'file(WRITE "${PROJECT_SOURCE_DIR}/header" "${header}")\n'
        'file(WRITE "${PROJECT_SOURCE_DIR}/text" "${text}")\n',
    )
    if result.returncode:
        return result.message
    assert (project / "header").read_text() == "kernel/x.hpp"
    return (project / "text").read_text()


def test_a_patch_is_applied_whatever_its_line_numbers(project):
    expected = HEADER.replace("  g(1);\n", "", 1)
    assert apply(project, REMOVED) == expected
    assert apply(project, REMOVED.replace("@@ -1,5 +1,4 @@", "@@ -700,5 +700,4 @@")) == expected


def test_a_patch_has_hunks_and_added_lines(project):
    patch = REMOVED + textwrap.dedent("""\
        @@ -7,3 +6,4 @@
         int k() {
        -  g(1);
        +  g(2);
        +  + more();
           h();
        """)
    expected = HEADER.replace("  g(1);\n", "", 1).replace("  g(1);", "  g(2);\n  + more();")
    assert apply(project, patch) == expected


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (REMOVED.replace(" int f() {\n", "").split("   return")[0], "occur more than once"),
        (REMOVED.replace("-  g(1)", "-  g(3)"), "occur not at all"),
        (REMOVED.replace("b/include", "b/src"), "expected a patch of one header"),
    ],
)
def test_a_patch_must_fit_one_place(project, patch, problem):
    message = apply(project, patch)
    assert problem in message
    assert "x/a.patch: " in message


def touched(project, *files):
    """The tests, of those of x.hpp and another, that a change of these files concerns."""
    result = run_script(
        project,
        "foreach(test IN ITEMS x y x_bf16_d32_dv64_p2 warpgroup_y_fp16_d64_dv128_p2)\n"
        f"  retention_is_touched(touched x/a.patch ${{test}} {' '.join(files)})\n"
        "  if(touched)\n"
        '    message("touched=${test}")\n'
        "  endif()\n"
        "endforeach()\n",
    )
    assert result.returncode == 0, result.stdout
    return [line.partition("=")[2] for line in result.stdout.splitlines() if "touched=" in line]


def test_a_change_touches_what_includes_it(project):
    of_x, of_y = ["x", "x_bf16_d32_dv64_p2"], ["y", "warpgroup_y_fp16_d64_dv128_p2"]
    everything = ["x", "y", of_x[1], of_y[1]]
    assert touched(project) == []
    assert touched(project, "README.md", "src/x.hpp", "tests/mutations/x/b.patch") == []
    assert touched(project, "include/retention/kernel/x.hpp") == of_x
    assert touched(project, "README.md", "tests/cpp/y_test.cpp") == of_y
    for common in (
        *("include/retention/y.hpp", "tests/cpp/check.hpp", "tests/emulator/src/block.cpp"),
        *("tests/mutations/x/a.patch", "tests/mutations/expect_caught.cmake"),
    ):
        assert touched(project, common) == everything, common


def test_changes_since_a_revision_are_those_of_the_working_tree_too(project):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=project, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (project / "tests/cpp/x_test.cpp").write_text("\n")
    git("commit", "-am", "second")
    (project / "tests/cpp/check.hpp").write_text("\n")
    (project / "new").write_text("\n")

    def changed_since(revision):
        return run_script(
            project,
            f'retention_changed_since(files {revision})\nmessage(FATAL_ERROR "[${{files}}]")\n',
        ).message

    both = "[tests/cpp/check.hpp;tests/cpp/x_test.cpp;new;script.cmake]"
    assert both in changed_since("HEAD~1")
    assert "[tests/cpp/check.hpp;new;script.cmake]" in changed_since("HEAD")
    assert "expected none, all or a revision that git knows, got 'nonsense'" in changed_since(
        "nonsense"
    )
