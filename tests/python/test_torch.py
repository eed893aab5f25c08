"""power_retention as a citizen of PyTorch."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import retention
from cases import INPUTS, Case, cast, make

OPTIONS = {"chunk_size": 4, "switch_over_seq_len": 0}


def leaves(case, dtype=torch.float64):
    return cast(make(case), dtype)


def test_import_brings_in_nothing_slow():
    """Beside what comes with torch itself: torch._dynamo alone takes a second."""
    program = """
import sys, torch
before = set(sys.modules)
import retention
print(*sorted(name for name in set(sys.modules) - before if name.startswith("torch.")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize("gate", [None, -0.5])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("deg", [2, 4])
def test_gradcheck(gate, state, deg):
    inputs = leaves(Case(t=7, b=1, hq=2, h=1, d=8, dv=2, gate=gate, state=state, deg=deg))
    names = [name for name, x in inputs.items() if x is not None]

    def function(*tensors):
        return retention.power_retention(
            **dict(zip(names, tensors, strict=True)), deg=deg, return_final_state=True, chunk_size=3
        )

    # A state makes the full Jacobian take a minute.
    tensors = [inputs[name] for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=state or deg > 2)


def test_gradients_of_some_inputs_only():
    inputs = leaves(Case(t=9, state=True))
    out, state, _ = retention.power_retention(**inputs, return_final_state=True, **OPTIONS)
    loss = out.sum() + state.sum()
    every = torch.autograd.grad(loss, list(inputs.values()))
    for name, gradient in zip(INPUTS, every, strict=True):
        some = {n: x if n == name else x.detach() for n, x in inputs.items()}
        out, state, _ = retention.power_retention(**some, return_final_state=True, **OPTIONS)
        (alone,) = torch.autograd.grad(out.sum() + state.sum(), some[name])
        assert torch.equal(alone, gradient)


def test_no_graph_without_gradients():
    inputs = leaves(Case(t=9))
    with torch.no_grad():
        assert not retention.power_retention(**inputs).requires_grad
    with torch.inference_mode():
        assert not retention.power_retention(**inputs).requires_grad


def test_double_backward_is_refused():
    inputs = leaves(Case(t=9))
    out = retention.power_retention(**inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["Q"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_no_gradients_are_made_up_for_results_that_are_not_used():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.retention.backward.default:
                seen.append([x is not None for x in args[:3]])
            return function(*args, **(kwargs or {}))

    inputs = leaves(Case(t=9, state=True))
    for used, expected in ((0, [True, False, False]), (1, [True, True, True])):
        results = retention.power_retention(**inputs, return_final_state=True, **OPTIONS)
        with Mode():
            results[used].sum().backward()
        assert seen.pop() == expected


@pytest.mark.parametrize("names", [(name,) for name in INPUTS] + [("Q", "sum_of_keys"), INPUTS])
def test_gradients_that_nobody_wants_are_not_asked_for(names):
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            if function is torch.ops.retention.backward.default:
                seen.append((args[-1], [x.shape for x in results]))
            return results

    inputs = {
        name: x.requires_grad_(name in names) for name, x in leaves(Case(t=9, state=True)).items()
    }
    out = retention.power_retention(**inputs, **OPTIONS)
    with Mode():
        out.sum().backward()
    expected = [name in names for name in INPUTS]
    expected[4:] = [any(expected[4:])] * 2  # a state and its keys: both or neither
    shapes = [x.shape if w else (0,) for x, w in zip(inputs.values(), expected, strict=True)]
    assert seen == [(expected, shapes)]
    assert [x.grad is not None for x in inputs.values()] == [name in names for name in INPUTS]


@pytest.mark.parametrize("name", INPUTS)
def test_forward_mode_is_refused(name):
    inputs = {n: x.detach() for n, x in leaves(Case(t=9, state=True)).items()}
    with forward_ad.dual_level():
        retention.power_retention(**inputs)  # nothing to differentiate
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not supported"):
            retention.power_retention(**inputs)


def test_torch_func_is_right_or_refused():
    inputs = {n: x if x is None else x.detach() for n, x in leaves(Case(t=9)).items()}

    def loss(Q):
        return retention.power_retention(**inputs | {"Q": Q}, **OPTIONS).square().sum()

    Q = inputs["Q"]
    several = torch.stack([Q, Q.flip(1), -Q])
    torch.testing.assert_close(torch.vmap(loss)(several), torch.stack([loss(x) for x in several]))
    torch.testing.assert_close(torch.func.functionalize(loss)(Q), loss(Q))
    for refused in (
        lambda: torch.func.grad(loss)(Q),
        lambda: torch.func.vjp(loss, Q),
        lambda: torch.func.jvp(loss, (Q,), (Q,)),
        lambda: torch.vmap(torch.func.grad(loss))(several),
        lambda: torch.func.jacrev(loss)(Q),
        lambda: torch.func.jacfwd(loss)(Q),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func does not differentiate"):
            refused()


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "state"])
def test_opcheck(state):
    inputs = leaves(Case(t=9, b=1, hq=2, h=1, d=8, dv=4, state=state), torch.float32)
    arguments = (*inputs.values(), None, 2, 4, 0, True, False, False)
    torch.library.opcheck(torch.ops.retention.forward, arguments)
    packed = torch.tensor([0, 4, 9], dtype=torch.int32)
    two = [x if x is None or n < 4 else x.detach().repeat(2, *[1] * (x.dim() - 1))
           for n, x in enumerate(inputs.values())]  # fmt: skip
    torch.library.opcheck(torch.ops.retention.forward, (*two, packed, 2, 4, 0, *[False] * 3))
    constants = [x if x is None else x.detach() for x in inputs.values()]
    results = torch.ops.retention.forward(*constants, None, 2, 4, 0, True, True, False)
    out, norm, state, keys, residual, kept = results
    saved = (out, residual, kept, norm)
    for wanted in ([True] * 6, [True, False, False, True, False, False]):
        arguments = (out, state, keys, *constants, None, *saved, 2, 4, 0, wanted)
        torch.library.opcheck(torch.ops.retention.backward, arguments)


def training_step(inputs, **options):
    out, state, keys = retention.power_retention(
        **inputs, return_final_state=True, **OPTIONS, **options
    )
    return out.square().sum() + state.sum() + keys.sum()


def test_compile_fullgraph():
    inputs = leaves(Case(t=9, state=True), torch.float32)
    expected = torch.autograd.grad(training_step(inputs), list(inputs.values()))
    torch.compiler.reset()
    step = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(step(inputs), list(inputs.values()))
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import of inductor
def test_compile_with_inductor_and_dynamic_lengths():
    torch.compiler.reset()
    step = torch.compile(training_step, fullgraph=True, dynamic=True)
    for t in (9, 12, 17):
        inputs = leaves(Case(t=t), torch.float32)
        tensors = [x for x in inputs.values() if x is not None]
        expected = torch.autograd.grad(training_step(inputs), tensors)
        actual = torch.autograd.grad(step(inputs), tensors)
        for x, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, wanted)


def test_compile_inference():
    inputs = {name: x if x is None else x.detach() for name, x in leaves(Case(t=6)).items()}
    torch.compiler.reset()
    step = torch.compile(
        lambda **i: retention.power_retention_inference(**i, switch_over_seq_len=6),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = retention.power_retention_inference(**inputs, switch_over_seq_len=6)
    for x, wanted in zip(step(**inputs), expected, strict=True):
        torch.testing.assert_close(x, wanted)


def test_meta_tensors():
    inputs = leaves(Case(t=9, state=True), torch.bfloat16)
    meta = {name: x.detach().to("meta").requires_grad_() for name, x in inputs.items()}
    real = retention.power_retention(**inputs, return_final_state=True)
    fake = retention.power_retention(**meta, return_final_state=True)
    for x, wanted in zip(fake, real, strict=True):
        assert x.is_meta
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)
    sum(x.sum() for x in fake).backward()
    for name, x in meta.items():
        assert (x.grad.shape, x.grad.dtype) == (inputs[name].shape, inputs[name].dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = leaves(Case(t=20), torch.float32)
    lower = {
        name: x if x is None or name == "log_G" else x.detach().to(dtype)
        for name, x in inputs.items()
    }
    expected = retention.power_retention(**lower, **OPTIONS)
    with torch.autocast("cpu", dtype=dtype):
        out = retention.power_retention(**inputs, **OPTIONS)
        mixed = inputs | {"K": lower["K"], "log_G": inputs["log_G"].bfloat16()}
        assert retention.power_retention(**mixed, **OPTIONS).dtype == dtype
        step, *_ = retention.power_retention_inference(**inputs, switch_over_seq_len=None)
        out.sum().backward()  # nor may autocast lower the arithmetic of backward
    assert torch.equal(out, expected)
    torch.testing.assert_close(step, out)
    assert inputs["log_G"].grad.dtype == torch.float32
    without = leaves(Case(t=20), torch.float32)
    cast_by_hand = {
        name: x if x is None or name == "log_G" else x.to(dtype) for name, x in without.items()
    }
    retention.power_retention(**cast_by_hand, **OPTIONS).sum().backward()
    for name in ("Q", "K", "V", "log_G"):
        assert torch.equal(inputs[name].grad, without[name].grad)


def test_activation_checkpointing():
    inputs = leaves(Case(t=20))
    expected = torch.autograd.grad(
        retention.power_retention(**inputs, **OPTIONS).square().sum(), inputs["Q"]
    )
    out = checkpoint(
        lambda i: retention.power_retention(**i, **OPTIONS), inputs, use_reentrant=False
    )
    actual = torch.autograd.grad(out.square().sum(), inputs["Q"])
    assert torch.equal(actual[0], expected[0])


def test_functional_call():
    layer = retention.nn.PowerRetention(32, 2, head_dim=16)
    x = torch.randn(1, 9, 32)
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), other(x))


def test_a_gradient_of_the_state_alone():
    inputs = leaves(Case(t=9, state=True))
    _, state, _ = retention.power_retention(**inputs, return_final_state=True, **OPTIONS)
    _, expected, _ = retention.reference(**inputs, return_final_state=True)
    names = ["K", "V", "log_G", "initial_state"]
    for actual, wanted in zip(
        torch.autograd.grad(state.sum(), [inputs[n] for n in names]),
        torch.autograd.grad(expected.sum(), [inputs[n] for n in names]),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_torch_is_imported_before_the_compiled_module():
    """Its libraries were seen to crash when they are loaded behind ours."""
    program = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'retention._C' or 'torch' in sys.modules\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import retention\n"
        "assert 'retention._C' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
