"""The table of what compiled kernels use: what it reads in SASS, and what it finds wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from retention.bench import resource_table as table

HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
PACKED = "HMUL2.BF16_V2 R8, R20, R21"


def symbol(kernel: str = "Output", element: str = "10bfloat16_t", d: int = 64, dv: int = 32) -> str:
    """As `entry<retention::kernel::Output<OutputTraits<cutlass::bfloat16_t, 64, 32, 4>>>`."""
    name, traits = f"{len(kernel)}{kernel}", f"{len(kernel) + 6}{kernel}Traits"
    arguments = f"IN7cutlass{element}ELi{d}ELi{dv}ELi4EEEEEEvNT_6ParamsE"
    return f"_Z5entryIN9retention6kernel{name}INS1_{traits}{arguments}"


def sass(code: str) -> str:
    """Lines of code, with labels, as cuobjdump prints them: addresses and no labels."""
    lines = [x.strip() for x in code.strip().splitlines() if x.strip()]
    labels: dict[str, int] = {}
    instructions = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(instructions)
        else:
            instructions.append(line)
    text = ""
    for i, line in enumerate(instructions):
        for label, address in labels.items():
            line = re.sub(rf"\b{label}$", f"{address:#x}", line)
        text += f"        /*{16 * i:04x}*/      {line} ;      /* 0x000000000000{i:04x} */\n"
        text += "                                             /* 0x000fe20000000800 */\n"
    return text


def dump(code: str, *, kernel: str | None = None, arch: str = "sm_80", stack: int = 0) -> str:
    kernel = kernel or symbol()
    return f"""
Fatbin elf code:
================
arch = {arch}
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:88
 Function {kernel}:
  REG:168 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:608 TEXTURE:0 SURFACE:0 SAMPLER:0

\tcode for {arch}
\t.target\t{arch}

