"""Processes that share sequences: `distributed_sequence_worker.py FOLDER WHAT [WHAT ...]`.

For every number of ranks, that many processes at a time; each writes `FOLDER/<ranks>-<rank>.pt`: by
name of `cases_of`, what `shared_call` returns, and by name of what `OTHERS` has, what it says.
`gpu:<ranks>`: likewise, of `gpu_cases`, each with a GPU, `FOLDER/gpu-<ranks>-<rank>.pt`.

`commands` makes runs of `retention train` in `FOLDER/runs`, of which it needs the text in
`FOLDER/text`, and of `retention bench` in `FOLDER/bench`; exit codes are in `FOLDER/codes.pt`.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retention
from cases import RESETS, Case, cast, make
from processes import run_copies
from retention.nn import PowerRetention

OF_TOKENS = ("Q", "K", "V", "log_G")
TIMEOUT = timedelta(seconds=60)  # where one process fails, the others do not wait for long


@dataclasses.dataclass(frozen=True)
class Shared:
    """One call. ``lengths`` of the shares; ``bounds`` of packed sequences."""

    case: Case
    lengths: tuple[int, ...]
    bounds: tuple[int, ...] | None = None
    all_final_states: bool = False
    dtype: torch.dtype = torch.float64
    payload: torch.dtype | None = None

    def inputs(self) -> dict[str, Tensor | None]:
        return make(self.case, sequences=None if self.bounds is None else len(self.bounds) - 1)

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32)

    def share(self, rank: int) -> slice:
        edges = [0, *accumulate(self.lengths)]
        return slice(edges[rank], edges[rank + 1])

    @property
    def states_are_everywhere(self) -> bool:
        return self.bounds is None or self.all_final_states


def cuts(ranks: int) -> dict[str, tuple[int, ...]]:
    """Ways to cut 24 tokens."""
    if ranks == 1:
        return {"even": (24,)}
    rest = ranks - 1
    return {
        "even": tuple([24 // ranks] * ranks),
        "first has few": (1, *[3] * (rest - 1), 23 - 3 * (rest - 1)),
        "one in the middle has none": (11, *[0] * (rest - 1), 13),
        "first has none": (0, *[5] * (rest - 1), 24 - 5 * (rest - 1)),
        "last has none": (24 - 5 * (rest - 1), *[5] * (rest - 1), 0),
    }


def cases_of(ranks: int) -> dict[str, Shared]:
    calls = {}
    for way, lengths in cuts(ranks).items():
        calls[f"rows, {way}"] = Shared(Case(t=24, state=True), lengths)
        calls[f"packed, {way}"] = Shared(Case(t=24, b=1), lengths, (0, 5, 20, 22))
        calls[f"packed with states, {way}"] = Shared(
            Case(t=24, b=1, state=True), lengths, (0, 0, 12, 24, 24), all_final_states=True
        )
    even = cuts(ranks)["even"]
    edge = even[0]
    calls |= {
        "fresh": Shared(Case(t=24), even),
        "no gates, degree 4": Shared(Case(t=24, gate=None, deg=4, d=8, state=True), even),
        "three rows, one key head": Shared(Case(t=24, b=3, hq=3, h=1, d=24), even),
        "strong gates": Shared(Case(t=24, gate=-60.0, state=True), even),
        "quadratic": Shared(Case(t=24, chunk=None, switch_over=None, state=True), even),
        "no tokens": Shared(Case(t=0, state=True), (0,) * ranks),
        "a token each": Shared(Case(t=ranks, state=True), (1,) * ranks),
        "float32": Shared(Case(t=24, state=True), even, dtype=torch.float32),
        "sent in bfloat16": Shared(
            Case(t=24, state=True), even, dtype=torch.float32, payload=torch.bfloat16
        ),
        "bfloat16, sent in bfloat16": Shared(
            Case(t=24, b=1), even, (0, 3, 23), dtype=torch.bfloat16, payload=torch.bfloat16
        ),
    }
    for reset in RESETS:
        case = Case(t=24, reset=reset, every=7, state=True)
        calls[f"reset {reset:.0e}"] = Shared(case, even)
    edges = {
        "one sequence": (0, 24),
        "begins at an edge": (0, edge, 24),
        "begins before an edge": (0, edge - 1, 24),
        "begins behind an edge": (0, edge + 1, 24),
        "within a share": (0, 2, 3, 24),
        "of no tokens at edges": (0, 0, edge, edge, 2 * edge, 2 * edge, 24, 24),
        "all of one share": (0, *range(edge, 25, edge)),
        "nobody's at the end": (0, 2, 3),
        "no tokens": (0, 0, 0),
    }
    for name, bounds in edges.items():
        if list(bounds) != sorted(bounds):
            continue  # behind an edge that a rank alone has at the row's end
        for state in (False, True):
            what = f"packed, {name}{', with states' * state}"
            calls[what] = Shared(Case(t=24, b=1, state=state), even, bounds)
    return calls


def loss_of(results: tuple[Tensor, ...], tokens: slice, weight_of_states: float) -> Tensor:
    """A sum in which every element has another weight; of the states with one of the rank's own."""
    out, *states = (x.double() for x in results)

    def weights(x: Tensor, first: int = 0) -> Tensor:
        place = torch.arange(first, first + x.numel(), dtype=torch.float64, device=x.device)
        return (3 * place + 1).cos().view_as(x)

    per_token = out.transpose(0, 1)  # the same weights wherever a share begins
    first = tokens.start * per_token[0].numel() if per_token.shape[0] else 0
    total = (per_token * weights(per_token, first)).sum()
    return total + weight_of_states * sum((x * weights(x)).sum() for x in states)


