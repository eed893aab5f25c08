"""The `retention` command: train a model, generate from it, chat with it, serve it, convert others,
measure, say what is built in."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from retention.lm.config import DTYPES, LARGEST, ModelConfig, TrainConfig
from retention.lm.errors import OutputError, UsageError, shown
from retention.lm.output import write

# Each command imports what it needs when it runs: the command line itself starts without any extra.
_NEEDS = {
    "train": ("rich", "matplotlib", "safetensors"),
    "generate": ("safetensors",),
    "chat": ("safetensors",),
    "bench": ("rich", "matplotlib"),
    "convert": ("transformers",),
    "serve": ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "safetensors"),
}
# The extra with what a command needs, where it is not `train`.
_EXTRAS = {"bench": "bench", "convert": "transformers", "serve": "serve"}
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse itself says nothing where its help cannot be written.
        if file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from retention import installation

        write(f"retention {installation.info()['version']}\n")
        parser.exit()


class _CMakeDir(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import retention._C as _C

        # Beside the compiled module, which an editable installation keeps apart from the sources.
        write(f"{Path(_C.__file__).parent / 'lib' / 'cmake' / 'retention'}\n")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns the exit code: 0; 2 for what cannot be done, said in a line; 1 where the reader of
    standard output went away; 130, 143 or 129 where SIGINT, SIGTERM or SIGHUP ended a training.
    """
    with contextlib.ExitStack() as stack:
        if sys.stderr is None or sys.stderr.closed:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if sys.stdout is None or sys.stdout.closed:
            # The next file to be opened could take its number, and what is printed.
            return _fail(None, "standard output is closed")
        try:
            code = _run(arguments)
        except SystemExit as end:  # of argparse, and of rich where the reader of a pipe went away
            code = end.code if isinstance(end.code, int) else 0
        try:
            # Else Python does it at its end, and complains.
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            return _output_failed(None, error) if code == 0 else _silenced(code)
        return code


def _run(arguments: Sequence[str] | None) -> int:
    command = None
    try:
        options = _parser().parse_args(arguments)
        command = options.command
        missing = [name for name in _NEEDS.get(command, ()) if not _importable(name)]
        if missing:
            raise UsageError(
                f"needs {' and '.join(missing)}, not installed here: pip install "
                f"'power-retention[{_EXTRAS.get(command, 'train')}]'",
            )
        return options.run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except UsageError as error:
        return _fail(command, str(error), error.exit_code)
    except OutputError as error:
        return _output_failed(command, error.reason)
    except BrokenPipeError as error:
        return _output_failed(command, error)
    except OSError as error:
        path = "" if error.filename is None else f"{error.filename}: "
        return _fail(command, f"{path}{shown(error)}")
    except (RuntimeError, MemoryError) as error:
        from retention.lm import devices

        if not devices.is_out_of_memory(error):
            raise
        return _fail(command, f"out of memory: {str(error)[:200]}")


def _fail(command: str | None, message: str, code: int = UsageError.exit_code) -> int:
    name = "retention" if command is None else f"retention {command}"
    try:
        sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    return code


def _output_failed(command: str | None, reason: OSError | ValueError) -> int:
    """A pipe's reader that went away has seen enough, which is no error to speak of."""
    if isinstance(reason, BrokenPipeError):
        return _silenced(1)
    return _silenced(_fail(command, f"standard output: {shown(reason)}"))


def _silenced(code: int) -> int:
    """`code`, with nowhere for what is left of standard output to go."""
    _discard(sys.stdout)
    return code