\t\tFunction : {kernel}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
{sass(code)}
\t\t..........
"""


def read(code: str, **options) -> table.Kernel:
    (kernel,) = table.read_dump(dump(code, **options))
    return kernel


def repeated(line: str, count: int) -> str:
    return "\n".join([line] * count)


def loop(name: str, *lines: str) -> str:
    return "\n".join([f"{name}:", *lines, f"@P0 BRA {name}"])


APPLY = loop("apply", repeated(PACKED, 4), repeated("LDSM.16.MT88.4 R0, [R2]", 2), *[HMMA] * 8)
INTRA = loop("intra", "LDSM.16.M88.4 R0, [R2]", *[HMMA] * 4)


def output(apply: str = APPLY, intra: str = INTRA) -> str:
    return f"MOV R1, c[0x0][0x28]\n{apply}\n{intra}\nEXIT\nself:\nBRA self\nNOP"


def loops(kernel: table.Kernel) -> list[tuple[str, int, int, int, int]]:
    """Name, depth, HMMA, other instructions and the rare ones."""
    return [
        (x.name, x.depth, x.counts.hmma, x.counts.other, x.rare.hmma + x.rare.other)
        for x in kernel.loops
    ]


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDSM.16.M88.4", 4),
        ("LDSM.16.MT88.4", 4),
        ("LDSM.16.MT88.2", 2),
        ("LDSM.16.M88", 1),
        ("LDS", 1),
        ("LDS.U16", 1),
        ("LDS.64", 2),
        ("LDS.128", 4),
        ("LDS.U.128", 4),
        ("STS", 1),
        ("STS.64", 2),
        ("STS.128", 4),
        ("SHFL.IDX", 1),
        ("SHFL.BFLY", 1),
        ("LDGSTS.E.BYPASS.LTC128B.128", 0),
        ("LDG.E.128", 0),
        ("LDGDEPBAR", 0),
        ("STG.E.64", 0),
        ("STL.128", 0),
    ],
)
def test_wavefronts_of_an_instruction(opcode: str, expected: int):
    assert table.Instruction(0, "", opcode, "R0, [R2]").wavefronts == expected
    kernel = read(loop("a", f"@!P1 {opcode} R0, [R2+0x40]", HMMA))
    assert kernel.loops[0].counts.wavefronts == expected


@pytest.mark.parametrize(
    ("opcode", "hmma", "wavefronts"),
    [
        ("HGMMA.64x32x16.F32", 4, 2),
        ("HGMMA.64x64x16.F32.BF16", 8, 4),
        ("HGMMA.64x128x16.F32.BF16", 16, 8),
    ],
)
def test_an_hgmma_is_the_hmma_of_a_warp(opcode: str, hmma: int, wavefronts: int):
    """A warp has 16 of its 64 rows, and a quarter of what it reads from shared memory."""
    kernel = read(
        loop("a", f"{opcode} R24, R4, gdesc[UR8].tnspB, R24, gsb0", "SHFL.IDX PT, R0, R1")
    )
    counts = kernel.loops[0].counts
    assert (counts.hmma, counts.wavefronts) == (hmma, wavefronts + 1)
    assert counts.other == read(loop("a", HMMA)).loops[0].counts.other + 1


def test_an_hgmma_reads_the_rows_of_a_from_shared_memory_too():
    """Its own 16 of 32 bytes, which are four wavefronts."""
    kernel = read(loop("a", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24"))
    assert kernel.loops[0].counts.wavefronts == 4 + 4


def test_contract_by_hgmma_is_the_loop_that_reads_no_operand_transposed():
    contract = loop("contract", "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24")
    intra = loop(
        "intra",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
        "HGMMA.64x64x16.F32.BF16 R56, R4, gdesc[UR8].tnspB, R56",
    )
    kernel = read(output(contract, intra), kernel=symbol("QueryGradient", d=64, dv=64))
    assert [x.name for x in kernel.loops] == ["contract", "intra-chunk"]
    assert kernel.violations == []


def test_an_hgmma_whose_shape_cannot_be_told():
    kernel = read(loop("a", "HGMMA.SP.F32 R24, R4, gdesc[UR8], R24"), kernel="k")
    assert kernel.violations == ["cannot tell the shape of HGMMA.SP.F32"]


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("HMUL2.BF16_V2", "R60, R60, R201.reuse", True),
        ("HMUL2", "R60, R60.H0_H0, R201", True),
        ("HFMA2.BF16_V2", "R163, R163, R201, -RZ.H0_H0", True),
        ("HFMA2.MMA", "R5, R6, R7, -RZ", True),
        ("HFMA2.MMA", "R5, -RZ, RZ, 0, 5.9604644775390625e-08", False),
        ("HADD2", "R5, R6, R7", False),
        ("HMMA.16816.F32", "R5, R6, R7, R5", False),
    ],
)
def test_packed_multiplies(opcode: str, operands: str, expected: bool):
    assert table.Instruction(0, "", opcode, operands).multiplies_packed is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (symbol("Output", "10bfloat16_t", 64, 32), ("Output", "bf16", [64, 32, 4])),
        (symbol("ChunkStates", "6half_t", 128, 64), ("ChunkStates", "fp16", [128, 64, 4])),
        (symbol("StateScan", "6half_t", 128, 64), ("StateScan", "fp16", [128, 64, 4])),
        (
            "_ZN9retention6kernel5entryINS6_6OutputINS0_12OutputTraitsIN7cutlass6half_tELi32ELi64E"
            "Lb1EEEEEEvNT_6ParamsE",
            ("Output", "fp16", [32, 64, 1]),
        ),
        ("_Z4testPf", ("test", "-", [])),
        ("plain", ("plain", "-", [])),
    ],
)
def test_what_a_mangled_name_says(name: str, expected: tuple[str, str, list[int]]):
    assert table.template_of(name) == expected


def test_a_kernel_and_its_resources():
    kernel = read(output(), arch="sm_90")
    assert kernel.title == "Output bf16 64 32 4 sm_90"
    assert kernel.resources["REG"] == 168
    assert kernel.resources["SHARED"] == 1024
    assert (kernel.spill_bytes, kernel.spill_instructions) == (0, 0)
    assert kernel.violations == []
    assert loops(kernel) == [("expand-apply", 1, 8, 7, 0), ("intra-chunk", 1, 4, 2, 0)]
    assert kernel.loops[0].counts.wavefronts_an_hmma == 1.0
    assert kernel.loops[0].counts.share == 8 / 15


def test_two_architectures_in_one_dump():
    text = dump(output(), arch="sm_80", stack=8) + dump(output(), arch="sm_90")
    assert [(x.arch, x.resources["STACK"]) for x in table.read_dump(text)] == [
        ("sm_80", 8),
        ("sm_90", 0),
    ]


def test_functions_of_the_compiler_are_no_kernels():
    assert list(table.read_dump(dump("RET", kernel="__cuda_sm70_warpsync"))) == []


def test_a_function_without_its_resources_is_an_error():
    text = dump(output(), arch="sm_90").replace("REG:", "REGISTERS:")
    with pytest.raises(table.UsageError, match=r"\(sm_90\): cannot read its resource usage"):
        list(table.read_dump(dump(output(), arch="sm_80") + text))


@pytest.mark.parametrize(
    "text",
    [
        dump(output()).replace("/*0030*/", "/* 0030 */"),
        dump(output()).replace("HMMA", "{hmma", 1),
        dump(""),
    ],
)
def test_code_that_cannot_be_read_is_an_error(text: str):
    with pytest.raises(table.UsageError, match="cannot read its instructions"):
        list(table.read_dump(text))


def test_the_inner_of_two_loops_has_its_own_instructions():
    inner = loop("inner", HMMA, HMMA, "IADD3 R1, R1, 0x1, RZ")
    code = loop("outer", "MOV R3, RZ", HMMA, inner, "MOV R4, RZ") + "\nEXIT"
    assert loops(read(code, kernel="k")) == [("other", 1, 1, 3, 0), ("other", 2, 2, 2, 0)]


def test_an_inner_loop_without_hmma_is_not_counted():
    inner = loop("inner", "LDS R4, [R3]", "IADD3 R1, R1, 0x1, RZ")
    kernel = read(loop("outer", HMMA, inner, "MOV R4, RZ") + "\nEXIT", kernel="k")
    assert loops(kernel) == [("other", 1, 1, 2, 0)]
    assert kernel.loops[0].counts.wavefronts == 0


def test_a_loop_whose_parts_lie_apart():
    """The body goes on behind the kernel's end, and what lies in the middle is not in the loop."""
    kernel = read(
        f"""
        head:
        {HMMA}
        LDS R0, [R1]
        BRA far
        after:
        STG.E [R2], R0
        STS [R2], R0
        EXIT
        far:
        {HMMA}
        SHFL.IDX PT, R0, R1, R2, R3
        @P0 BRA head
        BRA after
        """,
        kernel="k",
    )
    assert loops(kernel) == [("other", 1, 2, 4, 0)]
    assert kernel.loops[0].counts.wavefronts == 2


