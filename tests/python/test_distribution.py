"""The distribution `power-retention`, beside the authors' `retention` with the same import name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import retention
from retention import _distribution

SOURCES = Path(retention.__file__).parent


@pytest.fixture
def site(tmp_path):
    """As site-packages: a copy of the package, without what is compiled, and its distribution."""
    shutil.copytree(SOURCES, tmp_path / "retention", ignore=lambda folder, names: ["bench", "lib"])
    installed(tmp_path, "power_retention-0.1.0", "retention/__init__.py", "retention/nn.py")
    installed(tmp_path, "retention_tools-2.0", "retention/tools.py")
    return tmp_path


def installed(folder, name, *files):
    (folder / f"{name}.dist-info").mkdir()
    record = [f"{file},," for file in (*files, f"{name}.dist-info/RECORD")]
    (folder / f"{name}.dist-info" / "RECORD").write_text("\n".join(record) + "\n")


def imported(site):
    """Import the copy without site: nothing else is found, torch neither."""
    program = f"import sys; sys.path.insert(0, {str(site)!r}); import retention"
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_files_of_the_authors_package_in_the_same_folder_are_an_error(site):
    assert "distribution" not in imported(site)  # but for what it is made of: torch, its library
    installed(site, "retention-1.0.7", "retention/__init__.py", "retention/triton.py")
    message = imported(site)
    assert message.startswith(
        "ImportError: retention 1.0.7, another distribution than power-retention, has files in "
        f"the same folder, {site / 'retention'}. "
    )
    assert "pip uninstall --yes retention power-retention, then pip install power-retention" in (
        message
    )


@pytest.mark.parametrize(
    "record", [("__editable__.retention-1.0.7.pth",), ("retentions/__init__.py",), None]
)
def test_a_distribution_without_files_in_the_folder_does_no_harm(site, record):
    if record is None:
        (site / "retention-1.0.7.dist-info").mkdir()
    else:
        installed(site, "retention-1.0.7", *record)
    assert _distribution.others([str(site / "retention")]) == []


def test_every_folder_that_modules_come_from_is_looked_at(site, tmp_path):
    """An editable installation has two: that of the sources, and that of what was compiled."""
    installed(site, "retention-1.0.7", "retention/__init__.py")
    folders = [str(tmp_path / "checkout" / "retention"), str(site / "retention")]
    assert _distribution.others(folders) == ["retention 1.0.7"]


def test_version_is_that_of_the_compiled_part():
    assert retention.__version__ == retention.info()["version"]
