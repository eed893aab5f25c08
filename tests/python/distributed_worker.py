"""Several processes that train models together: `distributed_worker.py FOLDER`.

For every one of `WAYS`, writes `FOLDER/<WAY>-<RANK>.pt`: by variant, what `train` returns. And
`FOLDER/DTensor-<RANK>.pt`: by name of `SHARDED`, whole results and gradients, and placements;
`FOLDER/drawn-<RANK>.pt`: by way, the whole parameters of `wide_layer`, drawn after it was sharded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retention
from cases import Case, make
from processes import run_copies
from retention.lm.config import ModelConfig
from retention.lm.model import Block, LanguageModel
from retention.lm.training import make_model
from retention.nn import PowerRetention

PROCESSES = 2
STEPS = 3
MODEL = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, chunk_size=8)

# Lengths of the packed sequences, for each process: not as many tokens in one as in the other.
LENGTHS = ([5, 0, 17], [9])

# What has parameters, besides norms: each may be sharded for itself.
LEAVES = (nn.Linear, nn.Embedding)

Forward = Callable[[nn.Module, int], Tensor]  # the loss of part of the batch


def language_model() -> LanguageModel:
    return make_model(MODEL, 0, torch.device("cpu")).double()


def layer() -> PowerRetention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PowerRetention(32, 4, 2, chunk_size=4, switch_over_seq_len=4, dtype=torch.float64)


def wide_layer() -> PowerRetention:
    """Its gates are not as many in one shard as in the other."""
    return PowerRetention(96, 6, 3, bias=True, dtype=torch.float64)


def next_byte_loss(model: nn.Module, part: int, micro: slice = slice(None)) -> Tensor:
    """Over two of four sequences of 20 bytes."""
    tokens = torch.randint(256, (4, 21), generator=torch.Generator().manual_seed(1))
    tokens = tokens[2 * part : 2 * part + 2][micro]
    logits = model(tokens[:, :-1].contiguous())
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def packed_loss(model: nn.Module, part: int) -> Tensor:
    """Such that the mean over the parts is the mean over all tokens, wherever they are."""
    lengths = torch.tensor([0, *LENGTHS[part]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(2 + part)
    x = torch.randn(1, sum(LENGTHS[part]), 32, generator=generator, dtype=torch.float64)
    total = model(x, lengths.cumsum(0, dtype=torch.int32)).square().sum()
    return total * len(LENGTHS) / sum(map(sum, LENGTHS))


def train(
    model: nn.Module,
    backward: Callable[[nn.Module], None],
    gradients: Callable[[nn.Module], dict[str, Tensor]],
    parameters: Callable[[nn.Module], dict[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole gradients of the first step, and whole parameters after all of them.

    SGD with momentum is linear in the gradients: a difference in them is none larger in what is
    learnt.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(model)
        first = gradients(model) if first is None else first
        optimizer.step()
    return first, parameters(model)


def plain_name(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): p.grad.detach().clone() for n, p in model.named_parameters()}


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): p.detach().clone() for n, p in model.named_parameters()}


def alone(model: nn.Module, loss: Forward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process makes of all parts of the batch."""

    def backward(model: nn.Module) -> None:
        (sum(loss(model, part) for part in range(PROCESSES)) / PROCESSES).backward()

    return train(model, backward, whole_gradients, whole_parameters)