def test_a_loop_entered_at_its_test():
    code = f"BRA test\nbody:\n{HMMA}\nIADD3 R1, R1, 0x1, RZ\ntest:\nISETP.NE P0, R1, R2\n"
    assert loops(read(code + "@P0 BRA body\nEXIT", kernel="k")) == [("other", 1, 1, 3, 0)]


@pytest.mark.parametrize("branch", ["@!P1 BRA P0, top", "@P0 BRA top", "BRA.U UP0, top"])
def test_two_branches_back_to_one_header_are_one_loop(branch: str):
    code = f"top:\n{HMMA}\nLDS R0, [R1]\n{branch}\nMOV R1, R2\n@P1 BRA top\nEXIT"
    (found,) = read(code, kernel="k").loops
    # The second part is not in every iteration.
    assert (found.counts.hmma, found.counts.other) == (1, 2)
    assert (found.rare.hmma, found.rare.other) == (0, 2)


def test_a_branch_forward_is_no_loop():
    assert read(f"@P0 BRA end\n{HMMA}\nend:\nEXIT", kernel="k").loops == []


def test_subroutines_are_in_no_loop_of_their_callers():
    code = f"top:\n{HMMA}\nCALL.REL.NOINC sub\n@P0 BRA top\nEXIT\nsub:\nMOV R1, R2\n"
    assert loops(read(code + "@P1 BRA sub\nRET.REL R2 0x0", kernel="k")) == [("other", 1, 1, 2, 0)]


