"""The `retention` command: train a model, generate from it, measure, say what is built in."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from retention.lm.config import ModelConfig, TrainConfig
from retention.lm.errors import UsageError

# Each command imports what it needs when it runs: the command line itself starts without any extra.
_NEEDS = {
    "train": ("rich", "matplotlib", "safetensors"),
    "generate": ("safetensors",),
    "bench": ("rich", "matplotlib"),
}
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message}\n")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        from retention import _info as about

        print(f"retention {about.info()['version']}")
        parser.exit()


class _CMakeDir(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
        from retention import _C

        # Beside the compiled module, which an editable installation keeps apart from the sources.
        print(Path(_C.__file__).parent / "lib" / "cmake" / "retention")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for a usage error, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    missing = [name for name in _NEEDS.get(options.command, ()) if not _importable(name)]
    if missing:
        return _fail(
            options.command,
            f"needs {' and '.join(missing)}, not installed here: pip install "
            f"'retention[{'bench' if options.command == 'bench' else 'train'}]'",
        )
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe went away. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _fail(options.command, str(error), error.exit_code)


def _fail(command: str, message: str, code: int = UsageError.exit_code) -> int:
    print(f"retention {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="retention", description="Power retention: train, generate, inspect.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    where = "print the folder of the CMake package, for -Dretention_DIR=, and exit"
    parser.add_argument("--cmake-dir", action=_CMakeDir, nargs=0, help=where)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_generate(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="what is built in and which devices are there")
    info.set_defaults(run=_info)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train a small language model on bytes",
        description="Train a language model on bytes, with power retention in place of attention. "
        "Without --data it learns the Python sources of the interpreter's own standard library.",
    )
    train.set_defaults(run=_train)
    model, loop = ModelConfig(), TrainConfig()
    number = {"metavar": "N"}
    real = {"metavar": "X"}

    def add(flag: str, kind: Callable, default: object, text: str, **more: object) -> None:
        # The real defaults come later, so that --resume can tell what was asked for.
        train.add_argument(flag, type=kind, help=f"{text} (default: {default})", **more)

    sources = {"nargs": "+", "metavar": "FILE_OR_DIR"}
    add("--data", str, "Python's standard library", "files and folders to learn", **sources)
    add("--out", Path, "run", "folder of the run", metavar="DIR")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add("--steps", _positive, loop.steps, "optimizer steps", **number)
    add("--batch-size", _positive, loop.batch_size, "sequences a step", **number)
    add("--block-size", _positive, loop.block_size, "bytes a sequence", **number)
    add("--layers", _positive, model.layers, "blocks of retention and MLP", **number)
    add("--hidden-size", _positive, model.hidden_size, "width of the model", **number)
    add("--heads", _positive, model.heads, "query heads", **number)
    add("--kv-heads", _positive, "as many as query heads", "key and value heads", **number)
    add("--head-dim", _positive, "hidden size / heads", "channels, a multiple of 8", **number)
    add("--deg", _positive, model.deg, "degree of the power, even", **number)
    add("--chunk-size", _positive, "chosen by length", "bytes a chunk", **number)
    add("--learning-rate", _positive_float, loop.learning_rate, "at its peak", **real)
    add("--min-learning-rate", _non_negative_float, loop.min_learning_rate, "at the end", **real)
    add("--warmup", _non_negative, loop.warmup, "steps up to the peak", **number)
    add("--weight-decay", _non_negative_float, loop.weight_decay, "of the matrices", **real)
    add("--grad-clip", _positive_float, loop.grad_clip, "largest gradient norm", **real)
    add("--eval-every", _positive, loop.eval_every, "steps between validations", **number)
    add("--eval-blocks", _positive, loop.eval_blocks, "sequences a validation", **number)
    add("--checkpoint-every", _positive, loop.checkpoint_every, "steps to a checkpoint", **number)
    add("--seed", _seed, loop.seed, "of the weights and the batches", **number)
    add("--device", str, "cuda where there is one, else cpu", "where to train", metavar="NAME")
    _add_dtype(train, None, loop.dtype)
    train.add_argument(
        "--compile", action="store_true", default=None, help="compile the model (torch.compile)"
    )


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate text from a trained model",
        description="Stream text from a trained model. The memory it needs does not grow with the "
        "length of the text.",
    )
    generate.set_defaults(run=_generate)

    def add(flag: str, kind: Callable, default: object, text: str, metavar: str) -> None:
        shown = f"{text} (default: %(default)s)"
        generate.add_argument(flag, type=kind, default=default, help=shown, metavar=metavar)

    add("--checkpoint", Path, Path("run"), "a run's folder, or one checkpoint's", "DIR")
    add("--prompt", str, "", "what the text begins with", "TEXT")
    add("--max-new-tokens", _non_negative, 500, "bytes to generate", "N")
    add("--temperature", _non_negative_float, 0.8, "0: always the likeliest byte", "X")
    add("--top-p", _share, 0.95, "draw from the likeliest bytes of this joint probability", "X")
    add("--seed", _seed, 0, "of what is drawn", "N")
    ring = "recent bytes kept before they are folded into the state"
    add("--switch-over-seq-len", _positive, 512, ring, "N")
    generate.add_argument(
        "--device", metavar="NAME", help="where to run (default: cuda where there is one, else cpu)"
    )
    _add_dtype(generate, "float32", "float32")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure, beside what one would use instead",
        description="Measure power retention beside attention and others, on the same inputs. "
        "Modes: fwd, bwd, fwd+bwd, decode, components (each kernel alone), memory, host (calls of "
        "few tokens) and build; or `compare OLD NEW`, results of two runs, which fails where the "
        "new one is slower.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument("modes", nargs="+", metavar="MODE", help="one or several")

    def add(flag: str, kind: Callable, default: object, text: str, **more: object) -> None:
        shown = more.pop("shown", default)
        bench.add_argument(
            flag, type=kind, default=default, help=f"{text} (default: {shown})", **more
        )

    number = {"metavar": "N"}
    add("--b", _positive, 1, "sequences", **number)
    lengths = "65536 on a GPU, 1024 4096 8192 on a CPU"
    add(
        "--t", _positive, None, "tokens, one or several lengths", nargs="+", shown=lengths, **number
    )
    add("--h", _positive, None, "key heads", shown="8 on a GPU, 4 on a CPU", **number)
    add("--hq", _positive, None, "query heads", shown="as many as key heads", **number)
    add("--d", _positive, 64, "channels of a head, a multiple of 8", **number)
    add("--deg", _positive, 2, "degree of the power, even", **number)
    chosen = "1024 on a GPU, 0 on a CPU"
    add(
        "--chunk",
        _non_negative,
        None,
        "tokens a chunk; 0: the library's choice",
        shown=chosen,
        **number,
    )
    bench.add_argument("--no-gates", action="store_true", help="without log gates")
    _add_dtype(bench, None, "bfloat16 on a GPU, float32 on a CPU")
    add(
        "--device",
        str,
        None,
        "where to run",
        shown="cuda where there is one, else cpu",
        metavar="NAME",
    )
    add(
        "--peers",
        str,
        (),
        "names of those to measure, or how several begin",
        nargs="+",
        shown="all",
        metavar="NAME",
    )
    add(
        "--upstream",
        Path,
        None,
        "where `pip install --target DIR retention==1.0.7` was",
        shown="not measured",
        metavar="DIR",
    )
    limit = "limit of each process of --upstream, which tunes itself first"
    add("--upstream-seconds", _positive_float, 300.0, limit, metavar="X")
    add("--seconds", _positive_float, 2.0, "how long to repeat each call", metavar="X")
    described = "what git says"
    add("--commit", str, None, "of this build, for the results", shown=described, metavar="NAME")
    bench.add_argument(
        "--quick", action="store_true", help="few tokens and few calls, to see that it works"
    )
    bench.add_argument("--quiet", action="store_true", help="the tables alone")
    add(
        "--out",
        Path,
        None,
        "folder for results.json, results.csv and plots",
        shown="none",
        metavar="DIR",
    )


def _bench(options: argparse.Namespace) -> int:
    from retention.bench import command

    return command.run(options)


def _add_dtype(parser: argparse.ArgumentParser, default: str | None, shown: str) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=default,
        help=f"of the products; weights stay float32 (default: {shown})",
    )


def _train(options: argparse.Namespace) -> int:
    from retention.lm import devices, training

    out = Path("run") if options.out is None else options.out
    if options.data is not None:
        options.data = tuple(os.path.abspath(path) for path in options.data)
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.resume:
        _check_same(given, out)
        outcome = training.resume(out, options.device)
    else:
        given.setdefault("device", devices.default_device())
        outcome = training.train(_pick(ModelConfig, given), _pick(TrainConfig, given), out)
    return 0 if outcome is training.Outcome.FINISHED else _INTERRUPTED


def _pick(kind: type, given: dict[str, object]) -> object:
    """A configuration from the options of its fields' names, the others at their defaults."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names})


