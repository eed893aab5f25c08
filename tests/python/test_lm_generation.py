"""Generation: what the quadratic model would say, from a state of constant size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import retention
from retention import functional
from retention.lm import generation, training
from retention.lm.config import ModelConfig, TrainConfig
from retention.lm.errors import UsageError
from retention.lm.generation import Statistics, as_text, generate, sample
from retention.lm.model import LanguageModel

MODEL = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2)
# Lines that count, so that a greedy model neither repeats itself at once nor stops.
TEXT = b"".join(b"def f%d(x):\n    return x + %d\n\n" % (i % 7, i * 3 % 10) for i in range(700))
PROMPT = TEXT[:29]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def model(run: Path) -> LanguageModel:
    return generation.load_model(run, torch.device("cpu"))


@pytest.mark.parametrize("ring", [7, 64, 512])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 5])
def test_greedy_is_the_quadratic_model_token_for_token(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, ring: int, prompt: bytes
):
    count = 300
    got = list(generate(model, prompt, count, temperature=0, switch_over_seq_len=ring))
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
def test_step_gives_the_logits_of_forward(model: LanguageModel, ring: int):
    exact = LanguageModel(MODEL).double()
    exact.load_state_dict(model.state_dict())
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


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.0.retention.q_proj", "blocks.1.mlp.down", "norm"])
def test_a_step_that_fails_in_a_layer_is_taken_by_none(
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    kind: type[BaseException],
):
    exact = LanguageModel(MODEL).double()
    exact.load_state_dict(model.state_dict())
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
        list(generate(model, prompt, 10, switch_over_seq_len=32, statistics=statistics))
        assert (statistics.prompt_tokens, statistics.tokens) == (length, 10)
        sizes.add(statistics.state_bytes)
    D, d = retention.state_dim(8), 8
    # Two key heads; 32 tokens of a window and 16 of a step; where the slot is; counters of steps.
    layer = 4 * (2 * (D * (d + 1)) + (32 + 16) * 2 * (2 * d + 1)) + 32 + 4 * (2 + 1)
    assert sizes == {MODEL.layers * layer}


def test_a_seed_fixes_what_is_drawn(model: LanguageModel):
    first = list(generate(model, PROMPT, 40, temperature=1.0, seed=1))
    torch.manual_seed(9)
    assert list(generate(model, PROMPT, 40, temperature=1.0, seed=1)) == first
    assert list(generate(model, PROMPT, 40, temperature=1.0, seed=2)) != first


def test_empty_prompt_starts_a_file(model: LanguageModel):
    assert list(generate(model, b"", 9, temperature=0)) == list(
        generate(model, b"\0", 9, temperature=0)
    )


def test_no_new_tokens(model: LanguageModel):
    assert list(generate(model, PROMPT, 0)) == []


def test_bfloat16_and_autocast_stays_inside(model: LanguageModel):
    stream = generate(model, PROMPT, 20, temperature=0, dtype="bfloat16", switch_over_seq_len=4)
    for byte in stream:
        assert 0 <= byte < 256
        assert not torch.is_autocast_enabled("cpu")


def test_sample_is_the_tempered_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws, generator = 20_000, torch.Generator().manual_seed(0)

    def frequencies(temperature: float, top_p: float) -> list[float]:
        logits = p.log().expand(draws, 4)
        drawn = Counter(sample(logits, temperature, top_p, generator).tolist())
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


@pytest.mark.parametrize("tiny", [1e-300, 5e-324, 1e-45, 1e-30])
def test_tiny_limits_take_the_likeliest(tiny: float):
    logits = torch.randn(500, 256, generator=torch.Generator().manual_seed(0)) * 30
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(sample(logits, tiny, 1.0, generator), logits.argmax(-1))
    assert torch.equal(sample(logits, 1.0, tiny, generator), logits.argmax(-1))
    assert torch.equal(sample(logits, tiny, tiny, generator), logits.argmax(-1))


def test_huge_temperatures_take_any_byte():
    logits = torch.randn(256, generator=torch.Generator().manual_seed(0)).expand(20_000, 256)
    drawn = sample(logits, 1e300, 1.0, torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn, minlength=256)
    # 78 each on average; six standard deviations.
    assert (counts - 20_000 / 256).abs().max() < 6 * (20_000 / 256) ** 0.5


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_weights_that_are_no_numbers(model: LanguageModel, temperature: float):
    broken = LanguageModel(MODEL)
    broken.load_state_dict(model.state_dict())
    broken.norm.weight.data[3] = float("nan")
    with pytest.raises(UsageError, match="the model's logits are no finite numbers"):
        list(generate(broken, PROMPT, 3, temperature=temperature))


def test_text_comes_as_soon_as_a_character_is_whole():
    stream = iter("aé€😀".encode() + b"\xff" + "é".encode()[:1])
    pieces = as_text(stream)
    assert next(pieces) == "a"
    assert list(stream)[:2] == list("é".encode())  # nothing was read ahead
    assert list(as_text(iter("aé€😀".encode()))) == ["a", "é", "€", "😀"]
    assert "".join(as_text(iter(b"a\xffb\xc3"))) == "a\ufffdb\ufffd"


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
