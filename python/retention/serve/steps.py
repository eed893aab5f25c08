"""Steps of many sequences at once, in batches of a few sizes, each a captured CUDA graph.

A batch's size is its bucket; rows that are not there are padding, of slot -1. Products of different
sizes may round differently, and then a sequence's tokens would depend on how many others there are.
So buckets are tried when they are made, and those with other bits than the largest are left out.
Kernels that add up parts of a state are told how many parts: their sums have one order in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retention.lm import devices
from retention.serve.models import Network
from retention.serve.sampling import Draw, as_tensor, choose, log_probabilities

_WARM_UP_STEPS = 2
# What buckets are tried with: sequences, those of them that are stepped alone too, and steps.
_SEQUENCES = 4
_ALONE = 2
_STEPS = 3
# In 16 bits most sums in another order are rounded to the same number. Then so many numbers are
# tried, counted in values that heads read. On an H200 a batch of one differed from larger ones
# within 2^17, and not within 2^14; on a CPU it does, where a step takes longer.
_ROUNDED = {"cuda": 2**17, "cpu": 2**14}
# Of a state, in batches of any size: more read those of few sequences faster, fewer those of many.
_SLICES = 4


class Row(NamedTuple):
    """What a step does for one sequence."""

    slot: int
    token: int  # that the sequence goes on with
    draw: Draw
    likeliest: int | None = None  # how many of them, for log probabilities; None: none at all


class Taken(NamedTuple):
    """What came of it."""

    token: int  # `sampling.NOT_FINITE` where logits are no finite numbers
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()  # tokens and their log probabilities


class Bucket:
    """Steps of one batch size, with all that they read and write on the device.

    Attributes:
        tokens: int64 `[b, 1]`, read.
        slots: int32 `[b]`, read; -1 is padding.
        draws: `[b, 3]`, read by sampling.
        logits: `[b, vocabulary]`, written; which the next step of any bucket may overwrite.
        chosen: int64 `[b]`, the next tokens, written.
    """

    def __init__(self, network: Network, size: int, graph_pool: Any):
        self.size = size
        self._network = network
        self._graph_pool = graph_pool  # whose memory all graphs share; None: there are no graphs
        self._graphs: dict[bool, Callable[[], None]] = {}
        device = network.device
        self.tokens = torch.zeros(size, 1, dtype=torch.int64, device=device)
        self.slots = torch.full((size,), -1, dtype=torch.int32, device=device)
        self.draws = as_tensor([Draw()] * size, device).to(device)
        self.chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self.logits: Tensor = None

    def run(self, sampled: bool) -> None:
        """One step from what the tensors hold: by a graph, captured at the first time, or call by
        call. Without `sampled` all rows are greedy. Nothing waits for the device."""
        if self._graph_pool is None:
            self._step(sampled)
            return
        if sampled not in self._graphs:
            self._graphs[sampled] = self._captured(sampled)
        self._graphs[sampled]()

    def capture(self) -> None:
        """Both graphs, where there are graphs."""
        if self._graph_pool is not None:
            for sampled in (False, True):
                if sampled not in self._graphs:
                    self._graphs[sampled] = self._captured(sampled)

    @torch.no_grad()
    def _step(self, sampled: bool) -> None:
        self.logits = self._network.step(self.tokens, self.slots)
        self.chosen.copy_(choose(self.logits, self.draws if sampled else None))

    def _captured(self, sampled: bool) -> Callable[[], None]:
        # Of rows that are none, so that no sequence has seen anything.
        kept = self.slots.clone()
        self.slots.fill_(-1)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._step(sampled)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool):
            self._step(sampled)
        logits = self.logits
        self.slots.copy_(kept)

        def replay() -> None:
            graph.replay()
            self.logits = logits

        return replay


class Steps:
    """Steps of any number of sequences.

    Args:
        network: with its memory allocated.
        batch_invariance: whether a sequence's logits may depend on nothing but itself, to the last
            bit. Then buckets are tried, and `sizes` are those that are left; and kernels divide
            states alike in all of them. Default: True.
        graphs: whether steps are CUDA graphs. Default: on a CUDA device.

    Attributes:
        sizes: of the buckets, ascending.
    """

    def __init__(self, network: Network, batch_invariance: bool = True, graphs: bool | None = None):
        self.network = network
        self.slots = network.memories[0].slots
        if graphs is None:
            graphs = network.device.type == "cuda"
        self._graph_pool = torch.cuda.graph_pool_handle() if graphs else None
        self.sizes = _powers_of_two(self.slots)
        for memory in network.memories:
            memory.slices = _SLICES if batch_invariance else None
        self._tried = _steps_to_try(network)
        self._buckets: dict[int, Bucket] = {}
        with devices.current(network.device):
            if batch_invariance:
                self.sizes = self._invariant()
            # The largest first: what it allocates, the others find again.
            self._buckets = {size: self.bucket(size) for size in reversed(self.sizes)}
            for bucket in self._buckets.values():
                bucket.capture()

    def bucket(self, size: int) -> Bucket:
        """That of one of `sizes`, for those who fill its tensors themselves."""
        if size not in self._buckets:
            self._buckets[size] = Bucket(self.network, size, self._graph_pool)
        return self._buckets[size]

    def take(self, rows: Sequence[Row]) -> list[Taken]:
        """The next token of each sequence, at most as many as the largest of `sizes`.

        Raises:
            Exception: what the network raises. Then no sequence has taken its token; where a memory
                could not be taken back, its slot is empty (`retention.nn.all_or_nothing`).
        """
        with devices.current(self.network.device):
            return self._take(self.bucket(self.fitting(len(rows))), rows)

    def fitting(self, count: int) -> int:
        """The smallest of `sizes` that has so many rows."""
        return next(size for size in self.sizes if size >= count)

    def _take(self, bucket: Bucket, rows: Sequence[Row]) -> list[Taken]:
        padding = bucket.size - len(rows)
        bucket.tokens.copy_(torch.tensor([[row.token] for row in rows] + [[0]] * padding))
        slots = torch.tensor([row.slot for row in rows] + [-1] * padding, dtype=torch.int32)
        bucket.slots.copy_(slots)
        sampled = any(row.draw.temperature > 0 for row in rows)
        if sampled:
            draws = [row.draw for row in rows] + [Draw()] * padding
            bucket.draws.copy_(as_tensor(draws, self.network.device))
        bucket.run(sampled)
        asked = [i for i, row in enumerate(rows) if row.likeliest is not None]
        tokens = bucket.chosen.tolist()[: len(rows)]
        if not asked:
            return [Taken(token) for token in tokens]
        index = torch.tensor(asked, device=self.network.device)
        most = max(row.likeliest for row in rows if row.likeliest is not None)
        chosen, values, which = (
            x.tolist() for x in log_probabilities(bucket.logits[index], bucket.chosen[index], most)
        )
        taken = [Taken(token) for token in tokens]
        for place, i in enumerate(asked):
            pairs = zip(which[place], values[place], strict=True)
            taken[i] = Taken(tokens[i], chosen[place], tuple(pairs)[: rows[i].likeliest])
        return taken

    def drive(self, slots: Sequence[int], tokens: Sequence[int], count: int) -> Tensor:
        """Greedy steps without a word from the host, as a benchmark wants them.

        Args:
            slots: one for each sequence, at most as many as the largest of `sizes`.
            tokens: what each goes on with.
            count: how many steps.

        Returns:
            int64 `[count, n]`, the tokens, on the device, which is not waited for.
        """
        with devices.current(self.network.device), torch.no_grad():
            bucket = self.bucket(self.fitting(len(slots)))
            padding = bucket.size - len(slots)
            bucket.tokens.copy_(torch.tensor([*tokens, *[0] * padding])[:, None])
            bucket.slots.copy_(torch.tensor([*slots, *[-1] * padding], dtype=torch.int32))
            out = torch.empty(count, bucket.size, dtype=torch.int64, device=self.network.device)
            for i in range(count):
                bucket.run(sampled=False)
                out[i] = bucket.chosen
                bucket.tokens.copy_(bucket.chosen.clamp(min=0)[:, None])
            return out[:, : len(slots)]

    # ---- what does not depend on the batch ------------------------------------------------------

    def _invariant(self) -> list[int]:
        """Sizes of one kind: a sequence's logits have the same bits in all of them, at every place
        and whatever the other rows are."""
        found: dict[int, list[Tensor]] = {}
        for size in self.sizes:
            if size == 1:  # a batch of one is always the same
                found[size] = [self._alone(size, i) for i in range(_SEQUENCES)]
                continue
            together = self._together(size)
            # Where each is in one row, this is how rows are compared.
            compared = size if size <= _SEQUENCES else _ALONE
            if together is not None and all(
                torch.equal(self._alone(size, i), together[i]) for i in range(compared)
            ):
                found[size] = together
        for memory in self.network.memories:
            memory.reset()
        largest = max(found)
        return [
            size
            for size, logits in found.items()
            if size == largest
            or all(torch.equal(x, y) for x, y in zip(logits, found[largest], strict=False))
        ]

    def _alone(self, size: int, sequence: int) -> Tensor:
        """A sequence's logits of some steps, `[steps, vocabulary]`; the other rows are padding."""
        return self._logits(size, [sequence])[0]

    def _together(self, size: int) -> list[Tensor] | None:
        """Likewise of several, which fill all rows; None where one's differ from row to row."""
        count = min(size, _SEQUENCES)
        rows = [(i + i // count) % count for i in range(size)][::-1]
        logits = self._logits(size, rows)
        found = [logits[rows.index(sequence)] for sequence in range(count)]
        if all(torch.equal(x, found[row]) for x, row in zip(logits, rows, strict=True)):
            return found
        return None

    def _logits(self, size: int, rows: Sequence[int]) -> Tensor:
        """Of the sequence in each row, in slots of that order, `[rows, steps, vocabulary]`."""
        bucket = self.bucket(size)
        for slot, sequence in enumerate(rows):
            self._begin(slot, sequence)
        padding = [-1] * (size - len(rows))
        bucket.slots.copy_(torch.tensor([*range(len(rows)), *padding], dtype=torch.int32))
        steps = []
        for step in range(self._tried):
            tokens = [self._token(sequence, step) for sequence in rows] + [0] * len(padding)
            bucket.tokens.copy_(torch.tensor(tokens)[:, None])
            bucket.run(sampled=False)
            steps.append(bucket.logits[: len(rows)].clone())
        return torch.stack(steps, dim=1)

    def _begin(self, slot: int, sequence: int) -> None:
        """A slot has read a prompt, or nothing, and its window ends at one of the steps to come."""
        device = self.network.device
        length = 3 * sequence
        if device.type == "cuda":
            length += self.network.memories[0].window  # of which a state is made
        prompt = [self._token(sequence, -1 - i) for i in range(length)]
        slots = torch.tensor([slot], dtype=torch.int32, device=device)
        for memory in self.network.memories:
            # The step after it folds.
            memory.reset(slots, len(prompt) + 1 + sequence % (self._tried - 1))
        if prompt:
            self.network.read(torch.tensor([prompt], device=device), slots)

    def _token(self, sequence: int, step: int) -> int:
        return (7 + 31 * sequence + 13 * step) % self.network.vocabulary


def _steps_to_try(network: Network) -> int:
    if network.memories[0].dtype.itemsize > 2:
        return _STEPS
    values = sum(memory.kv_heads * memory.value_dim for memory in network.memories)
    rounded = _ROUNDED.get(network.device.type, _ROUNDED["cpu"])
    return max(_STEPS, -(-rounded // values))


def _powers_of_two(slots: int) -> list[int]:
    """1, 2, 4, ... and the number of slots."""
    return [*(2**i for i in range(slots.bit_length()) if 2**i < slots), slots]
