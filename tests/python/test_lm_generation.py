"""Generation: what the quadratic model would say, from a state of constant size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import retention
from retention import functional
from retention.lm import data, generation, training
from retention.lm.config import ModelConfig, TrainConfig
from retention.lm.errors import UsageError
from retention.lm.generation import Progress, Statistics, as_text, generate, sample
from retention.lm.model import LanguageModel

MODEL = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2)
# Lines that count, so that a greedy model neither repeats itself at once nor stops.
TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i * 3 % 10) for i in range(700))
PROMPT = TEXT[:29]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for a few seconds."""
    folder = tmp_path_factory.mktemp("generation")
    (folder / "text.py").write_bytes(TEXT)
    config = TrainConfig(
        data=(str(folder / "text.py"),),
        steps=120,
        batch_size=8,
        block_size=64,
        warmup=10,
        learning_rate=1e-2,
        eval_every=120,
        eval_blocks=4,
        checkpoint_every=60,
    )
    training.train(MODEL, config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exact(model: LanguageModel) -> LanguageModel:
    """In float64, where no rounding makes another byte the likeliest."""
    exact = LanguageModel(MODEL).double()
    exact.load_state_dict(model.state_dict())
    return exact


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return generation.load_model(run, torch.device("cpu"))


def texts(model: LanguageModel, prompts: Sequence[bytes], count: int, **more: Any) -> list[bytes]:
    """What follows each prompt."""
    followed = [b""] * len(prompts)
    for pieces in generate(model, prompts, count, **more):
        followed = [text + piece for text, piece in zip(followed, pieces, strict=True)]
    return followed


def text(model: LanguageModel, prompt: bytes, count: int, **more: Any) -> bytes:
    (only,) = texts(model, [prompt], count, **more)
    return only


@pytest.mark.parametrize("ring", [7, None, 512])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 5])
def test_greedy_is_the_quadratic_model_token_for_token(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, ring: int | None, prompt: bytes
):
    count = 300
    got = list(text(model, prompt, count, temperature=0, switch_over_seq_len=ring))
    assert len(got) == count
    assert len(set(got)) > 15  # most of the text's 22 characters

    def quadratic(*tensors: torch.Tensor, chunk_size=None, switch_over_seq_len=None, **more):
        return retention.reference(*tensors, **more)

    # By induction: each token is the quadratic model's own next one after the same prefix.
    monkeypatch.setattr(functional, "power_retention", quadratic)
    whole = torch.tensor([list(prompt) + got])
    with torch.no_grad():
        logits = model(whole[:, :-1])[0, len(prompt) - 1 :]
    assert logits.argmax(-1).tolist() == got


@pytest.mark.parametrize("ring", [5, 16])
def test_step_gives_the_logits_of_forward(exact: LanguageModel, ring: int):
    tokens = torch.randint(256, (2, 60), generator=torch.Generator().manual_seed(0))
    wanted = exact(tokens)
    caches = exact.init_caches(2, ring)
    start = 0
    for length in (1, 20, 1, 3, 1, 34):
        got = exact.step(tokens[:, start : start + length], caches)
        start += length
        # float64, through two layers and their norms.
        torch.testing.assert_close(got, wanted[:, start - 1], rtol=1e-8, atol=1e-8)
    assert start == 60


def test_step_takes_slots_and_padded_rows(exact: LanguageModel):
    tokens = torch.randint(256, (3, 60), generator=torch.Generator().manual_seed(0))
    wanted = exact(tokens)
    caches = exact.init_caches(4, 16)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    seen = [0, 0, 0]
    # A prompt and a step of several tokens, each with other lengths, padded on either side.
    for width, lengths, left in ((30, (30, 4, 21), True), (9, (2, 9, 5), False), (1, (1, 1, 1), 0)):
        given = torch.full((3, width), 65)
        mask = torch.zeros(3, width, dtype=torch.bool)
        for row, length in enumerate(lengths):
            place = slice(width - length, width) if left else slice(0, length)
            given[row, place] = tokens[row, seen[row] : seen[row] + length]
            mask[row, place] = True
            seen[row] += length
        got = exact.step(given, caches, slots, None if width == 1 else mask)
        for row in (0, 2):
            # float64, through two layers and their norms.
            torch.testing.assert_close(got[row], wanted[row, seen[row] - 1], rtol=1e-8, atol=1e-8)
    assert caches[1].positions.tolist() == [27, 0, 0, 33]