@pytest.mark.parametrize("call", ["@P0 CALL.REL.NOINC after", "@P0 BRA after"])
def test_a_call_that_does_not_return_is_a_branch(call: str):
    """So sm_80 code leaves a loop, and what comes after may be in a loop around it."""
    kernel = read(
        f"""
        outer:
        MOV R1, R2
        inner:
        {HMMA}
        @P1 CALL.REL.NOINC sub
        {call}
        BRA inner
        after:
        {HMMA}
        CALL.ABS.NOINC 0x0
        @P2 BRA outer
        EXIT
        sub:
        RET.REL R2 0x0
        """,
        kernel="k",
    )
    assert loops(kernel) == [("other", 1, 1, 3, 0), ("other", 2, 1, 3, 0)]


def test_a_conditional_part_counts_with_hmma_or_copies_in_it():
    """Every iteration's code and the copy of the next tile count, the chunk's end does not."""
    code = f"""
        top:
        @P1 BRA copy
        BSSY B0, joined
        STG.E [R2], R0
        STG.E [R2], R0
        @P3 BRA sync
        STG.E [R2], R0
        sync:
        BSYNC B0
        joined:
        MOV R4, R5
        copy:
        @P2 BRA compute
        IMAD R6, R7, R8, R9
        LDGSTS.E.BYPASS.128 [R2], [R6.64]
        compute:
        LDSM.16.M88.4 R0, [R2]
        {HMMA}
        @P0 BRA top
        EXIT
    """
    (found,) = read(code, kernel="k").loops
    assert (found.counts.hmma, found.counts.other, found.counts.wavefronts) == (1, 6, 4)
    assert (found.rare.hmma, found.rare.other) == (0, 7)


def test_what_only_diverged_warps_run_is_left_out():
    code = f"""
        top:
        BRA.DIV UR10, slow
        SHFL.BFLY PT, R0, R1, R2, R3
        back:
        BRA.CONV ~URZ, go
        CALL.REL.NOINC sub
        go:
        {HMMA}
        @P0 BRA top
        EXIT
        slow:
        WARPSYNC.COLLECTIVE R4, slow
        SHFL.BFLY PT, R0, R1, R2, R3
        BRA back
        sub:
        RET.REL.NODEC R2 0x0
    """
    (found,) = read(code, kernel="k").loops
    assert (found.counts.other, found.counts.wavefronts) == (4, 1)
    assert found.rare.other == 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"{HMMA}\n@P0 BRX R2 -0x1234\nEXIT", "BRX at 0x10 branches to where a register says"),
        (f"{HMMA}\nBRA `(.L_x_0)\nEXIT", "cannot tell the target of BRA"),
        (f"{HMMA}\nBRA 0x1230\nEXIT", "a branch to 0x1230, where there is no instruction"),
        (f"EXIT\na:\n{HMMA}\nBRA a", "HMMA in the code at 0x10, which no branch seems to reach"),
        (f"{HMMA}\nBSYNC B0\nEXIT", "BSYNC at 0x10 does not end the region of a BSSY"),
        (f"@P0 BRA b\na:\n{HMMA}\nb:\nMOV R1, R2\n@P1 BRA a\nEXIT", "has more than one entry"),
    ],
)
def test_control_flow_that_is_not_understood_is_a_violation(code: str, message: str):
    kernel = read(code, kernel="k")
    assert len(kernel.violations) == 1
    assert message in kernel.violations[0]


