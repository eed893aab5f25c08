"""torch.func over power retention: what it gives is right; what it would not give right is refused.

Everything is compared with a loop of plain calls, in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

import retention
from cases import INPUTS, Case, cast, make

OPTIONS = {"chunk_size": 4, "switch_over_seq_len": 0}
REFUSED = r"retention: torch\.func does not differentiate power retention; use torch\.autograd"


@pytest.fixture
def base() -> dict[str, Tensor]:
    inputs = cast(make(Case(t=9, state=True)), torch.float64)
    return {name: x.detach() for name, x in inputs.items()}


def several(inputs: dict[str, Tensor], names, requires_grad: bool = False) -> list[Tensor]:
    """Three of each: other tokens first, other magnitudes. Gates stay below 0."""
    stacked = [
        torch.stack([inputs[n], inputs[n].flip(1) * 1.5, inputs[n] * 0.5]).requires_grad_(
            requires_grad
        )
        for n in names
    ]
    assert all(not x[0].equal(x[1]) for x in stacked)
    return stacked


def looped(function, *stacks: Tensor):
    results = [function(*xs) for xs in zip(*stacks, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(x) for x in zip(*results, strict=True))


def with_states(base: dict[str, Tensor], names=("Q",)):
    def function(*tensors: Tensor):
        inputs = base | dict(zip(names, tensors, strict=True))
        return retention.power_retention(**inputs, return_final_state=True, **OPTIONS)

    return function


SOME = [*[(name,) for name in INPUTS], ("Q", "V"), ("K", "log_G"), INPUTS]


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("names", SOME, ids=" ".join)
def test_vmap_over_some_inputs(base, names, grad_mode):
    function = with_states(base, names)
    stacks = several(base, names)
    with grad_mode():
        torch.testing.assert_close(vmap(function)(*stacks), looped(function, *stacks))


@pytest.mark.parametrize("names", SOME, ids=" ".join)
def test_gradients_through_vmap(base, names):
    """Of what is mapped over, and of what is not."""
    shared = {name: x.clone().requires_grad_() for name, x in base.items()}
    function = with_states(shared, names)
    stacks = several(base, names, requires_grad=True)
    leaves = [*stacks, *[shared[n] for n in INPUTS if n not in names]]

    def gradients(results):
        return torch.autograd.grad(sum(x.square().sum() for x in results), leaves)

    actual = gradients(vmap(function)(*stacks))
    torch.testing.assert_close(actual, gradients(looped(function, *stacks)))


def test_vmap_options(base):
    function = with_states(base, ("Q", "K"))
    Q, K = several(base, ("Q", "K"))
    for i in range(3):
        one_K = vmap(function, in_dims=(0, None))(Q, K[i])
        torch.testing.assert_close(one_K, looped(lambda q: function(q, K[i]), Q))  # noqa: B023
        one_Q = vmap(function, in_dims=(None, 0))(Q[i], K)
        torch.testing.assert_close(one_Q, looped(lambda k: function(Q[i], k), K))  # noqa: B023
    expected = looped(function, Q, K)
    moved = vmap(function, in_dims=(2, -1), out_dims=1)(Q.movedim(0, 2), K.movedim(0, -1))
    torch.testing.assert_close(moved, tuple(x.movedim(0, 1) for x in expected))
    torch.testing.assert_close(vmap(function, chunk_size=2)(Q, K), expected)
    nested = vmap(vmap(function, in_dims=(None, 0)), in_dims=(0, None))(Q, K)
    torch.testing.assert_close(nested, looped(lambda q: looped(lambda k: function(q, k), K), Q))
    with pytest.raises(RuntimeError, match="vmap over dims of size 0"):
        vmap(function)(Q[:0], K[:0])


def test_vmap_over_packings():
    inputs = cast(make(Case(t=9, b=1)), torch.float64)
    inputs = {name: None if x is None else x.detach() for name, x in inputs.items()}
    packings = torch.tensor([[0, 4, 9], [0, 0, 9], [0, 9, 9]], dtype=torch.int32)

    def function(cu_seqlens: Tensor):
        return retention.power_retention(
            **inputs, cu_seqlens=cu_seqlens, return_final_state=True, **OPTIONS
        )

    torch.testing.assert_close(vmap(function)(packings), looped(function, packings))


def test_vmap_over_the_operator(base):
    def function(Q: Tensor):
        return torch.ops.retention.forward(
            Q, *list(base.values())[1:], None, 2, 4, 0, True, False, False
        )

    (stack,) = several(base, ("Q",))
    torch.testing.assert_close(vmap(function)(stack), looped(function, stack))


def test_many_gradients_at_once(base):
    """vmap over backward, as a vectorised Jacobian does it."""
    leaves = {name: x.clone().requires_grad_() for name, x in base.items()}
    results = with_states(leaves, ())()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, *x.shape, generator=generator, dtype=x.dtype) for x in results]

    def gradients(*weights: Tensor, **options):
        tensors = list(leaves.values())
        return torch.autograd.grad(results, tensors, weights, retain_graph=True, **options)

    actual = gradients(*weights, is_grads_batched=True)
    torch.testing.assert_close(actual, looped(gradients, *weights))

    def sums(Q: Tensor) -> Tensor:
        return with_states(base)(Q)[0].sum((0, 1, 2))

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(sums, base["Q"])
    torch.testing.assert_close(jacobian(sums, base["Q"], vectorize=True), expected)


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_refused(base, name):
    function = with_states(base, (name,))

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in function(x))

    x, (stack,) = base[name], several(base, (name,))
    for refused in (
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.grad_and_value(loss)(x),
        lambda: torch.func.vjp(loss, x),
        lambda: torch.func.jvp(loss, (x,), (x,)),
        lambda: torch.func.jacrev(loss)(x),
        lambda: torch.func.jacfwd(loss)(x),
        lambda: torch.func.hessian(loss)(x),
        lambda: vmap(torch.func.grad(loss))(stack),
        lambda: torch.func.grad(lambda xs: vmap(loss)(xs).sum())(stack),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            refused()
        with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
            refused()
    with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
        torch.func.linearize(loss, x)


@pytest.mark.parametrize("name", INPUTS)
def test_second_derivatives_are_refused(base, name):
    """By whatever way they are asked for."""
    function = with_states(base, (name,))

    def loss(x: Tensor) -> Tensor:
        return sum(y.square().sum() for y in function(x))

    x = base[name]
    functional = torch.autograd.functional
    for refused in (
        lambda: functional.hessian(loss, x),
        lambda: functional.hvp(loss, x, x),
        lambda: functional.vhp(loss, x, x),
        lambda: functional.jvp(function, x, x),  # by differentiating backward by its gradient
    ):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            refused()


def test_what_is_not_differentiated_may_be_there(base):
    """A gradient of something else, and autograd through it from outside."""
    leaves = {name: x.clone().requires_grad_() for name, x in base.items()}
    weight = torch.randn(2, 9, 4, 12, dtype=torch.float64)
    for inputs in (base, leaves):
        given = torch.func.grad(lambda w: (with_states(inputs)(inputs["Q"])[0] * w).sum())(weight)  # noqa: B023
        torch.testing.assert_close(given, with_states(inputs)(inputs["Q"])[0])
    expected = with_states(leaves, ())()[0].square().sum()
    for x, wanted in zip(
        torch.autograd.grad(given.square().sum(), list(leaves.values())),
        torch.autograd.grad(expected, list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(x, wanted)


# ---- layers -------------------------------------------------------------------------------------


def make_layers() -> list[retention.nn.PowerRetention]:
    torch.manual_seed(0)
    return [
        retention.nn.PowerRetention(32, 4, 2, chunk_size=4, switch_over_seq_len=4).double()
        for _ in range(3)
    ]


def test_an_ensemble_of_layers():
    layers = make_layers()
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(2, 9, 32, dtype=torch.float64)

    def call(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), (x,))

    together = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))
    together.square().sum().backward()
    for n, layer in enumerate(layers):
        layer(x).square().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(parameters[name].grad[n], p.grad)


def test_gradients_of_every_sample():
    """Not by torch.func.grad, which is refused; by an expanded copy of the parameters."""
    layer, *_ = make_layers()
    samples = torch.randn(3, 9, 32, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    with pytest.raises(RuntimeError, match=REFUSED):
        vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    copies = {
        name: p.expand(3, *p.shape).clone().requires_grad_() for name, p in parameters.items()
    }
    vmap(loss)(copies, samples).sum().backward()
    for n, sample in enumerate(samples):
        layer.zero_grad()
        loss(dict(layer.named_parameters()), sample).backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(copies[name].grad[n], p.grad)


# ---- decoding, which is made of PyTorch operations ----------------------------------------------


@pytest.mark.parametrize("names", SOME, ids=" ".join)
@pytest.mark.parametrize("switch_over", [None, 4], ids=["read", "fold"])
def test_vmap_and_gradients_of_inference(base, names, switch_over):
    def function(*tensors: Tensor):
        inputs = base | dict(zip(names, tensors, strict=True))
        return retention.power_retention_inference(**inputs, switch_over_seq_len=switch_over)

    def loss(*tensors: Tensor) -> Tensor:
        return sum(x.square().sum() for x in function(*tensors))

    stacks = several(base, names)
    torch.testing.assert_close(vmap(function)(*stacks), looped(function, *stacks))
    which = tuple(range(len(names)))
    given = vmap(torch.func.grad(loss, argnums=which))(*stacks)
    leaves = [x.clone().requires_grad_() for x in stacks]
    expected = torch.autograd.grad(looped(loss, *leaves).sum(), leaves)
    torch.testing.assert_close(given, expected)
