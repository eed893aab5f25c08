"""docs/serving.md does what it says, on a small model under the name that it has."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

import serve_cases
from retention import cli
from retention.serve import schema

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's model is."""
    (tmp_path / "text.py").write_bytes(b"def f(x):\n    return x\n" * 200)
    monkeypatch.chdir(tmp_path)
    sizes = "--layers 1 --hidden-size 32 --heads 2 --device cpu --steps 1 --batch-size 2"
    few = "--block-size 16 --warmup 1 --eval-every 1 --eval-blocks 1 --checkpoint-every 1"
    data = "--data text.py --out runs/demo"
    assert cli.main(["train", *f"{sizes} {few} {data}".split()]) == 0
    return tmp_path


@pytest.fixture
def running(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Iterator[serve_cases.Running]:
    capsys.readouterr()
    (line,) = re.findall(r"^retention (serve .*)$", PAGE, re.MULTILINE)
    started = serve_cases.Running(shlex.split(line), monkeypatch)
    started.said = capsys.readouterr().out
    yield started
    started.end()
    assert started.code == 0


def curl(line: str, url: str) -> httpx.Response:
    """What curl would send."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-H", action="append")
    parser.add_argument("-N", action="store_true")
    parser.add_argument("-d")
    given = parser.parse_args(shlex.split(line)[1:])
    headers = dict(header.split(": ") for header in given.H)
    target = given.url.replace("http://127.0.0.1:8000", url)
    return httpx.post(target, content=given.d, headers=headers, timeout=serve_cases.SECONDS)


def without_numbers(line: str) -> str:
    return re.sub(r"N(, N)+", "N", re.sub(r"\d[\d,]*\d|\d", "N", line))


def test_the_page_does_what_it_says(running: serve_cases.Running, capsys, monkeypatch):
    assert {language for language, _ in BLOCKS} == {"", "bash", "python"}
    asked = 0
    for language, code in BLOCKS:
        code = code.replace("\\\n", "")
        if language == "bash":
            for line in code.splitlines():
                if line.startswith("curl"):
                    response = curl(line, running.url)
                    assert response.status_code == 200, response.text
                    if "stream" in line:
                        assert response.text.endswith("data: [DONE]\n\n")
                    else:
                        assert len(response.json()["choices"][0]["text"]) > 5
                    asked += 1
        elif language == "python":
            exec(compile(code.replace("http://127.0.0.1:8000", running.url), "page", "exec"), {})
            asked += 1
        else:
            assert without_numbers(code) == without_numbers(running.said)
    assert asked == 4
    assert "torch.Size([20, 3])" in capsys.readouterr().out
    # The program that it names.
    program = str(ROOT / "examples" / "ask_server.py")
    monkeypatch.setattr(sys, "argv", [program, running.url, "--max-tokens", "5"])
    runpy.run_path(program, run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith("def ")
    assert len(re.findall(r"^-- \d tokens$", out, re.MULTILINE)) == 2


def table_below(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_option_is_there_with_its_default():
    parser = cli._parser()
    commands = next(x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    known = {
        flag: action.default
        for action in commands.choices["serve"]._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }
    rows = [row.split(" | ") for row in table_below("Options").splitlines() if "`--" in row]
    written = {flag: row for row in rows for flag in re.findall(r"`(--[\w-]+)", row[0])}
    assert set(written) == set(known)
    for flag, default in known.items():
        if default is not None and not isinstance(default, bool):
            shown = written[flag][1].replace("`", "").split(", ")
            assert f"{default:g}" in shown if isinstance(default, float) else str(default) in shown


def test_every_parameter_error_and_metric_is_there(running: serve_cases.Running):
    parameters = table_below("Endpoints")
    names = {*schema.CompletionRequest.model_fields, *schema.ChatRequest.model_fields}
    names |= {*schema._HARMLESS, *schema._NEUTRAL}
    assert [name for name in sorted(names) if not re.search(rf"`{name}[`.]", PAGE)] == []
    for path in ("completions", "chat/completions", "models"):
        assert f"/v1/{path}`" in parameters
    metrics = httpx.get(f"{running.url}/metrics").text
    found = set(re.findall(r"^# HELP (\w+)", metrics, re.MULTILINE))
    found = {name for name in found if not name.endswith("_created")}
    assert found == set(re.findall(r"`(retention_\w+)", table_below("Metrics")))
    assert json.loads(httpx.get(f"{running.url}/health").text) == {"status": "ok"}


def test_what_it_tells_to_install_and_run_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert re.findall(r"pip install 'power-retention\[(\w+)\]'", PAGE) == ["serve"]
    assert "serve" in extras
    assert re.findall(r"nox -s (\w+)", PAGE) == ["serve"]
    assert "\ndef serve(session: nox.Session)" in (ROOT / "noxfile.py").read_text()