def _discard(stream: TextIO) -> None:
    # What is in its buffer would be written at the end of the process, and fail once more.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
    _add_chat(commands)
    _add_convert(commands)
    _add_serve(commands)
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
    add("--data", _path, "Python's standard library", "files and folders to learn", **sources)
    add("--out", _path, "run", "folder of the run", metavar="DIR")
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
    add("--seed", _non_negative, loop.seed, "of the weights and the batches", **number)
    add("--device", str, "cuda where there is one, else cpu", "where to train", metavar="NAME")
    _add_dtype(train, None, loop.dtype)
    train.add_argument(
        "--context-parallel",
        type=_positive,
        default=1,
        help="processes that share every sequence, started by torchrun (default: 1)",
        metavar="N",
    )
    train.add_argument(
        "--compile", action="store_true", default=None, help="compile the model (torch.compile)"
    )


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="generate text from a trained model",
        description="Generate text behind one prompt or several at once, from a run of `retention "
        "train`, whose tokens are bytes, or from any causal language model of transformers. The "
        "memory that power retention needs does not grow with the length of the text. One text is "
        "streamed; several are printed each when it and those before it have ended.",
    )
    generate.set_defaults(run=_generate)
    _add_model(generate)
    prompts = generate.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        action="append",
        default=None,
        help="what the text begins with; several times for several texts (default: nothing)",
        metavar="TEXT",
    )
    prompts.add_argument(
        "--prompts",
        type=_path,
        help="a file with one prompt a line, taken as it is, without escapes; -: standard input",
        metavar="FILE",
    )
    generate.add_argument(
        "--stop",
        action="store_true",
        help="end a text where its model ends it: a run's where it begins another file, that of a "
        "model of transformers at its end-of-sequence token",
    )
    _add_sampling(generate, "of each text")
    generate.add_argument(
        "--stats",
        action="store_true",
        help="say on standard error the time to the first token, and tokens a second as the text "
        "grows; after a warm-up",
    )
    generate.add_argument(
        "--plot",
        type=_path,
        help="draw the time of generation over its tokens, and tokens a second, after a warm-up; "
        "the name's end says as what: .png, .svg, .pdf",
        metavar="FILE",
    )
    generate.add_argument(
        "--compare",
        type=_path,
        help="a second model, which generates as many tokens behind the same prompts after the "
        "first: the model of softmax attention that one was converted from, for example",
        metavar="DIR",
    )


