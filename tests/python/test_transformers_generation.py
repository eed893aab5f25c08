"""Every way in which transformers generates, against whole forward passes without a cache."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache

import retention.transformers as rt
from retention.nn import all_or_nothing

# First, since it keeps transformers offline.
from transformers_cases import EXACT, formula, greedy, make_config, make_model, tokens

KINDS = ("retention", "no gates", "mixed")
NEW = 24  # a window of 16 ends among them


@pytest.fixture(autouse=True)
def no_gradients():
    """As in generate()."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, rt.RetentionForCausalLM]:
    return {kind: make_model(kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, models: dict) -> rt.RetentionForCausalLM:
    return models[request.param]


@pytest.fixture(scope="module")
def greedy_tokens(model: rt.RetentionForCausalLM) -> Tensor:
    """Two rows that go on greedily, [2, 9 + NEW]."""
    return greedy(model, tokens(2, 9), NEW)


OPTIONS = {"do_sample": False, "max_new_tokens": NEW}


def test_greedy(model: rt.RetentionForCausalLM, greedy_tokens: Tensor):
    out = model.generate(tokens(2, 9), **OPTIONS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, greedy_tokens)
    logits = torch.stack(out.logits, dim=1).double()
    # The library keeps logits in float32.
    wanted = formula(model.state_dict(), model.config, greedy_tokens)[:, 8:-1]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    for layer, kind in zip(out.cache.layers, model.config.layer_types, strict=True):
        assert isinstance(layer, rt.PowerRetentionLayer) == (kind == "power_retention")
        assert layer.get_seq_length() == 9 + NEW - 1


def test_sampling(model: rt.RetentionForCausalLM):
    """With a seed, the same tokens as without a cache."""
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        out = model.generate(
            tokens(3, 9), do_sample=True, top_k=0, max_new_tokens=NEW, use_cache=use_cache
        )
        drawn.append(out)
    assert torch.equal(*drawn)
    assert len(set(map(tuple, drawn[0][:, 9:].tolist()))) == 3


def test_several_sequences_of_a_prompt(models: dict):
    model = models["retention"]
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        out = model.generate(
            *(tokens(2, 9),),
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=8,
            use_cache=use_cache,
        )
        drawn.append(out)
    assert torch.equal(*drawn)


def test_beams(model: rt.RetentionForCausalLM):
    """Rows that change places: huggingface/transformers#46612."""
    found = [
        model.generate(
            tokens(2, 9),
            do_sample=False,
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=NEW,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores)
    # Beams did change places, else this shows nothing.
    assert not torch.equal(
        found[0].beam_indices[:, :NEW], found[0].beam_indices[:, :1].expand(-1, NEW)
    )


@pytest.mark.parametrize("count", [1, 5])
def test_left_padding(model: rt.RetentionForCausalLM, count: int):
    """Rows of different lengths, each as it is alone: huggingface/transformers#46773."""
    long, short = tokens(1, 9), tokens(1, 9 - count, seed=1)
    padded = torch.cat((torch.zeros(1, count, dtype=torch.int64), short), dim=1)
    ids = torch.cat((long, padded))
    out = model.generate(ids, attention_mask=(ids != 0).long(), **OPTIONS)
    assert torch.equal(out[:1], greedy(model, long, NEW))
    assert torch.equal(out[1:, count:], greedy(model, short, NEW))


def test_left_padding_with_beams(models: dict):
    model = models["retention"]
    short = tokens(1, 6, seed=1)
    ids = torch.cat((tokens(1, 9), torch.nn.functional.pad(short, (3, 0))))
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 12}
    out = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(out[1:, 3:], model.generate(short, **options, use_cache=False))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_prefill_in_chunks(model: rt.RetentionForCausalLM, greedy_tokens: Tensor, size: int):
    out = model.generate(tokens(2, 9), **OPTIONS, prefill_chunk_size=size)
    assert torch.equal(out, greedy_tokens)


@pytest.mark.parametrize(
    "more",
    [{}, {"gating": False}, {"layer_types": ["full_attention", "power_retention"]}],
    ids=["gates", "no gates", "mixed"],
)
def test_right_padding_in_a_cache(more: dict):
    """A prompt that is padded on the right, and goes on: huggingface/transformers#48256."""
    model, ids = make_model(**more), tokens(1, 6)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    cache = model(torch.nn.functional.pad(ids, (0, 3)), attention_mask=mask).cache
    new = tokens(1, 1, seed=5)
    got = model(
        new,
        attention_mask=torch.cat((mask, torch.ones_like(new)), 1),
        position_ids=torch.tensor([[6]]),
        cache=cache,
    ).logits
    wanted = model(torch.cat((ids, new), 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, wanted, **EXACT)


def test_continuation(model: rt.RetentionForCausalLM, greedy_tokens: Tensor):
    """A cache goes on in another call, after more tokens of the user's."""
    cache = DynamicCache(config=model.config)
    out = model.generate(tokens(2, 9), do_sample=False, max_new_tokens=10, cache=cache)
    assert torch.equal(out, greedy_tokens[:, :19])
    more = torch.cat((out, tokens(2, 5, seed=3)), dim=1)
    out = model.generate(more, do_sample=False, max_new_tokens=12, cache=cache)
    assert torch.equal(out, greedy(model, more, 12))


@pytest.mark.parametrize("pieces", [(9, 1, 1, 4, 17, 1), (1, 30, 2)])
def test_logits_of_pieces(model: rt.RetentionForCausalLM, pieces: tuple[int, ...]):
    """Any split of a sequence into calls, by the old name of the cache too."""
    ids = tokens(2, sum(pieces))
    parts, cache = [], None
    for i, part in enumerate(ids.split(pieces, dim=1)):
        if i % 2:
            with pytest.warns(FutureWarning, match="past_key_values"):
                out = model(part, past_key_values=cache)
        else:
            out = model(part, cache=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.cache
    wanted = formula(model.state_dict(), model.config, ids)
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **EXACT)


@torch.enable_grad()
def test_gradients_through_a_cache(model: rt.RetentionForCausalLM):
    """Of the new tokens; what came before is a constant."""
    ids, parameters = tokens(2, 21), list(model.parameters())
    with torch.no_grad():
        cache = model(ids[:, :13]).cache
    out = model(ids[:, 13:], cache=cache)
    torch.testing.assert_close(out.logits, model(ids, use_cache=False).logits[:, 13:], **EXACT)
    got = torch.autograd.grad(out.logits.square().sum(), parameters)
    assert all(x.abs().max() > 0 for x in got)
    # Moving all weights moves the same logits by as much, with the past held.
    step, direction = 1e-6, [torch.randn_like(x) for x in parameters]
    slope = sum((x * d).sum() for x, d in zip(got, direction, strict=True))
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            cache = model(ids[:, :13]).cache
            for x, d in zip(moved.parameters(), direction, strict=True):
                x.add_(d, alpha=sign * step)
            values.append(moved(ids[:, 13:], cache=cache).logits.square().sum())
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)
    # And the cache goes on, and takes back.
    with torch.no_grad():
        cache = model(ids[:, :13]).cache
    cache.activate_past_recording()
    model(ids[:, 13:20], cache=cache)
    cache.crop(-3)
    got = model(ids[:, 17:], cache=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 17:], **EXACT)


