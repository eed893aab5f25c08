"""The operators by themselves: the shapes of their results, what they refuse, and which path."""

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import retention
from cases import INPUTS, Case, make
from retention.ops import call
from retention.ops.cuda import coverage

FULL = Case(t=100, d=64, dv=32, state=True)


def lowered(case, dtype=torch.bfloat16):
    """Inputs of a call; gates and states in float32."""
    return {
        name: x if x is None else x.to(dtype if name in "QKV" else torch.float32)
        for name, x in make(case).items()
    }


def on_cuda(case, dtype=torch.bfloat16):
    """Under FakeTensorMode: inputs on a device that need not be there."""
    return {
        name: x if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
        for name, x in lowered(case, dtype).items()
    }


def operands(inputs, deg=2, chunk=None, final=False, save=False, keep=False):
    return (*inputs.values(), None, deg, chunk, None, final, save, keep)


def backward_operands(arguments, results):
    """Of a call of forward with a final state, with its results in the gradients' places."""
    out, norm, state, keys, residual, kept = results
    results = (out, residual, kept, norm)
    return (out, state, keys, *arguments[:7], *results, *arguments[7:10], [True] * 6)


# ---- shapes of results, by the arguments alone --------------------------------------------------


@pytest.fixture
def unasked(monkeypatch):
    """A build and a GPU that nobody may ask."""

    def ask(*_):
        raise AssertionError("the shapes of results must not depend on it")

    monkeypatch.setattr(coverage, "_C", SimpleNamespace(build_info=ask))
    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)


@pytest.mark.parametrize(
    ("case", "dtype", "expected"),
    [
        (FULL, torch.bfloat16, True),
        (FULL, torch.float16, True),
        (Case(t=9, d=40, dv=20), torch.bfloat16, True),  # of some build, perhaps
        (Case(t=0, d=64, dv=32), torch.bfloat16, True),
        (FULL, torch.float32, False),
        (Case(t=9, d=136, dv=32), torch.bfloat16, False),
        (Case(t=9, d=64, dv=136), torch.bfloat16, False),
        (Case(t=9, d=16, dv=32, deg=4), torch.bfloat16, False),
    ],
    ids=str,
)
def test_shapes_of_fakes_on_cuda(unasked, case, dtype, expected):
    with FakeTensorMode():
        inputs = on_cuda(case, dtype)
        arguments = operands(inputs, deg=case.deg, final=True, save=True)
        results = torch.ops.retention.forward(*arguments)
        out, _, _, _, residual, kept = results
        assert residual.shape == (out.shape if expected else (0, 0, 0, 0))
        assert (residual.dtype, kept.shape) == (dtype, (0,))
        gradients = torch.ops.retention.backward(*backward_operands(arguments, results))
        for gradient, x in zip(gradients, inputs.values(), strict=True):
            shape, like = (x.shape, x) if x is not None else ((0,), inputs["Q"])
            assert (gradient.shape, gradient.dtype, gradient.device) == (
                shape,
                like.dtype,
                like.device,
            )


class Call(torch.nn.Module):
    def forward(self, *tensors):
        return retention.power_retention(*tensors, chunk_size=64, keep_states=True)


def test_a_graph_for_cuda_is_exported_without_a_gpu(unasked):
    with FakeTensorMode(shape_env=ShapeEnv()):
        inputs = on_cuda(Case(t=100, d=64, dv=32))
        tensors = tuple(x for x in inputs.values() if x is not None)
        t = torch.export.Dim("t", min=2, max=4096)
        program = torch.export.export(Call(), tensors, dynamic_shapes=({"tensors": ({1: t},) * 4}))
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    (out,) = (x.meta["val"] for x in node.args[0])
    assert isinstance(out.shape[1], torch.SymInt)
    assert [out.shape[0], *out.shape[2:]] == [2, 4, 32]


def training_step(inputs, keep):
    out = retention.power_retention(**inputs, chunk_size=64, keep_states=keep)
    return out.float().square().sum()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import of inductor
def test_a_graph_for_kernels_runs_where_they_refuse_the_call(monkeypatch, dynamic, keep):
    """The CPU stands for a GPU without kernels: the shapes are those of one with them."""
    monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu"})
    torch.compiler.reset()
    step = torch.compile(training_step, fullgraph=True, dynamic=dynamic)
    for t in (100, 130) if dynamic else (100,):
        inputs = lowered(Case(t=t, b=1, d=64, dv=32))
        tensors = [x.requires_grad_() for x in inputs.values() if x is not None]
        expected = torch.autograd.grad(training_step(inputs, keep), tensors)
        actual = torch.autograd.grad(step(inputs, keep), tensors)
        for x, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck_where_the_kernels_refuse_the_call(monkeypatch, dtype, keep):
    monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu"})
    inputs = lowered(Case(t=70, b=1, d=32, dv=32, state=True), dtype)
    arguments = operands(inputs, chunk=64, final=True, save=True, keep=keep)
    torch.library.opcheck(torch.ops.retention.forward, arguments)
    results = torch.ops.retention.forward(*arguments)
    torch.library.opcheck(torch.ops.retention.backward, backward_operands(arguments, results))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.library.opcheck(torch.ops.retention.forward, operands(leaves, chunk=64, keep=keep))


# ---- what they refuse ---------------------------------------------------------------------------


def wrong(x):
    """What does not fit where x does."""
    yield x.new_empty((*x.shape[:-1], x.shape[-1] + 1))[None]
    if x.dim() > 1:
        yield x.new_empty((*x.shape[:-1], x.shape[-1] + 1))
        yield x.new_empty((*x.shape[:1], x.shape[1] + 1, *x.shape[2:]))
    yield x.to(torch.float64)
    yield x.to("meta")