def checkpointed(model: LanguageModel) -> LanguageModel:
    """The same model; every block is computed again in backward."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


# ---- ways to share the work ---------------------------------------------------------------------


def data_parallel(rank: int) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    def one(model: nn.Module) -> None:
        next_byte_loss(model, rank).backward()

    def accumulated(model: nn.Module) -> None:
        with model.no_sync():
            (next_byte_loss(model, rank, slice(0, 1)) / 2).backward()
        (next_byte_loss(model, rank, slice(1, 2)) / 2).backward()

    def packed(model: nn.Module) -> None:
        packed_loss(model, rank).backward()

    whole = whole_gradients, whole_parameters
    wrap = DistributedDataParallel
    compiled = torch.compile(wrap(layer()), backend="aot_eager")
    return {
        "language model": train(wrap(language_model()), one, *whole),
        "small buckets": train(
            wrap(language_model(), bucket_cap_mb=0.01, gradient_as_bucket_view=True), one, *whole
        ),
        "accumulated": train(wrap(language_model()), accumulated, *whole),
        "checkpointed": train(wrap(checkpointed(language_model())), one, *whole),
        "packed": train(wrap(layer()), packed, *whole),
        "packed, compiled": train(compiled, packed, *whole),
    }


def fully_sharded(rank: int) -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def summoned(read: Callable[[nn.Module], dict[str, Tensor]], **options):
        def inside(model: nn.Module) -> dict[str, Tensor]:
            with FullyShardedDataParallel.summon_full_params(model, **options):
                return read(model)

        return inside

    def one(model: nn.Module) -> None:
        next_byte_loss(model, rank).backward()

    def packed(model: nn.Module) -> None:
        packed_loss(model, rank).backward()

    whole = summoned(whole_gradients, with_grads=True), summoned(whole_parameters)
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    blocks = {"auto_wrap_policy": ModuleWrapPolicy({Block})}
    leaves = {"auto_wrap_policy": ModuleWrapPolicy(LEAVES)}
    return {
        "language model": train(wrap(language_model(), **blocks), one, *whole),
        "checkpointed": train(wrap(checkpointed(language_model()), **blocks), one, *whole),
        "packed": train(wrap(layer()), packed, *whole),
        "language model, by leaf": train(wrap(language_model(), **leaves), one, *whole),
        "packed, by leaf": train(wrap(layer(), **leaves), packed, *whole),
    }


def fully_sharded_by_parameter(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))

    def one(model: nn.Module) -> None:
        next_byte_loss(model, rank).backward()

    def packed(model: nn.Module) -> None:
        packed_loss(model, rank).backward()

    def sharded(model: nn.Module, kinds: tuple[type, ...] = (Block,)) -> nn.Module:
        for module in model.modules():
            if isinstance(module, kinds):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def leaves_alone(model: nn.Module) -> nn.Module:
        for module in model.children():
            fully_shard(module, mesh=mesh)
        return model

    whole = (
        lambda model: {n: p.grad.full_tensor() for n, p in model.named_parameters()},
        lambda model: {n: p.detach().full_tensor() for n, p in model.named_parameters()},
    )
    return {
        "language model": train(sharded(language_model()), one, *whole),
        "checkpointed": train(sharded(checkpointed(language_model())), one, *whole),
        "packed": train(sharded(layer()), packed, *whole),
        "language model, by leaf": train(sharded(language_model(), LEAVES), one, *whole),
        "packed, by leaf": train(sharded(layer(), LEAVES), packed, *whole),
        "packed, leaves alone": train(leaves_alone(layer()), packed, *whole),
    }


# ---- calls on sharded tensors -------------------------------------------------------------------

# By name: the inputs, what they are sharded by (None: not), lengths of packed sequences, and what
# the results are sharded by.
SHARDED = {
    "batch": (Case(t=9, state=True), ["batch"] * 6, None, "batch"),
    "more rows than parts": (Case(t=9, b=3, gate=None), ["batch"] * 6, None, "batch"),
    "heads": (Case(t=9, state=True), ["heads"] * 6, None, "heads"),
    "heads, fresh": (Case(t=9, b=1, hq=6, h=2), ["heads"] * 6, None, "heads"),
    "keys and values by heads": (
        Case(t=9, b=1, state=True),
        [None, "heads", "heads", None, None, "heads"],
        None,
        "heads",
    ),
    "each in its way": (
        Case(t=9, state=True),
        ["heads", "batch", None, "tokens", "heads", None],
        None,
        None,
    ),
    "heads that cannot be cut": (
        Case(t=9, b=1, hq=6, h=3),
        ["heads"] * 6,
        None,
        "not at all",
    ),
    "one key head": (Case(t=9, b=1, hq=2, h=1), ["heads", None, None, None], None, "not at all"),
    "packed, by heads": (Case(t=9, b=1, state=True), ["heads"] * 6, [0, 4, 4, 9], "heads"),
    "packed, as a batch": (Case(t=9, b=1), ["batch"] * 6, [0, 4, 9], None),
}


def whole_call(
    call: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor], **options
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results, and gradients of a sum of them in which every element has another weight."""
    results = call(**tensors, return_final_state=True, **options)
    total = sum((x * torch.cos(3 * x.detach())).sum() for x in results)
    leaves = [x for x in tensors.values() if x is not None]
    return results, torch.autograd.grad(total, leaves)