# ---- drafts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assistants(models: dict) -> dict[str, rt.RetentionForCausalLM]:
    """One whose drafts are the model's own, and one whose are sometimes."""
    torch.manual_seed(3)
    made = {"perfect": copy.deepcopy(models["retention"])}
    made["worse"] = copy.deepcopy(models["retention"])
    for parameter in made["worse"].parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    for assistant in made.values():
        assistant.generation_config.num_assistant_tokens = 9
        assistant.generation_config.assistant_confidence_threshold = 0.0
    return made


@pytest.mark.parametrize("prompt", [1, 9, 40])
@pytest.mark.parametrize("who", ["perfect", "worse"])
def test_an_assistant(models: dict, assistants: dict, who: str, prompt: int):
    """Drafts that are taken back: huggingface/transformers#46937."""
    model, ids, taken = models["retention"], tokens(1, prompt), []
    inner = rt.PowerRetentionLayer.crop

    def spy(layer: rt.PowerRetentionLayer, count: int) -> None:
        taken.append(count)
        inner(layer, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rt.PowerRetentionLayer, "crop", spy)
        out = model.generate(
            ids, do_sample=False, max_new_tokens=40, assistant_model=assistants[who]
        )
    assert torch.equal(out, greedy(model, ids, 40))
    assert (min(taken) < -4) == (who == "worse")


