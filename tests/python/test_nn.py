"""`PowerRetention` against the plain formula in float64, and its `step` against its `forward`."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retention
from retention import functional
from retention.nn import (
    GateProjection,
    PowerRetention,
    all_or_nothing,
    apply_rotary,
    log_gates,
    rotary_angles,
)
from retention.ops import decoding
from retention.ops.pytorch import decoding as pooled

# The layer in float64 differs from the formula by the order of sums only.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# float32: a few hundred additions of numbers near 1, and a division by a sum of like size.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}

LAYERS = {
    "plain": {"hidden_size": 32, "num_heads": 2},
    "gqa": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "mqa": {"hidden_size": 24, "num_heads": 3, "num_kv_heads": 1, "head_dim": 8, "bias": True},
    "no gates": {"hidden_size": 16, "num_heads": 2, "gating": False},
    "no rotary": {"hidden_size": 16, "num_heads": 2, "rope_theta": None},
    "degree 4": {"hidden_size": 16, "num_heads": 2, "deg": 4},
    "chunked": {"hidden_size": 16, "num_heads": 2, "chunk_size": 7, "switch_over_seq_len": 9},
}


def make(name: str, dtype: torch.dtype = torch.float64, **more) -> PowerRetention:
    torch.manual_seed(0)
    return PowerRetention(**{**LAYERS[name], **more}, dtype=dtype)


def rotated(x: Tensor, theta: float) -> Tensor:
    """x [b, t, h, d] as d/2 complex numbers, each turned by its position times its frequency."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def formula(layer: PowerRetention, x: Tensor) -> Tensor:
    """The layer by its definition, one head at a time, keys repeated for nobody."""
    d, ratio = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q = layer.q_proj(x).unflatten(-1, (-1, d))
    k = layer.k_proj(x).unflatten(-1, (-1, d))
    v = layer.v_proj(x).unflatten(-1, (-1, d))
    if layer.rope_theta is not None:
        q, k = rotated(q, layer.rope_theta), rotated(k, layer.rope_theta)
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    heads = []
    for n in range(layer.num_heads):
        m = n // ratio
        w = (q[:, :, n] @ k[:, :, m].mT / math.sqrt(d)) ** layer.deg
        if layer.gating:
            total = torch.sigmoid(layer.g_proj(x))[..., m].log().cumsum(1)
            w = w * (total[:, :, None] - total[:, None, :]).clamp(max=0).exp()
        w = w * past
        heads.append((w / w.sum(-1, keepdim=True)) @ v[:, :, m])
    return layer.o_proj(torch.cat(heads, dim=-1))


def test_attribute_of_the_package():
    assert retention.nn.PowerRetention is PowerRetention


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_are_the_formula(name: str):
    layer = make(name)
    x = torch.randn(2, 23, layer.hidden_size, dtype=torch.float64, requires_grad=True)
    wanted = formula(layer, x)
    got = layer(x)
    torch.testing.assert_close(got, wanted, **EXACT)
    weight = torch.randn_like(wanted)
    inputs = [x, *layer.parameters()]
    for got_gradient, gradient in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert gradient.abs().max() > 0
        # Gradients divide by small sums of weights more often than outputs do.
        torch.testing.assert_close(got_gradient, gradient, rtol=1e-7, atol=1e-7)


def test_rotation_depends_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i: int, j: int) -> Tensor:
        turned_q = apply_rotary(q, rotary_angles(torch.tensor([i]), 16))
        turned_k = apply_rotary(k, rotary_angles(torch.tensor([j]), 16))
        return (turned_q * turned_k).sum()

    assert (product(5, 2) - product(6, 2)).abs() > 1e-3
    # A float64 product of 10^7 is off by 1e-9; a float32 one would be off by 1.
    for shift in (1, 1000, 10_000_000):
        torch.testing.assert_close(product(5 + shift, 2 + shift), product(5, 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_split_into_steps_is_forward(name: str, data: st.DataObject):
    layer = make(name)
    t = data.draw(st.integers(1, 40), label="t")
    ring = data.draw(st.integers(1, 12), label="ring")
    x = torch.randn(2, t, layer.hidden_size, dtype=torch.float64)
    cache = layer.init_cache(2, ring)
    outs, start = [], 0
    while start < t:
        stop = start + data.draw(st.integers(1, t - start), label="tokens")
        out, cache = layer.step(x[:, start:stop], cache)
        outs.append(out)
        start = stop
    assert cache.positions.tolist() == [t, t]
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **EXACT)


def test_state_after_steps_is_the_final_state():
    layer = make("gqa")
    x = torch.randn(1, 30, layer.hidden_size, dtype=torch.float64)
    slots = torch.tensor([0], dtype=torch.int32)
    states = []
    for pieces in ([30], [1] * 30, [7, 23]):
        cache = layer.init_cache(1, 10)
        for part in x.split(pieces, dim=1):
            layer.step(part, cache)
        states.append(cache.state(slots))
    for state, sum_of_keys in states[1:]:
        torch.testing.assert_close(state, states[0][0], **EXACT)
        torch.testing.assert_close(sum_of_keys, states[0][1], **EXACT)
    assert states[0][0].abs().max() > 0


def test_step_in_float32_and_default_cache():
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 600, layer.hidden_size)
    first, cache = layer.step(x[:, :590])
    # 19.6 = sqrt(4 D dv / (d + dv)) with d = dv = 16 and D = 192: state and ring are of float32.
    assert (cache.window, cache.max_tokens_per_step) == (16, 16)
    assert cache.lengths.tolist() == [0, 0]  # a prompt goes straight into the state
    outs = [first]
    for i in range(590, 600):
        out, cache = layer.step(x[:, i : i + 1], cache)
        outs.append(out)
    # Of slot 0 two tokens have completed a window, which began at 576; that of 1 ends at 600.
    assert cache.lengths.tolist() == [8, 10]
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **SINGLE)


