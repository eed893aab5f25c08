"""`retention bench serving`: what is made up is what a long context leaves, and rows are right."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from retention.bench import report, served, serving, serving_report
from retention.bench.problem import Problem
from retention.bench.timing import Ceilings, Effort
from transformers import DynamicCache

from retention import cli
from retention.lm.errors import UsageError

CPU = torch.device("cpu")
WAYS = serving.softmax_ways("cpu")
NAMES = [way.name for way in WAYS]
ONCE = Effort(seconds=0.0, least=2, most=2)
LINE = ("--device", "cpu", "--quick", "--quiet")


@pytest.fixture(scope="module")
def pair():
    return served.configurations("small", None)


@pytest.fixture(scope="module")
def ours(pair):
    return serving.Retention(pair, CPU, torch.float32, "float32", slots=5)


@pytest.fixture(scope="module")
def softmax_model(pair):
    return served.build(pair.softmax, CPU, torch.float32)


def measured(plan, budget=2**30, **options):
    """Rows of a plan, on the CPU."""
    plan = dataclasses.replace(plan, memory=budget)
    given = {
        "problem": Problem(dtype="float32", device="cpu"),
        "ceilings": Ceilings(1.0, 1.0),
        "effort": ONCE,
        "wanted": lambda name: True,
        "say": lambda text: None,
        "free": lambda device: None,
    }
    return list(serving.measure(plan, **given | options))


# ---- what is made up ----------------------------------------------------------------------------


def test_slots_are_where_sequences_are_that_have_read_as_much(ours):
    """Cursors are those of sequences whose tokens were really read, and whose windows begin at the
    end of what was read at once."""
    t, window = 100, ours.window
    ours.start(t, 5)
    made_up = [memory.pool.cursors.clone() for memory in ours.network.memories]
    lengths = ours.network.memories[0].lengths
    assert sorted(lengths.tolist()) == sorted(1 + (8 + i * window // 5) % window for i in range(5))
    for slot, length in enumerate(lengths.tolist()):
        one = torch.tensor([slot], dtype=torch.int32)
        for memory in ours.network.memories:
            phase = torch.full_like(one, (t - length) % window)
            torch.ops.retention.decode_reset(*memory.pool, one, phase)
        tokens = torch.randint(ours.network.vocabulary, (1, t - length))
        ours.network.read(tokens, one)
        ours.steps.drive([slot], [1], length)
    for memory, cursors in zip(ours.network.memories, made_up, strict=True):
        assert memory.pool.cursors.tolist() == cursors.tolist()


def test_states_and_rings_hold_what_tokens_left(pair):
    ours = serving.Retention(pair, CPU, torch.float32, "float32", slots=7)
    assert ours.network._cache.memories is ours.network.memories
    ours.start(1000, 7)
    for memory in ours.network.memories:
        assert memory.positions.tolist() == [1000] * 7
        assert memory.pool.high.isfinite().all()
        assert (memory.pool.high != 0).flatten(2).any(-1).all()
        for x in (memory.pool.keys, memory.pool.values, memory.pool.log_gates[..., None]):
            assert x.isfinite().all()
            assert (x != 0).any(-1).all()  # every place of the ring
        # Sums of squares of keys: those rows of the state.
        _, sums = memory.state(torch.arange(7, dtype=torch.int32))
        assert (sums.amax(-1) > 0).all()


def test_every_slot_folds_once_in_the_steps_that_are_timed(ours):
    for b in (1, 3, 5):
        ours.start(200, b)
        at_first = ours._folded(b)
        seconds = ours.seconds(200, b, ours.window)
        assert len(seconds) == ours.window
        assert all(x > 0 for x in seconds)
        assert (ours._folded(b) - at_first == ours.window).all()
        assert ours.network.memories[0].positions[:b].tolist() == [200 + ours.window] * b


def test_a_fold_that_is_missed_is_an_error(ours, monkeypatch):
    monkeypatch.setattr(ours, "_folded", lambda b: torch.zeros(2, b))
    with pytest.raises(RuntimeError, match="not every slot has folded"):
        ours.seconds(200, 2, ours.window)


def test_a_prompt_is_read_in_pieces_and_its_last_token_by_a_step(ours, monkeypatch):
    pieces = []
    read = ours.network.read

    def watched(tokens, slots):
        pieces.append((tokens.shape[1], slots.tolist()))
        read(tokens, slots)

    monkeypatch.setattr(ours.network, "read", watched)
    for tokens, piece, expected in ((100, 32, [32, 32, 32, 3]), (33, 32, [32]), (20, 32, [19])):
        ours.first_token(torch.randint(256, (1, tokens)), piece)
        assert pieces == [(count, [0]) for count in expected]
        assert {memory.positions[0].item() for memory in ours.network.memories} == {tokens}
        pieces.clear()


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_softmax_attention_reads_its_whole_cache(softmax_model, way):
    """A step over keys and values of a real prompt gives the token that the whole text gives."""
    t = 24
    torch.manual_seed(0)
    text = torch.randint(256, (3, t))
    expected = softmax_model(text).logits[:, -1].argmax(-1)
    before = DynamicCache(config=softmax_model.config)
    softmax_model(text[:, :-1], cache=before, use_cache=True)
    cache = serving.Softmax(softmax_model, t, 3)
    for mine, theirs in zip(cache.cache.layers, before.layers, strict=True):
        mine.keys[:, :, :-1], mine.values[:, :, :-1] = theirs.keys, theirs.values
    steps = serving.SoftmaxSteps(cache, way)
    cache.tokens.copy_(text[:, -1:])
    cache.place(t - 1)
    with way.chosen(softmax_model):
        steps._step()
    assert steps.chosen.tolist() == expected.tolist()
    # Places behind the token, which hold anything, are read without a mask alone.
    longer = serving.Softmax(softmax_model, 2 * t, 3)
    for mine, theirs in zip(longer.cache.layers, before.layers, strict=True):
        mine.keys[:, :, : t - 1], mine.values[:, :, : t - 1] = theirs.keys, theirs.values
    over_places = serving.SoftmaxSteps(longer, way)
    longer.tokens.copy_(text[:, -1:])
    longer.place(t - 1)
    with way.chosen(softmax_model):
        over_places._step()
    assert (over_places.chosen.tolist() == expected.tolist()) == way.masked
    assert cache.nbytes() == 3 * 2 * t * 2 * 2 * 16 * 4
    # Timed steps end at the last place.
    assert len(steps.seconds(t, 3, 4)) == 4
    assert [int(layer.cumulative_length) for layer in cache.cache.layers] == [t, t]
    assert len(steps.seconds(t, 3, 100)) == t - 1


def test_numbers_that_are_not_finite_are_an_error(pair):
    ours = serving.Retention(pair, CPU, torch.float32, "float32", slots=1)
    ours.network._model.lm_head.weight[3].fill_(torch.nan)
    model = served.build(pair.softmax, CPU, torch.float32)
    model.lm_head.weight[3].fill_(torch.nan)
    theirs = serving.SoftmaxSteps(serving.Softmax(model, 30, 2), WAYS[0])
    for steps in (ours, theirs):
        with pytest.raises(RuntimeError, match="logits are not finite"):
            steps.seconds(30, 1, 2)


# ---- the models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [("powercoder", 30, 3_030_371_328), ("brumby", 40, 14_768_307_200), ("small", 2, None)],
)
def test_both_models_have_the_same_sizes(name, layers, parameters):
    """But for gates. StarCoder2-3B has 3.03 and Qwen3-14B 14.8 billion parameters."""
    pair = served.configurations(name, None)
    assert (pair.layers, pair.whole, pair.note) == (layers, layers, "")
    # Of one layer and of two: the others are as these.
    counts = []
    for count in (1, 2):
        some = served.configurations(name, count)
        models = [
            served.build(config, "meta", torch.bfloat16)
            for config in (some.retention, some.softmax)
        ]
        assert some.note == ("" if count == layers else f"{count} of {layers} layers")
        assert {x.dtype for model in models for x in model.parameters()} == {torch.bfloat16}
        sizes = [
            {name: x.shape for name, x in model.named_parameters() if ".g_proj." not in name}
            for model in models
        ]
        assert sizes[0] == sizes[1]
        assert some.weight_bytes(torch.bfloat16) == served.parameter_bytes(models[0])
        counts.append(sum(x.numel() for x in models[1].parameters()))
    if parameters is not None:
        assert counts[0] + (layers - 1) * (counts[1] - counts[0]) == parameters


def test_a_step_reads_all_weights_but_embeddings(pair, softmax_model):
    embeddings = 256 * 64 * 4
    assert served.read_bytes(softmax_model) == served.parameter_bytes(softmax_model) - embeddings
    with torch.device("meta"):
        tied = served.build(served.configurations("powercoder", 1).softmax, "meta", torch.bfloat16)
    assert served.read_bytes(tied) == served.parameter_bytes(tied)


def test_as_many_layers_as_fit():
    dtype, free = torch.bfloat16, 4_000_000_000
    pair = served.fitting("powercoder", None, dtype, free)
    assert 1 < pair.layers < 30
    assert pair.weight_bytes(dtype) <= 0.7 * free
    more = served.configurations("powercoder", pair.layers + 1)
    assert more.weight_bytes(dtype) > 0.7 * free
    assert served.fitting("powercoder", None, dtype, 10 * free).layers == 30
    assert served.fitting("powercoder", 7, dtype, free // 100).layers == 7
    with pytest.raises(UsageError, match=r"--model: powercoder takes .* with one layer"):
        served.fitting("powercoder", None, dtype, free // 100)


# ---- rows ---------------------------------------------------------------------------------------


def test_times_and_rates_of_a_row(pair):
    seconds = [0.1, 0.2, 0.2, 0.7]
    asked = []

    def timed(t, b, count):
        asked.append((t, b, count))
        return seconds

    steps = SimpleNamespace(
        seconds=timed, graph=True, weight_bytes=30, cache_bytes=lambda t, b: t * b
    )
    problem = Problem(dtype="float32", device="cpu")
    effort = Effort(seconds=30.0, least=2, most=50)
    run = serving._Run(
        serving.Plan(), problem, pair, 2**30, Ceilings(1.0, 1e-9), effort, print, print
    )
    row = run._decoded(steps, 10, 6)
    assert asked == [(10, 6, 3), (10, 6, 15)]  # a tenth of the effort, and steps of 0.2 s
    assert (row["ms"], row["calls"], row["graph"]) == (200.0, 4, True)
    assert row["ms mean"] == pytest.approx(300)
    assert row["ms a layer"] == pytest.approx(150)
    assert row["tokens/s"] == pytest.approx(20)
    assert row["bytes"] == 90
    assert row["share of copy"] == pytest.approx(90 / 0.3 / 1000)
    assert row["share of weights"] == pytest.approx(1 / 3)
    run._decoded(steps, 10, 6, 4)
    assert asked[2:] == [(10, 6, 4)]


def test_what_a_step_reads_and_writes(ours):
    """Of each slot and layer a state, half a window and a new token, and part of a fold."""
    rows = ours.network.memories[0].pool.key_sum.shape[2]
    token = 2 * (2 * 16 * 4) + 2 * 4  # of two heads: keys, values, gates
    state = 2 * rows * (16 + 1) * 4
    step = state + token * (ours.window / 2 + 2) + 2 * 4 * 16 * 4
    fold = (2 * state + ours.window * token) / ours.window
    assert ours.cache_bytes(1000, 3) == pytest.approx(2 * 3 * (step + fold))


@pytest.mark.parametrize(
    ("fits", "expected"),
    [(0, [1, 8]), (1, [1, 8]), (5, [1, 5, 8]), (8, [1, 8]), (1000, [1, 8])],
)
def test_as_many_as_fit_are_measured_too(fits, expected):
    assert serving.batches_to_measure((8, 1), fits) == expected


def step(peer, b, rate, memory, **more):
    state = "float32" if peer == "retention" else ""
    same = {"mode": "serving", "pass": "decode", "model": "m", "layers": 2, "t": 64, "state": state}
    return same | {"peer": peer, "b": b, "tokens/s": rate, "memory": memory, "budget": 100} | more


def test_the_fastest_of_what_fits_into_the_same_memory():
    rows = [
        step("retention", 1, 10.0, 10),
        step("retention", 8, 60.0, 10),
        step("retention", 10, 70.0, 10),
        step("retention", 11, 80.0, 10),  # 110 bytes
        step("retention", 1, 5.0, 50, state="bfloat16"),
        step("softmax, a", 2, 11.0, 40),
        step("softmax, b", 2, 14.0, 40),
        step("softmax, b", 3, 21.0, 40),
        step("retention", 1, 99.0, 1, t=128),  # nothing is beside it
        step("softmax, b", 1, 99.0, 1, t=256),
        {**step("softmax, a", 1, 99.0, 40), "failed": "no"},
        {**step("softmax, a", 1, 99.0, 40), "pass": "first token"},
        {"mode": "decode", "peer": "retention", "t": 64},
    ]
    first, second = serving_report.same_memory(rows)
    assert first == {
        "model": "m",
        "t": 64,
        "budget": 100,
        "state": "float32",
        "fits": 10,
        "b": 10,
        "tokens/s": 70.0,
        "fits beside": 2,
        "b beside": 2,
        "tokens/s beside": 14.0,
        "peer": "softmax, b",
        "speed-up": 5.0,
    }
    assert (second["state"], second["fits"], second["speed-up"]) == ("bfloat16", 2, 5 / 14)


def test_what_has_no_room_has_a_row_that_says_so(monkeypatch):
    """And what comes after it is measured."""
    make = serving.Softmax.__init__

    def limited(self, model, t, b):
        if b > 1:
            raise torch.OutOfMemoryError("out of memory\nand more")
        make(self, model, t, b)

    monkeypatch.setattr(serving.Softmax, "__init__", limited)
    plan = serving.Plan(batches=(2, 1), contexts=(40,))
    rows = measured(plan, wanted=lambda name: name != "retention")
    assert [(x["peer"], x["pass"], x["b"], x.get("failed")) for x in rows] == [
        *((name, "decode", 1, None) for name in NAMES),
        *((name, "decode", 2, "out of memory") for name in NAMES),
        (NAMES[1], "first token", 1, None),
    ]


def test_memory_of_what_failed_is_given_back_before_anything_else(monkeypatch):
    make, events = serving.SoftmaxSteps.__init__, []

    def fails(self, softmax, way):
        events.append(way.name)
        if way.masked:
            raise torch.OutOfMemoryError("no room")
        make(self, softmax, way)

    monkeypatch.setattr(serving.SoftmaxSteps, "__init__", fails)
    plan = serving.Plan(contexts=(40,))
    rows = measured(plan, free=events.append, wanted=lambda name: name != "retention")
    assert events[1:4] == [NAMES[0], "cpu", NAMES[1]]
    assert ["failed" in row for row in rows] == [True, False, False]


def test_what_can_not_be_built_has_rows_that_say_so(monkeypatch):
    def fails(config, device, dtype):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(served, "build", fails)
    rows = measured(serving.Plan(batches=(1, 2), contexts=(40, 80)))
    assert {x["failed"] for x in rows} == {"no room"}
    expected = {("retention", "decode", t, b) for t in (40, 80) for b in (1, 2)}
    expected |= {(name, "decode", t, b) for name in NAMES for t in (40, 80) for b in (1, 2)}
    expected |= {
        (x, "first token", t, 1) for x in ("retention", "softmax, flash") for t in (40, 80)
    }
    assert {(x["peer"], x["pass"], x["t"], x["b"]) for x in rows} == expected


def test_slots_are_as_many_as_there_is_memory_for(pair, monkeypatch):
    each = serving._Run(
        serving.Plan(), Problem(dtype="float32", device="cpu"), pair, 0, None, ONCE, print, print
    )._slot_bytes("float32")
    memories = [serving._planned(pair, n, torch.float32, "float32") for n in (3, 4)]
    three, four = (sum(memory.nbytes for memory in some) for some in memories)
    assert each == four - three
    there = pair.weight_bytes(torch.float32) + int(3.9 * each / 0.9)
    monkeypatch.setattr(serving, "_free_bytes", lambda device: there)
    said = []
    only_ours = {"wanted": lambda name: name == "retention", "say": said.append}
    plan = serving.Plan(layers=2, batches=(1, 8), contexts=(40,))
    rows = [x for x in measured(plan, budget=None, **only_ours) if x["pass"] == "decode"]
    found = [(x["b"], x.get("largest", False), "failed" in x) for x in rows]
    assert found == [(1, False, False), (3, True, False), (8, False, True)]
    assert said[0] == "serving: small, retention, 3 slots, states of float32"
    assert rows[2]["failed"] == f"slots do not fit: {8 * each / 1e9:.1f} GB"
    assert {x["budget"] for x in rows} == {int(0.9 * (there - pair.weight_bytes(torch.float32)))}


def test_keys_and_values_that_do_not_fit_are_not_tried(monkeypatch):
    each = 2 * 40 * 2 * 2 * 16 * 4
    monkeypatch.setattr(serving, "_free_bytes", lambda device: int(2.5 * each))
    plan = serving.Plan(layers=2, batches=(2, 3), contexts=(40,))
    rows = measured(plan, wanted=lambda name: name == NAMES[0])
    assert "failed" not in rows[0]
    assert rows[1]["failed"] == "keys and values do not fit: 0.0 of 0.0 GB that are free"


def test_steps_whose_graph_can_not_be_captured_are_made_one_by_one(monkeypatch):
    def fails(step):
        raise RuntimeError("not while capturing\nand more")

    monkeypatch.setattr(serving, "captures", lambda device: True)
    monkeypatch.setattr(serving, "capture", fails)
    rows = measured(serving.Plan(contexts=(40,)), wanted=lambda name: name == NAMES[0])
    assert rows[0]["note"] == "no graph: not while capturing"
    assert not rows[0]["graph"]
    assert rows[0]["tokens/s"] > 0


def test_the_first_token_by_another_way_where_the_fastest_fails(monkeypatch):
    first, tried = serving.first_token_of_softmax, []
    ways = [*WAYS, serving.Way("softmax, other"), serving.Way("softmax, new")]

    def fails(model, way, tokens):
        tried.append(way.name)
        if way.name == "softmax, new":
            raise RuntimeError("no such kernel")
        first(model, way, tokens)

    monkeypatch.setattr(serving, "first_token_of_softmax", fails)
    monkeypatch.setattr(serving, "softmax_ways", lambda device: ways)
    rows = measured(serving.Plan(contexts=(40,)), wanted=lambda name: name != "retention")
    (row,) = (x for x in rows if x["pass"] == "first token")
    assert row["peer"] == "softmax, other"
    assert tried == ["softmax, new", "softmax, other", "softmax, other"]  # one is not counted
    assert row["tokens/s"] == pytest.approx(40 / row["ms"] * 1e3)


# ---- the command --------------------------------------------------------------------------------


def test_a_run_has_rows_of_both_with_the_same_memory(tmp_path: Path, capsys):
    """200 KiB are six slots; or twelve contexts of 64 tokens, and six of 128."""
    given = ("--t", "64", "128", "--b", "1", "8", "--memory-gib", str(200 / 2**20))
    assert (
        cli.main(["bench", "serving", *LINE, *given, "--layers", "1", "--out", str(tmp_path)]) == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert not [row for row in rows if "failed" in row]
    found = {(x["peer"], x["t"], x["b"]) for x in rows if x["pass"] == "decode"}
    largest = {("retention", 64): 6, ("retention", 128): 6}
    largest |= {(name, t): n for name in NAMES for t, n in ((64, 12), (128, 6))}
    expected = {(peer, t, b) for peer, t in largest for b in (1, 8)}
    expected |= {(*key, b) for key, b in largest.items() if b < 8}
    assert found == expected
    assert {(x["peer"], x["b"]) for x in rows if "largest" in x} == {
        (peer, 6) for peer in ("retention", *NAMES)
    }
    for row in rows:
        shared = (row["model"], row["layers"], row["budget"], row["note"].split(",")[0])
        assert shared == ("small", 1, 200 * 1024, "1 of 2 layers")
        if row["pass"] == "decode":
            assert row["low"] <= row["ms"] <= row["high"]
            assert row["tokens/s"] == pytest.approx(row["b"] / row["ms mean"] * 1e3)
            assert not row["graph"]
        else:
            assert row["tokens/s"] == pytest.approx(row["t"] / row["ms"] * 1e3)
    sizes = {(x["peer"], x["t"]): x["memory"] for x in rows if x["peer"] != "retention"}
    assert sizes == {(name, t): 2 * t * 2 * 16 * 4 for name in NAMES for t in (64, 128)}
    (slot,) = {x["memory"] for x in rows if x["peer"] == "retention"}
    assert 200 * 1024 // slot == 6
    first = [(x["peer"], x["t"]) for x in rows if x["pass"] == "first token"]
    assert first == [(peer, t) for peer in ("retention", "softmax, flash") for t in (64, 128)]
    lines = serving_report.same_memory(rows)
    assert [(x["t"], x["fits"], x["fits beside"]) for x in lines] == [(64, 6, 12), (128, 6, 6)]
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "serving_small.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "\nserving: sizes of small, 1 layers\n" in shown
    for title in (serving_report.STEPS, serving_report.FIRST, serving_report.MEMORY):
        assert f"\n{title} " in shown
    assert cli.main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0
    assert "0 of 6 times are slower" in capsys.readouterr().out


def test_runs_of_two_models_do_not_compare(tmp_path, capsys):
    for name in ("m", "n"):
        row = step("retention", 1, 1.0, 1, model=name) | {"ms": 1.0, "low": 0.9, "high": 1.1}
        results = {"environment": {"device": "some"}, "options": {}, "rows": [row]}
        (tmp_path / name).write_text(json.dumps(results))
    assert cli.main(["bench", "compare", str(tmp_path / "m"), str(tmp_path / "n")]) == 2
    assert "no mode and length in common" in capsys.readouterr().err


def test_a_plot_of_what_there_is(tmp_path):
    """Ours alone, and rows of both formats of states beside softmax attention."""
    rows = [step("retention", b, 10.0 * b, 10, t=t) for t in (64, 128) for b in (1, 8)]
    others = [step("retention", 1, 9.0, 5, state="bfloat16"), step("softmax, a", 1, 3.0, 5)]
    others += [step("retention", 3, 30.0, 10, largest=True)]  # of no line
    saved = []

    def save(figure, name, title):
        lines = [
            (line.get_label(), line.get_linestyle(), line.get_ydata().tolist())
            for line in figure.axes[0].get_lines()
        ]
        saved.append((name, title, lines, len(figure.axes[1].get_lines())))

    serving_report.plot(rows, "some device", save)
    serving_report.plot([*rows, *others, step("softmax, b", 1, 4.0, 5)], "some device", save)
    alone, both = saved
    assert alone[:2] == ("serving_m", "some device, sizes of m, 2 layers")
    of_one = ("batch 1, retention, float32", "-", [10.0, 10.0])
    of_eight = ("batch 8, retention, float32", "-", [80.0, 80.0])
    assert alone[2:] == ([of_one, of_eight], 0)
    half = ("batch 1, retention, bfloat16", "-.", [9.0])
    assert both[2:] == ([of_one, half, ("batch 1, softmax", "--", [4.0]), of_eight], 3)


def test_rows_without_times_are_shown_as_failed(capsys):
    console = report.Console(width=140)
    failed = {**step("retention", 1, 1.0, 1), "failed": "no [/such] thing"}
    del failed["tokens/s"]
    about = {"device": "some", "torch": "2", "retention": "0", "commit": "c"}
    ceilings = {"tflops": 1.0, "tbytes": 1.0}
    results = {"environment": about, "ceilings": ceilings, "rows": [failed], "missing": {}}
    report.print_tables(results, console)
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "no [/such] thing" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serving", "--layers", "3"], "--layers: expected at most the 2 of small, got 3"),
        (["serving", "--d", "64"], "--d: serving takes the shape of --model, and no other"),
        (["serving", "--no-gates"], "--no-gates: serving takes the shape of --model"),
        (["serving", "--deg", "4"], "--deg: serving takes the shape of --model"),
        (["serving", "--t", "16", "64"], "--t: expected more tokens for serving than the window"),
        (["fwd", "--layers", "3"], "--layers: expected the mode serving, got fwd"),
        (["fwd", "--memory-gib", "3"], "--memory-gib: expected the mode serving, got fwd"),
        (["serving", "--memory-gib", "0"], "--memory-gib: expected a number above 0, got '0'"),
        (["serving", "--model", "large"], "--model: invalid choice: 'large'"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, capsys):
    try:
        code = cli.main(["bench", *arguments, *LINE])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_said_in_one_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    gone = {"transformers"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    assert cli.main(["bench", "serving", *LINE]) == 2
    assert capsys.readouterr().err == (
        "retention bench: error: serving: needs transformers, not installed here: pip install "
        "'power-retention[bench,serve]'\n"
    )
    gone.clear()

    def too_old(name):
        raise ImportError("expected transformers 5.24 or newer, got 4.0")

    monkeypatch.setattr(served.importlib, "import_module", too_old)
    with pytest.raises(UsageError, match=r"serving: expected transformers 5\.24 or newer"):
        served.check_installed()


@pytest.mark.gpu
def test_steps_are_graphs_on_a_gpu(tmp_path):
    given = ("--model", "powercoder", "--layers", "2", "--b", "1", "3", "--quick")
    assert cli.main(["bench", "serving", *given, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert not [row for row in rows if "failed" in row]
    steps = [row for row in rows if row["pass"] == "decode"]
    assert {row["peer"] for row in steps} == {"retention", *_names_on_a_gpu()}
    assert all(row["graph"] for row in steps)


def _names_on_a_gpu():
    return {way.name for way in serving.softmax_ways("cuda")}
