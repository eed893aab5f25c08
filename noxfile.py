"""Sessions of work on this repository: `nox -s demo`, `nox -s tests`, `nox --list`.

Everything is installed in the versions of constraints.txt and built in folders that git ignores.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests", "wheel", "mutations"]

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "nox"
CONSTRAINTS = ROOT / "constraints.txt"

# Writes what the package's users see to a file, as text that two builds can be compared by.
PUBLIC_API = """
import inspect, json, pathlib, sys
import retention, retention._C
def describe(value):
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return type(value).__name__
names = {f"retention.{name}": describe(getattr(retention, name)) for name in retention.__all__}
names |= {
    f"_C.{name}": getattr(value, "__doc__", None)
    for name, value in vars(retention._C).items() if not name.startswith("__")
}
pathlib.Path(sys.argv[1]).write_text(json.dumps({
    "names": names,
    "cuda": retention._C.build_info()["cuda"],
    "file": retention.__file__,
}))
"""


# What has to do with torch alone; the other tests take longer, and depend on it less.
CORE_TESTS = (
    *("test_operators", "test_power_retention", "test_gradients", "test_inference", "test_nn"),
    *("test_symmetric_power", "test_torch", "test_torch_func"),
)


@contextlib.contextmanager
def timed(session: nox.Session, part: str) -> Iterator[None]:
    """Log what a part of a session took, for the budget in CONTRIBUTING.md."""
    start = time.monotonic()
    yield
    session.log(f"{session.name}: {part} took {time.monotonic() - start:.0f} s")


def install(session: nox.Session, *requirements: str, constraints: Path = CONSTRAINTS) -> None:
    # What is imported is compiled then: most of what is installed never is.
    session.install("--no-compile", "--constraint", str(constraints), *requirements)


def install_build_tools(session: nox.Session) -> None:
    """Install what pyproject.toml's build-system asks for, in the versions tested."""
    install(session, "scikit-build-core", "nanobind", "cmake", "ninja")