@pytest.mark.parametrize("name", ["d_out", "d_state", "d_keys", "out", "residual", "kept", "norm"])
@pytest.mark.parametrize("saves", [False, True])
def test_backward_refuses_what_is_not_of_its_call(monkeypatch, saves, name):
    if saves:
        monkeypatch.setattr(coverage, "DEVICE_TYPES", {"cpu"})
    arguments = operands(lowered(FULL), final=True, save=True)
    right = backward_operands(arguments, torch.ops.retention.forward(*arguments))
    torch.ops.retention.backward(*right)
    names = [argument.name for argument in torch.ops.retention.backward.default._schema.arguments]
    position = names.index(name)
    for x in wrong(right[position]):
        given = [x if n == position else y for n, y in enumerate(right)]
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .* got "):
            torch.ops.retention.backward(*given)
    if name in ("d_state", "d_keys"):
        given[position] = None
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor beside"):
            torch.ops.retention.backward(*given)


@pytest.mark.parametrize("name", [*INPUTS, "cu_seqlens"])
def test_the_operators_check_their_inputs(name):
    """Without the public function before them."""
    inputs = lowered(FULL) | {"cu_seqlens": torch.tensor([0, 100], dtype=torch.int32)}
    inputs = {n: x if n == "cu_seqlens" else x[:1] for n, x in inputs.items()}
    options = (2, None, None, True, True, False)
    results = torch.ops.retention.forward(*inputs.values(), *options)
    rest = backward_operands((*inputs.values(), *options), results)
    for x in wrong(inputs[name]):
        given = inputs | {name: x}
        with pytest.raises((TypeError, ValueError), match=r"^[A-Za-z_]+: .*expected .* got "):
            torch.ops.retention.forward(*given.values(), *options)
        with pytest.raises((TypeError, ValueError), match=r"^[A-Za-z_]+: .*expected .* got "):
            torch.ops.retention.backward(*rest[:3], *given.values(), *rest[10:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((3, None, None), "deg: expected a positive even integer, got 3"),
        ((0, None, None), "deg: expected a positive even integer, got 0"),
        ((2, 0, None), "chunk_size: expected an integer of at least 1, got 0"),
        ((2, 64, -1), "switch_over_seq_len: expected an integer of at least 0, got -1"),
    ],
)
def test_the_operators_check_their_options(options, message):
    arguments = operands(lowered(FULL), final=True, save=True)
    rest = backward_operands(arguments, torch.ops.retention.forward(*arguments))
    with pytest.raises(ValueError, match=f"^{message}"):
        torch.ops.retention.forward(*arguments[:7], *options, False, False, False)
    with pytest.raises(ValueError, match=f"^{message}"):
        torch.ops.retention.backward(*rest[:14], *options, [True] * 6)


@pytest.mark.parametrize("wanted", [[True] * 5, [True] * 7, [True, True, True, True, True, False]])
def test_backward_checks_what_is_wanted(wanted):
    arguments = operands(lowered(FULL), final=True, save=True)
    *rest, _ = backward_operands(arguments, torch.ops.retention.forward(*arguments))
    with pytest.raises(ValueError, match=r"^wanted: expected a bool for each of Q, K, V, log_G"):
        torch.ops.retention.backward(*rest, wanted)


def test_sparse_tensors_are_refused():
    inputs = lowered(FULL)
    for name in INPUTS:
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got one of"):
            retention.power_retention(**inputs | {name: inputs[name].to_sparse()})


# ---- without the kernels ------------------------------------------------------------------------


def in_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results.pop()


def test_the_kernels_are_turned_off_for_one_thread_alone():
    def reason():
        return coverage.device_reason("cpu", None)

    with coverage.turned_off():
        assert reason() == "kernels are turned off"
        assert in_a_thread(reason) == "no kernels for cpu devices"
        with coverage.turned_off(False):
            assert reason() == "no kernels for cpu devices"
        assert reason() == "kernels are turned off"

    def inside():
        with coverage.turned_off():
            entered.set()
            left.wait(60)
            return reason()

    entered, left = threading.Event(), threading.Event()
    other = threading.Thread(target=inside)
    other.start()
    entered.wait(60)
    with coverage.turned_off():
        left.set()
        other.join()
        assert reason() == "kernels are turned off"
    assert reason() == "no kernels for cpu devices"


@pytest.mark.parametrize("off", [True, False])
def test_backward_follows_its_forward_in_every_thread(caplog, off):
    inputs = lowered(FULL)
    with coverage.turned_off(off):
        out = retention.power_retention(**inputs | {"Q": inputs["Q"].requires_grad_()})
    with caplog.at_level(logging.DEBUG, logger="retention"):
        in_a_thread(lambda: out.sum().backward(retain_graph=True))
        with coverage.turned_off(not off):
            out.sum().backward()
    reason = "kernels are turned off" if off else "no kernels for cpu devices"
    path = f"backward on cpu: PyTorch path ({reason}); bfloat16"
    assert [message[: len(path)] for message in caplog.messages] == [path] * 2


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_groups_of_arguments_have_the_schemas_names(op):
    schema = getattr(torch.ops.retention, op).default._schema
    names = [getattr(call, f"{op.upper()}_{of}") for of in ("ARGUMENTS", "RESULTS")]
    assert [x.name for x in schema.arguments] == [*names[0]]
    assert [x.name for x in schema.returns] == [*names[1]]