def shared_call(call: Shared, rank: int, device: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """One rank's results and gradients."""
    tokens = call.share(rank)
    mine = {
        name: x if x is None else (x[:, tokens] if name in OF_TOKENS else x).to(device)
        for name, x in call.inputs().items()
    }
    cu_seqlens = call.cu_seqlens
    leaves = cast(mine, call.dtype)
    results = retention.distributed.power_retention(
        **leaves,
        return_final_state=True,
        deg=call.case.deg,
        chunk_size=call.case.chunk,
        switch_over_seq_len=call.case.switch_over,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device),
        share_start=tokens.start,
        all_final_states=call.all_final_states,
        payload=call.payload,
        **options,
    )
    given = {name: x for name, x in leaves.items() if x is not None}
    weight = rank + 1.0 if call.states_are_everywhere else 1.0
    loss_of(results, tokens, weight).backward()
    named = dict(zip(("out", "state", "sum_of_keys_out"), results, strict=True))
    named |= {f"d_{name}": x.grad for name, x in given.items()}
    return {name: x.detach().cpu() for name, x in named.items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# ---- besides the grid ---------------------------------------------------------------------------


def arrival(rank: int, ranks: int) -> bool:
    """Whether results are the same bits, whoever comes last."""
    call = cases_of(ranks)["rows, even"]
    first = shared_call(call, rank)
    same = []
    for late in range(ranks):
        if rank == late:
            time.sleep(0.1)
        same.append(same_bits(shared_call(call, rank), first))
    return all(same)


def checked(rank: int, ranks: int) -> dict[str, str]:
    """What each rank is told where `check` finds that one differs."""
    good = cases_of(ranks)["rows, even"]
    tensors = {n: x[:, good.share(rank)] if n in OF_TOKENS else x for n, x in good.inputs().items()}
    last = rank == ranks - 1
    bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
    row = {n: x if "s" in n else x[:1] for n, x in tensors.items()}
    row |= {"initial_state": None, "sum_of_keys": None, "cu_seqlens": bounds}
    faulty = {
        "heads": tensors | ({"Q": tensors["Q"][:, :, :2]} if last else {}),
        "dtype": tensors | ({"Q": tensors["Q"].float()} if last else {}),
        "gates": tensors | ({"log_G": None} if last else {}),
        "deg": tensors | ({"deg": 4, "initial_state": None, "sum_of_keys": None} if last else {}),
        "final": tensors | {"return_final_state": last},
        "start": row | {"share_start": 1 if last else None},
        "start of rows": tensors | {"share_start": 1 if last else None},
        "device": tensors | ({"Q": tensors["Q"].to("meta")} if last else {}),
        "bounds": row | {"cu_seqlens": bounds + torch.tensor([0, int(last), 0]).int()},
        "end": row | {"cu_seqlens": bounds * 2},
        "gradient": tensors | ({"V": tensors["V"].clone().requires_grad_()} if last else {}),
        "nothing": tensors,
    }
    said = {}
    for name, arguments in faulty.items():
        try:
            retention.distributed.power_retention(**arguments, check=True)
            said[name] = ""
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def refused(rank: int, ranks: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh

    x = torch.zeros(1, 4, 2, 16)
    faulty = {
        "device": {"tensors": [x.to("meta")] * 3},
        "mesh": {"group": init_device_mesh("cpu", (1, ranks), mesh_dim_names=("a", "b"))},
        "type": {"group": "context"},
        "not a member": {"group": torch.distributed.GroupMember.NON_GROUP_MEMBER},
        "payload": {"payload": torch.float16},
        "share_start": {"share_start": -1},
    }
    said = {}
    for name, options in faulty.items():
        try:
            tensors = options.pop("tensors", [x] * 3)
            retention.distributed.power_retention(*tensors, **options)
            said[name] = ""
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def alone(rank: int, ranks: int) -> str:
    """What a rank is told after the group's timeout, where another one does not come."""
    group = torch.distributed.new_group(timeout=timedelta(seconds=0.5))
    x = torch.zeros(1, 4, 2, 16)
    said = ""
    if rank > 0:
        try:
            retention.distributed.power_retention(x, x, x, group=group)
        except RuntimeError as error:
            said = str(error)
    torch.distributed.barrier()
    return said


def composed(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """By way: results and gradients that are those of the plain call."""
    from torch.distributed.device_mesh import init_device_mesh

    rows, packed = (cases_of(ranks)[name] for name in ("rows, even", "packed, even"))
    mesh = init_device_mesh("cpu", (ranks,))
    plain = retention.distributed.power_retention
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)

    def with_call(call: Shared, function: Callable, **options: Any) -> dict[str, Tensor]:
        retention.distributed.power_retention = function
        try:
            return shared_call(call, rank, **options)
        finally:
            retention.distributed.power_retention = plain

    def checkpointed(use_reentrant: bool, **arguments: Any) -> tuple[Tensor, ...]:
        names = [n for n, x in arguments.items() if isinstance(x, Tensor)]
        others = {n: x for n, x in arguments.items() if n not in names}

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return plain(**dict(zip(names, tensors, strict=True)), **others)

        tensors = [arguments[n] for n in names]
        return checkpoint(run, *tensors, use_reentrant=use_reentrant)

    return {
        "rows": shared_call(rows, rank),
        "rows, mesh": shared_call(rows, rank, group=mesh),
        "rows, compiled": with_call(rows, compiled),
        "rows, checkpointed": with_call(rows, partial(checkpointed, False)),
        "rows, checkpointed by re-entry": with_call(rows, partial(checkpointed, True)),
        "rows, kept states": shared_call(rows, rank, keep_states=True),
        "packed": shared_call(packed, rank),
        "packed, compiled": with_call(packed, compiled),
        "packed, checkpointed": with_call(packed, partial(checkpointed, False)),
    }


HIDDEN = 32
BOUNDS = (0, 7, 24)


def layer() -> PowerRetention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PowerRetention(HIDDEN, 4, 2, chunk_size=4, switch_over_seq_len=4).double()


def activations(rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 24, HIDDEN, generator=generator, dtype=torch.float64)


def layer_loss(model: nn.Module, x: Tensor, *where: Any) -> Tensor:
    return model(x, *where).square().sum()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    def whole(x: Tensor) -> Tensor:
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    return {n.removeprefix("module."): whole(p.grad).clone() for n, p in model.named_parameters()}


def layers(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    """By way: the gradients of a layer whose loss is the sum over all tokens."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    lengths = cuts(ranks)["first has few"]
    edges = [0, *accumulate(lengths)]
    tokens = slice(edges[rank], edges[rank + 1])
    where = {"rows": (None, tokens.start), "packed": (torch.tensor(BOUNDS).int(), tokens.start)}

    def summed(kind: str, compiled: bool = False) -> dict[str, Tensor]:
        model = layer()
        model.context_parallel = mesh
        if compiled:
            model.compile(backend="aot_eager", fullgraph=True)
        layer_loss(model, activations(2 - (kind == "packed"))[:, tokens], *where[kind]).backward()
        gradients = gradients_of(model)
        for x in gradients.values():
            torch.distributed.all_reduce(x)
        return gradients

    def data_parallel() -> dict[str, Tensor]:
        model = layer()
        model.context_parallel = mesh
        wrapped = DistributedDataParallel(model)
        # DDP takes the mean over ranks.
        (ranks * layer_loss(wrapped, activations()[:, tokens], *where["rows"])).backward()
        return gradients_of(wrapped)

    def sharded() -> dict[str, Tensor]:
        """Rows by one dimension of a mesh, tokens by the other; parameters by both."""
        two = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "context"))
        model = layer()
        model.context_parallel = two["context"]
        fully_shard(model, mesh=two)
        data, context = two.get_local_rank("data"), two.get_local_rank("context")
        x = activations()
        x = x.chunk(ranks // 2)[data][:, 12 * context : 12 * context + 12]
        (ranks * layer_loss(model, x)).backward()
        return gradients_of(model)

    ways = {"rows": summed("rows"), "packed": summed("packed"), "DDP": data_parallel()}
    if ranks == 2:
        ways |= {f"{kind}, compiled": summed(kind, compiled=True) for kind in where}
    return ways | {"fully_shard": sharded()}


OTHERS: dict[int, tuple[Callable[[int, int], Any], ...]] = {
    2: (arrival, checked, refused, composed, layers, alone),
    3: (arrival, checked),
    4: (arrival, layers),
}


def one(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with (folder / f"{ranks}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / f"rendezvous-{ranks}").as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    done: dict[str, Any] = {}
    for name, call in cases_of(ranks).items():
        done[name] = shared_call(call, rank)
    for function in OTHERS[ranks]:
        done[function.__name__] = copy.deepcopy(function(rank, ranks))
    torch.save(done, folder / f"{ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


# ---- on GPUs ------------------------------------------------------------------------------------


def gpu_cases(ranks: int) -> dict[str, Shared]:
    """Those of `cases_of`, on PyTorch operations; and as large ones as kernels are made for."""
    edges = [0, *(300 + 400 * i for i in range(ranks - 1)), 400 * ranks]
    lengths = tuple(stop - start for start, stop in pairwise(edges))
    t = edges[-1]
    wide = {"t": t, "hq": 4, "h": 2, "d": 64, "dv": 64, "chunk": 128, "switch_over": 128}
    bf16, fp16 = torch.bfloat16, torch.float16
    bounds = (0, 100, t // 2 + 100, t - 10)
    calls = {
        "kernels, rows": Shared(Case(state=True, **wide), lengths, dtype=bf16),
        "kernels, fresh": Shared(Case(gate=-0.01, **wide), lengths, dtype=bf16),
        "kernels, no gates": Shared(Case(b=1, gate=None, **wide), lengths, dtype=bf16),
        "kernels, resets": Shared(
            Case(b=1, reset=-torch.inf, every=350, **wide), lengths, dtype=bf16
        ),
        "kernels, chosen chunks": Shared(
            Case(gate=-0.01, **(wide | {"chunk": None, "switch_over": None})), lengths, dtype=bf16
        ),
        "kernels, packed": Shared(Case(b=1, **wide), lengths, bounds, dtype=bf16),
        "kernels, packed with states": Shared(
            Case(b=1, state=True, **wide), lengths, bounds, all_final_states=True, dtype=bf16
        ),
        "kernels, heads of 128": Shared(
            Case(b=1, **(wide | {"d": 128, "dv": 128})), lengths, dtype=bf16
        ),
        "kernels, narrow heads": Shared(Case(b=1, **(wide | {"d": 48})), lengths, dtype=bf16),
        "kernels, float16": Shared(Case(state=True, **wide), lengths, dtype=fp16),
    }
    return cases_of(ranks) | calls


def one_gpu(rank: int, ranks: int, folder: Path) -> None:
    device = f"cuda:{rank}"
    torch.cuda.set_device(device)
    with (folder / f"gpu-{ranks}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.distributed.init_process_group(
        "nccl",
        init_method=(folder / f"rendezvous-gpu-{ranks}").as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
        device_id=torch.device(device),
    )
    done: dict[str, Any] = {}
    for name, call in gpu_cases(ranks).items():
        options = {"keep_states": True} if name == "kernels, fresh" else {}
        done[name] = shared_call(call, rank, device, **options)
        if name.startswith("kernels"):
            if rank == 0:
                time.sleep(0.02)
            again = shared_call(call, rank, device, **options)
            done[f"{name}: same bits"] = same_bits(done[name], again)
    torch.save(done, folder / f"gpu-{ranks}-{rank}.pt")
    torch.distributed.destroy_process_group()


# ---- what to compare with -----------------------------------------------------------------------


def whole_call(call: Shared) -> dict[str, Tensor]:
    """What the float64 formula makes of the whole sequence, for the sum of the ranks' losses."""
    leaves = cast(cast(call.inputs(), call.dtype), torch.float64)
    results = retention.reference(
        **leaves, return_final_state=True, deg=call.case.deg, cu_seqlens=call.cu_seqlens
    )
    ranks = len(call.lengths)
    weight = ranks * (ranks + 1) / 2 if call.states_are_everywhere else 1.0
    given = {name: x for name, x in leaves.items() if x is not None}
    loss = loss_of(results, slice(0, call.case.t), weight)
    gradients = torch.autograd.grad(loss, [*given.values()])
    named = dict(zip(("out", "state", "sum_of_keys_out"), results, strict=True))
    named |= {f"d_{name}": x for name, x in zip(given, gradients, strict=True)}
    return {name: x.detach() for name, x in named.items()}


def joined(call: Shared, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as those of one process: tokens one after another, and sums of what is on
    one rank and 0 on others."""
    whole = {}
    for name in parts[0]:
        every = [part[name].double() for part in parts]
        if name == "out" or name.removeprefix("d_") in OF_TOKENS:
            whole[name] = torch.cat(every, 1)
        elif name in ("state", "sum_of_keys_out") and call.states_are_everywhere:
            whole[name] = every[0]
        else:
            whole[name] = torch.stack(every).sum(0)
    return whole


# ---- the command line -------------------------------------------------------------

TRAIN = (
    *("train", "--steps", "6", "--batch-size", "4", "--block-size", "33", "--layers", "2"),
    *("--hidden-size", "32", "--heads", "2", "--chunk-size", "8", "--eval-every", "3"),
    *("--eval-blocks", "8", "--checkpoint-every", "3", "--device", "cpu"),
)


def command_one(rank: int, ranks: int, port: int, log: Path, signalled: bool, *given: str) -> None:
    """As torchrun starts it; with ``signalled``, the last process gets a SIGTERM in step 2."""
    from retention import cli
    from retention.lm import data

    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if signalled and rank == ranks - 1:
        plain = data.batch

        def batch(corpus: Any, seed: int, step: int, *sizes: int) -> Tensor:
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(corpus, seed, step, *sizes)

        data.batch = batch
    sys.exit(cli.main([*given]))


def command(ranks: int, folder: Path, *given: str, signalled: bool = False) -> list[int]:
    """Exit codes of `retention` in as many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(
            target=command_one,
            args=(rank, ranks, port, folder / f"{given[0]}-{ranks}-{rank}.log", signalled, *given),
            daemon=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def commands(folder: Path) -> dict[str, list[int]]:
    runs = folder / "runs"

    def given(name: str) -> tuple[str, ...]:
        out = ("--data", str(folder / "text"), "--out", str(runs / name))
        return (*TRAIN, *out, "--context-parallel", "2")

    codes = {"two": command(2, folder, *given("two"))}
    # What three processes go on with is what two left in the middle of their run.
    shutil.copytree(runs / "two", runs / "three")
    shutil.rmtree(runs / "three" / "checkpoints" / "step-00000006")
    resume = ("train", "--resume", "--out", str(runs / "three"), "--context-parallel", "3")
    codes["three"] = command(3, folder, *resume)
    codes["stopped"] = command(2, folder, *given("stopped"), signalled=True)
    bench = ("bench", "context", "--quick", "--t", "64", "--h", "2", "--d", "16", "--device", "cpu")
    codes["bench"] = command(2, folder, *bench, "--out", str(folder / "bench"))
    return codes


def main(folder: Path, what: list[str]) -> None:
    # Once for all processes, which are copies of this one.
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    if "commands" in what:
        torch.save(commands(folder), folder / "codes.pt")
    for number in what:
        kind, _, ranks = number.rpartition(":")
        if number == "commands":
            continue
        target = one_gpu if kind == "gpu" else one
        run_copies(int(ranks), target, int(ranks), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
