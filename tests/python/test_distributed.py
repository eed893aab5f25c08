"""Work shared by two processes: gradients and results are those of one process on the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distributed_worker as worker
import retention
from processes import run_worker

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)

# Both sides are float64, and differ in the order of a few sums.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes leave: results and logs."""
    return run_worker(worker, tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone():
    """Gradients of the first step and parameters after all of one process, by model."""
    return {
        "language model": worker.alone(worker.language_model(), worker.next_byte_loss),
        "packed": worker.alone(worker.layer(), worker.packed_loss),
    }


def results_of(name: str, folder: Path) -> list[dict]:
    """What each process has left under that name."""
    paths = [folder / f"{name}-{rank}.pt" for rank in range(worker.PROCESSES)]
    if not all(path.exists() for path in paths):
        pytest.fail("\n----\n".join(log.read_text()[-5000:] for log in folder.glob("*.log")))
    return [torch.load(path) for path in paths]


@pytest.mark.parametrize("way", worker.WAYS)
def test_two_processes_train_as_one(way: str, folder: Path, alone):
    results = results_of(way, folder)
    assert results[0].keys() == results[1].keys() >= {"language model", "packed"}
    for variant in results[0]:
        expected = alone["packed" if "packed" in variant else "language model"]
        for index, what in enumerate(("gradient", "parameter")):
            first, second = (result[variant][index] for result in results)
            assert first.keys() == second.keys() == expected[index].keys()
            for name, wanted in expected[index].items():
                where = f"{variant}: {what} of {name}"
                assert torch.equal(first[name], second[name]), where
                assert wanted.abs().max() > 1e-5, where
                difference = (first[name] - wanted).abs().max().item()
                assert difference <= TOLERANCE, f"{where}: off by {difference:.1e}"


@pytest.mark.parametrize("name", worker.SHARDED)
def test_calls_on_sharded_tensors(name: str, folder: Path):
    """Against the definition on the whole, in float64 as they are."""
    tensors, cu_seqlens = worker.inputs_of(name)
    results, gradients = worker.whole_call(retention.reference, tensors, cu_seqlens=cu_seqlens)
    *_, way = worker.SHARDED[name]
    expected = {
        "batch": ["S(0)"] * 3,
        "heads": ["S(2)", "S(1)", "S(1)"],
        "not at all": ["R"] * 3,
    }
    for actual, placements in (left[name] for left in results_of("DTensor", folder)):
        assert way is None or placements == expected[way]
        for x, wanted in zip(actual, (*results, *gradients), strict=True):
            torch.testing.assert_close(x, wanted.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("heads", "mesh", "expected"),
    [
        (4, (2,), True),
        (3, (2,), False),
        (1, (2,), True),  # no part for all: DTensor does not cut it
        (4, (2, 2), True),
        (2, (2, 2), True),  # along one of both
        (6, (2, 2), False),
        (6, (2, 3), True),
        (6, (4, 2), False),
    ],
)
def test_heads_that_can_be_cut(heads: int, mesh: tuple[int, ...], expected: bool):
    from retention.ops import sharding

    assert sharding._can_be_cut(heads, mesh) is expected


@pytest.mark.parametrize("way", ["fully_shard", "FSDP"])
def test_sharded_parameters_start_as_whole_ones(way: str, folder: Path):
    fresh = worker.wide_layer()
    first, second = (result[way] for result in results_of("drawn", folder))
    assert first.keys() == second.keys() == dict(fresh.named_parameters()).keys()
    for name, wanted in fresh.named_parameters():
        assert torch.equal(first[name], second[name]), name
        if name == "g_proj.bias":
            assert torch.equal(first[name], wanted.detach())
        else:  # uniform
            assert first[name].abs().max() <= 96**-0.5, name
            assert first[name].abs().max() > 0.5 * 96**-0.5, name
