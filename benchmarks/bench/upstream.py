"""The package `retention` 1.0.7 of the method's authors, in a process of its own: its import name
is ours. `python upstream.py`, with one JSON object on standard input, prints one with the times."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec, PathFinder

import torch
from problem import Problem
from timing import Effort, time_call


class Theirs:
    """Finds ``retention`` in a folder, and nowhere else: an installation of ours is not it."""

    def __init__(self, folder: str):
        self.folder = folder

    def find_spec(self, name: str, path: list[str] | None, _: object = None) -> ModuleSpec | None:
        if not f"{name}.".startswith("retention."):
            return None
        spec = PathFinder.find_spec(name, [self.folder] if name == "retention" else path)
        if spec is None:
            raise ModuleNotFoundError(f"there is no {name} in {self.folder}")
        return spec


def main() -> None:
    request = json.load(sys.stdin)
    sys.path.insert(0, request["folder"])
    sys.meta_path.insert(0, Theirs(request["folder"]))
    from retention import power_retention

    problem = Problem(**request["problem"])
    inputs = problem.inputs()

    def attend(*tensors):
        return power_retention(*tensors, deg=problem.deg, chunk_size=problem.chunk)

    if request["backward"]:
        leaves = [x.requires_grad_() for x in inputs if x is not None]
        d_out = torch.randn_like(inputs.q)

        def call():
            out = attend(*leaves)
            torch.autograd.grad(out, leaves, d_out)
            return out
    else:
        leaves = list(inputs)

        def call():
            with torch.no_grad():
                return attend(*leaves)

    out = call()
    group = problem.hq // problem.h
    torch.save(out[:1, request["rows"], -group:].detach().cpu(), request["out"])
    # Triton's launches are not all fit for a graph.
    timing = time_call(call, problem.device, Effort(**request["effort"]), graph=False)
    json.dump(timing.row(), sys.stdout)


if __name__ == "__main__":
    main()
