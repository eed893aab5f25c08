"""The server's engine, without HTTP: whose tokens are whose, alone and under load."""

from __future__ import annotations

import copy
import itertools
import threading
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import serve_cases
import transformers_cases as cases
from retention.lm import generation
from retention.nn import GateProjection
from retention.serve import sampling
from retention.serve.engine import Done, Engine, Failed, Piece, QueueFullError, UnavailableError
from retention.serve.models import Model
from retention.serve.sampling import Draw
from retention.serve.steps import Steps
from retention.serve.text import ByteText, StopStrings
from serve_cases import MODELS, Scripted, Waiting, Wrapped, engine_of

PROMPTS = ("the quick", "η", "fox; die schöne", "x" * 70, "🦊", "素早い", "q" * 33)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def small() -> Model:
    """For what is no model's matter."""
    return serve_cases.run_model()


# ---- alone and under load -----------------------------------------------------------------------


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Different ones: lengths, ways of choosing, and what is asked beside tokens."""
    made = []
    for i in range(count):
        more: dict[str, Any] = {"max_tokens": 3 + 7 * i % 31}
        if i % 3 == 1:
            more |= {"temperature": 0.9, "top_p": 0.9, "seed": i}
        if i % 4 == 0:
            more |= {"likeliest": i % 5}
        made.append((PROMPTS[i % len(PROMPTS)] + f" {i}", more))
    return made


def check_alone_and_under_load(engine: Engine, asked: list[tuple[str, dict[str, Any]]]) -> None:
    """By one another in every way: tokens, texts and log probabilities are, to the last bit, those
    that each request has when nothing else runs."""
    together = [Waiting(engine, prompt, **more) for prompt, more in asked]
    together = [waiting.result() for waiting in together]
    assert all(isinstance(done, Done) for done, *_ in together)
    for (prompt, more), got in list(zip(asked, together, strict=True))[::4]:
        assert Waiting(engine, prompt, **more).result() == got
    assert len({str(texts) for _, texts, *_ in together}) > len(asked) * 3 / 4


def test_the_same_bits_alone_and_under_load(model: Model):
    """Up to 64 requests at once in 16 slots."""
    with engine_of(model, slots=16, prefill_tokens=16) as engine:
        assert engine.steps.sizes[-1] == 16
        check_alone_and_under_load(engine, requests(64 if model.name == "folder" else 32))


WIDE = {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.1}


def test_the_same_bits_where_many_tokens_are_as_likely():
    """As in 16 bits."""
    model = serve_cases.folder_model(torch.bfloat16, initializer_range=0.1)
    with engine_of(model, batch_invariance=False) as engine:
        engine.steps.sizes = [4]  # no other one, so that no other is compared with it
        check_alone_and_under_load(engine, requests(24))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_graphs_on_a_gpu(dtype):
    """And captured steps give what calls give."""
    model = serve_cases.folder_model(dtype, "cuda", **WIDE)
    with engine_of(model, slots=16, prefill_tokens=64) as engine:
        check_alone_and_under_load(engine, requests(64))
        assert engine.steps.bucket(16)._graphs
    driven = []
    for graphs in (True, False):
        model.network.allocate(16)
        steps = Steps(model.network, graphs=graphs)
        driven.append(steps.drive([3, 1], [7, 8], 40).tolist())
    assert driven[0] == driven[1]


def test_greedy_tokens_are_those_of_the_model_without_a_cache():
    """In float64, where no rounding makes another token the likeliest."""
    model = serve_cases.folder_model(torch.float64)
    inner = model.network._model
    with engine_of(model, slots=4, prefill_tokens=8) as engine, torch.no_grad():
        waiting = [Waiting(engine, prompt, max_tokens=40, likeliest=3) for prompt in PROMPTS]
        for prompt, each in zip(PROMPTS, waiting, strict=True):
            done = each.end()
            ids = torch.tensor([model.text.encode(prompt)])
            assert done.prompt_tokens == ids.shape[1]
            wanted = cases.greedy(inner, ids, done.completion_tokens)[0, ids.shape[1] :]
            got = [x.token for x in each.logprobs[0]]
            if each.reasons == ["stop"]:
                assert wanted[-1].item() in model.text.ends
                wanted = wanted[:-1]
            else:
                assert done.completion_tokens == 40
            assert got == wanted.tolist()
            whole = inner(torch.cat((ids[0], wanted))[None], use_cache=False).logits
            logprobs = whole[0, ids.shape[1] - 1 : -1 if len(wanted) == 40 else None]
            logprobs = logprobs.log_softmax(-1)[: len(wanted)]
            for x, own in zip(each.logprobs[0], logprobs, strict=True):
                best = own.topk(3)
                assert [token for token, _ in x.likeliest] == best.indices.tolist()
                # float64 on both sides, a state in place of sums over keys.
                assert [y for _, y in x.likeliest] == pytest.approx(best.values.tolist(), abs=1e-9)
                assert x.logprob == pytest.approx(own[x.token].item(), abs=1e-9)


class Noisy(Wrapped):
    """Rounds differently in batches of some sizes, or at some places of them."""

    def __init__(self, network: Any, sizes: set[int], row: int | None = None):
        super().__init__(network)
        self.sizes, self.row = sizes, row

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        logits = super().step(tokens, slots)
        if len(slots) in self.sizes:
            rows = logits if self.row is None else logits[self.row : self.row + 1]
            rows += 1e-3
        return logits


@pytest.mark.parametrize(
    ("sizes", "row", "left"),
    [
        (set(), None, [4, 8, 11]),
        ({4}, None, [8, 11]),
        ({8}, 7, [4, 11]),
        ({8}, 0, [4, 11]),
        ({11}, 10, [4, 8]),
        ({2, 4, 8, 11}, 1, [1]),
    ],
)
def test_batch_sizes_with_other_bits_are_left_out(sizes: set[int], row: int | None, left: list):
    """Those that round as the largest do are left; what a place rounds differently has none."""
    model = serve_cases.run_model()
    network = Noisy(model.network, sizes, row)
    network.allocate(11)
    found = Steps(network).sizes
    # Which of the small ones are of the same kind is the processor's matter.
    assert [size for size in found if size >= min(4, max(left))] == left
    assert Steps(network, batch_invariance=False).sizes == [1, 2, 4, 8, 11]
    # What they were tried with is gone.
    assert all((memory.positions == 0).all() for memory in network.memories)


def test_more_sequences_than_the_largest_batch(model: Model):
    """As where no batch of several is like another: steps of one, and the same answers."""
    asked = requests(9)
    noisy = model._replace(network=Noisy(model.network, {2, 4}, 1))
    results = []
    for each in (noisy, noisy):
        with engine_of(each, slots=4) as engine:
            assert engine.steps.sizes == [1]
            together = [Waiting(engine, prompt, **more) for prompt, more in asked]
            results.append([waiting.result() for waiting in together])
    assert results[0] == results[1]


def test_a_driven_batch_generates_what_the_engine_does(model: Model):
    with engine_of(model, slots=4) as engine:
        wanted = [
            [x.token for x in waiting.logprobs[0]]
            for prompt in ("ab", "qu")
            if (waiting := Waiting(engine, prompt, max_tokens=9, likeliest=0)).end()
        ]
        prompts = [model.text.encode(prompt) for prompt in ("ab", "qu")]
        for slot, prompt in zip((3, 1), prompts, strict=True):
            memory_slots = torch.tensor([slot], dtype=torch.int32)
            for memory in model.network.memories:
                memory.reset(memory_slots)
            if prompt[:-1]:
                model.network.read(torch.tensor([prompt[:-1]]), memory_slots)
        out = engine.steps.drive([3, 1], [prompt[-1] for prompt in prompts], 9)
        for row, tokens in zip(out.T.tolist(), wanted, strict=True):
            assert row[: len(tokens)] == tokens


# ---- prompts in pieces --------------------------------------------------------------------------


class Recorded(Wrapped):
    """What was called, in order: tokens read, or 0 for a step."""

    def __init__(self, network: Any):
        super().__init__(network)
        self.calls: list[int] = []

    def read(self, tokens: Tensor, slots: Tensor) -> None:
        self.calls.append(tokens.shape[1])
        super().read(tokens, slots)

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self.calls.append(0)
        return super().step(tokens, slots)


def test_long_prompts_do_not_stall_those_that_run():
    model = serve_cases.run_model()
    network = Recorded(model.network)
    with engine_of(model._replace(network=network), slots=4, prefill_tokens=16) as engine:
        running = Waiting(engine, "a", max_tokens=200)
        running.next()
        network.calls.clear()
        long = [Waiting(engine, "x" * length, max_tokens=2) for length in (161, 100, 3)]
        for waiting in long:
            waiting.end()
        engine.cancel(running.request)
    between = [
        sum(calls)
        for is_step, calls in itertools.groupby(network.calls, lambda call: call == 0)
        if not is_step
    ]
    assert max(between) <= 16
    assert sum(between) == 160 + 99 + 2
    # The shorter prompts did not wait for the whole of the longest.
    assert network.calls.index(2) < 12


# ---- what ends an answer ------------------------------------------------------------------------


def scripted(script: str | bytes, slots: int = 2) -> Any:
    model = serve_cases.run_model()
    script = script.encode() if isinstance(script, str) else script
    return engine_of(model._replace(network=Scripted(model.network, script)), slots)


@pytest.mark.parametrize(
    ("script", "stop", "text", "tokens", "reason"),
    [
        ("hello world", (), "hello wo", 8, "length"),
        ("hello world", ("o w",), "hell", 7, "stop"),
        ("hello world", ("zz", "wx", "lo "), "hel", 6, "stop"),
        ("aaab", ("ab",), "aa", 4, "stop"),
        ("abcabd", ("abd",), "abc", 6, "stop"),
        ("xabc", ("abcd", "xabc", "ab"), "x", 3, "stop"),  # what is complete first
        ("für 🦊!", ("🦊",), "für ", 9, "stop"),  # part by part
        ("a\x00b", (), "a", 2, "stop"),  # where another file begins
        ("ab<en\x00d", ("<end>",), "ab<en", 6, "stop"),  # held back, and no stop string
        ("12345<en", ("<end>",), "12345<en", 8, "length"),
    ],
)
def test_how_answers_end(script: str, stop: tuple, text: str, tokens: int, reason: str):
    with scripted(script) as engine:
        waiting = Waiting(engine, "?", max_tokens=max(8, tokens), stop=stop, likeliest=0)
        done = waiting.end()
        assert (waiting.texts, waiting.reasons) == ([text], [reason])
        assert (done.prompt_tokens, done.completion_tokens) == (1, tokens)
        # Log probabilities are of the tokens whose text is there.
        assert bytes(x.token for x in waiting.logprobs[0]).decode() == text
        assert [x.offset for x in waiting.logprobs[0]] == [
            len(text.encode()[:i].decode("utf-8", "ignore")) for i in range(len(text.encode()))
        ]


def test_characters_come_whole():
    with scripted("é素🦊") as engine:
        waiting = Waiting(engine, "?", max_tokens=8)
        pieces = []
        while isinstance(event := waiting.next(), Piece):
            pieces.append(event.text)
        # The last one is cut off by the number of tokens.
        assert pieces == ["é", "素", "\N{REPLACEMENT CHARACTER}"]


def first_complete(text: str, stops: list[str]) -> str:
    """By trying all beginnings of the text."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_wherever_tokens_end(parts: list[str], stops: list[str]):
    matcher, shown, stopped = StopStrings(stops), "", False
    for part in parts:
        new, stopped = matcher.add(part)
        shown += new
        assert first_complete("".join(parts), stops).startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += matcher.finish()
    assert shown == first_complete("".join(parts), stops)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 5))