def test_step_keeps_no_gradients():
    layer = make("plain", torch.float32)
    out, cache = layer.step(torch.randn(1, 3, 32, requires_grad=True))
    assert not out.requires_grad
    assert not cache.pool.keys.requires_grad


@pytest.mark.parametrize("name", ["plain", "no gates"])
def test_bytes_of_the_cache_never_change(name: str):
    layer = make(name, torch.float32)
    cache = layer.init_cache(1, 16)
    before = cache.nbytes
    tensors = [x for x in cache.pool if x is not None]
    places = [x.data_ptr() for x in tensors]
    for _ in range(100):
        layer.step(torch.randn(1, 1, layer.hidden_size), cache)
    layer.step(torch.randn(1, 9900, layer.hidden_size), cache)
    assert cache.positions.tolist() == [10_000]
    # In place: the bytes counted are the bytes held.
    now = [x for x in cache.pool if x is not None]
    assert [x.data_ptr() for x in now] == places
    assert cache.nbytes == before == sum(x.nbytes for x in now)


def test_reset_forgets():
    layer = make("plain")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    cache = layer.init_cache(1, 4)
    first, _ = layer.step(x, cache)
    cache.reset()
    assert cache.positions.tolist() == [0]
    again, _ = layer.step(x, cache)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


# ---- sequences at different positions -----------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa", "no rotary", "no gates"])
def test_rows_at_different_positions(name: str):
    """Two sequences in slots of a larger cache, one ahead of the other, and a row of padding."""
    layer = make(name)
    x = torch.randn(2, 40, layer.hidden_size, dtype=torch.float64)
    wanted = layer(x)
    cache = layer.init_cache(5, 6)
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    ahead = layer.step(x[:1, :19], cache, slots[:1])[0]
    torch.testing.assert_close(ahead, wanted[:1, :19], **EXACT)
    for i in range(20):
        rows = torch.stack((x[0, 19 + i], torch.full_like(x[0, 0], math.nan), x[1, i]))[:, None]
        out, _ = layer.step(rows, cache, slots)
        torch.testing.assert_close(out[0, 0], wanted[0, 19 + i], **EXACT)
        torch.testing.assert_close(out[2, 0], wanted[1, i], **EXACT)
        assert not out[1].any()
    assert cache.positions.tolist() == [20, 0, 0, 39, 0]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("t", [5, 30], ids=["step", "prompt"])