def test_spills_and_stack_are_violations():
    code = "STL [R1], R2\nSTL.64 [R1+0x8], R2\n@P0 STL.128 [R1+0x10], R4\nLDL.LU R2, [R1]\nEXIT"
    kernel = read(code, kernel="k", stack=32)
    assert (kernel.spill_bytes, kernel.spill_instructions) == (28, 4)
    assert kernel.violations == [
        "32 bytes of stack, where none is allowed",
        "28 bytes spilled, 4 STL and LDL, where none is allowed",
    ]
    assert read("LDL R2, [R1]\nEXIT", kernel="k").violations == [
        "0 bytes spilled, 1 STL and LDL, where none is allowed"
    ]


def test_registers_that_are_not_dealt_out_are_a_violation():
    """ptxas ignores setmaxnreg where it finds too few for either side."""
    product = loop("intra", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24")
    violation = "no USETMAXREG, where registers are to be dealt out"
    deals = "USETMAXREG.DEALLOC.CTAPOOL 0x50"
    assert violation in read(output(APPLY, product)).violations
    assert violation not in read(output(APPLY, f"{deals}\n{product}")).violations
    assert violation not in read(output(APPLY, loop("intra", HMMA))).violations
    other = read(output(APPLY, product), kernel=symbol("ValueGradient", d=64, dv=64))
    assert violation not in other.violations


KEY_SUM = loop("keys", "LDSM.16.M88.4 R0, [R2]", HMMA)


def test_the_sum_of_keys_in_expand_apply_is_not_taken_for_a_main_loop():
    apply = loop("apply", repeated(PACKED, 4), KEY_SUM, *["LDS R0, [R1]"] * 8, *[HMMA] * 8)
    kernel = read(output(apply))
    assert loops(kernel) == [
        ("expand-apply", 1, 8, 13, 0),
        ("other", 2, 1, 2, 0),
        ("intra-chunk", 1, 4, 2, 0),
    ]
    assert kernel.violations == []


def test_an_outer_loop_with_the_same_work_is_not_the_main_loop():
    outer = loop("outer", repeated(PACKED, 8), *["LDS R0, [R1]"] * 40, *[HMMA] * 8, APPLY)
    kernel = read(output(outer))
    assert [x[:2] for x in loops(kernel)] == [
        ("other", 1),
        ("expand-apply", 2),
        ("intra-chunk", 1),
    ]
    assert kernel.violations == []


def test_every_version_of_a_main_loop_is_checked():
    lines = [repeated(PACKED, 4), *["LDS R0, [R1]"] * 10, *[HMMA] * 5]
    again = loop("again", *lines) + "\n" + loop("start", *lines[:-2])
    kernel = read(output(APPLY + "\n" + again))
    assert [x.name for x in kernel.loops] == [
        *("expand-apply", "expand-apply", "other", "intra-chunk"),
    ]
    assert kernel.violations == [
        "expand-apply loop at 0x100: 2.000 wavefronts an HMMA, over 1.25",
    ]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        # 8 HMMA, 4 multiplies, 2 loads of 4 wavefronts each and the branch are in it already.
        (["LDS R0, [R1]"] * 2, []),
        (["LDS R0, [R1]"] * 3, ["{}: 1.375 wavefronts an HMMA, over 1.25"]),
        (["MOV R0, R1"] * 17, []),
        (["MOV R0, R1"] * 18, ["{}: 0.242 of its instructions are HMMA, under 0.25"]),
    ],
)
@pytest.mark.parametrize("name", ["Output", "ChunkStates"])
def test_bounds_of_a_main_loop(name: str, extra: list[str], expected: list[str]):
    apply = APPLY.replace(HMMA, "\n".join([*extra, HMMA]), 1)
    kernel = read(output(apply, INTRA if name == "Output" else ""), kernel=symbol(name))
    role = {"Output": "expand-apply", "ChunkStates": "expand-reduce"}[name]
    assert kernel.violations == [x.format(f"{role} loop at 0x10") for x in expected]


