"""What the bindings of the decoding kernels refuse; with kernels that run on the emulator."""

import re

import pytest

from conftest import EMULATED, emulated_module

SIZES = {
    "degree": 2,
    "head_dim": 32,
    "value_dim": 32,
    "heads": 2,
    "slots": 4,
    "ring": 144,
    "null_slot": -1,
    "cursors_stride": 1,
    "rows": 3,
    "tokens": 4,
    "query_heads": 8,
    "window": 128,
}
ADDRESS = 1 << 20  # nothing is read from it
NULL = ("low", "log_gates", "log_gate", "cu_seqlens")


@pytest.fixture
def binding():
    module = emulated_module()
    if module is None:
        pytest.skip(f"needs a module whose kernels run on the emulator: {EMULATED}")
    return module


def step(binding, sizes, pointers):
    """Arguments of a step: SIZES and what is given; strides are 0 unless given."""
    return (
        tuple({**SIZES, **sizes}.get(name, 0) for name in binding.DECODE_STEP_SIZES),
        tuple(pointers.get(n, 0 if n in NULL else ADDRESS) for n in binding.DECODE_STEP_POINTERS),
    )


@pytest.mark.parametrize(
    ("sizes", "pointers", "expected"),
    [
        ({}, {}, None),
        ({"tokens": 17}, {}, "tokens: got 17, expected at most 16"),
        ({"tokens": 0}, {}, "tokens: got 0, expected at least 1"),
        ({"query_heads": 7}, {}, "query_heads: got 7, expected a multiple of heads = 2, and"),
        ({"query_heads": 130}, {}, "query_heads: got 130, expected a multiple of heads = 2, and"),
        ({"window": 3}, {}, "window: got 3, expected 0, or tokens = 4 to 512"),
        ({"window": 513}, {}, "window: got 513, expected 0, or tokens = 4 to 512"),
        ({"keep": 13}, {}, None),
        ({"keep": 14}, {}, "ring: got 144, expected at least 145: window - 1, and keep, and"),
        ({"keep": -1}, {}, "keep: got -1, expected 0 or more"),
        ({"window": 0, "ring": 3}, {}, "ring: got 3, expected at least 4, the tokens of a step"),
        ({"ring": 1 << 21}, {}, "ring: got 2097152, expected at most 1048576"),
        ({"rows": 2**31 - 1}, {}, "rows: got 2147483647, expected at most 97612893 with 2 heads"),
        (
            {"heads": 1 << 16, "query_heads": 1 << 16},
            {},
            "heads: got 65536, expected at most 65535",
        ),
        ({"slots": 0}, {}, "slots: got 0, expected at least 1"),
        ({"total": 9}, {"cu_seqlens": ADDRESS}, None),
        ({}, {"cu_seqlens": ADDRESS}, "total: got 0, expected at least 1 with cu_seqlens"),
        ({"slice_pairs": -1}, {}, "slice_pairs: got -1, expected 0 or more"),
        ({"head_dim": 48}, {}, "no kernel for bf16_d48_dv32_p2: expected degree 2"),
        ({"high_slot": 4}, {}, "high: expected a 16-byte aligned pointer and strides that are mul"),
        ({"key_sum_head": 2}, {}, "key_sum: expected a 16-byte aligned pointer and strides that"),
        ({"query_token": 3}, {}, "query: expected a 16-byte aligned pointer and strides that are"),
        ({}, {"low": ADDRESS, "log_gates": ADDRESS, "log_gate": ADDRESS}, None),
        ({}, {"log_gate": ADDRESS}, "log_gate and the pool's log_gates: expected both or neither"),
        ({}, {"low": 8}, "low: expected a 16-byte aligned pointer and strides that are"),
        ({}, {"cursors": 8}, "cursors: expected a 16-byte aligned pointer"),
        *(({}, {name: 0}, f"{name}: got a null pointer") for name in ("high", "query", "arrivals")),
    ],
)
def test_a_step_is_refused(binding, sizes, pointers, expected):
    arguments = step(binding, sizes, pointers)
    reason = binding.decode_step_can_implement(*arguments)
    if expected is None:
        assert reason is None
        return
    assert reason.startswith(expected)
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        binding.decode_step(*arguments, 0, 0)


def test_lists_of_slots_are_refused(binding):
    def sizes(count):
        return tuple({**SIZES, "count": count}.get(name, 0) for name in binding.DECODE_LIST_SIZES)

    for call, names in (
        (binding.decode_copy, binding.DECODE_COPY_POINTERS),
        (binding.decode_reset, binding.DECODE_RESET_POINTERS),
        (binding.decode_rollback, binding.DECODE_ROLLBACK_POINTERS),
    ):
        pointers = {name: 0 if name in NULL else ADDRESS for name in names}
        with pytest.raises(ValueError, match=r"^count: got 0, expected at least 1"):
            call(sizes(0), tuple(pointers.values()), 0)
        first = names[len(binding.DECODE_POOL_POINTERS)]
        with pytest.raises(ValueError, match=f"^{first}: got a null pointer"):
            call(sizes(1), tuple({**pointers, first: 0}.values()), 0)
    pointers = tuple(0 if n in NULL else ADDRESS for n in binding.DECODE_COPY_POINTERS)
    with pytest.raises(ValueError, match=r"^count: got 8193, expected at most 8192"):
        binding.decode_copy(sizes(8193), pointers, 0)


def test_too_little_shared_memory_is_refused(binding, monkeypatch):
    monkeypatch.setenv("RETENTION_EMULATED_SHARED_BYTES", str(16 * 1024))
    reason = binding.decode_step_can_implement(*step(binding, {}, {}))
    assert reason.startswith("too little shared memory for bf16_d32_dv32_p2: expected ")


def test_workspace(binding):
    # Four multiprocessors: sixteen heads are too many to be cut, two are not.
    assert binding.decode_step_workspace_size(*step(binding, {"rows": 8}, {})) == 0
    one = step(binding, {"rows": 1}, {})
    slices = 5  # of two block pairs each; floats of a query: numerators, normaliser, padding
    assert binding.decode_step_workspace_size(*one) == slices * 2 * 16 * (32 + 4) * 4
    with pytest.raises(RuntimeError, match=r"^workspace: expected memory aligned to 256 bytes"):
        binding.decode_step(*one, 8, 0)
    assert binding.decode_step_workspace_size(*step(binding, {"tokens": 0}, {})) == 0