def test_texts_come_back_as_they_were(text: str, prompt: int):
    """Whatever the tokenizer cuts, and without half a character meanwhile."""
    for tokens, served in texts_of(text):
        decoder = served.decoder(tokens[:prompt])
        parts = [decoder.add(token) for token in tokens[prompt:]]
        assert all(part.isascii() or "\N{REPLACEMENT CHARACTER}" not in part for part in parts) or (
            "\N{REPLACEMENT CHARACTER}" in text or prompt
        )
        whole = "".join(parts) + decoder.finish()
        if prompt == 0:
            assert whole == text
        assert b"".join(map(served.token_bytes, tokens)) == text.encode()


def test_words_keep_their_space_and_bytes_are_bytes():
    """Of tokenizers that write a space as a character, and drop the first one of a text."""
    names = ["<unk>", "\N{LOWER ONE EIGHTH BLOCK}the", "\N{LOWER ONE EIGHTH BLOCK}fox", "es"]
    names += ["<0xC3>", "<0xA9>"]
    inner = Tokenizer(tokenizers.models.WordLevel({x: i for i, x in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    text = serve_cases.TokenizerText(fast, frozenset())
    assert text.encode("the fox") == [1, 2]
    decoder = text.decoder([1])
    assert [decoder.add(token) for token in (2, 3, 1, 4, 5)] == [" fox", "es", " the", "", "é"]
    assert [text.token_bytes(token) for token in (2, 3, 4)] == [b" fox", b"es", b"\xc3"]
    assert text.decoder([]).add(2) == "fox"


TOKENIZER = serve_cases.TokenizerText(serve_cases.make_tokenizer(), frozenset())


def texts_of(text: str) -> list[tuple[list[int], Any]]:
    if not text:
        return []
    return [(TOKENIZER.encode(text), TOKENIZER), (ByteText().encode(text), ByteText())]


@given(st.binary(min_size=1, max_size=12))
def test_bytes_that_are_no_text(content: bytes):
    decoder = ByteText().decoder([])
    got = "".join(map(decoder.add, content)) + decoder.finish()
    assert got == content.decode("utf-8", "replace")
    # In a tokenizer's hands nothing is held back for ever.
    decoder = TOKENIZER.decoder([])
    tokens = TOKENIZER._decoding.convert_tokens_to_ids(
        [character for byte in content for character, b in TOKENIZER._byte_of.items() if b == byte]
    )
    shown = sum(bool(decoder.add(token)) for token in tokens)
    assert shown >= len(content) // 4


# ---- draws --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.floats(0, 1), st.floats(0, 0.999)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 99),
)
def test_rows_are_sampled_as_one_is_alone(draws: list[tuple], seed: int):
    logits = torch.randn(len(draws), 7, generator=torch.Generator().manual_seed(seed))
    cpu = torch.device("cpu")
    got = sampling.choose(logits, sampling.as_tensor([Draw(*x) for x in draws], cpu))
    for row, (temperature, top_p, drawn) in enumerate(draws):
        uniform = torch.tensor([drawn], dtype=torch.float64)
        wanted = generation.sample(logits[row : row + 1], temperature, top_p, uniform)
        assert got[row] == wanted[0]
    assert torch.equal(sampling.choose(logits, None), logits.argmax(-1))


def test_gates_are_widened_once():
    """To the same bits."""
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        network = serve_cases.folder_model(torch.bfloat16).network
        gates = [x for x in network._model.modules() if isinstance(x, GateProjection)]
        assert {gate.weight.dtype for gate in gates} == {torch.float32}
        for gate in gates:
            gate.to(dtype)
        network.allocate(2)
        slots = torch.tensor([1, 0], dtype=torch.int32)
        tokens = torch.tensor([[3], [9]])
        logits.append(torch.stack([network.step(tokens + i, slots) for i in range(5)]))
    assert torch.equal(*logits)
    assert logits[0].dtype == torch.bfloat16


def test_among_equals_the_first_is_the_likeliest_whatever_is_asked():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).round().bfloat16()
    chosen = sampling.choose(logits, None)
    whole = sampling.log_probabilities(logits, chosen, 20)
    assert torch.equal(whole[2][:, 0], chosen)
    assert torch.equal(whole[1][:, 0], whole[0])
    for row, tokens in zip(logits.tolist(), whole[2].tolist(), strict=True):
        assert tokens == sorted(range(50), key=lambda token: (-row[token], token))[:20]
    for rows, count in ((slice(0, 9), 3), (slice(4, 5), 20), (slice(7, 9), 1), (slice(0, 9), 0)):
        got = sampling.log_probabilities(logits[rows], chosen[rows], count)
        wanted = (whole[0][rows], *(x[rows, :count] for x in whole[1:]))
        assert all(map(torch.equal, got, wanted))


def test_a_seed_is_that_of_retention_generate():
    model = serve_cases.run_model()
    prompts, more = ["def ", "x = "], {"temperature": 0.8, "top_p": 0.95, "seed": 5}
    with engine_of(model) as engine:
        waiting = Waiting(engine, *prompts, max_tokens=30, likeliest=0, **more)
        waiting.end()
    wanted = [b"", b""]
    stream = generation.generate(
        model.network._model, [prompt.encode() for prompt in prompts], 30, **more, stop=True
    )
    for pieces in stream:
        wanted = [text + piece for text, piece in zip(wanted, pieces, strict=True)]
    got = [bytes(x.token for x in logprobs) for logprobs in waiting.logprobs]
    assert got == wanted
    assert got[0] != got[1]


def test_choices_have_seeds_of_their_own(model: Model):
    more = {"max_tokens": 12, "temperature": 1.0}
    with engine_of(model, slots=3) as engine:
        several = Waiting(engine, "the", "fox", n=3, seed=40, **more)
        done = several.end()
        assert done.prompt_tokens == sum(len(model.text.encode(x)) for x in ("the", "fox"))
        assert len(set(several.texts)) == 6
        for i in range(6):
            alone = Waiting(engine, ("the", "fox")[i // 3], seed=40 + i, **more)
            alone.end()
            assert alone.texts == [several.texts[i]]
        unseeded = [Waiting(engine, "the", likeliest=0, **more) for _ in range(3)]
        for waiting in unseeded:
            waiting.end()
        # Not their texts: bytes that are no characters look alike.
        assert len({tuple(x.token for x in w.logprobs[0]) for w in unseeded}) == 3


# ---- what fails ---------------------------------------------------------------------------------

POISON = ord("!")


class Poisoned(Wrapped):
    """Raises where a token is among those of a step, or of a prompt.

    With `loses`, memories of all other sequences of the step are lost as well.
    """

    kind: type[BaseException] = RuntimeError
    loses = False
    armed = False  # what batches are tried with is not poison

    def read(self, tokens: Tensor, slots: Tensor) -> None:
        self._look(tokens, slots)
        super().read(tokens, slots)

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self._look(tokens, slots)
        return super().step(tokens, slots)

    def _look(self, tokens: Tensor, slots: Tensor) -> None:
        if self.armed and (tokens == POISON).any():
            if self.loses:
                for memory in self.memories:
                    memory.reset(slots[tokens[:, 0] != POISON])
            raise self.kind("no such product")


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("prompt", ["xyz!", "!xyz"], ids=["step", "prompt"])
def test_a_request_that_fails_hurts_no_other(prompt: str, loses: bool):
    model = serve_cases.run_model()
    network = Poisoned(model.network)
    network.loses = loses
    asked = [(p, m) for p, m in requests(5) if "!" not in p]
    with engine_of(model._replace(network=network), slots=8, prefill_tokens=16) as engine:
        network.armed = True
        alone = [Waiting(engine, p, **m).result() for p, m in asked]
        if any("!" in text for _, texts, *_ in alone for text in texts):
            raise AssertionError("another poison: the model says this one itself")
        together = [Waiting(engine, p, **m) for p, m in asked]
        for waiting in together:
            waiting.next()
        bad = [Waiting(engine, prompt, max_tokens=3, n=2) for _ in range(2)]
        for waiting in bad:
            failed = waiting.end()
            assert isinstance(failed, Failed)
            assert failed == Failed(
                "the model failed on this request: RuntimeError: no such product"
            )
        for waiting, wanted in zip(together, alone, strict=True):
            assert waiting.result() == wanted
        assert Waiting(engine, *asked[0][:1], **asked[0][1]).result() == alone[0]


def test_logits_that_are_no_numbers_fail_one_request():
    class Broken(Wrapped):
        def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
            logits = super().step(tokens, slots)
            logits[(tokens == POISON)[:, 0], 3] = torch.inf
            return logits

    model = serve_cases.run_model()
    with engine_of(model._replace(network=Broken(model.network))) as engine:
        alone = Waiting(engine, "abc", max_tokens=30).result()
        good, bad = (Waiting(engine, prompt, max_tokens=30) for prompt in ("abc", "ab!"))
        assert bad.end() == Failed("the model's logits are no finite numbers")
        assert good.result() == alone


def test_a_device_that_is_gone_ends_the_engine(caplog: pytest.LogCaptureFixture):
    model = serve_cases.run_model()
    network = Poisoned(model.network)
    network.kind = torch.AcceleratorError
    with engine_of(model._replace(network=network), slots=1) as engine:
        network.armed = True
        waiting = [Waiting(engine, prompt, max_tokens=50) for prompt in ("ab!", "abc", "x")]
        for each in waiting:
            failed = each.end()
            assert failed.unavailable
            assert failed.message == "the engine has failed: AcceleratorError: no such product"
        assert engine.wait_until_idle(serve_cases.SECONDS)
        assert engine.failure == failed.message
        assert not engine.available
        with pytest.raises(UnavailableError, match="the engine has failed"):
            Waiting(engine, "x", max_tokens=1)
    assert "the engine has failed" in caplog.text


# ---- coming and going ---------------------------------------------------------------------------


def test_cancelled_requests_leave_their_slots(small: Model):
    with engine_of(small, slots=2) as engine:
        alone = Waiting(engine, "the end", max_tokens=20).result()
        running = [Waiting(engine, "the", max_tokens=10**6) for _ in range(2)]
        waiting = [Waiting(engine, "fox", max_tokens=10**6) for _ in range(3)]
        last = Waiting(engine, "the end", max_tokens=20)
        for each in running:
            each.next()
        assert (engine.slots_in_use, engine.load) == (2, 6)
        for each in (*waiting[:2], running[0], waiting[2], running[1]):
            engine.cancel(each.request)
        assert last.result() == alone
        assert engine.load == 0
        for each in waiting:
            assert each.events.empty()
        engine.cancel(last.request)  # which has ended


def test_a_queue_has_an_end(small: Model):
    with engine_of(small, slots=2, max_queue=3) as engine:
        running = [Waiting(engine, "the", max_tokens=10**6) for _ in range(2)]
        waiting = Waiting(engine, "the", "fox", max_tokens=5)
        with pytest.raises(QueueFullError):
            Waiting(engine, "fox", max_tokens=5, n=2)
        one = Waiting(engine, "fox", max_tokens=5)
        with pytest.raises(QueueFullError):
            Waiting(engine, "fox", max_tokens=5)
        for each in running:
            engine.cancel(each.request)
        assert isinstance(waiting.end(), Done)
        assert isinstance(one.end(), Done)
        assert isinstance(Waiting(engine, "fox", max_tokens=5).end(), Done)


def test_draining_finishes_what_is_there(small: Model):
    with engine_of(small, slots=2) as engine:
        alone = Waiting(engine, "the", max_tokens=30).result()
        waiting = [Waiting(engine, "the", max_tokens=30) for _ in range(5)]
        assert engine.available
        engine.drain()
        assert not engine.available
        with pytest.raises(UnavailableError, match="the server is shutting down"):
            Waiting(engine, "the", max_tokens=1)
        assert [each.result() for each in waiting] == [alone] * 5
        assert engine.wait_until_idle(serve_cases.SECONDS)


def test_closing_ends_what_is_there(small: Model):
    with engine_of(small, slots=2) as engine:
        waiting = [Waiting(engine, "the", max_tokens=10**6) for _ in range(5)]
        waiting[0].next()
        assert not engine.wait_until_idle(0.01)
        engine.close()
        for each in waiting:
            assert each.end() == Failed("the server is shutting down", unavailable=True)
        assert engine.load == 0
        engine.close()


def test_requests_from_many_threads(small: Model):
    """Some of which change their mind."""
    with engine_of(small, slots=4) as engine:
        wanted = [Waiting(engine, p, max_tokens=9).result() for p in PROMPTS]
        found: list[bool] = []

        def ask(number: int) -> None:
            for turn in range(4):
                i = (number + turn) % len(PROMPTS)
                waiting = Waiting(engine, PROMPTS[i], max_tokens=9)
                if (number + turn) % 3 == 0:
                    engine.cancel(waiting.request)
                else:
                    found.append(waiting.result() == wanted[i])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * len(found)
        assert len(found) > 20


def test_the_memory_of_a_slot_is_known_before(model: Model):
    each = model.network.slot_bytes()
    model.network.allocate(5)
    assert sum(memory.nbytes for memory in model.network.memories) == 5 * each
    before = copy.copy(model.network.memories)
    with engine_of(model, slots=3) as engine:
        Waiting(engine, "x" * 3000, max_tokens=64).end()
        assert sum(memory.nbytes for memory in model.network.memories) == 3 * each
    assert model.network.memories != before