def test_the_model_for_decoding_is_the_same_model(exact: LanguageModel, model: LanguageModel):
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    pieces = tokens.split((30, 2, 1), dim=1)

    def logits(stepped: LanguageModel, maker: LanguageModel) -> torch.Tensor:
        caches = maker.init_caches(2)
        return torch.stack([stepped.step(piece, caches) for piece in pieces])

    wanted = exact(tokens)[:, [29, 31, 32]].transpose(0, 1)
    same = logits(exact.for_decoding(torch.float32), exact)
    torch.testing.assert_close(same, wanted, rtol=1e-8, atol=1e-8)
    narrow = model.for_decoding(torch.bfloat16)
    assert narrow.blocks[0].mlp.down.weight.dtype == torch.bfloat16
    assert narrow.blocks[0].retention.g_proj.weight.dtype == torch.float32
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Products of equal bfloat16 numbers, that may be added in another order.
        got, autocast = logits(narrow, model).double(), logits(model, model).double()
    torch.testing.assert_close(got, autocast, rtol=2**-7, atol=2**-4)
    scale = (autocast - wanted).norm()
    assert 0 < (got - wanted).norm() < 1.1 * scale


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.0.retention.q_proj", "blocks.1.mlp.down", "norm"])
def test_a_step_that_fails_in_a_layer_is_taken_by_none(
    exact: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    kind: type[BaseException],
):
    tokens = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(0))
    wanted = exact(tokens)
    caches = exact.init_caches(1, 8)

    def fail(start: int, stop: int) -> BaseException:
        def raising(*_):
            raise kind("no memory")

        with monkeypatch.context() as patches:
            patches.setattr(exact.get_submodule(where), "forward", raising)
            with pytest.raises(kind) as caught:
                exact.step(tokens[:, start:stop], caches)
        return caught.value

    for start, stop in ((0, 10), (10, 11), (11, 17), (17, 20)):  # a prompt, then a fold too
        assert not hasattr(fail(start, stop), "__notes__")
        got = exact.step(tokens[:, start:stop], caches)
        torch.testing.assert_close(got, wanted[:, stop - 1], rtol=1e-8, atol=1e-8)
    error = fail(20, 40)
    if where != "blocks.0.retention.q_proj":  # the first layer has a prompt in its state
        assert [note[:12] for note in error.__notes__] == ["cache: reset"]
        assert [cache.positions.item() for cache in caches] == [0, 0]
        exact.step(tokens[:, :20], caches)
    got = exact.step(tokens[:, 20:], caches)
    torch.testing.assert_close(got, wanted[:, -1], rtol=1e-8, atol=1e-8)


def test_hooks_of_the_embedding_act_on_both_layers(model: LanguageModel):
    calls = []
    handle = model.embedding.register_forward_pre_hook(lambda _, x: calls.append(x[0].dtype))
    try:
        model(torch.zeros(1, 3, dtype=torch.int64))
        model.step(torch.zeros(1, 3, dtype=torch.int64), model.init_caches(1, 8))
    finally:
        handle.remove()
    assert calls == [torch.int64, torch.float32] * 2


def test_state_has_as_many_bytes_at_token_10000_as_at_100(model: LanguageModel):
    sizes = set()
    for length in (1, 90, 9_990):
        statistics = Statistics()
        prompt = (PROMPT * 500)[:length]
        text(model, prompt, 10, switch_over_seq_len=32, statistics=statistics)
        assert (statistics.prompt_tokens, statistics.tokens) == (length, 10)
        sizes.add(statistics.state_bytes)
    D, d = retention.state_dim(8), 8
    # Two key heads; 32 tokens of a window and 16 of a step; where the slot is; counters of steps.
    layer = 4 * (2 * (D * (d + 1)) + (32 + 16) * 2 * (2 * d + 1)) + 32 + 4 * (2 + 1)
    assert sizes == {MODEL.layers * layer}


def test_a_seed_fixes_what_is_drawn(model: LanguageModel):
    first = text(model, PROMPT, 40, temperature=1.0, seed=1)
    torch.manual_seed(9)
    assert text(model, PROMPT, 40, temperature=1.0, seed=1) == first
    assert text(model, PROMPT, 40, temperature=1.0, seed=2) != first


