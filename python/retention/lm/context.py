"""The processes that train one model on sequences that they share, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retention.lm.errors import UsageError
from retention.nn import PowerRetention


@dataclass(frozen=True)
class Context:
    """This process among those that share every sequence; alone, it has all of it."""

    rank: int = 0
    ranks: int = 1
    group: Any = None  # a process group; None where there is one process

    def share(self, t: int) -> slice:
        """This process's part of t tokens; parts differ by one token at most."""
        return slice(t * self.rank // self.ranks, t * (self.rank + 1) // self.ranks)

    def join(self, model: nn.Module) -> None:
        """Have the layers of a model share sequences."""
        for module in model.modules():
            if isinstance(module, PowerRetention):
                module.context_parallel = self.group

    def add(self, *tensors: Tensor) -> None:
        """Sums over the processes, in place, in one message."""
        if self.ranks > 1 and tensors:
            flat = torch.cat([x.flatten() for x in tensors])
            dist.all_reduce(flat, group=self.group)
            for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
                x.copy_(part.view_as(x))

    def largest(self, number: int, device: torch.device) -> int:
        """Of the processes' numbers."""
        if self.ranks == 1:
            return number
        largest = torch.tensor(number, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)


ALONE = Context()


@contextlib.contextmanager
def opened(ranks: int, device: str) -> Iterator[tuple[Context, str]]:
    """The processes, and the name of this one's device: "cuda" is one of its own for each.

    Raises:
        UsageError: where torchrun did not start as many.
    """
    if ranks == 1:
        yield ALONE, device
        return
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(ranks):
        raise UsageError(
            f"--context-parallel: expected {ranks} processes, got {started}; start them with "
            f"torchrun --nproc-per-node {ranks} -m retention train --context-parallel {ranks} ..."
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield Context(dist.get_rank(), ranks, dist.group.WORLD), device
    finally:
        dist.destroy_process_group()