def inputs_of(name: str) -> tuple[dict[str, Tensor | None], Tensor | None]:
    case, _, bounds, _ = SHARDED[name]
    sequences = None if bounds is None else len(bounds) - 1
    tensors = make(case, sequences=sequences)
    leaves = {n: x if x is None else x.requires_grad_() for n, x in tensors.items()}
    return leaves, None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def sharded(rank: int) -> dict[str, tuple[list[Tensor], list[str]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (PROCESSES,))

    def cut(name: str, x: Tensor, by: str | None) -> Tensor:
        heads = Shard(1 if name in ("initial_state", "sum_of_keys") else 2)
        ways = {"batch": Shard(0), "heads": heads, "tokens": Shard(1), None: Replicate()}
        return distribute_tensor(x.detach(), mesh, [ways[by]]).requires_grad_()

    done = {}
    for name, (_, ways, _, _) in SHARDED.items():
        tensors, cu_seqlens = inputs_of(name)
        for (n, x), by in zip(tensors.items(), ways, strict=False):
            tensors[n] = None if x is None else cut(n, x, by)
        if cu_seqlens is not None:
            cu_seqlens = distribute_tensor(cu_seqlens, mesh, [Replicate()])
        results, gradients = whole_call(
            retention.power_retention,
            tensors,
            cu_seqlens=cu_seqlens,
            chunk_size=4,
            switch_over_seq_len=0,
            keep_states=True,
        )
        placements = [str(*x.placements) for x in results]
        done[name] = ([x.full_tensor().detach() for x in (*results, *gradients)], placements)
    return done


WAYS = {"DDP": data_parallel, "FSDP": fully_sharded, "fully_shard": fully_sharded_by_parameter}


def drawn() -> dict[str, dict[str, Tensor]]:
    """By way: parameters of a layer made on the meta device, sharded, and drawn then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def on_meta() -> PowerRetention:
        with torch.device("meta"):
            return wide_layer()

    by_parameter = fully_shard(on_meta(), mesh=init_device_mesh("cpu", (PROCESSES,)))
    by_parameter.to_empty(device="cpu")
    for module in by_parameter.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    # FSDP calls `reset_parameters` of all modules that have parameters themselves.
    flat = FullyShardedDataParallel(on_meta(), use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(flat):
        whole = whole_parameters(flat)
    return {
        "fully_shard": {n: p.detach().full_tensor() for n, p in by_parameter.named_parameters()},
        "FSDP": whole,
    }


def one(rank: int, folder: Path) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=30),  # where one process fails, the other does not wait for long
    )
    for way, trained in WAYS.items():
        torch.save(trained(rank), folder / f"{way}-{rank}.pt")
    torch.save(sharded(rank), folder / f"DTensor-{rank}.pt")
    torch.manual_seed(0)
    torch.save(drawn(), folder / f"drawn-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    # Once for all processes, which are copies of this one.
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    run_copies(PROCESSES, one, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
