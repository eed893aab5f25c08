"""Models of transformers that several processes share: what comes out is what one process makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# First, since it keeps transformers offline.
import transformers_cases as cases
import transformers_worker as worker
from processes import run_worker

TENSORS = ("brumby", "powercoder", "mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and what processes leave: results and logs."""
    folder = tmp_path_factory.mktemp("shared")
    for kind in TENSORS:
        cases.make_model(kind).save_pretrained(folder / kind)
    blend = {"softmax_blend": 0.5, "softmax_types": ["full_attention"] * 3}
    cases.make_model("mixed", torch.float32, **blend).save_pretrained(folder / "blend")
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": str(worker.PROCESSES),
        "LOCAL_WORLD_SIZE": str(worker.PROCESSES),
    }
    return run_worker(worker, folder, **environment)


def results_of(name: str, folder: Path) -> list[dict]:
    """What each process has left under that name."""
    paths = [folder / f"{name}-{rank}.pt" for rank in range(worker.PROCESSES)]
    if not all(path.exists() for path in paths):
        pytest.fail("\n----\n".join(log.read_text()[-5000:] for log in folder.glob("*.log")))
    return [torch.load(path) for path in paths]


def test_fsdp_trains_as_one_process(folder: Path):
    """Of a model in which softmax attention fades out meanwhile."""
    before = dict(cases.make_model("mixed", torch.float32).named_parameters())
    alone = worker.train(folder, 1)
    assert len(alone["losses"]) == worker.STEPS
    for result in results_of("trained", folder):
        assert result["not shared"] == []
        # float32, summed over two halves of a batch; losses are logged in float32 as well.
        torch.testing.assert_close(
            torch.tensor(result["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5
        )
        for name, x in alone["parameters"].items():
            assert (x - before[name]).abs().max() > 1e-4, name  # it was trained
            torch.testing.assert_close(
                result["parameters"][name], x, rtol=1e-4, atol=1e-5, msg=name
            )


@pytest.mark.parametrize("kind", TENSORS)
def test_the_tensor_parallel_plan(kind: str, folder: Path):
    """Half of the heads in each process, their gates with them."""
    model = cases.make_model(kind)
    ids = cases.tokens(2, 11)
    logits = model(ids).logits
    logits.square().mean().backward()
    wanted = cases.greedy(model, ids, 8)
    for result in results_of("tensors", folder):
        assert result[kind]["rows"] == model.config.head_dim  # one of two key heads
        torch.testing.assert_close(result[kind]["logits"], logits, **cases.EXACT)
        assert torch.equal(result[kind]["tokens"], wanted)
        for name, parameter in model.named_parameters():
            got = result[kind]["gradients"][name]
            torch.testing.assert_close(got, parameter.grad, **cases.EXACT, msg=name)
