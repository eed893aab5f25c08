"""Serving: a whole model's steps after contexts of many lengths, and the time to a first token.

Power retention runs as `retention serve` has it: a `SlotCache`, steps that are captured graphs,
prompts in pieces. Beside it is a model of the same sizes with softmax attention in transformers,
whose steps are captured likewise. What was read before is made up: states that a few tokens have
left, and keys and values at random, at the positions of a long context. The time of a step does not
depend on what they hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retention.lm import devices
from retention.lm.errors import UsageError
from retention.ops import pool

from . import decoding, served
from .peers import attention_backends
from .problem import DTYPES, Problem
from .timing import Ceilings, Effort, Timing

Row = dict[str, Any]

RETENTION = "retention"
_SHARE = 0.9  # of the memory beside weights: the rest is for activations and graphs
_MEMORY_ON_A_CPU = 2**30
_READ = 4  # sequences that have really read something, which all others are copies of
_PROMPT = 64  # tokens that they have read
_WARM_UP = 3  # steps before those that are timed
_PIECES = (512, 8192)  # of a prompt: those of `retention serve`, and larger ones
_LONGEST_WARM_UP = 32768  # longer prompts are not read twice
_COPIED = 16  # slots at a time, each by way of a copy
_MOST = 0.95  # of what is free, that keys and values may take
_UNMASKED = "retention_bench_unmasked"  # a name among transformers' attention functions


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: one of `served.MODELS`.
        layers: of it; None: all, or as many as fit.
        batches: sequences that take a step together, several numbers of them.
        contexts: tokens read before.
        states: what states are held in.
        memory: bytes for the memory of sequences; None: what is free beside the weights.
    """

    model: str = "small"
    layers: int | None = None
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (1024,)
    states: tuple[str, ...] = ("float32",)
    memory: int | None = None


PLANS = {
    "cuda": Plan("powercoder", batches=(1, 8, 32, 128), contexts=(2048, 32768, 131072)),
    "cpu": Plan("small", batches=(1, 8), contexts=(512, 2048)),
}
QUICK_BATCHES = (1, 2)


@dataclass(frozen=True)
class Way:
    """How transformers computes softmax attention of a step.

    Attributes:
        name: of its rows.
        masked: whether there is a mask of the cache's places, as `generate` has it with a static
            cache. Without one all places are read, which more backends take.
        backend: of PyTorch; None: its choice.
    """

    name: str
    masked: bool = False
    backend: SDPBackend | None = None

    def chosen(self, model: Any) -> contextlib.AbstractContextManager:
        """Within, the model's calls are computed so."""
        model.set_attn_implementation("sdpa" if self.masked else _unmasked())
        return contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend)