def test_sampling_with_an_assistant(models: dict, assistants: dict):
    """Of a model that is its own assistant, every draft is taken."""
    model, ids = models["retention"], tokens(1, 9)
    torch.manual_seed(0)
    out = model.generate(
        ids, do_sample=True, top_k=0, max_new_tokens=40, assistant_model=assistants["perfect"]
    )
    assert out.shape == (1, 49)


def test_prompt_lookup(model: rt.RetentionForCausalLM):
    """Drafts from the text itself, of a model that repeats itself and of one that does not."""
    ids = tokens(1, 4).repeat(1, 5)
    out = model.generate(ids, **OPTIONS, prompt_lookup_num_tokens=6)
    assert torch.equal(out, greedy(model, ids, NEW))


@pytest.mark.parametrize("gates", [True, False])
def test_drafts_against_the_formula(gates: bool):
    """Steps of any length, of which any part is taken back, rows in lockstep."""
    model = make_model("retention" if gates else "no gates")
    generator = torch.Generator().manual_seed(5)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    ids = tokens(2, 0)
    for turn in range(14):
        count = int(torch.randint(1, 20, (), generator=generator)) if turn else 150
        # As an assistant does: several calls before one crop.
        for part in tokens(2, count, seed=turn).split(7, dim=1):
            out = model(part, cache=cache)
            ids = torch.cat((ids, part), dim=1)
            wanted = model(ids, use_cache=False).logits[:, -part.shape[1] :]
            torch.testing.assert_close(out.logits, wanted, **EXACT)
        back = int(torch.randint(0, min(count, 40) + 1, (), generator=generator))
        cache.crop(-back)
        ids = ids[:, : ids.shape[1] - back]
        assert cache.get_seq_length() == ids.shape[1]


def test_what_cannot_be_taken_back():
    model, ids = make_model("retention"), tokens(1, 40)
    recorded = DynamicCache(config=model.config)
    recorded.activate_past_recording()
    plain = DynamicCache(config=model.config)
    for cache, count, room in ((plain, 1, 0), (recorded, 129, 128)):
        model(tokens(1, 200), cache=cache)
        with pytest.raises(
            ValueError, match=rf"tokens_to_remove: expected at least -{room}, .* got"
        ):
            cache.crop(-count)
        with pytest.raises(ValueError, match="tokens_to_remove: expected a negative number"):
            cache.crop(1)
        # Nothing has changed.
        ids = torch.cat((tokens(1, 200), tokens(1, 1, seed=9)), 1)
        got = model(ids[:, 200:], cache=cache).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 200:], **EXACT)


def test_recording_that_begins_later():
    model, ids = make_model("retention"), tokens(1, 30)
    cache = model(ids[:, :21]).cache
    cache.activate_past_recording()
    for part in ids[:, 21:].split((1, 5, 1, 2), 1):
        model(part, cache=cache)
    cache.crop(-8)
    got = model(ids[:, 22:], cache=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 22:], **EXACT)


# ---- static caches ------------------------------------------------------------------------------


def test_static_cache(model: rt.RetentionForCausalLM, greedy_tokens: Tensor):
    out = model.generate(tokens(2, 9), **OPTIONS, cache_implementation="static")
    assert torch.equal(out, greedy_tokens)


