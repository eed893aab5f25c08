"""Train a small Qwen3 on the standard library's sources, convert it, and train on: two curves.

    python examples/convert_qwen3.py --out runs/convert

From one checkpoint the model goes on in three ways, over the same batches: as it was, with softmax
attention; converted, with a blend that goes from softmax attention to power retention; and
converted at once. `curves.png` and `curves.json` show the loss on files that were held out, and
`converted/` is the second model, as `AutoModelForCausalLM.from_pretrained` loads it. Bytes are the
tokens, so nothing is fetched.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import Qwen3Config, Qwen3ForCausalLM

import retention.transformers as rt
from retention.lm import data

ROWS, BLOCK = 8, 256
WARMUP = 50
EVALUATE_EVERY = 50


def train(
    model: Any,
    corpus: data.Corpus,
    steps: range,
    learning_rate: float,
    schedule: rt.BlendSchedule | None = None,
) -> Iterator[dict[str, float]]:
    """Steps of AdamW; now and then the loss on held-out files, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    start = time.perf_counter()
    for i, step in enumerate(steps):
        if schedule is not None:
            rt.set_blend(model, schedule.blend(i, len(steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (i + 1) / WARMUP)
        ids = data.batch(corpus, 0, step, ROWS, BLOCK)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i % EVALUATE_EVERY == 0 or step == steps[-1]:
            yield {
                "step": step,
                "held_out_loss": evaluate(model, corpus),
                "blend": getattr(model.config, "softmax_blend", 1.0),
                "seconds": round(time.perf_counter() - start, 1),
            }
    if schedule is not None:
        rt.set_blend(model, schedule.blend(len(steps), len(steps)))


@torch.no_grad()
def evaluate(model: Any, corpus: data.Corpus) -> float:
    model.eval()
    losses = [
        model(ids, labels=ids, use_cache=False).loss
        for ids in data.validation_batches(corpus, 64, ROWS, BLOCK)
    ]
    model.train()
    return torch.stack(losses).mean().item()


def draw(curves: dict[str, list[dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, records), colour in zip(
        curves.items(), ("0.35", "tab:blue", "tab:red", "tab:orange"), strict=True
    ):
        points = [(x["step"], x["held_out_loss"]) for x in records]
        label = f"{name} ({points[-1][1]:.2f})"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=label)
    axes.set(xlabel="step", ylabel="loss on held-out files (nats a byte)", xlim=(0, None))
    axes.set_ylim(1.2, 3.0)
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/convert"))
    parser.add_argument("--steps", type=int, default=800, help="before the conversion")
    parser.add_argument("--more-steps", type=int, default=400, help="after it")
    parser.add_argument("--data", nargs="+", help="default: the standard library")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    corpus = data.load_corpus(options.data, BLOCK)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).train()
    print(f"{model.num_parameters():,} parameters, {len(corpus.train):,} bytes to learn from")

    curves: dict[str, list[dict[str, float]]] = {}

    def follow(name: str, *arguments: Any) -> None:
        curves[name] = []
        for record in train(*arguments):
            curves[name].append(record)
            print(f"{name}: {json.dumps(record)}", flush=True)
        (options.out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")

    follow("Qwen3", model, corpus, range(options.steps), 2e-3)
    more = range(options.steps, options.steps + options.more_steps)
    converted = rt.convert(copy.deepcopy(model))
    at_once = rt.convert(copy.deepcopy(model), blend=0.0)
    follow("goes on as it was", model, corpus, more, 1e-3)
    follow("converted, blended", converted, corpus, more, 1e-3, rt.BlendSchedule(share=0.5))
    follow("converted at once", at_once, corpus, more, 1e-3)
    draw(curves).savefig(options.out / "curves.png")
    converted.save_pretrained(options.out / "converted")

    prompt = torch.tensor([list(b"def ")])
    text = converted.eval().generate(prompt, do_sample=False, max_new_tokens=120, pad_token_id=0)
    print(bytes(text[0].tolist()).decode("utf-8", "replace"))


if __name__ == "__main__":
    main()