@pytest.mark.parametrize("name", ["gqa", "no gates"])
def test_padding_leaves_no_trace(name: str, t: int, side: str):
    layer = make(name)
    lengths = [t, 0, t - 3, 1]
    mask = torch.zeros(4, t, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        start = {"left": t - length, "right": 0, "both": (t - length) // 2}[side]
        row[start : start + length] = 1
    x = torch.randn(4, t, layer.hidden_size, dtype=torch.float64)
    x[mask == 0] = math.nan
    out, cache = layer.step(x, attention_mask=mask)
    assert cache.positions.tolist() == lengths
    torch.testing.assert_close(out[mask == 0], torch.zeros_like(out[mask == 0]))
    last = torch.randn(4, 2, layer.hidden_size, dtype=torch.float64)
    after, _ = layer.step(last, cache, attention_mask=torch.ones(4, 2, dtype=torch.bool))
    for n in range(4):
        whole = torch.cat((x[n][mask[n] == 1], last[n]))[None]
        got = torch.cat((out[n][mask[n] == 1], after[n]))[None]
        torch.testing.assert_close(got, layer(whole), **EXACT)


def test_layers_that_step_together_share_a_rotation():
    layers = [make("gqa"), make("gqa", num_heads=2)]
    slots = torch.tensor([2, 0], dtype=torch.int32)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    wanted = [layer(x) for layer in layers]
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :8] = False
    caches = [layer.init_cache(3, 6) for layer in layers]
    places = torch.tensor([[*range(20)], [0] * 8 + [*range(12)]])
    rows = torch.arange(2)[:, None]
    for width in (20, 3, 1):
        padding = mask if width == 20 else None
        given = x[rows, places[:, -width:]]
        rotation = layers[0].rotation(given, caches[0], slots, padding)
        for layer, cache, whole in zip(layers, caches, wanted, strict=True):
            out, _ = layer.step(given, cache, slots, padding, rotation)
            real = mask[:, -width:]
            torch.testing.assert_close(out[real], whole[rows, places[:, -width:]][real], **EXACT)
        places, mask = places + 3 if width == 20 else places + 1, torch.ones_like(mask)
    # What is handed over is what turns.
    still = torch.ones(1, 1, 16).double(), torch.zeros(1, 1, 16).double()
    other, _ = layers[0].step(x[:, :5], layers[0].init_cache(2), rotation=still)
    assert (other - wanted[0][:, :5]).abs().max() > 1e-3
    assert make("no rotary").rotation(x[..., :16]) is None


def test_drafts_that_were_rejected():
    layer = make("gqa")
    x = torch.randn(2, 60, layer.hidden_size, dtype=torch.float64)
    cache = layer.init_cache(2, 9)
    slots = torch.arange(2, dtype=torch.int32)
    outs, start = [layer.step(x[:, :20], cache)[0]], 20
    while start < 60:
        accepted = 1 + start % 4
        drafts = torch.cat((x[:, start : start + accepted], torch.randn(2, 2, 32).double()), dim=1)
        accepted = drafts.shape[1] - 2
        out, _ = layer.step(drafts, cache)
        cache.rollback(slots, 2)
        outs.append(out[:, :accepted])
        start += accepted
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **EXACT)


# ---- packed sequences ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa", "no gates", "chunked"])
def test_packed_is_separate(name: str):
    layer = make(name)
    lengths = [5, 0, 17, 1]
    x = torch.randn(1, sum(lengths), layer.hidden_size, dtype=torch.float64)
    bounds = torch.tensor([0, 5, 5, 22, 23], dtype=torch.int32)
    wanted = torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(layer(x, bounds), wanted, **EXACT)
    assert (layer(x) - wanted).abs().max() > 1e-3  # the sequences do differ from one long one


def test_positions_restart_in_each_packed_sequence(monkeypatch: pytest.MonkeyPatch):
    """Outputs do not tell, being relative; the keys that a state would hold do."""
    layer = make("gqa")
    lengths = [5, 0, 17, 1]
    x = torch.randn(1, sum(lengths), layer.hidden_size, dtype=torch.float64)
    seen = []
    inner = retention.power_retention

    def spy(q: Tensor, k: Tensor, *more: Tensor, **options):
        seen.append(k)
        return inner(q, k, *more, **options)

    monkeypatch.setattr(functional, "power_retention", spy)
    layer(x, torch.tensor([0, 5, 5, 22, 23], dtype=torch.int32))
    for part in x.split(lengths, dim=1):
        layer(part)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:], dim=1), **EXACT)


def test_gates_start_with_a_spread_of_long_memories():
    layer = PowerRetention(64, 8)
    forgotten = 1 - torch.sigmoid(layer.g_proj.bias)
    memory = 1 / forgotten.detach()
    torch.testing.assert_close(memory[[0, -1]], torch.tensor([4096.0, 16.0]), rtol=1e-2, atol=0)
    ratios = memory[:-1] / memory[1:]
    torch.testing.assert_close(ratios, torch.full((7,), 256 ** (1 / 7)), rtol=1e-2, atol=0)


def test_gates_of_a_checkpoint_without_biases():
    torch.manual_seed(0)
    gate = GateProjection(16, 3, bias=False, dtype=torch.bfloat16)
    assert dict(gate.named_parameters()).keys() == {"weight"}
    x = torch.randn(2, 5, 16)
    wanted = (x.double() @ gate.weight.double().mT).sigmoid().log()
    got = log_gates(gate, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, **SINGLE)