@pytest.mark.parametrize(
    "kind", [{}, {"layer_types": ["power_retention", "full_attention"]}], ids=["alone", "mixed"]
)
def test_compiled_steps(kind: dict):
    """In one graph, compiled once for all steps: as on a GPU, but for what makes code of it."""
    torch._dynamo.reset()
    model, graphs = make_model(**kind), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    ids = torch.cat((tokens(1, 9), torch.nn.functional.pad(tokens(1, 6), (3, 0))))
    mask = (ids != 0).long()
    options = {"attention_mask": mask, **OPTIONS}
    out = model.generate(ids, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(out, model.generate(ids, **options))
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "default"
)  # inductor warns of TF32, and of the empty graph it starts with
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [None, 16])
def test_compiled_steps_on_a_gpu(dtype: torch.dtype, chunks: int | None):
    """As generate() compiles them of its own accord, with captured graphs; kernels and PyTorch."""
    torch._dynamo.reset()
    options = {"hidden_size": 128, "head_dim": 64, "num_hidden_layers": 3, "initializer_range": 0.1}
    kinds = ["power_retention", "power_retention", "full_attention"]
    model = make_model(dtype=dtype, layer_types=kinds, **options).cuda()
    short = torch.nn.functional.pad(tokens(1, 30), (10, 0))
    ids = torch.cat((tokens(1, 40), short)).cuda()
    arguments = {"attention_mask": (ids != 0).long(), "do_sample": False, "max_new_tokens": 150}
    for _ in range(2):  # the second time from what was compiled
        out = model.generate(
            ids, **arguments, cache_implementation="static", prefill_chunk_size=chunks
        )
        mask = torch.nn.functional.pad(arguments["attention_mask"], (0, 150), value=1)
        logits = model(out, attention_mask=mask, use_cache=False).logits.float()[:, 39:-1]
        chosen = logits.gather(2, out[:, 40:, None])[..., 0]
        # Each token is as likely as the likeliest, but for the roundings of the model's dtype.
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype] * logits.abs().max()
        assert (logits.amax(-1) - chosen).max() <= tolerance
    torch._dynamo.reset()


def test_a_static_cache_is_used_again(models: dict):
    """From memory that stays where it is, for compiled steps and captured graphs."""
    model, ids = models["retention"], tokens(2, 9)
    cache = StaticCache(model.config, max_cache_len=64)
    places = None
    for seed in (0, 1):
        ids = tokens(2, 9, seed=seed)
        out = model.generate(ids, **OPTIONS, cache=cache)
        assert torch.equal(out, greedy(model, ids, NEW))
        layer = cache.layers[0]
        kept = [x for x in (*layer.memory.pool, layer.slots, layer.seen) if x is not None]
        assert all(hasattr(x, "_dynamo_static_input_type") for x in kept)  # the compiler knows
        now = [x.data_ptr() for x in kept]
        assert places in (None, now)
        places = now
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_static_cache_does_not_blend():
    model = make_model("retention", softmax_blend=0.5)
    with pytest.raises(ValueError, match="softmax_blend: expected 0 with a static cache"):
        model.generate(tokens(1, 5), **OPTIONS, cache_implementation="static")


# ---- a blend of softmax attention ---------------------------------------------------------------


BLENDED = {
    "softmax_blend": 0.3,
    "num_hidden_layers": 3,
    # The first keeps its window alone, and the second blends with one.
    "layer_types": ["sliding_attention", "power_retention", "power_retention"],
    "softmax_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 6,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 5},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "beams", "drafts", "chunks"],
)
def test_generating_while_a_model_is_converted(options: dict):
    """Keys and values of the softmax attention go where the states go."""
    model = make_model("retention", **BLENDED)
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = tokens(rows, 9)
    out = model.generate(ids, **OPTIONS, **options)
    slow = {name: x for name, x in options.items() if name == "num_beams"}
    assert torch.equal(out, model.generate(ids, **OPTIONS, **slow, use_cache=False))
    torch.testing.assert_close(
        model(ids).logits, formula(model.state_dict(), model.config, ids), **EXACT
    )