def _unmasked() -> str:
    """The name of transformers' own function, for which it makes no masks under this name."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    return _UNMASKED


def softmax_ways(device: str) -> list[Way]:
    backends = attention_backends(device)
    # The efficient one does not share keys among heads.
    taken = [(x, name) for x, name in backends if x != SDPBackend.EFFICIENT_ATTENTION]
    return [
        Way("softmax, masked", masked=True),
        *(Way(f"softmax, {name}", backend=backend) for backend, name in taken),
    ]


def check(plan: Plan, problem: Problem) -> None:
    """Raises UsageError for a plan by which nothing can be measured."""
    pair = served.configurations(plan.model, plan.layers)
    for state in plan.states:
        memory, *_ = _planned(pair, 1, DTYPES[problem.dtype], state)
        if min(plan.contexts) <= memory.window:
            raise UsageError(
                f"--t: expected more tokens for serving than the window of {memory.window}, which "
                f"slots fold at a time, got {min(plan.contexts)}"
            )


def measure(
    plan: Plan,
    problem: Problem,
    ceilings: Ceilings,
    effort: Effort,
    wanted: Callable[[str], bool],
    say: Callable[[str], None],
    free: Callable[[str], None],
) -> Iterator[Row]:
    """Rows of power retention, then of softmax attention, with the same memory to fill. What fails
    has a row that says why.

    Raises:
        UsageError: where not even one layer fits.
    """
    free(problem.device)
    dtype = DTYPES[problem.dtype]
    there = _free_bytes(problem.device)
    pair = served.fitting(plan.model, plan.layers, dtype, there)
    if plan.memory is not None:
        budget = plan.memory
    elif there is None:
        budget = _MEMORY_ON_A_CPU
    else:
        budget = int(_SHARE * (there - pair.weight_bytes(dtype)))
    run = _Run(plan, problem, pair, budget, ceilings, effort, say, free)
    if wanted(RETENTION):
        for state in plan.states:
            yield from run.retention(state)
    ways = [way for way in softmax_ways(problem.device) if wanted(way.name)]
    if ways:
        yield from run.softmax(ways)


def _free_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None


def _planned(pair: served.Pair, slots: int, dtype: torch.dtype, state: str) -> list[Any]:
    """The memory of each layer, of which nothing is allocated."""
    from retention.transformers import SlotCache

    states = getattr(torch, state)
    return SlotCache(pair.retention, slots, dtype=dtype, state_dtype=states, device="meta").memories


def batches_to_measure(asked: tuple[int, ...], fitting: int) -> list[int]:
    """Those asked for, and as many as fit where that is fewer than the most of them."""
    more = {fitting} if 0 < fitting < max(asked) else set()
    return sorted({*asked, *more})


class _Run:
    """One run of a plan: what all its rows have in common."""

    def __init__(
        self,
        plan: Plan,
        problem: Problem,
        pair: served.Pair,
        budget: int,
        ceilings: Ceilings,
        effort: Effort,
        say: Callable[[str], None],
        free: Callable[[str], None],
    ):
        self.plan, self.pair, self.budget = plan, pair, budget
        self.device, self.dtype = torch.device(problem.device), DTYPES[problem.dtype]
        self._name = problem.device
        self._ceilings, self._effort, self._say, self._free = ceilings, effort, say, free

    def retention(self, state: str) -> Iterator[Row]:
        each = self._slot_bytes(state)
        peer = {"peer": RETENTION, "state": state, "memory": each}
        batches = batches_to_measure(self.plan.batches, self.budget // each)
        slots = min(max(batches), self._most_slots(each))
        self._said(f"{RETENTION}, {slots} slots, states of {state}")
        ours, failed = self._tried(
            lambda: Retention(self.pair, self.device, self.dtype, state, slots)
        )
        for t, b in itertools.product(self.plan.contexts, batches):
            row = self._row(peer, "decode", t, b)
            if failed or b > slots:
                too_many = {"failed": f"slots do not fit: {b * each / 1e9:.1f} GB"}
                yield row | (failed or too_many)
                continue
            self._said(f"{RETENTION}, {t:,} tokens, batch {b}")
            yield row | self._result(lambda t=t, b=b: self._decoded(ours, t, b, ours.window))
        for piece, t in itertools.product(_PIECES, self.plan.contexts):
            if piece != _PIECES[0] and t <= _PIECES[0]:
                continue  # one piece, as before
            self._said(f"{RETENTION}, first token of {t:,}, in pieces of {piece}")
            row = _noted(self._row(peer, "first token", t, 1), f"pieces of {piece:,}")
            yield row | (
                failed or self._result(lambda t=t, n=piece: self._first(ours.first_token, t, n))
            )
        ours = None
        self._free(self._name)

    def softmax(self, ways: list[Way]) -> Iterator[Row]:
        self._said("softmax attention")
        model, failed = self._tried(
            lambda: served.build(self.pair.softmax, self.device, self.dtype)
        )
        for t in self.plan.contexts:
            each = self._sequence_bytes(t)
            for b in batches_to_measure(self.plan.batches, self.budget // each):
                self._said(f"softmax attention, {t:,} tokens, batch {b}")
                rows = [
                    self._row({"peer": way.name, "state": "", "memory": each}, "decode", t, b)
                    for way in ways
                ]
                yield from [x | failed for x in rows] if failed else self._steps(model, ways, rows)
        # The last one first: it is the fastest as a rule, and the others are for where it fails.
        whole = [way for way in ways if not way.masked][::-1] or ways
        for t in self.plan.contexts:
            self._said(f"softmax attention, first token of {t:,}")
            for way in whole:
                peer = {"peer": way.name, "state": "", "memory": self._sequence_bytes(t)}
                row = self._row(peer, "first token", t, 1)
                row |= failed or self._result(
                    lambda t=t, way=way: self._first(
                        lambda tokens, _: first_token_of_softmax(model, way, tokens), t, t
                    )
                )
                if "failed" not in row:
                    break
            yield row
        model = None
        self._free(self._name)

    def _steps(self, model: Any, ways: list[Way], rows: list[Row]) -> Iterator[Row]:
        """Rows of all ways, which share a cache."""
        t, b, each = (rows[0][key] for key in ("t", "b", "memory"))

        def allocated() -> Softmax:
            there = _free_bytes(self._name)
            if there is not None and b * each > _MOST * there:
                sizes = f"{b * each / 1e9:.1f} of {there / 1e9:.1f} GB that are free"
                raise RuntimeError(f"keys and values do not fit: {sizes}")
            return Softmax(model, t, b)

        cache, failed = self._tried(allocated)
        for way, row in zip(ways, rows, strict=True):
            if failed:
                yield row | failed
                continue
            steps, failed_here = self._tried(lambda way=way: SoftmaxSteps(cache, way))
            row = _noted(row, "" if steps is None else steps.note)
            yield row | (
                failed_here or self._result(lambda steps=steps: self._decoded(steps, t, b))
            )
            steps = None
        cache = None
        self._free(self._name)

    # ---- parts of rows --------------------------------------------------------------------------

    def _said(self, what: str) -> None:
        note = f" ({self.pair.note})" if self.pair.note else ""
        self._say(f"serving: {self.pair.name}{note}, {what}")

    def _row(self, peer: Row, kind: str, t: int, b: int) -> Row:
        row = {"mode": "serving", "pass": kind, "t": t, "b": b} | peer
        row |= {"model": self.pair.name, "layers": self.pair.layers, "budget": self.budget}
        if b not in self.plan.batches and kind == "decode":
            row["largest"] = True  # that fits, and not one of those asked for
        return _noted(row, self.pair.note)

    def _tried(self, run: Callable[[], Any]) -> tuple[Any, Row]:
        """What comes of it, and where nothing does why not, with all memory given back."""
        failed: Row = {}
        try:
            return run(), failed
        except (RuntimeError, MemoryError) as error:
            failed["failed"] = (str(error) or type(error).__name__).splitlines()[0]
        self._free(self._name)
        return None, failed

    def _result(self, run: Callable[[], Row]) -> Row:
        """Part of a row: what is measured, or why nothing is."""
        row, failed = self._tried(run)
        return failed or row

    def _decoded(self, steps: Retention | SoftmaxSteps, t: int, b: int, count: int = 0) -> Row:
        """Of so many steps, or of as many as effort has them."""
        if not count:
            effort = dataclasses.replace(self._effort, seconds=self._effort.seconds / 10)
            count = effort.calls(statistics.median(steps.seconds(t, b, _WARM_UP)))
        seconds = steps.seconds(t, b, count)
        mean = statistics.mean(seconds)
        moved = steps.weight_bytes + steps.cache_bytes(t, b)
        return {
            **Timing.of(seconds, steps.graph).row(),
            "ms mean": 1e3 * mean,
            "ms a layer": 1e3 * mean / self.pair.layers,
            "tokens/s": b / mean,
            "bytes": moved,
            "share of copy": moved / mean / (self._ceilings.tbytes * 1e12),
            "share of weights": steps.weight_bytes / moved,
        }

    def _first(self, read: Callable[[Tensor, int], None], t: int, piece: int) -> Row:
        """How long a prompt of t tokens takes, after one that is not counted."""
        tokens = torch.randint(self.pair.retention.vocab_size, (1, t), device=self.device)
        read(tokens[:, : t if t <= _LONGEST_WARM_UP else 2 * _PIECES[-1]], piece)
        start = time.perf_counter()
        read(tokens, piece)
        seconds = time.perf_counter() - start
        return {"ms": 1e3 * seconds, "tokens/s": t / seconds}

    def _slot_bytes(self, state: str) -> int:
        one, two = (
            sum(x.nbytes for x in _planned(self.pair, slots, self.dtype, state)) for slots in (1, 2)
        )
        return two - one

    def _most_slots(self, each: int) -> int:
        """As many as fit beside weights that are still to come; at least one is tried."""
        there = _free_bytes(self._name)
        if there is None:
            return max(self.plan.batches)
        return max(1, int(_SHARE * (there - self.pair.weight_bytes(self.dtype))) // each)

    def _sequence_bytes(self, t: int) -> int:
        """Of keys and values."""
        config = self.pair.retention
        heads = config.num_key_value_heads * config.head_dim
        return 2 * t * self.pair.layers * heads * self.dtype.itemsize


def _noted(row: Row, note: str) -> Row:
    notes = [x for x in (row.get("note", ""), note) if x]
    return row | ({"note": ", ".join(notes)} if notes else {})


class Clock:
    """When steps have ended: on a GPU by its own events, for which nobody waits meanwhile."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = itertools.pairwise(self._marks)
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _check_finite(tokens: Tensor) -> None:
    if (tokens < 0).any():
        raise RuntimeError("logits are not finite")