# Of lengths that fit steps and prompts, and of one that goes in pieces.
PROMPTS = [PROMPT, b"", TEXT[5:6], TEXT[3:20], TEXT[:300], PROMPT]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_what_follows_a_prompt_is_the_same_beside_others(
    exact: LanguageModel, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    count, n = 24, len(PROMPTS)
    alone = [
        text(exact, prompt, count, temperature=temperature, seed=5 + i)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert len(set(alone)) == (n - 1 if temperature == 0 else n)  # two prompts are the same
    lengths = [max(1, len(prompt)) for prompt in PROMPTS]
    # One by one; and as on a device, which is ahead of the host, with prompts in pieces.
    for at_once, prompt_bytes in ((1, 2**16), (7, 100 * n)):
        monkeypatch.setattr(generation, "_STEPS_AT_ONCE", {"cpu": at_once})
        monkeypatch.setattr(generation, "_PROMPT_BYTES", prompt_bytes)
        statistics = Statistics()
        more = {"temperature": temperature, "seed": 5, "statistics": statistics}
        given = list(generate(exact, PROMPTS, count, **more))
        assert [b"".join(pieces) for pieces in zip(*given, strict=True)] == alone
        assert [len(pieces[0]) for pieces in given] == {1: [1] * count, 7: [7, 7, 7, 3]}[at_once]
        assert [x.prompt_tokens for x in statistics.each] == lengths
        assert [x.tokens for x in statistics.each] == [count] * n
        assert (statistics.prompt_tokens, statistics.tokens) == (sum(lengths), count * n)
        assert all(0 < x.seconds <= statistics.seconds for x in statistics.each)
        assert all(x.ended for x in (statistics, *statistics.each))


@pytest.mark.parametrize("at_once", [1, 7])
def test_each_text_ends_where_a_file_ends(
    exact: LanguageModel, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    prompts = [b"def f1", b"def f1(x):\n    re", b"\n\nd"]
    whole = texts(exact, prompts, 40, temperature=0)
    # The model has seen no separator: the end of a line stands for it.
    monkeypatch.setattr(data, "SEPARATOR", b"\n")
    monkeypatch.setattr(generation, "_STEPS_AT_ONCE", {"cpu": at_once})
    inner, slots = LanguageModel.step, []

    def step(self: LanguageModel, *arguments: Any) -> torch.Tensor:
        slots.append(arguments[2].tolist())
        return inner(self, *arguments)

    monkeypatch.setattr(LanguageModel, "step", step)
    statistics = Statistics()
    more = {"temperature": 0, "stop": True, "statistics": statistics}
    ended = texts(exact, prompts, 40, **more)
    assert ended == [text.partition(b"\n")[0] for text in whole]
    lengths = [len(text) for text in ended]
    assert len(set(lengths)) == 3
    assert max(lengths) < 30
    assert [x.tokens for x in statistics.each] == lengths
    assert statistics.tokens == sum(lengths)
    # One that has ended is padding; after a step with all of them ended come at most those given
    # to the device already.
    taken = slots[1:]
    for i, row in enumerate(taken[: max(lengths) + 1]):
        assert row == [slot if i <= length else -1 for slot, length in enumerate(lengths)]
    assert len(taken) - (max(lengths) + 1) <= (0 if at_once == 1 else 2 * at_once - 1)


def test_whole_texts_come_when_they_and_those_before_have_ended():
    statistics = Statistics(each=[Progress() for _ in range(3)])
    given = []

    def stream() -> Iterator[list[bytes]]:
        for ends in ((), (1,), (0,), (2,)):
            for i in ends:
                statistics.each[i].ended = True
            given.append(ends)
            yield [b"x", b"y", b"z"]

    got = generation.whole_texts([b"a", b"b", b""], stream(), statistics)
    assert next(got) == b"axxx"
    assert next(got) == b"byyy"
    assert len(given) == 3
    assert list(got) == [b"zzzz"]
    assert list(generation.whole_texts([b"a", b"b"], [], Statistics())) == [b"a", b"b"]


def test_what_cannot_be_generated(model: LanguageModel):
    with pytest.raises(UsageError, match="--cuda-graph: expected a CUDA device, got cpu"):
        generate(model, [PROMPT], 1, cuda_graph=True)
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        generate(model, [], 1)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it is a prototype
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_draws_what_steps_without_it_do(dtype: str, temperature: float):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(layers=2, hidden_size=64, heads=2)).cuda().eval()
    more = {"dtype": dtype, "temperature": temperature, "switch_over_seq_len": 20}
    wanted = texts(model, PROMPTS, 100, cuda_graph=False, **more)
    assert texts(model, PROMPTS, 100, **more) == wanted
    assert [len(text) for text in wanted] == [100] * len(PROMPTS)
    stream = generate(model, PROMPTS, 100, cuda_graph=False, **more)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(stream)) == 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_empty_prompt_starts_a_file(model: LanguageModel):
    assert text(model, b"", 9, temperature=0) == text(model, b"\0", 9, temperature=0)


def test_no_new_tokens(model: LanguageModel):
    assert list(generate(model, [PROMPT], 0)) == []


def test_bfloat16_and_autocast_stays_inside(model: LanguageModel):
    stream = generate(model, [PROMPT], 20, temperature=0, dtype="bfloat16", switch_over_seq_len=4)
    for (piece,) in stream:
        assert len(piece) == 1
        assert not torch.is_autocast_enabled("cpu")


def test_sample_is_the_tempered_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws, generator = 20_000, torch.Generator().manual_seed(0)

    def frequencies(temperature: float, top_p: float) -> list[float]:
        logits = p.log().expand(draws, 4)
        uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
        drawn = Counter(sample(logits, temperature, top_p, uniform).tolist())
        return [drawn[i] / draws for i in range(4)]

    # Four standard deviations of a frequency of one half from 20,000 draws.
    near = {"abs": 4 * (0.25 / draws) ** 0.5}
    assert frequencies(1.0, 1.0) == pytest.approx(p.tolist(), **near)
    squared = p.square() / p.square().sum()
    assert frequencies(0.5, 1.0) == pytest.approx(squared.tolist(), **near)
    assert frequencies(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], **near)
    assert frequencies(1.0, 0.4) == [1, 0, 0, 0]
    assert frequencies(0, 1.0) == [1, 0, 0, 0]
    assert frequencies(1e-4, 1.0) == [1, 0, 0, 0]