# ---- rows of a cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [0.0, 0.3])
@pytest.mark.parametrize("recorded", [False, True])
def test_rows_are_repeated_and_selected(blend: float, recorded: bool):
    model = make_model("retention", softmax_blend=blend)
    ids = tokens(3, 20)
    cache = DynamicCache(config=model.config)
    if recorded:
        cache.activate_past_recording()
    model(ids[:, :17], cache=cache)
    model(ids[:, 17:18], cache=cache)
    rows = torch.arange(3)
    for change, argument, chosen in (
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("reorder_cache", torch.tensor([5, 0, 1, 1, 4, 2]), [5, 0, 1, 1, 4, 2]),
        ("batch_select_indices", torch.tensor([4, 0, 2]), [4, 0, 2]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
    ):
        getattr(cache, change)(argument)
        rows = rows[chosen]
        probe = copy.deepcopy(cache)
        got = model(ids[rows, 18:], cache=probe).logits
        wanted = model(ids[rows], use_cache=False).logits[:, 18:]
        torch.testing.assert_close(got, wanted, **EXACT)
        if recorded:
            probe.crop(-3)
            got = model(ids[rows, 17:], cache=probe).logits
            wanted = model(ids[rows], use_cache=False).logits[:, 17:]
            torch.testing.assert_close(got, wanted, **EXACT)


def test_a_cache_is_offloaded_and_fetched():
    """All of it: what is left behind would be read where it is not."""
    model, ids = make_model("retention", softmax_blend=0.3), tokens(2, 12)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :10], cache=cache)
    for layer in cache.layers:
        layer.home = torch.device("meta")  # another device than the CPU
        layer.prefetch()
        on_device = [*layer.memory.pool, layer.slots, *layer._pending]
        on_device += [layer.softmax.keys, layer.softmax.values]
        assert {x.device.type for x in on_device if x is not None} == {"meta"}
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], cache=cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    got = model(ids[:, 10:], cache=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 10:], **EXACT)


def test_a_cache_that_was_reset_is_new():
    model, ids = make_model("retention", softmax_blend=0.3), tokens(2, 12)
    cache = model(tokens(3, 7)).cache
    cache.reset()
    assert cache.get_seq_length() == 0
    got = model(ids, cache=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, **EXACT)


# ---- slots --------------------------------------------------------------------------------------


def indices(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["no gates", "brumby", "powercoder"])
def test_rows_in_slots_at_different_positions(kind: str):
    """A server's work: prompts in packed pieces, steps of those that are there, slots reused."""
    model = make_model(kind)
    cache = rt.SlotCache(model.config, 5, dtype=torch.float64, max_tokens_per_step=3)
    texts: dict[int, Tensor] = {}

    def take(slots: list[int], lengths: list[int], seed: int, step: bool) -> None:
        new = [tokens(n, seed=10 * seed + s) for s, n in zip(slots, lengths, strict=True)]
        cache.rows = indices(*slots)
        if step:
            logits = list(model(torch.stack(new), cache=cache).logits)
        else:
            bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            packed = torch.cat(new)[None]
            logits = model(packed, cache=cache, cu_seq_lens_q=bounds).logits[0].split(lengths)
        for slot, ids, got in zip(slots, new, logits, strict=True):
            if slot >= 0:
                texts[slot] = torch.cat((texts.get(slot, ids[:0]), ids))
                wanted = model(texts[slot][None], use_cache=False).logits[0, -len(ids) :]
                torch.testing.assert_close(got, wanted, **EXACT)

    take([3, 0], [11, 4], 0, step=False)
    take([0, 3, 1], [9, 1, 20], 1, step=False)
    for turn in range(20):
        take([1, -1, 3], [1, 1, 1], 2 + turn, step=True)
    take([0, 1], [3, 3], 30, step=True)
    for memory in cache.memories:
        memory.reset(indices(3))
    del texts[3]
    take([3, 0], [6, 1], 31, step=False)
    assert cache.positions.tolist() == [6, 4 + 9 + 3 + 1]
    # A call that fails in its second layer has taken nothing in its first.
    cache.rows = indices(0, 3)
    before = [memory.positions for memory in cache.memories]
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), all_or_nothing(cache.memories):
        model(tokens(2, 1), cache=cache)
    hook.remove()
    for memory, positions in zip(cache.memories, before, strict=True):
        assert torch.equal(memory.positions, positions)
    take([0, 3], [1, 1], 32, step=True)