# ---- power retention ----------------------------------------------------------------------------


class Retention:
    """A model of power retention with sequences in slots, as `retention serve` has them.

    Attributes:
        window: tokens that a slot folds at a time.
        graph: whether steps are captured graphs.
        weight_bytes: that a step reads.
    """

    def __init__(
        self, pair: served.Pair, device: torch.device, dtype: torch.dtype, state: str, slots: int
    ):
        from retention.serve.models import FolderNetwork
        from retention.serve.steps import Steps

        self._pair, self._dtype, self._state = pair, dtype, state
        model = served.build(pair.retention, device, dtype)
        self.weight_bytes = served.read_bytes(model)
        self.network = FolderNetwork(model, getattr(torch, state))
        self.network.allocate(slots)
        self.window = self.network.memories[0].window
        self.steps = Steps(self.network, batch_invariance=False)
        self.graph = device.type == "cuda"
        self._read()

    def _read(self) -> None:
        """Something in every slot: its state, and every place of its ring."""
        network, device = self.network, self.network.device
        slots = network.memories[0].slots
        count = min(_READ, slots)
        prompts = torch.randint(network.vocabulary, (count, _PROMPT), device=device)
        for slot, prompt in enumerate(prompts):
            network.read(prompt[None], torch.tensor([slot], dtype=torch.int32, device=device))
        ring = network.memories[0].pool.keys.shape[2]
        _check_finite(self.steps.drive(range(count), prompts[:, 0].tolist(), ring))
        others = torch.arange(count, slots, dtype=torch.int32, device=device)
        for memory, some in itertools.product(network.memories, others.split(_COPIED)):
            memory.copy(some % count, some)

    def start(self, t: int, b: int) -> None:
        """The first b slots have seen t tokens, and are where sequences are that came at any time:
        their rings are full to all degrees, and each folds once in a window of steps."""
        device = self.network.device
        slot = torch.arange(b, device=device)
        length = 1 + (self.window // 2 + slot * self.window // b) % self.window
        folded = t - length
        cursor = pool.Cursor(
            torch.zeros_like(length).int(),
            length.int(),
            (folded % self.window).int(),  # windows end with as many tokens as they have
            folded,
            torch.full_like(length, t),
        )
        for memory in self.network.memories:
            memory.pool.cursors[:b] = pool.pack(cursor)

    @torch.no_grad()
    def seconds(self, t: int, b: int, count: int) -> list[float]:
        """Of each of so many steps of b sequences, after t tokens."""
        bucket = self.steps.bucket(self.steps.fitting(b))
        padding = bucket.size - b
        bucket.slots.copy_(torch.tensor([*range(b), *[-1] * padding], dtype=torch.int32))
        bucket.tokens.random_(self.network.vocabulary)
        with devices.current(self.network.device):
            self.start(t, b)
            for _ in range(_WARM_UP):
                bucket.run(sampled=False)
            self.start(t, b)
            before = self._folded(b)
            chosen = torch.empty(count, bucket.size, dtype=torch.int64, device=bucket.chosen.device)
            clock = Clock(self.network.device)
            for tokens in chosen:
                bucket.run(sampled=False)
                tokens.copy_(bucket.chosen)
                bucket.tokens.copy_(bucket.chosen.clamp(min=0)[:, None])
                clock.mark()
            seconds = clock.seconds()
        _check_finite(chosen[:, :b])
        if count == self.window and not (self._folded(b) - before == count).all():
            raise RuntimeError("not every slot has folded as often as its windows ended")
        return seconds

    def _folded(self, b: int) -> Tensor:
        """Tokens in the states of the first b slots, of every layer."""
        return torch.stack([x.positions[:b] - x.lengths[:b] for x in self.network.memories])

    def cache_bytes(self, t: int, b: int) -> float:
        """That a step reads and writes of b slots on average, each byte once, folds included."""
        config = self._pair.retention
        shape = decoding.Shape(
            *(b, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        )
        total = 0.0
        for memory in _planned(self._pair, b, self._dtype, self._state):
            p = memory.pool
            state = sum(x.nbytes for x in (p.high, p.low, p.key_sum) if x is not None)
            ring = sum(x.nbytes for x in (p.keys, p.values, p.log_gates) if x is not None)
            folded = 2 * state / memory.window + ring / p.keys.shape[2]
            total += decoding.step_bytes(memory, shape) + folded
        return total

    @torch.no_grad()
    def first_token(self, tokens: Tensor, piece: int) -> None:
        """Reads a prompt [1, t] in pieces, and waits for the token after it."""
        from retention.serve.models import empty_slot

        empty_slot(self.network, 0, tokens[0, :_PROMPT].tolist())
        slot = torch.zeros(1, dtype=torch.int32, device=tokens.device)
        most = tokens.shape[1] - 1
        for begin in range(0, most, piece):
            self.network.read(tokens[:, begin : min(begin + piece, most)], slot)
        _check_finite(self.steps.drive([0], tokens[0, -1:].tolist(), 1))


# ---- softmax attention --------------------------------------------------------------------------


class Softmax:
    """A static cache of transformers, full of random keys and values, and steps that read it.

    Args:
        model: of transformers.
        t: places for tokens.
        b: sequences.
    """

    def __init__(self, model: Any, t: int, b: int):
        from transformers import StaticCache

        config = model.config
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        self.model = model
        self.cache = StaticCache(config=config, max_cache_len=t)
        self.cache.early_initialization(b, heads, head_dim, model.dtype, model.device)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.tokens = torch.randint(config.vocab_size, (b, 1), device=model.device)
        self.weight_bytes = served.read_bytes(model)

    def place(self, t: int) -> None:
        """The next token is the one after t."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(t)

    def nbytes(self) -> int:
        return sum(x.keys.nbytes + x.values.nbytes for x in self.cache.layers)


class SoftmaxSteps:
    """Steps of a cache, in one way: a captured graph, or on a CPU, and where a graph cannot be
    captured, call by call.

    Attributes:
        graph, weight_bytes: as `Retention` has them.
        note: why there is no graph where there should be one.
    """

    def __init__(self, softmax: Softmax, way: Way):
        self._softmax, self._way = softmax, way
        self.weight_bytes = softmax.weight_bytes
        self.chosen = torch.zeros_like(softmax.tokens[:, 0])
        self.graph, self.note, self._run = False, "", self._step
        softmax.place(0)
        if captures(softmax.model.device):
            try:
                with way.chosen(softmax.model):
                    self._run = capture(self._step)
                self.graph = True
            except RuntimeError as error:
                if devices.is_out_of_memory(error):
                    raise
                self.note = f"no graph: {str(error).splitlines()[0]}"

    @torch.no_grad()
    def _step(self) -> None:
        from retention.serve.sampling import choose

        x = self._softmax
        logits = x.model(x.tokens, cache=x.cache, use_cache=True, logits_to_keep=1).logits
        self.chosen.copy_(choose(logits[:, -1], None))
        x.tokens.copy_(self.chosen.clamp(min=0)[:, None])

    def seconds(self, t: int, b: int, count: int) -> list[float]:
        """Of each of so many steps, the last of which takes the last place of the cache."""
        count = min(count, t - 1)
        self._softmax.place(t - 1 - count)
        with self._way.chosen(self._softmax.model):
            self._run()
            broken = self.chosen < 0
            clock = Clock(self._softmax.model.device)
            for _ in range(count):
                self._run()
                broken |= self.chosen < 0
                clock.mark()
            seconds = clock.seconds()
        _check_finite(-broken.long())
        return seconds

    def cache_bytes(self, t: int, b: int) -> float:
        """That a step reads: all keys and values."""
        return self._softmax.nbytes()


def captures(device: torch.device) -> bool:
    """Whether steps are captured on this device."""
    return device.type == "cuda"


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step, which replays it."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def first_token_of_softmax(model: Any, way: Way, tokens: Tensor) -> None:
    """Reads a prompt [1, t] in one call, and waits for the token after it."""
    from transformers import DynamicCache

    from retention.serve.sampling import choose

    cache = DynamicCache(config=model.config)
    with way.chosen(model):
        logits = model(tokens, cache=cache, use_cache=True, logits_to_keep=1).logits
    _check_finite(choose(logits[:, -1], None))