@functools.cache
def gpu_architectures() -> tuple[str, ...]:
    """What to compile for to run on this machine's GPUs; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    found = {x.replace(".", "") for x in re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)}
    # Not `native`, which is sm_90 where the kernels have main loops for sm_90a.
    return tuple(sorted(f"{x}a-real" if x == "90" else f"{x}-real" for x in found))


def cuda_options() -> dict[str, str]:
    """CMake options: kernels for this machine's GPUs, and none where there is no GPU to run them,
    since compiling them takes long."""
    if architectures := gpu_architectures():
        return {"RETENTION_CUDA": "AUTO", "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures)}
    return {"RETENTION_CUDA": "OFF"}


MAX_WHEEL_MB = 30

# Those that a table of the wheel's kernels must have rows of.
MAIN_KERNELS = (
    *("ChunkStates", "Output"),
    *("QueryGradient", "StateGradients", "KeyGradient", "ValueGradient"),
)

# One configuration for one architecture, which compiles in a few minutes.
QUICK = {
    "RETENTION_ELEMENTS": "bf16",
    "RETENTION_HEAD_DIMS": "64",
    "RETENTION_VALUE_DIMS": "64",
    "CMAKE_CUDA_ARCHITECTURES": "90a-real",
}


def defines(options: dict[str, str], prefix: str = "-D") -> list[str]:
    """CMake options as arguments of cmake, or with another prefix of pip."""
    return [f"{prefix}{name}={value}" for name, value in options.items()]


def install_package(session: nox.Session, extra: str) -> None:
    """Install this package with an extra. Warnings in its C++ sources are errors."""
    install_build_tools(session)
    install_kernel_headers(session)
    # Without isolation, the build uses the tools above and not the newest of the day.
    install(
        session,
        "--no-build-isolation",
        *defines(
            cuda_options() | {"RETENTION_WARNINGS_AS_ERRORS": "ON"},
            "--config-settings=cmake.define.",
        ),
        f".[{extra}]",
    )


def install_kernel_headers(session: nox.Session) -> None:
    """Install what compiling kernels takes, for a device or the emulator: headers alone."""
    install(
        session,
        "--no-deps",
        "nvidia-cutlass",
        *("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl"),
    )


def fresh_folder(session: nox.Session, name: str) -> Path:
    folder = BUILD / session.name / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def public_api(session: nox.Session, python: str) -> dict:
    """What `python` sees of the package, from a folder where only installed code can be found."""
    answer = fresh_folder(session, "elsewhere") / "answer.json"
    with session.chdir(answer.parent):
        session.run(python, "-c", PUBLIC_API, str(answer), external=True, log=False)
    return json.loads(answer.read_text())


def run_core_tests(session: nox.Session, requirement: str) -> None:
    """Run the core tests with another version of torch than that of constraints.txt."""
    # What torch needs, some of it in one version alone, is not that of constraints.txt.
    free = r"^(torch|filelock|fsspec|jinja2|networkx|nvidia-.*|setuptools|sympy)==.*\n"
    constraints = fresh_folder(session, "torch") / "constraints.txt"
    constraints.write_text(re.sub(free, "", CONSTRAINTS.read_text(), flags=re.MULTILINE))
    install_build_tools(session)
    install(
        session,
        *("--no-build-isolation", "--config-settings=cmake.define.RETENTION_CUDA=OFF"),
        *(requirement, ".[test]"),
        constraints=constraints,
    )
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    tests = [f"tests/python/{name}.py" for name in CORE_TESTS]
    run_pytest(session, *(session.posargs or tests), env={})


def without_nvcc() -> dict[str, str | None]:
    """The changes to the environment after which CMake finds no CUDA compiler."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    kept = [folder for folder in folders if not (Path(folder) / "nvcc").exists()]
    # A variable that is None is taken out.
    return {"PATH": os.pathsep.join(kept), "CUDACXX": None, "CUDA_PATH": None, "CUDA_HOME": None}


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small language model on the standard library's sources and generate from it.

    A run that was stopped is continued. Arguments after `--` go to `retention train`.
    """
    install_package(session, "train")
    out = ROOT / "runs" / "demo"
    steps = out / "metrics.jsonl"  # empty where the first step failed: then it may start anew
    resume = ["--resume"] if steps.exists() and steps.stat().st_size else []
    session.run("retention", "train", "--out", str(out), *resume, *session.posargs)
    session.run(
        "retention",
        "generate",
        *("--checkpoint", str(out)),
        *("--prompt", "def "),
        *("--max-new-tokens", "300"),
    )


@nox.session
def serve(session: nox.Session) -> None:
    """Serve a small language model, ask it something with OpenAI's client, and end it.

    The model is that of `nox -s demo` where there is one, and else trained for 100 steps.
    """
    install_package(session, "serve,train")
    install(session, "openai")
    out = ROOT / "runs" / "demo"
    if not any((out / "checkpoints").glob("step-*")):
        out = ROOT / "runs" / "serve"
        if not any((out / "checkpoints").glob("step-*")):
            shutil.rmtree(out, ignore_errors=True)
            session.run(
                *("retention", "train", "--out", str(out), "--steps", "100"),
                *("--warmup", "10", "--eval-every", "100", "--checkpoint-every", "100"),
            )
    command = [str(Path(session.bin) / "retention"), "serve", "--model", str(out), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            if (url := re.search(r"http://\S+(?=:)", said)) is None:
                session.error(f"retention serve: expected to be told a URL, got {said!r}")
            session.log(said.strip())
            session.run("python", str(ROOT / "examples" / "ask_server.py"), url[0])
        finally:
            server.terminate()
    if server.returncode != 0:
        session.error(f"retention serve: expected exit code 0, got {server.returncode}")
    session.log("retention serve: ended with exit code 0")


def ctest(build: str, *arguments: str) -> list[str]:
    """The command that runs a build's C++ tests."""
    return [
        *("ctest", "--test-dir", build, "--output-on-failure", "--parallel"),
        *(str(os.cpu_count() or 1), *arguments),
    ]