def test_sample_passes_the_sum_of_probabilities():
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64)
    drawn = torch.tensor([0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, 1 - 2**-53], dtype=torch.float64)
    logits = p.log().expand(8, 4)
    assert sample(logits, 1.0, 1.0, drawn).tolist() == [1, 1, 3, 3, 0, 0, 2, 2]
    # Of 0.8 in all.
    assert sample(logits, 1.0, 0.7, drawn).tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    # What is no number makes some byte, not an error on a device.
    for broken in (float("nan"), float("inf"), -float("inf")):
        for logits in (torch.full((8, 4), broken), torch.tensor([[0, broken, 1, 2]]).expand(8, 4)):
            got = sample(logits, 1.0, 0.7, drawn)
            assert ((got >= 0) & (got < 4)).all()


@pytest.mark.parametrize("tiny", [1e-300, 5e-324, 1e-45, 1e-30])
def test_tiny_limits_take_the_likeliest(tiny: float):
    logits = torch.randn(500, 256, generator=torch.Generator().manual_seed(0)) * 30
    drawn = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn[0], drawn[-1] = 0, 1 - 2**-53
    assert torch.equal(sample(logits, tiny, 1.0, drawn), logits.argmax(-1))
    assert torch.equal(sample(logits, 1.0, tiny, drawn), logits.argmax(-1))
    assert torch.equal(sample(logits, tiny, tiny, drawn), logits.argmax(-1))


def test_huge_temperatures_take_any_byte():
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0)).expand(20_000, 256)
    drawn = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.bincount(sample(logits, 1e300, 1.0, drawn), minlength=256)
    # 78 each on average; six standard deviations.
    assert (counts - 20_000 / 256).abs().max() < 6 * (20_000 / 256) ** 0.5


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_weights_that_are_no_numbers(model: LanguageModel, temperature: float):
    broken = LanguageModel(MODEL)
    broken.load_state_dict(model.state_dict())
    broken.norm.weight.data[3] = float("nan")
    with pytest.raises(UsageError, match="the model's logits are no finite numbers"):
        text(broken, PROMPT, 3, temperature=temperature)


def test_text_comes_as_soon_as_a_character_is_whole():
    def one_by_one(content: bytes) -> Iterator[bytes]:
        return (bytes([byte]) for byte in content)

    stream = one_by_one("aé€😀".encode() + b"\xff" + "é".encode()[:1])
    pieces = as_text(stream)
    assert next(pieces) == "a"
    assert b"".join(stream)[:2] == "é".encode()  # nothing was read ahead
    assert list(as_text(one_by_one("aé€😀".encode()))) == ["a", "é", "€", "😀"]
    assert list(as_text(["aé€".encode()[:4], b"", "€😀".encode()[1:]])) == ["aé", "€😀"]
    assert "".join(as_text(one_by_one(b"a\xffb\xc3"))) == "a\ufffdb\ufffd"


def test_load_model_takes_a_run_or_a_checkpoint(run: Path, tmp_path: Path, model: LanguageModel):
    device = torch.device("cpu")
    earlier = generation.load_model(run / "checkpoints" / "step-00000060", device)
    assert not torch.equal(earlier.embedding.weight, model.embedding.weight)
    newest = generation.load_model(run / "checkpoints" / "step-00000120", device)
    assert torch.equal(newest.embedding.weight, model.embedding.weight)
    with pytest.raises(UsageError, match=r"--checkpoint: no such folder: .*none"):
        generation.load_model(tmp_path / "none", device)
    with pytest.raises(UsageError, match=r"not a checkpoint \(no state.json\)"):
        generation.load_model(tmp_path, device)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"--checkpoint: the run in .* has no checkpoint yet"):
        generation.load_model(tmp_path, device)