def _check_same(given: dict[str, object], out: Path) -> None:
    """A resumed run has the options it began with; only the device may be another."""
    from retention.lm.run import RunFolder

    run = RunFolder(out).read_config()
    stored = {**dataclasses.asdict(run.model), **dataclasses.asdict(run.train)}
    for name, value in given.items():
        if name != "device" and name in stored and stored[name] != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag}: {_shown(value)} differs from {_shown(stored[name])}, which the run in "
                f"{out} began with; leave it out to resume"
            )


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(str(x) for x in value)
    return "the default" if value is None else str(value)


def _generate(options: argparse.Namespace) -> int:
    from retention.lm import devices, generation

    device = devices.open_device(options.device or devices.default_device())
    model = generation.load_model(options.checkpoint, device)
    prompt = os.fsencode(options.prompt)
    statistics = generation.Statistics()
    stream = generation.generate(
        model,
        prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        options.switch_over_seq_len,
        options.dtype,
        statistics,
    )
    _write(prompt.decode("utf-8", "replace"))
    for piece in generation.as_text(stream):
        _write(piece)
    _write("\n")
    print(
        f"{statistics.tokens} tokens, {statistics.tokens_per_second:,.1f} tokens/s, "
        f"{statistics.state_bytes:,} bytes of state",
        file=sys.stderr,
    )
    return 0


def _write(text: str) -> None:
    # A terminal may know fewer characters than UTF-8 has.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _info(options: argparse.Namespace) -> int:
    from retention import _info as about

    print(about.format_info(about.info()))
    return 0


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _non_negative(text: str) -> int:
    value = _integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return value


def _seed(text: str) -> int:
    value = _non_negative(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer below 2^63, got {text!r}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _non_negative_float(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
