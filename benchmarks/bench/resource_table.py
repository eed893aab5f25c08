"""A table of what compiled kernels use, and a check of it: `resource_table.py FILE...`.

FILE is an object, a static or shared library or a cubin. The table has, for every kernel and
architecture, registers, shared memory, stack and spills (bytes stored by STL, and how many STL and
LDL there are), and then the kernel's loops that contain HMMA. An HGMMA, which four warps carry out,
counts as the HMMA that a warp would need for its part, and its operand in shared memory as the
warp's share of wavefronts. Dynamic shared memory is chosen at launch, and no object knows it:
`run_kernel` has its size as a template argument, a std::size_t, and so in its name.

Loops are natural loops of the control flow graph: what reaches a branch back to the header without
passing it, wherever the compiler put it. An instruction counts for the innermost loop it is in.
What HMMA and cp.async are in, and whatever runs before those or in every iteration, is counted;
the column `rare` has the other instructions of the loop. They are an outer loop's, as what happens
at a chunk's end, in a loop over tiles of tokens. Left out is what only diverged warps run, the
targets of BRA.DIV and what BRA.CONV jumps over, as these kernels' warps stay together.

Which loop is which: RULES names the loops of each kernel and says whether they multiply packed
pairs (HMUL2, HFMA2), as only loops do that build phi in registers, for every HMMA, and, where that
tells loops apart, whether they read operands transposed (ldmatrix.trans, HGMMA's tnspB). Of the
loops that fit, and hold no other loop that fits, the one with the most HMMA is meant, and any with
at least half as many, which are other versions of it. That tells expand-apply, with its 64 HMMA and
more, from the few of the sum of keys nested in it, and from the intra-chunk loop, whose weights
are squared in fp32. Other loops are listed as "other". A rule without a loop is a violation.

Exits with 1 where a check fails, one line each, and with 2 where something cannot be read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class LoopRule:
    name: str
    packed: bool  # whether its operands come from packed multiplies
    transposed: bool | None = None  # whether some of them are read transposed; None: either way
    max_wavefronts: float = float("inf")  # of shared memory, an HMMA
    min_share: float = 0.0  # of HMMA in the instructions


RULES = {
    "ChunkStates": (LoopRule("expand-reduce", True, max_wavefronts=1.25, min_share=0.25),),
    "StateGradients": (LoopRule("expand-reduce", True, max_wavefronts=1.25, min_share=0.25),),
    "Output": (
        LoopRule("expand-apply", True, max_wavefronts=1.25, min_share=0.25),
        LoopRule("intra-chunk", False),
    ),
    "QueryGradient": (
        LoopRule("contract", False, transposed=False, max_wavefronts=2.0),
        LoopRule("intra-chunk", False, transposed=True),
    ),
    "KeyGradient": (
        LoopRule("contract", False, transposed=False, max_wavefronts=2.0),
        LoopRule("intra-chunk", False, transposed=True),
    ),
    "ValueGradient": (
        LoopRule("expand-apply", True, max_wavefronts=1.25, min_share=0.25),
        LoopRule("intra-chunk", False),
    ),
}
# Those that, where they have HGMMA, deal registers out between warps that copy and warps with rows.
# ptxas may ignore that they do, and says so in a remark alone.
DEALS_REGISTERS = ("Output",)
ELEMENTS = {"bfloat16_t": "bf16", "half_t": "fp16"}


class UsageError(Exception):
    """What cannot be read, in one line."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or nothing
    opcode: str
    operands: str

    def is_a(self, *opcodes: str) -> bool:
        return self.opcode.split(".")[0] in opcodes

    @property
    def target(self) -> int:
        """Where a branch or BSSY goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        if found is None:
            raise ValueError(f"cannot tell the target of {self.opcode} {self.operands}")
        return int(found[1], 16)

    @property
    def width(self) -> int:
        """Bytes a thread moves to or from shared or local memory."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((sizes[x] for x in self.opcode.split(".")[1:] if x in sizes), 4)

    @property
    def hmma(self) -> int:
        """How many HMMA.16816 its products are, of one warp."""
        if self.is_a("HGMMA"):
            return self.columns // 8  # a warp has 16 of the 64 rows
        return int(self.is_a("HMMA"))

    @property
    def columns(self) -> int:
        """Of the B operand of HGMMA."""
        found = re.search(r"\.64x(\d+)x16\b", self.opcode)
        if found is None:
            raise ValueError(f"cannot tell the shape of {self.opcode}")
        return int(found[1])

    @property
    def wavefronts(self) -> int:
        """Of shared memory, without bank conflicts; cp.async (LDGSTS) is not counted."""
        if self.is_a("HGMMA"):
            # 16 rows of two bytes a column, for four warps; of A each its own 16, of 32 bytes.
            a_is_shared = re.match(r"R\d+, gdesc", self.operands) is not None
            return self.columns // 16 + 4 * a_is_shared
        if self.guard == "@!PT":
            return 0  # never runs: the compiler puts LDS of this kind before LDGSTS
        if self.is_a("LDSM"):
            last = self.opcode.split(".")[-1]
            return int(last) if last in ("2", "4") else 1
        if self.is_a("LDS", "STS"):
            return max(1, self.width // 4)
        return int(self.is_a("SHFL"))

    @property
    def reads_transposed(self) -> bool:
        return (self.is_a("LDSM") and ".MT" in self.opcode) or (
            self.is_a("HGMMA") and ".tnspB" in self.operands
        )

    @property
    def multiplies_packed(self) -> bool:
        # HFMA2 R0, -RZ, RZ, x, y is how the compiler sets a register to a constant.
        return self.is_a("HMUL2", "HFMA2") and not re.search(r", -?RZ, -?RZ\b", self.operands)


@dataclass(frozen=True)
class Counts:
    hmma: int
    other: int
    wavefronts: int
    packed: int
    transposed: int

    @classmethod
    def of(cls, code: Iterable[Instruction]) -> Counts:
        code = list(code)
        return cls(
            hmma=sum(x.hmma for x in code),
            other=sum(not x.hmma for x in code),
            wavefronts=sum(x.wavefronts for x in code),
            packed=sum(x.multiplies_packed for x in code),
            transposed=sum(x.reads_transposed for x in code),
        )

    @property
    def share(self) -> float:
        return self.hmma / (self.hmma + self.other)

    @property
    def wavefronts_an_hmma(self) -> float:
        return self.wavefronts / self.hmma

    @property
    def builds_operands(self) -> bool:
        # Half a packed multiply an HMMA and more where phi is built, nearly none elsewhere.
        return 4 * self.packed >= self.hmma


@dataclass
class Loop:
    header: int  # address
    depth: int  # 1 for an outermost loop
    counts: Counts
    rare: Counts  # of what some iterations run, see above
    around: set[int]  # headers of the loops it is in
    name: str = "other"


@dataclass
class Kernel:
    symbol: str
    arch: str
    name: str
    element: str
    dims: list[int]  # d, dv and further integers of the template arguments
    resources: dict[str, int]  # as cuobjdump calls them: REG, STACK, SHARED, ...
    spill_bytes: int = 0
    spill_instructions: int = 0
    loops: list[Loop] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return " ".join(map(str, [self.name, self.element, *self.dims, self.arch]))


def graph_of(code: Sequence[Instruction]) -> tuple[dict[int, range], dict[int, list[int]]]:
    """Basic blocks (address of the first instruction -> indices) and the edges between them.

    Subroutines are in no loop of their callers. Calls of code that never returns are branches: so
    sm_80 code leaves a loop where all lanes of a warp meet.
    """
    index = {x.address: i for i, x in enumerate(code)}
    falls = {x.address: [y.address] for x, y in pairwise(code)} | {code[-1].address: []}
    joins = {x.target for x in code if x.is_a("BSSY")}
    flow = falls.copy()  # of single instructions
    for x in code:
        after = falls[x.address]
        if x.is_a("BRX", "BRXU", "JMX", "JMXU"):
            raise ValueError(f"{x.opcode} at {x.address:#x} branches to where a register says")
        if x.is_a("BSYNC") and joins.isdisjoint([x.address, *after]):
            raise ValueError(f"{x.opcode} at {x.address:#x} does not end the region of a BSSY")
        if x.opcode == "BRA.CONV":
            flow[x.address] = [x.target]
        elif x.is_a("BRA", "JMP") and x.opcode != "BRA.DIV":
            flow[x.address] = [x.target, *(after if x.guard or "," in x.operands else [])]
        elif x.is_a("EXIT", "RET"):
            flow[x.address] = after if x.guard else []
    if outside := {y for x in flow.values() for y in x} - index.keys():
        raise ValueError(f"a branch to {min(outside):#x}, where there is no instruction")
    branches = {}
    for x in code:
        if x.opcode.startswith("CALL.REL") and x.target in index:
            called = reachable([x.target], flow, None)
            if not any(code[index[y]].is_a("RET") for y in called):
                branches[x.address] = [x.target, *(falls[x.address] if x.guard else [])]
    flow |= branches

    turns = [i for i, x in enumerate(code) if flow[x.address] != falls[x.address]]
    targets = {index[y] for i in turns for y in flow[code[i].address]}
    starts = sorted({0, *targets, *(i + 1 for i in turns)} - {len(code)})
    blocks = {code[x].address: range(x, y) for x, y in pairwise([*starts, len(code)])}
    return blocks, {x: flow[code[y[-1]].address] for x, y in blocks.items()}


def reachable(start: Iterable[int], edges: dict[int, list[int]], avoid: int | None) -> set[int]:
    seen, todo = set[int](), list(start)
    while todo:
        if (x := todo.pop()) not in seen and x != avoid:
            seen.add(x)
            todo += edges[x]
    return seen


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """The loops with HMMA of their own, in the order of their headers.

    Raises ValueError where the code's loops cannot be told.
    """
    blocks, edges = graph_of(code)
    entry = code[0].address
    live = reachable([entry], edges, None)
    for x in blocks.keys() - live:
        if any(code[i].hmma for i in blocks[x]):
            raise ValueError(f"HMMA in the code at {x:#x}, which no branch seems to reach")
    # Without its dominator a block cannot be reached.
    dominated = {x: live - reachable([entry], edges, x) for x in live}
    before: dict[int, list[int]] = {x: [] for x in live}
    latches: dict[int, list[int]] = {}
    forward = TopologicalSorter[int]()
    for x in live:
        for y in edges[x]:
            before[y].append(x)
            if x in dominated[y]:
                latches.setdefault(y, []).append(x)
            else:
                forward.add(y, x)
    try:
        forward.prepare()
    except CycleError as error:
        raise ValueError(f"a loop at {min(error.args[1]):#x} has more than one entry") from error

    bodies = {x: {x} | reachable(ends, before, x) for x, ends in latches.items()}
    loops = []
    for header, body in sorted(bodies.items()):
        own = body.difference(*(bodies[x] for x in bodies if x in body and x != header))
        work = {x for x in own if any(code[i].is_a("HMMA", "HGMMA", "LDGSTS") for i in blocks[x])}
        steady = {
            x
            for x in own
            if dominated[x].issuperset(latches[header]) or not dominated[x].isdisjoint(work)
        }
        counts, rare = (
            Counts.of(code[i] for x in part for i in blocks[x]) for part in (steady, own - steady)
        )
        if counts.hmma:
            around = {x for x in bodies if header in bodies[x] and x != header}
            loops.append(Loop(header, len(around) + 1, counts, rare, around))
    return loops


def name_loops(kernel: Kernel) -> Iterator[str]:
    """Names the kernel's loops after the rules; yields what they break."""
    for rule in RULES.get(kernel.name, ()):
        fitting = [
            x
            for x in kernel.loops
            if x.counts.builds_operands == rule.packed
            and rule.transposed in (None, x.counts.transposed > 0)
        ]
        around = {header for x in fitting for header in x.around}
        fitting = [x for x in fitting if x.header not in around]
        most = max((x.counts.hmma for x in fitting), default=0)
        if not fitting:
            yield f"no loop of {rule.name} found"
        for loop in (x for x in fitting if 2 * x.counts.hmma >= most):
            loop.name = rule.name
            where = f"{rule.name} loop at {loop.header:#x}"
            wavefronts, share = loop.counts.wavefronts_an_hmma, loop.counts.share
            if wavefronts > rule.max_wavefronts:
                yield f"{where}: {wavefronts:.3f} wavefronts an HMMA, over {rule.max_wavefronts}"
            if share < rule.min_share:
                yield f"{where}: {share:.3f} of its instructions are HMMA, under {rule.min_share}"


def analysed(kernel: Kernel, code: Sequence[Instruction]) -> Kernel:
    local = [x for x in code if x.is_a("STL", "LDL")]
    kernel.spill_bytes = sum(x.width for x in local if x.is_a("STL"))
    kernel.spill_instructions = len(local)
    stack = kernel.resources["STACK"] + kernel.resources["LOCAL"]
    if stack:
        kernel.violations.append(f"{stack} bytes of stack, where none is allowed")
    if local:
        spilled = f"{kernel.spill_bytes} bytes spilled, {len(local)} STL and LDL"
        kernel.violations.append(f"{spilled}, where none is allowed")
    found = {x.opcode.split(".")[0] for x in code}
    if kernel.name in DEALS_REGISTERS and "HGMMA" in found and "USETMAXREG" not in found:
        kernel.violations.append("no USETMAXREG, where registers are to be dealt out")
    try:
        kernel.loops = loops_of(code) if any(x.hmma for x in code) else []
        kernel.violations += name_loops(kernel)
    except ValueError as error:
        kernel.violations.append(str(error))
    return kernel


def template_of(symbol: str) -> tuple[str, str, list[int]]:
    """Kernel, element type and integers, from a mangled name like that of
    `entry<kernel::Output<kernel::OutputTraits<cutlass::bfloat16_t, 64, 32>>>`.
    """
    words, numbers, i = [], [], 2 if symbol.startswith("_Z") else len(symbol)
    while i < len(symbol):
        # A substitution, an integer, the length of an identifier, or a letter of the grammar.
        token = re.compile(r"S[0-9A-Z]*_|Lm\d+E|L[a-z](n?\d+)E|(\d+)|.").match(symbol, i)
        assert token is not None
        i = token.end()
        if token[1]:
            numbers.append(int(token[1].replace("n", "-")))
        elif token[2]:
            words.append(symbol[i : i + int(token[2])])
            i += int(token[2])
    known = [x for x in words if x in RULES]
    spaced = [y for x, y in pairwise(words) if x == "kernel"]
    element = next((ELEMENTS[x] for x in words if x in ELEMENTS), "-")
    return (known + spaced + words + [symbol])[0], element, numbers


def dynamic_shared(symbol: str, arch: str) -> int:
    """Bytes of shared memory that the kernel is launched with: its name has those of code for
    Hopper, and then those of other code."""
    sizes = [int(x) for x in re.findall(r"Lm(\d+)E", symbol)]
    return sizes[0 if arch.startswith("sm_9") else -1] if sizes else 0


def read_dump(text: str) -> Iterator[Kernel]:
    """The kernels in what `cuobjdump -sass -res-usage` prints."""
    code_line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*([^;]*?)\s*;")
    resources: dict[str, dict[str, int]] = {}
    functions: list[tuple[str, str, dict[str, int], list[Instruction]]] = []
    arch = symbol = ""
    for line in map(str.strip, text.splitlines()):
        if line == "Resource usage:":
            resources = {}
        elif line.startswith("code for "):
            arch = line.removeprefix("code for ")
        elif line.startswith("Function : "):
            symbol = line.removeprefix("Function : ")
            functions.append((symbol, arch, resources.get(symbol, {}), []))
        elif line.startswith("Function "):
            symbol = line.removeprefix("Function ").removesuffix(":")
        elif line.startswith("REG:"):
            resources[symbol] = {x: int(y) for x, y in re.findall(r"(\w+):(\d+)", line)}
        elif functions and (found := code_line.match(line)):
            address, *parts = found.groups(default="")
            functions[-1][-1].append(Instruction(int(address, 16), *parts))
    for symbol, arch, used, code in functions:
        if not used.keys() >= {"REG", "STACK", "SHARED", "LOCAL"}:
            raise UsageError(f"{symbol} ({arch}): cannot read its resource usage")
        used = used | {"SHARED": used["SHARED"] + dynamic_shared(symbol, arch)}
        if not code or any(x.address != 16 * i for i, x in enumerate(code)):
            raise UsageError(f"{symbol} ({arch}): cannot read its instructions, 16 bytes each")
        if not symbol.startswith("__cuda_"):  # the compiler's own
            yield analysed(Kernel(symbol, arch, *template_of(symbol), used), code)


def find_tool(name: str) -> Path:
    """`name` on PATH, in the CUDA toolkit or in the Python package nvidia-cuda-<name>."""
    toolkits = [os.environ.get(x) for x in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(x) / "bin" for x in toolkits if x]
    if nvcc := shutil.which("nvcc"):
        folders += [Path(nvcc).parent, Path(nvcc).resolve().parent]
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations or () if packages else ():
        for pattern in ("cu*/bin", "cuda_*/bin"):
            folders += sorted(Path(place).glob(pattern), reverse=True)
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    if found := shutil.which(name, path=search):
        return Path(found)
    raise UsageError(
        f"{name} not found: install the CUDA toolkit and put it on PATH, or "
        "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
    )


def dump(file: Path) -> str:
    # cuobjdump runs nvdisasm, and looks for it on PATH.
    tools = [find_tool("cuobjdump"), find_tool("nvdisasm")]
    path = os.pathsep.join([*(str(x.parent) for x in tools), os.environ.get("PATH", "")])
    command = [str(tools[0]), "-sass", "-res-usage", str(file)]
    result = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if result.returncode or "Function : " not in result.stdout:
        reason = result.stderr.strip() or "no device code in it"
        raise UsageError(f"{file}: {' '.join(reason.split())}")
    return result.stdout


HEADINGS = (
    *("kernel, its loops", "regs", "smem", "stack", "spill"),
    *("depth", "HMMA", "other", "rare", "waves", "w/HMMA", "share"),
)


def rows_of(kernels: Iterable[Kernel]) -> Iterator[list[str]]:
    """A row for every kernel, and after it one for each of its loops."""
    for kernel in kernels:
        used = [str(kernel.resources[x]) for x in ("REG", "SHARED", "STACK")]
        spills = f"{kernel.spill_bytes}/{kernel.spill_instructions}"
        yield [kernel.title, *used, spills] + [""] * 7
        for loop in kernel.loops:
            n, rare = loop.counts, loop.rare.hmma + loop.rare.other
            counts = map(str, (loop.depth, n.hmma, n.other, rare, n.wavefronts))
            ratios = f"{n.wavefronts_an_hmma:.2f}", f"{n.share:.3f}"
            yield [f"- {loop.name}", *[""] * 4, *counts, *ratios]


def plain(rows: Sequence[Sequence[str]]) -> str:
    table = [HEADINGS, *rows]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    form = " ".join([f"{{:{first}}}", *(f"{{:>{x}}}" for x in widths)])
    return "\n".join(form.format(*row).rstrip() for row in table)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    table = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "".join(f"| {' | '.join(x)} |\n" for x in table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What compiled kernels use, and a check of it.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--require", action="append", metavar="KERNEL", help="expect this kernel")
    given = parser.parse_args(arguments)
    try:
        found = [kernel for file in given.files for kernel in read_dump(dump(file))]
    except UsageError as error:
        print(f"resource_table: {error}", file=sys.stderr)
        return 2
    # What is in an object and in the library made of it counts once.
    kernels = list({repr(x): x for x in found}.values())
    kernels.sort(key=lambda x: (x.name, x.element, x.dims, x.arch, x.symbol))
    violations = [f"{x.title}: {problem}" for x in kernels for problem in x.violations]
    names = {x.name for x in kernels}
    violations += [f"{x}: no such kernel" for x in given.require or () if x not in names]
    if names.isdisjoint(RULES):
        violations.append(f"nothing to check: none of the kernels {', '.join(RULES)}")

    rows = list(rows_of(kernels))
    print(plain(rows), flush=True)
    if given.markdown:
        given.markdown.write_text(markdown(rows))
    if given.json:
        content = {"kernels": [asdict(x) for x in kernels], "violations": violations}
        given.json.write_text(json.dumps(content, indent=2, default=sorted) + "\n")
    for line in violations:
        print(f"violation: {line}", file=sys.stderr)
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