def test_the_intra_chunk_loop_has_no_bounds():
    kernel = read(output(intra=loop("intra", repeated("LDS.128 R0, [R1]", 20), HMMA)))
    assert kernel.loops[1].counts.wavefronts_an_hmma == 80
    assert kernel.violations == []


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        (output(intra=""), "intra-chunk"),
        (output(apply=""), "expand-apply"),
        (output(apply=repeated(HMMA, 8)), "expand-apply"),  # unrolled
        (output(apply=APPLY.replace("HMUL2", "HADD2")), "expand-apply"),
    ],
)
def test_a_main_loop_that_is_not_there_is_a_violation(code: str, missing: str):
    assert read(code).violations == [f"no loop of {missing} found"]


CONTRACT = loop("contract", repeated("LDSM.16.M88.4 R0, [R2]", 4), *[HMMA] * 8)
BOTH_WAYS = loop("both", "LDSM.16.M88.4 R0, [R2]", "LDSM.16.MT88.4 R0, [R2]", *[HMMA] * 8)


def test_contract_is_the_loop_without_transposed_operands():
    kernel = read(f"{BOTH_WAYS}\n{CONTRACT}\nEXIT", kernel=symbol("QueryGradient"))
    assert [x.name for x in kernel.loops] == ["intra-chunk", "contract"]
    assert kernel.violations == []
    slow = CONTRACT.replace(HMMA, f"LDS R0, [R1]\n{HMMA}", 1)
    kernel = read(f"{BOTH_WAYS}\n{slow}\nEXIT", kernel=symbol("QueryGradient"))
    assert kernel.violations == ["contract loop at 0xb0: 2.125 wavefronts an HMMA, over 2.0"]
    kernel = read(f"{BOTH_WAYS}\nEXIT", kernel=symbol("QueryGradient"))
    assert kernel.violations == ["no loop of contract found"]


def test_other_kernels_have_loops_and_no_bounds():
    kernel = read(loop("a", repeated("LDS.128 R0, [R1]", 9), HMMA) + "\nEXIT", kernel="k")
    assert loops(kernel) == [("other", 1, 1, 10, 0)]
    assert kernel.violations == []


# The command line, with tools that print what they are told to.


@pytest.fixture
def no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the only one that tools can be in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return folder


def add_tools(folder: Path) -> Path:
    """Stand-ins: cuobjdump has nvdisasm print its third argument, and that prints the file."""
    folder.mkdir(parents=True, exist_ok=True)
    command = '[ "$1 $2" = "-sass -res-usage" ] && exec nvdisasm "$3"'
    for name, line in (("cuobjdump", command), ("nvdisasm", 'exec /bin/cat "$1"')):
        tool = folder / name
        tool.write_text(f"#!/bin/sh\n{line}\n")
        tool.chmod(0o755)
    return folder