@contextlib.contextmanager
def beside(session: nox.Session, log: Path, *commands: list[str]) -> Iterator[None]:
    """Commands one after another, beside something that leaves processors idle. Then waits for
    them, shows what they wrote, and ends the session if one has failed."""
    path = os.pathsep.join((session.bin, os.environ.get("PATH", os.defpath)))
    running: list[subprocess.Popen] = []
    ended = threading.Event()
    failed = []

    def run() -> None:
        with log.open("w") as file:
            for command in commands:
                if ended.is_set():
                    return
                running.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=file, env=os.environ | {"PATH": path}
                    )
                )
                if running[-1].wait() != 0:
                    failed.append(command)
                    return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
        thread.join()
    except BaseException:
        ended.set()
        for process in running:
            process.terminate()
        raise
    finally:
        thread.join()
        print(log.read_text(), end="", flush=True)
    if failed:
        session.error(f"failed: {' '.join(failed[0])}")


def run_pytest(session: nox.Session, *arguments: str, env: dict[str, str]) -> None:
    """On all processors, but where tests share a GPU and measure times and memory on it."""
    if not gpu_architectures():
        # A file is one process's, so that what its tests share is made once. A thread of PyTorch's
        # each, else they wait for one another's.
        arguments = ("--numprocesses", "auto", "--dist", "loadfile", *arguments)
        env = {"OMP_NUM_THREADS": "1"} | env
    session.run("python", "-m", "pytest", *arguments, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the C++ tests (ctest), then the Python tests (pytest, which gets what follows `--`).

    Kernels run on the emulator in a pairwise choice of configurations.
    """
    with timed(session, "installing what builds"):
        install_build_tools(session)
        install_kernel_headers(session)
    build = str(fresh_folder(session, "cmake"))
    session.run(
        "cmake",
        *("-S", str(ROOT), "-B", build, "-G", "Ninja"),
        *defines(
            cuda_options()
            | {
                "RETENTION_BUILD_TESTS": "ON",
                "RETENTION_BUILD_EMULATED": "ON",
                "RETENTION_WARNINGS_AS_ERRORS": "ON",
                "Python_EXECUTABLE": str(Path(session.bin) / "python"),
            }
        ),
    )
    # Not cmake, which would leave the compilers at work when it is ended.
    building = [str(Path(session.bin) / "ninja"), "-C", build]
    testing = ctest(build, "--no-tests=error")
    log = fresh_folder(session, "ctest") / "log"
    with (
        timed(session, "installing, and C++ tests"),
        beside(session, log, building, testing),
        timed(session, "installing"),
    ):
        install_package(session, "test")
    measured = fresh_folder(session, "bench")
    with timed(session, "retention bench"):
        session.run(
            *("retention", "bench", "fwd", "--quick", "--device", "cpu", "--out", str(measured))
        )
    # Where it is named, it must be there. The emulator is for Linux.
    emulated = {"RETENTION_EMULATED": f"{build}/emulated"} if sys.platform == "linux" else {}
    with timed(session, "pytest"):
        run_pytest(session, *(session.posargs or ["tests/python"]), env=emulated)


def last_seen_revision() -> str:
    """The commit of tests/mutations/seen, at which all mutations were seen caught; `all` where git
    knows none of that name before this one."""
    seen = (ROOT / "tests" / "mutations" / "seen").read_text().split()[0]
    command = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", seen, "HEAD"]
    known = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return seen if known else "all"


@nox.session
def mutations(session: nox.Session) -> None:
    """See that the tests notice mistakes in kernels, of which tests/mutations has a list.

    In kernels that changed since the commit of tests/mutations/seen, or whose tests did; `-- all`
    for all kernels, or another git revision.
    """
    if len(session.posargs) > 1:
        session.error(f"mutations: expected `all` or a git revision, got {session.posargs}")
    since = session.posargs[0] if session.posargs else last_seen_revision()
    install(session, "cmake", "ninja")
    install_kernel_headers(session)
    build = str(fresh_folder(session, "cmake"))
    with timed(session, "building"):
        session.run(
            *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
            *defines(
                {
                    "RETENTION_CUDA": "OFF",
                    "RETENTION_BUILD_TESTS": "ON",
                    "RETENTION_MUTATIONS": since,
                }
            ),
        )
        session.run("cmake", "--build", build, "--target", "mutations")
    with timed(session, "ctest"):
        # A change may touch no kernel.
        session.run(*ctest(build, "--label-regex", "mutation", "--no-tests=ignore"))


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with a CUDA device: the tests that need one, then compute-sanitizer."""
    if not gpu_architectures():
        session.error("no CUDA device here: nvidia-smi is not on PATH, or finds none")
    install_package(session, "test")
    build = str(fresh_folder(session, "cmake"))
    session.run(
        *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
        *defines(cuda_options() | {"RETENTION_BUILD_TESTS": "ON"}),
    )
    session.run("cmake", "--build", build, "--target", "device_tests")
    session.run("ctest", "--test-dir", build, "--output-on-failure", "--label-regex", "device")
    session.run("python", "-m", "pytest", "-m", "gpu", *(session.posargs or ["tests/python"]))
    session.run("cmake", "--build", build, "--target", "sanitize")


@nox.session
def torch_oldest(session: nox.Session) -> None:
    """Run the core tests with the oldest torch that pyproject.toml accepts: its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (x for x in project["dependencies"] if x.startswith("torch>="))
    run_core_tests(session, bound.replace(">=", "=="))


@nox.session
def torch_newest(session: nox.Session) -> None:
    """Run the core tests with the newest torch. An error where there is none after the pin."""
    pin = re.search(r"^torch==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)[1]
    run_core_tests(session, f"torch>{pin}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check the formatting, the common mistakes that ruff knows, and the package's types."""
    install(session, "ruff", "clang-format", "mypy", "torch")
    session.run("ruff", "check", str(ROOT))
    session.run("ruff", "format", "--check", str(ROOT))
    session.run("mypy")
    sources = [
        str(path)
        for folder in ("include", "src", "tests")
        for suffix in ("*.hpp", "*.cpp", "*.cu")
        for path in sorted((ROOT / folder).rglob(suffix))
    ]
    session.run("clang-format", "--dry-run", "-Werror", *sources)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the sdist and from it the wheel, install that in a clean environment and use it.

    Where there is a CUDA compiler, the wheel has kernels for all architectures, and what they need
    of a device is checked. `-- all` compiles all configurations, as a release has them, not a
    pairwise choice.
    """
    if session.posargs not in ([], ["all"]):
        session.error(f"wheel: expected `all` or nothing, got {session.posargs}")
    options = {
        "RETENTION_WARNINGS_AS_ERRORS": "ON",
        "RETENTION_PAIRWISE_ONLY": "OFF" if session.posargs else "ON",
    }
    install(session, "build")
    dist = fresh_folder(session, "dist")
    with timed(session, "building"):
        session.run(
            *("python", "-m", "build", "--outdir", str(dist), str(ROOT)),
            *defines(options, "-Ccmake.define."),
        )
    built = sorted(dist.glob("*.whl"))
    if len(built) != 1:
        session.error(f"expected one wheel in {dist}, got {built}")
    clean = fresh_folder(session, "clean")
    session.run("python", "-m", "venv", str(clean))
    bin_folder = clean / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    session.run(
        *(python, "-m", "pip", "install", "--constraint", str(CONSTRAINTS), str(built[0])),
        external=True,
    )
    found = public_api(session, python)
    package = Path(found["file"]).resolve().parent
    if not package.is_relative_to(clean.resolve()):
        session.error(f"imported {found['file']}, which is not in {clean}")
    session.run(str(bin_folder / "retention"), "info", external=True)
    megabytes = built[0].stat().st_size / 1e6
    session.log(f"{built[0].name}: {megabytes:.1f} MB")
    if megabytes >= MAX_WHEEL_MB:
        session.error(f"{built[0].name}: {megabytes:.1f} MB, expected less than {MAX_WHEEL_MB}")
    if found["cuda"]:
        install(session, "--no-deps", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
        session.run(
            *("python", str(ROOT / "benchmarks" / "bench" / "resource_table.py")),
            *(argument for kernel in MAIN_KERNELS for argument in ("--require", kernel)),
            *("--markdown", str(dist / "resources.md")),
            *(str(path) for path in (package / "lib").glob("libretention.*")),
        )
    if sys.platform == "linux":
        # The tag that the wheel could have, by the versions of the system's symbols that it needs.
        install(session, "auditwheel")
        said = session.run("auditwheel", "show", str(built[0]), silent=True)
        if (tag := re.search(r'tag:\s*"(manylinux\w+)"', said)) is None:
            session.error(f"{built[0].name}: expected a wheel fit for manylinux, got\n{said}")
        session.log(f"{built[0].name}: fit for {tag[1]}")


@nox.session
def cuda_modes(session: nox.Session) -> None:
    """Build with RETENTION_CUDA=OFF, AUTO and ON: one Python API, and ON needs a compiler."""
    install_build_tools(session)
    install_kernel_headers(session)
    install(session, "torch")
    nvcc = shutil.which("nvcc")
    expected_cuda = {"OFF": False, "AUTO": nvcc is not None}
    if nvcc:
        expected_cuda["ON"] = True
    else:
        session.log("no nvcc on PATH: RETENTION_CUDA=ON is not built here")
    seen = {}
    build = fresh_folder(session, "build")  # of all three: kernels are compiled once
    for mode, expected in expected_cuda.items():
        with timed(session, f"RETENTION_CUDA={mode}"):
            install(
                session,
                *("--no-build-isolation", "--no-deps", "--force-reinstall"),
                *defines(QUICK | {"RETENTION_CUDA": mode}, "--config-settings=cmake.define."),
                f"--config-settings=build-dir={build}",
                ".",
            )
        seen[mode] = public_api(session, "python")
        if seen[mode]["cuda"] is not expected:
            session.error(f"RETENTION_CUDA={mode}: expected cuda {expected}, got {seen[mode]}")
        if seen[mode]["names"] != seen["OFF"]["names"]:
            session.error(f"RETENTION_CUDA={mode}: another API than OFF: {seen}")
        session.log(f"RETENTION_CUDA={mode}: cuda {expected}, {len(seen[mode]['names'])} names")

    if nvcc:
        # Programs that are run on a GPU alone. Their objects, for no kernel is compiled again.
        with timed(session, "tests on a device"):
            tests = str(fresh_folder(session, "tests"))
            options = QUICK | {"RETENTION_CUDA": "ON", "RETENTION_BUILD_TESTS": "ON"}
            options["RETENTION_WARNINGS_AS_ERRORS"] = "ON"
            session.run(
                *("cmake", "-S", str(ROOT), "-B", tests, "-G", "Ninja", *defines(options)),
            )
            programs = [f"{name}_device_test" for name in ("forward", "backward", "decode")]
            objects = [f"tests/cpp/CMakeFiles/{name}.dir/{name}.cu.o" for name in programs]
            session.run("cmake", "--build", tests, "--target", *objects)

    message = session.run(
        "cmake",
        *("-S", str(ROOT), "-B", str(fresh_folder(session, "no-compiler"))),
        "-DRETENTION_CUDA=ON",
        env=without_nvcc(),
        success_codes=[1],
        silent=True,
    )
    if "RETENTION_CUDA=ON, but no working CUDA compiler was found" not in message:
        session.error(f"RETENTION_CUDA=ON without a compiler: unexpected output\n{message}")
    session.log("RETENTION_CUDA=ON without a CUDA compiler: a clear error")