def test_autocast_keeps_gates_in_float32(monkeypatch: pytest.MonkeyPatch):
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 40, layer.hidden_size)
    seen = {}
    inner = retention.power_retention

    def spy(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **more):
        seen.update(q=q.dtype, k=k.dtype, v=v.dtype, gate=gate)
        return inner(q, k, v, gate, **more)

    exact = layer._log_gate(x)
    monkeypatch.setattr(functional, "power_retention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert {seen["q"], seen["k"], seen["v"], out.dtype} == {torch.bfloat16}
    assert seen["gate"].dtype == torch.float32
    torch.testing.assert_close(seen["gate"], exact, rtol=0, atol=0)
    # Eight bits in each of projections, products and output projection: a few parts in a hundred.
    wanted = layer(x)
    assert (out - wanted).norm() / wanted.norm() < 0.03
    (out.float() ** 2).sum().backward()
    assert layer.q_proj.weight.grad.dtype == torch.float32


def test_step_under_autocast():
    layer = make("gqa", torch.float32)
    x = torch.randn(1, 30, layer.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = layer.init_cache(1, 8)
        outs = [layer.step(part, cache)[0] for part in x.split(5, dim=1)]
    assert cache.dtype == torch.bfloat16
    assert cache.state_dtype == torch.float32
    wanted = layer(x)
    assert (torch.cat(outs, 1) - wanted).norm() / wanted.norm() < 0.03  # as above


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype: torch.dtype):
    layer = make("gqa", torch.float32)
    x = torch.randn(1, 40, layer.hidden_size)
    wanted = layer(x)
    layer = layer.to(dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert (out - wanted).norm() / wanted.norm() < 0.03  # bfloat16, as above
    stepped = torch.cat([layer.step(x.to(dtype), layer.init_cache(1, 16))[0]], 1)
    assert stepped.dtype == dtype
    assert (stepped - wanted).norm() / wanted.norm() < 0.03


def test_compiles_whole():
    layer = make("gqa", torch.float32)
    x = torch.randn(1, 20, layer.hidden_size, requires_grad=True)
    bounds = torch.tensor([0, 6, 20], dtype=torch.int32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for cu_seqlens in (None, bounds):
        wanted = torch.autograd.grad(layer(x, cu_seqlens).square().sum(), x)
        got = torch.autograd.grad(compiled(x, cu_seqlens).square().sum(), x)
        torch.testing.assert_close(got, wanted, **SINGLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_step_compiles_whole():
    layer = make("gqa", torch.float32)
    one, other = layer.init_cache(3, 4), layer.init_cache(3, 4)
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    for _ in range(9):
        x = torch.randn(3, 1, layer.hidden_size)
        torch.testing.assert_close(
            compiled(x, one, slots)[0], layer.step(x, other, slots)[0], **SINGLE
        )
    assert one.positions.tolist() == [9, 0, 9]


def test_checkpointing_functional_call_and_state_dict():
    layer = make("gqa")
    x = torch.randn(1, 20, layer.hidden_size, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    recomputed = checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(recomputed.square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    other = PowerRetention(**LAYERS["gqa"], dtype=torch.float64)
    assert (other(x) - layer(x)).abs().max() > 1e-3
    called = torch.func.functional_call(other, dict(layer.named_parameters()), (x,))
    torch.testing.assert_close(called, layer(x), rtol=0, atol=0)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    assert set(layer.state_dict()) == {
        *(f"{x}_proj.weight" for x in "qkvgo"),
        "g_proj.bias",
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks are of the example's
@pytest.mark.parametrize("name", ["gqa", "chunked", "degree 4"])
def test_traced_layer_takes_other_lengths(name: str):
    layer = make(name)
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32)
    x = torch.randn(1, 20, layer.hidden_size, dtype=torch.float64)
    traced = torch.jit.trace(layer, (x,))
    packed = torch.jit.trace(layer, (x, bounds))
    for b, t in ((1, 20), (3, 8), (2, 41)):
        x = torch.randn(b, t, layer.hidden_size, dtype=torch.float64, requires_grad=True)
        wanted, got = layer(x), traced(x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        (wanted,) = torch.autograd.grad(wanted.square().sum(), x)
        (got,) = torch.autograd.grad(got.square().sum(), x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        bounds = torch.tensor([0, 1, 1, t], dtype=torch.int32)
        torch.testing.assert_close(packed(x[:1], bounds), layer(x[:1], bounds), rtol=0, atol=0)


def test_meta_device():
    layer = PowerRetention(32, 2, device="meta")
    assert layer(torch.empty(2, 9, 32, device="meta")).shape == (2, 9, 32)


# ---- projections are modules ---------------------------------------------------------------------

PROJECTIONS = [f"{x}_proj" for x in "qkvgo"]


class LowRank(nn.Module):
    """A linear layer and what two small ones add to it."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype | None = None):
        super().__init__()
        dtype = base.weight.dtype if dtype is None else dtype
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 3, bias=False, dtype=dtype)
        self.up = nn.Linear(3, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Int8(nn.Module):
    """A linear layer of integers, and one scale for all of them."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.detach().abs().max() / 127
        self.register_buffer("weight", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if base.bias is None else base.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Sealed(nn.Module):
    """A linear layer whose weight nobody sees, as where it is packed."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        self.compute = lambda x: F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def steps(layer: PowerRetention, x: Tensor, ring: int = 6, tokens: int = 4) -> Tensor:
    cache = layer.init_cache(len(x), ring)
    return torch.cat([layer.step(part, cache)[0] for part in x.split(tokens, dim=1)], dim=1)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_wrapped_projection_is_one_with_the_sum_of_weights(name: str):
    layer = make("gqa")
    x = torch.randn(2, 20, layer.hidden_size, dtype=torch.float64)
    merged = copy.deepcopy(layer)
    wrapper = LowRank(getattr(layer, name))
    with torch.no_grad():
        getattr(merged, name).weight += wrapper.up.weight @ wrapper.down.weight
    before = layer(x)
    setattr(layer, name, wrapper)
    assert (layer(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(layer(x), formula(merged, x), **EXACT)
    torch.testing.assert_close(steps(layer, x), formula(merged, x), **EXACT)

    small = [wrapper.up.weight, wrapper.down.weight]
    for got, wanted in zip(
        torch.autograd.grad(layer(x).square().sum(), small),
        torch.autograd.grad(formula(layer, x).square().sum(), small),
        strict=True,
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_of_a_projection_act(name: str):
    layer = make("gqa")
    x = torch.randn(2, 20, layer.hidden_size, dtype=torch.float64)
    calls = []
    getattr(layer, name).register_forward_pre_hook(lambda *_: calls.append("before"))
    getattr(layer, name).register_forward_hook(lambda *_: calls.append("after"))
    layer(x)
    assert calls == ["before", "after"]
    layer.step(x[:, :4])
    assert calls == ["before", "after"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrapped_gate_is_computed_in_float32(dtype: torch.dtype):
    layer = make("gqa", torch.float32).to(dtype)
    layer.g_proj = LowRank(layer.g_proj)
    nn.init.zeros_(layer.g_proj.up.weight)  # as it starts: all bits are those of the base
    x = torch.randn(2, 40, layer.hidden_size).to(dtype)
    exact = F.logsigmoid(copy.deepcopy(layer.g_proj.base).double()(x.double()))
    for cast in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with cast:
            gate = layer._log_gate(x)
        assert gate.dtype == torch.float32
        torch.testing.assert_close(gate.double(), exact.float().double(), **SINGLE)


def test_autocast_does_not_lower_what_a_wrapper_adds_to_a_gate():
    layer = make("gqa", torch.float32)
    layer.g_proj = LowRank(layer.g_proj)
    x = torch.randn(2, 40, layer.hidden_size)
    wanted = copy.deepcopy(layer).double()._log_gate(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer._log_gate(x)
        assert layer(x).dtype == torch.bfloat16
        # What came before was lowered, and is taken as it is.
        layer._log_gate(x.bfloat16())
    torch.testing.assert_close(got.double(), wanted, **SINGLE)


def test_a_gate_of_another_kind_is_widened():
    layer = make("gqa", torch.float32).to(torch.bfloat16)
    layer.g_proj = nn.Linear(32, 2, dtype=torch.bfloat16)
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16)
    assert layer._log_gate(x).dtype == torch.float32
    assert layer(x).dtype == steps(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [LowRank, Int8, Sealed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring_has_the_dtype_of_keys_whatever_weights_have(kind: type, dtype: torch.dtype):
    layer = make("gqa", torch.float32).to(dtype)
    for name in PROJECTIONS:
        if kind is not Sealed or name != "g_proj":  # which tells the dtype
            setattr(layer, name, kind(getattr(layer, name)))
    x = torch.randn(2, 20, layer.hidden_size).to(dtype)
    wanted = layer(x)
    assert wanted.dtype == dtype
    for cache in (layer.init_cache(2, 6), layer.step(x[:, :1])[1]):
        assert cache.dtype == dtype
        assert cache.state_dtype == torch.float32
    got = steps(layer, x)
    assert got.dtype == dtype
    # As elsewhere: rounding to bfloat16 between the same products in another order.
    assert (got - wanted).norm() / wanted.norm() < (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_ring_of_a_layer_without_any_parameters():
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 20, layer.hidden_size)
    wanted = layer(x)
    for name in PROJECTIONS:
        setattr(layer, name, Sealed(getattr(layer, name)))
    assert layer.init_cache(1).dtype == torch.float32
    torch.testing.assert_close(steps(layer, x), wanted, **SINGLE)


@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_ring_of_a_dtype_of_its_own(kept: torch.dtype):
    for dtype in (torch.float32, torch.float64):
        layer = make("gqa", dtype)
        x = torch.randn(1, 20, layer.hidden_size, dtype=dtype)
        for tokens in (3, 20):
            cache = layer.init_cache(1, 8, dtype=kept)
            outs = [layer.step(part, cache)[0] for part in x.split(tokens, dim=1)]
            assert (cache.state_dtype, outs[0].dtype) == (kept, dtype)
            torch.testing.assert_close(torch.cat(outs, 1), layer(x), **SINGLE)


# ---- modules start on their own -----------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_modules_that_reset_themselves_make_a_new_layer(backwards: bool, dtype: torch.dtype):
    with torch.device("meta"):
        layer = PowerRetention(64, 8, 4, dtype=dtype, bias=True)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, math.nan)
    modules = list(layer.modules())
    for module in reversed(modules) if backwards else modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = PowerRetention(64, 8, 4, dtype=dtype, bias=True)
    assert torch.equal(layer.g_proj.bias, fresh.g_proj.bias)
    wanted = (torch.logspace(12, 4, 4, base=2, dtype=torch.float64) - 1).log()
    torch.testing.assert_close(layer.g_proj.bias.double(), wanted.to(dtype).double())
    for name, parameter in layer.named_parameters():
        if name != "g_proj.bias":  # uniform, as in torch.nn.Linear: inputs are 64 wide everywhere
            bound = 64**-0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.abs().max() > 0.5 * bound, name


def test_one_head_remembers_long():
    bias = PowerRetention(16, 2, 1).g_proj.bias
    torch.testing.assert_close(bias, torch.tensor([4095.0]).log())


# ---- steps that fail ----------------------------------------------------------------------------


class BrokenError(Exception):
    pass


def fails(error: BaseException) -> Callable:
    def raising(*_, **__):
        raise error

    return raising


def break_at(stage: str, layer: PowerRetention, error: BaseException, monkeypatch) -> None:
    """Have `step` raise, for as long as the patches hold."""
    if stage.endswith("_proj"):
        monkeypatch.setattr(getattr(layer, stage), "forward", fails(error))
    elif stage == "forward":
        monkeypatch.setattr(pooled, "_fold_new", fails(error))
    else:
        monkeypatch.setattr(decoding, stage, fails(error))


RING = 6
# Tokens seen before the step that fails, and its own. Windows of slot 0 end with tokens 6, 12, ..
# and those of slot 1 with 3, 9, ..
MOMENTS = {
    "first token": (0, 1),
    "first prompt": (0, 20),
    "in the ring": (2, 2),
    "in the ring, with a state": (RING + 2, 1),
    "folds": (RING, 1),
    "folds the other, many tokens": (RING + 3, 6),
    "a prompt after a few tokens": (2, 15),
    "a prompt after a state": (RING + 4, 13),
}
PROMPTS = [moment for moment, (_, new) in MOMENTS.items() if new > RING]
STAGES = {
    "q_proj": MOMENTS,
    "g_proj": MOMENTS,
    "o_proj": [
        moment for moment, (seen, _) in MOMENTS.items() if moment not in PROMPTS or not seen
    ],
    "attend": (
        "first token",
        "in the ring",
        "in the ring, with a state",
        "folds",
        "folds the other, many tokens",
    ),
    "fold": ("folds", "a prompt after a few tokens", "a prompt after a state"),
    "forward": PROMPTS,
}


@pytest.mark.parametrize("kind", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("stage", "moment"), [(stage, moment) for stage, of in STAGES.items() for moment in of]
)
def test_a_failed_step_was_never_taken(
    stage: str, moment: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    layer = make("gqa")
    before, tokens = MOMENTS[moment]
    x = torch.randn(2, before + tokens + 9, layer.hidden_size, dtype=torch.float64)
    cache = layer.init_cache(2, RING)
    parts = [*x[:, :before].split(1, dim=1)] if before else []
    outs = [layer.step(part, cache)[0] for part in parts]
    with monkeypatch.context() as patches:
        error = kind("no memory")
        break_at(stage, layer, error, patches)
        with pytest.raises(kind) as caught:
            layer.step(x[:, before : before + tokens], cache)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert cache.positions.tolist() == [before, before]
    for part in x[:, before:].split([tokens, *[3] * 3], dim=1):
        outs.append(layer.step(part, cache)[0])
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **EXACT)


def test_a_prompt_that_is_in_a_state_is_not_taken_back(monkeypatch: pytest.MonkeyPatch):
    layer = make("gqa")
    x = torch.randn(2, 30, layer.hidden_size, dtype=torch.float64)
    cache = layer.init_cache(4, RING)
    one, two = torch.tensor([1], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    layer.step(x[:1, :4], cache, one)
    with monkeypatch.context() as patches:
        break_at("o_proj", layer, BrokenError("no memory"), patches)
        with pytest.raises(BrokenError) as caught:
            layer.step(x[:, 4:20], cache, two)
    # Slot 2 had seen nothing, and has not now.
    assert [note[:21] for note in caught.value.__notes__] == ["cache: reset slots [1]"[:21]]
    assert cache.positions.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(layer.step(x, cache, two)[0], layer(x), **EXACT)


@pytest.mark.parametrize("kind", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("moment", "lost"),
    [
        ("first prompt", []),
        ("folds", [0]),
        ("folds the other, many tokens", [1]),
        ("a prompt after a few tokens", [0, 1]),
        ("a prompt after a state", [0, 1]),
    ],
)
@pytest.mark.parametrize("half", ["high", "key_sum"])
def test_a_sequence_with_half_a_state_is_reset(
    moment: str,
    lost: list[int],
    half: str,
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
):
    layer = make("gqa")
    before, tokens = MOMENTS[moment]
    x = torch.randn(2, before + tokens, layer.hidden_size, dtype=torch.float64)
    cache = layer.init_cache(2, RING)
    for part in x[:, :before].split(1, dim=1) if before else ():
        layer.step(part, cache)
    inner = pooled._Selection.store

    def store(self: object, target: Tensor, *more: object):
        if target.data_ptr() == getattr(cache.pool, half).data_ptr():
            raise kind("no memory")
        inner(self, target, *more)

    with monkeypatch.context() as patches:
        patches.setattr(pooled._Selection, "store", store)
        with pytest.raises(kind) as caught:
            layer.step(x[:, before:], cache)
    # A sequence that was empty is as it was; of another, the error says what became of it.
    notes = getattr(caught.value, "__notes__", [])
    assert [note.split(",")[0] for note in notes] == [f"cache: reset slots {lost}".split(",")[0]][
        : len(lost)
    ]
    assert cache.positions.tolist() == [0 if slot in lost else before for slot in range(2)]
    cache.reset(torch.tensor(lost, dtype=torch.int32))
    for slot in range(2):
        row, since = torch.tensor([slot], dtype=torch.int32), 0 if slot in lost else before
        out, _ = layer.step(x[slot : slot + 1, since:], cache, row)
        torch.testing.assert_close(out, layer(x)[slot : slot + 1, since:], **EXACT)


def test_layers_step_together_or_not_at_all():
    first, second = make("gqa"), make("gqa")
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    caches = [layer.init_cache(1, RING) for layer in (first, second)]

    def both(part: slice, error: BaseException | None = None) -> Tensor:
        with all_or_nothing(caches):
            out, _ = first.step(x[:, part], caches[0])
            if error is not None:
                raise error
            return second.step(out, caches[1])[0]

    def position() -> list[int]:
        return [cache.positions.item() for cache in caches]

    wanted = second(first(x))
    outs = []
    for part in (slice(0, 8), slice(8, 12), slice(12, 16), slice(16, 20)):  # a prompt; folds too
        before, error = position(), BrokenError()
        with pytest.raises(BrokenError):
            both(part, error)
        assert position() == before
        assert not hasattr(error, "__notes__")
        outs.append(both(part))
    error = BrokenError()
    with pytest.raises(BrokenError):
        both(slice(20, 40), error)  # the first cache has a prompt in its state
    assert position() == [0, 0]
    assert [note.split(",")[0] for note in error.__notes__] == ["cache: reset slots [0]"]
    torch.testing.assert_close(torch.cat(outs, 1), wanted[:, :20], **EXACT)
    torch.testing.assert_close(both(slice(0, 40)), wanted, **EXACT)


def test_caches_that_do_not_belong_together():
    caches = [make("gqa").init_cache(slots) for slots in (2, 3)]
    with (
        pytest.raises(ValueError, match=r"caches: expected as many slots in each, got \[2, 3\]"),
        all_or_nothing(caches),
    ):
        pass


# ---- caches in and out of inference mode --------------------------------------------------------

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("default", [False, True])
def test_a_cache_goes_from_mode_to_mode(made: str, used: str, default: bool):
    layer = make("gqa")
    x = torch.randn(2, 30, layer.hidden_size, dtype=torch.float64)
    with MODES[made]():
        cache = None if default else layer.init_cache(2, RING)
        out, cache = layer.step(x[:, :2], cache)
    outs = [out.clone()]
    for i, part in enumerate(x[:, 2:].split([1, 5, 1, 13, 8], dim=1)):
        with MODES[used if i % 2 else made]():
            outs.append(layer.step(part, cache)[0].clone())
    torch.testing.assert_close(torch.cat(outs, 1), layer(x).detach(), **EXACT)
    cache.reset()
    with MODES[used]():
        cache.reset()
        torch.testing.assert_close(layer.step(x, cache)[0].clone(), layer(x), **EXACT)
    assert not any(x is not None and x.is_inference() for x in cache.pool)


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, r"num_kv_heads: .*divisor of num_heads = 3.*got 2"),
        ({"num_heads": 5}, r"num_heads: .*divisor of hidden_size = 32.*got 5"),
        ({"num_heads": 0}, r"num_heads: .*at least 1, got 0"),
        ({"hidden_size": -1}, r"hidden_size: .*at least 1, got -1"),
        ({"num_kv_heads": 0}, r"num_kv_heads: .*at least 1, got 0"),
        ({"head_dim": 12}, r"head_dim: .*multiple of 8, got 12"),
        ({"deg": 3}, r"deg: .*even.*got 3"),
        ({"chunk_size": 0}, r"chunk_size: .*at least 1, got 0"),
        ({"switch_over_seq_len": 0}, r"switch_over_seq_len: .*at least 1, got 0"),
        ({"rope_theta": -1.0}, r"rope_theta: .*positive.*got -1"),
    ],
)
def test_wrong_sizes(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PowerRetention(**{"hidden_size": 32, "num_heads": 2, **arguments})


def test_wrong_type_of_size():
    with pytest.raises(TypeError, match=r"num_heads: expected an integer, got float"):
        PowerRetention(32, 2.0)


def test_wrong_inputs():
    layer = make("gqa", torch.float32)
    with pytest.raises(ValueError, match=r"x: expected \[b, t, 32\], got \[2, 32\]"):
        layer(torch.randn(2, 32))
    with pytest.raises(ValueError, match=r"x: expected \[b, t, 32\], got \[1, 2, 31\]"):
        layer.step(torch.randn(1, 2, 31))
    with pytest.raises(ValueError, match=r"x: expected at least one token, got \[1, 0, 32\]"):
        layer.step(torch.randn(1, 0, 32))
    for bounds in (torch.tensor([0]), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"cu_seqlens: expected"):
            layer(torch.randn(1, 3, 32), bounds.int())
    with pytest.raises(ValueError, match=r"cu_seqlens: expected to start at 0 or later, got -1"):
        layer(torch.randn(1, 3, 32), torch.tensor([-1, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"batch_size: .*at least 1, got 0"):
        layer.init_cache(0)
    with pytest.raises(ValueError, match=r"switch_over_seq_len: .*at least 1, got 0"):
        layer.init_cache(1, 0)


def test_wrong_caches():
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 1, 32)
    with pytest.raises(ValueError, match=r"cache: expected one with slots=2.*got slots=1"):
        layer.step(x, layer.init_cache(1))
    for more, message in (
        ({"head_dim": 8}, r"head_dim=16, got head_dim=8"),
        ({"num_kv_heads": 1}, r"kv_heads=2, got kv_heads=1"),
        ({"deg": 4}, r"deg=2, got deg=4"),
        ({"gating": False}, r"gating=True, got gating=False"),
    ):
        with pytest.raises(ValueError, match=f"cache: expected one with {message}"):
            layer.step(x, make("gqa", torch.float32, **more).init_cache(2))
    with pytest.raises(TypeError, match=r"cache: expected a RetentionCache, got list"):
        layer.step(x, [layer.init_cache(2)])


def test_wrong_slots_and_masks():
    layer = make("gqa", torch.float32)
    x, cache = torch.randn(2, 3, 32), layer.init_cache(4)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    for wrong, kind, message in (
        (slots.long(), TypeError, r"slots: expected torch.int32 as the cache, got torch.int64"),
        (slots[:1], ValueError, r"slots: expected \[2\], one for each row, got \[1\]"),
        (slots[[1, 1]], ValueError, r"slots: expected each slot at most once, got 1 twice"),
        ([0, 1], TypeError, r"slots: expected an int32 tensor \[n\], got list"),
    ):
        with pytest.raises(kind, match=message):
            layer.step(x, cache, wrong)
    with pytest.raises(ValueError, match=r"slots: expected None where there is no cache"):
        layer.step(x, None, slots)
    for wrong, kind, message in (
        (torch.ones(2, 3), TypeError, r"attention_mask: expected .* bools or integers.*float32"),
        (torch.ones(2, 2).bool(), ValueError, r"attention_mask: expected \[b, t\] = \[2, 3\]"),
        ([[1] * 3] * 2, TypeError, r"attention_mask: expected a tensor .* got list"),
    ):
        with pytest.raises(kind, match=message):
            layer.step(x, cache, slots, wrong)
    assert cache.positions.tolist() == [0] * 4