def test_a_prefix_is_kept_without_the_drafts_that_were_rejected(models: dict):
    """Drafts are verified in the very slot that prefixes are copied from: vllm-project/vllm#53912
    and #40875."""
    model, ids = models["retention"], tokens(1, 23)
    cache = rt.SlotCache(model.config, 2, dtype=torch.float64, max_tokens_per_step=4)
    cache.rows = indices(0)
    model(ids[:, :14], cache=cache)
    for start in range(14, 19):
        # One draft of four is right. A window of 16 ends meanwhile.
        drafts = torch.cat((ids[:, start : start + 1], tokens(1, 3, seed=start)), dim=1)
        model(drafts, cache=cache)
        for memory in cache.memories:
            memory.rollback(indices(0), 3)
    for memory in cache.memories:
        memory.copy(indices(0), indices(1))
    for slot in (1, 0):
        cache.rows = indices(slot)
        got = model(ids[:, 19:], cache=cache).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 19:], **EXACT)


def test_padding_in_slots_touches_nothing(models: dict):
    """-1 is no slot, not the last one: vllm-project/vllm#43810."""
    model = models["retention"]
    cache = rt.SlotCache(model.config, 3, dtype=torch.float64)
    cache.rows = indices(0, 1, 2)
    model(tokens(3, 5), cache=cache)
    before = [x.clone() for m in cache.memories for x in m.pool.remembered().values()]
    cache.rows = indices(-1, 7, -1)
    assert cache.positions.tolist() == [0, 0, 0]
    out = model(tokens(3, 1), cache=cache)
    assert out.logits.isfinite().all()
    after = [x for m in cache.memories for x in m.pool.remembered().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_models_without_a_place_in_slots():
    for more, message in (
        ({"kind": "mixed"}, "expected layers of 'power_retention' alone"),
        ({"kind": "retention", "softmax_blend": 0.5}, "expected softmax_blend = 0, got 0.5"),
    ):
        with pytest.raises(ValueError, match=f"config: {message}"):
            rt.SlotCache(make_config(**more), 2)
    with pytest.raises(TypeError, match="config: expected a RetentionConfig"):
        rt.SlotCache("brumby", 2)
    model = make_model("retention")
    cache = rt.SlotCache(model.config, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"rows: expected torch\.int32"):
        cache.rows = torch.arange(2)
    with pytest.raises(ValueError, match="attention_mask: expected None with a SlotCache"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 3), cache=cache)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_texts_in_sixteen_bits(dtype: torch.dtype):
    """A cache's logits stay as close to float64 as whole passes: gates summed twice, or states of
    16 bits, would drift (fla-org/flash-linear-attention#1176, vllm-project/vllm#39032)."""
    exact = make_model("retention", initializer_range=0.1)
    model = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(model.state_dict())
    ids = tokens(1, 280)
    with torch.no_grad():
        wanted = exact(ids).logits
        whole = model(ids, use_cache=False).logits.double()
        cache = model(ids[:, :100]).cache
        parts = [model(ids[:, i : i + 1], cache=cache).logits for i in range(100, 280)]
    assert cache.layers[0].memory.state_dtype == torch.float32
    error_of_steps = (torch.cat(parts, 1).double() - wanted[:, 100:]).square().mean().sqrt()
    error_of_whole = (whole - wanted)[:, 100:].square().mean().sqrt()
    assert error_of_steps < 1.5 * error_of_whole
    assert math.isfinite(error_of_steps)
    assert error_of_whole > 0