@pytest.fixture
def tools(no_tools: Path) -> Path:
    return add_tools(no_tools)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = table.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text(dump(output(), arch="sm_90") + dump(output(), arch="sm_80"))
    other.write_text(file.read_text() + dump("EXIT", kernel="_Z4testPf"))  # two of them again
    written = tmp_path / "table.md", tmp_path / "table.json"
    code, out, err = call(
        *(capsys, "--markdown", written[0], "--json", written[1], file, other),
    )
    assert (code, err) == (0, "")
    assert out == (
        "kernel, its loops         regs smem stack spill depth HMMA other rare waves w/HMMA share\n"
        "Output bf16 64 32 4 sm_80  168 1024     0   0/0\n"
        "- expand-apply                                      1    8     7    0     8   1.00 0.533\n"
        "- intra-chunk                                       1    4     2    0     4   1.00 0.667\n"
        "Output bf16 64 32 4 sm_90  168 1024     0   0/0\n"
        "- expand-apply                                      1    8     7    0     8   1.00 0.533\n"
        "- intra-chunk                                       1    4     2    0     4   1.00 0.667\n"
        "test - sm_80               168 1024     0   0/0\n"
    )
    markdown = written[0].read_text().splitlines()
    assert len(markdown) == 9  # two of the heading, three kernels, four loops
    assert {x.count("|") for x in markdown} == {13}
    assert markdown[3] == "| - expand-apply |  |  |  |  | 1 | 8 | 7 | 0 | 8 | 1.00 | 0.533 |"
    content = json.loads(written[1].read_text())
    assert content["violations"] == []
    assert [x["arch"] for x in content["kernels"]] == ["sm_80", "sm_90", "sm_80"]
    assert content["kernels"][0]["loops"][0]["counts"] == {
        "hmma": 8,
        "other": 7,
        "wavefronts": 8,
        "packed": 4,
        "transposed": 2,
    }


