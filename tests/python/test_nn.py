"""`PowerRetention` against the plain formula in float64, and its `step` against its `forward`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import retention
from retention.nn import PowerRetention, apply_rotary, rotary_angles

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
    assert cache.position == t
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **EXACT)


def test_state_after_steps_is_the_final_state():
    layer = make("gqa")
    x = torch.randn(1, 30, layer.hidden_size, dtype=torch.float64)
    caches = []
    for pieces in ([30], [1] * 30, [7, 23]):
        cache = layer.init_cache(1, 10)
        for part in x.split(pieces, dim=1):
            layer.step(part, cache)
        assert cache.length == 0  # every way ends on a full ring
        caches.append(cache)
    for cache in caches[1:]:
        torch.testing.assert_close(cache.state, caches[0].state, **EXACT)
        torch.testing.assert_close(cache.sum_of_keys, caches[0].sum_of_keys, **EXACT)
    assert caches[0].state.abs().max() > 0


def test_step_in_float32_and_default_cache():
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 600, layer.hidden_size)
    first, cache = layer.step(x[:, :590])
    assert cache.capacity == 512
    assert cache.length == 0  # a prompt longer than the ring goes straight into the state
    outs = [first]
    for i in range(590, 600):
        out, cache = layer.step(x[:, i : i + 1], cache)
        outs.append(out)
    assert cache.length == 10
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), **SINGLE)


def test_step_keeps_no_gradients():
    layer = make("plain", torch.float32)
    out, cache = layer.step(torch.randn(1, 3, 32, requires_grad=True))
    assert not out.requires_grad
    assert not cache.keys.requires_grad


@pytest.mark.parametrize("name", ["plain", "no gates"])
def test_bytes_of_the_cache_never_change(name: str):
    layer = make(name, torch.float32)
    cache = layer.init_cache(1, 16)
    before = cache.nbytes
    tensors = [cache.keys, cache.values, cache.state, cache.sum_of_keys]
    places = [x.data_ptr() for x in tensors]
    for _ in range(100):
        layer.step(torch.randn(1, 1, layer.hidden_size), cache)
    assert cache.nbytes == before
    layer.step(torch.randn(1, 9900, layer.hidden_size), cache)
    assert cache.position == 10_000
    assert cache.nbytes == before
    # In place: the bytes counted are the bytes held.
    now = [cache.keys, cache.values, cache.state, cache.sum_of_keys]
    assert [x.data_ptr() for x in now] == places
    d, h = layer.head_dim, layer.num_kv_heads
    floats = 2 * 16 * h * d + (16 * h if layer.gating else 0)
    floats += h * retention.state_dim(d) * (d + 1)
    assert before == 4 * floats + 16


def test_reset_forgets():
    layer = make("plain")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    cache = layer.init_cache(1, 4)
    first, _ = layer.step(x, cache)
    cache.reset()
    assert cache.position == 0
    again, _ = layer.step(x, cache)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


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

    monkeypatch.setattr(retention, "power_retention", spy)
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


def test_autocast_keeps_gates_in_float32(monkeypatch: pytest.MonkeyPatch):
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 40, layer.hidden_size)
    seen = {}
    inner = retention.power_retention

    def spy(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **more):
        seen.update(q=q.dtype, k=k.dtype, v=v.dtype, gate=gate)
        return inner(q, k, v, gate, **more)

    exact = layer._log_gate(x)
    monkeypatch.setattr(retention, "power_retention", spy)
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
    assert cache.keys.dtype == torch.bfloat16
    assert cache.state.dtype == torch.float32
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


def test_checkpointing_functional_call_and_state_dict():
    layer = make("gqa")
    x = torch.randn(1, 20, layer.hidden_size, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    recomputed = checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(recomputed.square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    other = make("gqa")
    other.reset_parameters()
    assert (other(x) - layer(x)).abs().max() > 1e-3
    called = torch.func.functional_call(other, dict(layer.named_parameters()), (x,))
    torch.testing.assert_close(called, layer(x), rtol=0, atol=0)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    assert set(layer.state_dict()) == {
        *(f"{x}_proj.weight" for x in "qkvgo"),
        "g_proj.bias",
    }


def test_meta_device():
    layer = PowerRetention(32, 2, device="meta")
    assert layer(torch.empty(2, 9, 32, device="meta")).shape == (2, 9, 32)


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
    with pytest.raises(ValueError, match=r"cu_seqlens: expected to start at 0, got 1"):
        layer(torch.randn(1, 3, 32), torch.tensor([1, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"batch_size: .*at least 1, got 0"):
        layer.init_cache(0)
    with pytest.raises(ValueError, match=r"switch_over_seq_len: .*at least 1, got 0"):
        layer.init_cache(1, 0)


def test_wrong_caches():
    layer = make("gqa", torch.float32)
    x = torch.randn(2, 1, 32)
    with pytest.raises(ValueError, match=r"cache: expected keys \[2, n, 2, 16\]"):
        layer.step(x, layer.init_cache(1))
    with pytest.raises(ValueError, match=r"cache: expected keys \[2, n, 2, 16\]"):
        layer.step(x, make("degree 4", torch.float32, hidden_size=32, head_dim=8).init_cache(2))
    with pytest.raises(ValueError, match=r"cache: .*a state of 192 rows.*5280 rows"):
        layer.step(x, make("gqa", torch.float32, deg=4).init_cache(2))
    with pytest.raises(ValueError, match=r"cache: .*gating=True, got gating=False"):
        layer.step(x, make("gqa", torch.float32, gating=False).init_cache(2))