def _add_chat(commands: argparse._SubParsersAction) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a trained model",
        description="Talk to a model, a line of standard input a turn. What was said stays in its "
        "memory: a turn reads what is new. A model of transformers is spoken to by its tokenizer's "
        "chat template; without one, and with a run of `retention train`, turns are lines, `User: "
        "...` and `Assistant: ...`. /reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer.",
    )
    chat.set_defaults(run=_chat, stop=True)
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="what is said before all (default: nothing)")
    _add_sampling(chat, "of each answer")
    chat.add_argument(
        "--stats",
        action="store_true",
        help="say on standard error, for each answer, the time to the first token, and tokens a "
        "second as it grows",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The options of commands that generate: which model, and where it runs."""
    parser.add_argument(
        "--checkpoint",
        type=_path,
        default=Path("run"),
        help="a run's folder, one checkpoint's, or that of a model of transformers (default: run)",
        metavar="DIR",
    )
    parser.add_argument(
        "--switch-over-seq-len",
        type=_positive,
        help="recent bytes kept before they are folded into the state; of runs alone (default: "
        "chosen by shape)",
        metavar="N",
    )
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="capture a step in a CUDA graph, and replay it; of runs alone (default: on a CUDA "
        "device)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="where to run (default: cuda where there is one, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of a run, what its products are in, float32 by default; of a model of transformers, "
        "what its weights are in, as they are stored by default",
    )


def _add_sampling(parser: argparse.ArgumentParser, of: str) -> None:
    """The options of commands that generate: which tokens."""

    def add(flag: str, kind: Callable, text: str, metavar: str, default: object = None) -> None:
        parser.add_argument(flag, type=kind, help=text, metavar=metavar, default=default)

    count = f"tokens to generate, {of}; bytes, of a run (default: %(default)s)"
    add("--max-new-tokens", _non_negative, count, "N", default=500)
    theirs = "or what the generation_config.json of a model of transformers says"
    likeliest = f"0: always the likeliest token (default: 0.8, {theirs})"
    add("--temperature", _non_negative_float, likeliest, "X")
    nucleus = f"draw from the likeliest tokens of this joint probability (default: 0.95, {theirs})"
    add("--top-p", _share, nucleus, "X")
    seed = "of what is drawn; each next prompt has the next one (default: %(default)s)"
    add("--seed", _non_negative, seed, "N", default=0)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="put power retention in place of a transformer's attention",
        description="Write a checkpoint of transformers (Llama, Mistral, Qwen2, Qwen3, StarCoder2) "
        "anew, with power retention in place of its attention. It computes what it was until it is "
        "trained on, while the blend of both goes from 1 to 0.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=_path, metavar="SOURCE", help="the checkpoint's folder")
    convert.add_argument("out", type=_path, metavar="OUT", help="a folder that is not there yet")
    convert.add_argument(
        "--layers",
        type=_non_negative,
        nargs="+",
        metavar="N",
        help="layers to convert, counted from 0 (default: all)",
    )
    convert.add_argument(
        "--gating",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether heads forget (default: they do)",
    )
    convert.add_argument(
        "--blend",
        type=_non_negative_float,
        default=1.0,
        metavar="X",
        help="1: softmax attention's output; 0: power retention's (default: 1)",
    )


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model, with the endpoints of OpenAI's API",
        description="Serve a run of `retention train` or a checkpoint of transformers on this "
        "machine, with the endpoints of OpenAI's API. A text takes one slot whatever its length, "
        "so that memory is known in advance. SIGTERM and SIGINT end it when what runs is done.",
    )
    serve.set_defaults(run=_serve)

    def add(
        flag: str, kind: Callable, default: object, text: str, metavar: str, shown: str = ""
    ) -> None:
        said = f"{text} (default: {shown or '%(default)s'})"
        serve.add_argument(flag, type=kind, default=default, help=said, metavar=metavar)

    add("--model", _path, Path("run"), "a run's folder, or one of transformers", "DIR")
    add("--served-model-name", str, None, "what requests call it", "NAME", "the folder's name")
    add("--host", str, "127.0.0.1", "address to listen on", "ADDRESS")
    add("--port", _port, 8000, "0: any that is free", "N")
    key = "that requests must bring; in $RETENTION_API_KEY no other user can see it"
    add("--api-key", str, None, key, "KEY", "$RETENTION_API_KEY, or none is asked for")
    slots = "16 on a CPU; on a GPU, as many as there is memory for, at most 256"
    add("--slots", _positive, None, "texts generated at once", "N", slots)
    add("--max-queue", _non_negative, 256, "texts that may wait for a slot", "N")
    add("--max-prompt-tokens", _positive, None, "of a request", "N", "any number")
    add("--max-new-tokens", _positive, 4096, "of a text; a chat has these unless it says", "N")
    add("--max-body-bytes", _positive, 2**22, "of a request", "N")
    piece = "of a prompt read between two steps of the others"
    add("--prefill-tokens", _positive, 512, piece, "N")
    add("--shutdown-seconds", _non_negative_float, 30.0, "for what runs when told to end", "X")
    device = "cuda where there is one, else cpu"
    add("--device", str, None, "where to run", "NAME", device)
    serve.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the products (default: a checkpoint's own; float32 for a run)",
    )
    serve.add_argument(
        "--state-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what states are held in; bfloat16 takes half the memory (default: float32)",
    )
    serve.add_argument(
        "--batch-invariance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use batch sizes alone in which a text's numbers do not depend on the others, found "
        "by trying them at the start (default: it is so)",
    )


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure, beside what one would use instead",
        description="Measure power retention beside attention and others, on the same inputs. "
        "Modes: fwd, bwd, fwd+bwd, shapes (forward and both passes of many), forms (the quadratic "
        "one and chunks, where the library changes), decode, serving (steps of a whole model), "
        "context (one sequence over the processes that torchrun starts), components (each kernel "
        "alone), memory, host (calls of few tokens) and build; or `compare OLD NEW`, results of "
        "two runs, which fails where the new one is slower.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument("modes", nargs="+", metavar="MODE", help="one or several")

    def add(flag: str, kind: Callable, default: object, text: str, **more: object) -> None:
        shown = more.pop("shown", default)
        bench.add_argument(
            flag, type=kind, default=default, help=f"{text} (default: {shown})", **more
        )

    number = {"metavar": "N"}
    add(
        "--b",
        _positive,
        None,
        "sequences; for decode and serving, one or several numbers of them",
        nargs="+",
        shown="1; for decode, usual shapes, unless some of --b --h --hq --d --tokens --state-dtype;"
        " for serving, 1 8 32 128 on a GPU, 1 8 on a CPU",
        **number,
    )
    lengths = (
        "65536 on a GPU, for decode 1024 to 131072; 1024 4096 8192 on a CPU; for serving "
        "2048 32768 131072 on a GPU, 512 2048 on a CPU"
    )
    add(
        "--t", _positive, None, "tokens, one or several lengths", nargs="+", shown=lengths, **number
    )
    add("--h", _positive, None, "key heads", shown="8 on a GPU, 4 on a CPU", **number)
    add("--hq", _positive, None, "query heads", shown="as many as key heads", **number)
    channels = "channels of a head, a multiple of 8"
    add("--d", _positive, None, channels, shown=64, **number)
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
    several = "for decode, tokens of a sequence in a step, one or several numbers"
    add("--tokens", _positive, None, several, nargs="+", shown=1, **number)
    add(
        "--state-dtype",
        str,
        None,
        "for decode and serving, what states are held in, one or both",
        nargs="+",
        choices=("float32", "bfloat16"),
        shown="float32",
    )
    add(
        "--model",
        str,
        None,
        "for serving, whose sizes, with random weights",
        choices=("powercoder", "brumby", "small"),
        shown="powercoder on a GPU, small on a CPU",
    )
    layers = "for serving, layers of the model"
    add("--layers", _positive, None, layers, shown="all, or as many as fit", **number)
    memory = "for serving, GiB for the memory of sequences, in which both models are compared"
    add(
        "--memory-gib",
        _positive_float,
        None,
        memory,
        shown="nine tenths of what is free beside the weights on a GPU, 1 on a CPU",
        metavar="X",
    )
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
        _path,
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
        _path,
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
        choices=DTYPES,
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
        outcome = training.resume(out, options.device, options.context_parallel)
    else:
        given.setdefault("device", devices.default_device())
        configs = _pick(ModelConfig, given), _pick(TrainConfig, given)
        outcome = training.train(*configs, out, options.context_parallel)
    return int(outcome)


def _pick(kind: type, given: dict[str, object]) -> Any:
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
    from retention.generation import command

    return command.run(options)


def _chat(options: argparse.Namespace) -> int:
    from retention.generation import chat

    return chat.run(options)


def _convert(options: argparse.Namespace) -> int:
    try:
        from transformers.utils import logging

        from retention.transformers import convert_checkpoint

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        model = convert_checkpoint(
            options.source, options.out, options.layers, options.gating, options.blend
        )
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    kinds = model.config.layer_types
    write(
        f"{options.out}: {kinds.count('power_retention')} of {len(kinds)} layers are power "
        f"retention, {model.num_parameters():,} parameters, blend {model.config.softmax_blend:g}\n"
    )
    return 0


def _serve(options: argparse.Namespace) -> int:
    from retention.serve import command

    return command.run(options, write)


def _info(options: argparse.Namespace) -> int:
    from retention import installation

    write(installation.format_info(installation.info()) + "\n")
    return 0


def _path(text: str) -> Path:
    # An empty one would be the current folder.
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


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


def _port(text: str) -> int:
    value = _integer(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 65535, got {text!r}")
    return value


def _integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer below 2^63, got {text!r}")
    return value


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