def test_a_row_fits_a_terminal(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    apply = loop("apply", repeated(PACKED, 999), *[HMMA] * 999, *["SHFL.IDX R0, R1"] * 1000)
    (tmp_path / "file").write_text(dump(apply, kernel=symbol("ChunkStates", d=128, dv=128)))
    _, out, _ = call(capsys, tmp_path / "file")
    assert max(map(len, out.splitlines())) <= 100


def test_a_violation_is_a_line_and_exit_code_1(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text(dump("STL [R1], R2\n" + output(), stack=16))
    code, out, err = call(capsys, tmp_path / "file", "--json", tmp_path / "json")
    assert code == 1
    assert "Output bf16 64 32 4 sm_80  168 1024    16   4/1\n" in out
    lines = [
        "Output bf16 64 32 4 sm_80: 16 bytes of stack, where none is allowed",
        "Output bf16 64 32 4 sm_80: 4 bytes spilled, 1 STL and LDL, where none is allowed",
    ]
    assert err.splitlines() == [f"violation: {x}" for x in lines]
    assert json.loads((tmp_path / "json").read_text())["violations"] == lines


def test_a_check_of_nothing_fails(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text(dump("EXIT", kernel="_Z4testPf"))
    code, _, err = call(capsys, tmp_path / "file")
    assert code == 1
    kernels = ", ".join(table.RULES)
    assert err == f"violation: nothing to check: none of the kernels {kernels}\n"


def test_a_kernel_can_be_required(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text(dump(output()))
    assert call(capsys, tmp_path / "file", "--require", "Output")[0] == 0
    code, _, err = call(
        capsys, tmp_path / "file", "--require", "Output", "--require", "ChunkStates"
    )
    assert (code, err) == (1, "violation: ChunkStates: no such kernel\n")


def test_a_file_without_device_code(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").write_text("")
    code, out, err = call(capsys, tmp_path / "empty")
    assert (code, out) == (2, "")
    assert err == f"resource_table: {tmp_path / 'empty'}: no device code in it\n"
    code, _, err = call(capsys, tmp_path / "absent")
    assert code == 2
    assert "No such file" in err


def test_a_disassembler_that_fails(tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text(dump(output()))
    with (tools / "nvdisasm").open("w") as tool:
        tool.write('#!/bin/sh\n/bin/cat "$1"\necho "fatal :  no memory" >&2\nexit 3\n')
    code, out, err = call(capsys, tmp_path / "file")
    assert (code, out) == (2, "")
    assert err == f"resource_table: {tmp_path / 'file'}: fatal : no memory\n"


def test_missing_tools_are_named(no_tools: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = call(capsys, "file")
    assert (code, out) == (2, "")
    assert err == (
        "resource_table: cuobjdump not found: install the CUDA toolkit and put it on PATH, or "
        "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`\n"
    )
    (add_tools(no_tools) / "nvdisasm").unlink()
    assert call(capsys, "file")[2].startswith("resource_table: nvdisasm not found: install")


def test_tools_of_a_toolkit_and_of_packages(
    no_tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "file").write_text(dump(output()))
    packages = tmp_path / "site-packages" / "nvidia"
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(packages)]
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": spec}.get)
    for folder in ("cuda_nvdisasm", "cu13"):
        bin_folder = add_tools(packages / folder / "bin")
        assert table.find_tool("nvdisasm") == bin_folder / "nvdisasm"
        assert call(capsys, tmp_path / "file")[0] == 0
        shutil.rmtree(bin_folder)

    home = add_tools(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(home.parent))
    assert table.find_tool("cuobjdump") == home / "cuobjdump"
    monkeypatch.delenv("CUDA_HOME")

    toolkit = add_tools(tmp_path / "toolkit" / "bin")
    shutil.copy(toolkit / "cuobjdump", toolkit / "nvcc")
    (no_tools / "nvcc").symlink_to(toolkit / "nvcc")
    assert table.find_tool("cuobjdump") == toolkit / "cuobjdump"


# Four ldmatrix and four mma in a loop that is not unrolled further.
REAL_KERNEL = """
#include <cstdint>
extern "C" __global__ void Output(float* out, std::uint32_t const* in, int n) {
  __shared__ std::uint32_t tile[256];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float c[4] = {};
  std::uint32_t b = tile[threadIdx.x ^ 1];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      std::uint32_t a[4];
      std::uint32_t const row =
          static_cast<std::uint32_t>(__cvta_generic_to_shared(&tile[(i + k) % 32 * 4]));
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(row));
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    out[4 * threadIdx.x + i] = c[i];
  }
}
"""


def has_compiler() -> bool:
    try:
        table.find_tool("cuobjdump"), table.find_tool("nvdisasm")
    except table.UsageError:
        return False
    return shutil.which("nvcc") is not None


@pytest.mark.skipif(not has_compiler(), reason="compiles: needs nvcc, cuobjdump and nvdisasm")
@pytest.mark.parametrize("suffix", ["cubin", "o", "a", "so"])
def test_a_compiled_kernel(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "real.cu").write_text(REAL_KERNEL)
    file = tmp_path / f"real.{suffix}"
    kinds = {"cubin": "-cubin", "o": "-c", "a": "-lib", "so": "-shared -Xcompiler=-fPIC"}
    options = ["-std=c++17", "-arch=sm_80", *kinds[suffix].split()]
    command = ["nvcc", *options, "real.cu", "-o", str(file)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    code, _, err = call(capsys, file, "--json", tmp_path / "json")
    (kernel,) = json.loads((tmp_path / "json").read_text())["kernels"]
    assert (kernel["symbol"], kernel["arch"]) == ("Output", "sm_80")
    assert kernel["resources"]["SHARED"] == 1024
    assert (kernel["resources"]["STACK"], kernel["spill_bytes"]) == (0, 0)
    (found,) = kernel["loops"]
    assert (found["counts"]["hmma"], found["counts"]["wavefronts"]) == (4, 16)
    assert found["counts"]["other"] >= 5  # the loads and the branch
    assert found["counts"]["packed"] == 0
    # Without packed multiplies there is an intra-chunk loop and no expand-apply.
    assert found["name"] == "intra-chunk"
    assert code == 1
    assert err == "violation: Output - sm_80: no loop of expand-apply found\n"


def test_dynamic_shared_memory_is_read_from_the_name():
    name = symbol("Output", d=64, dv=64)
    launched = name + "Lm98304E"
    assert table.dynamic_shared(name, "sm_80") == 0
    assert table.dynamic_shared(launched, "sm_90a") == 98304
    assert table.template_of(launched) == table.template_of(name)
