"""What does without PyTorch's private symbols, and that they stand in one module."""

import re
from pathlib import Path

import pytest
import torch

import retention
from cases import Case, error, make
from retention.ops import torch_private

PACKAGE = Path(retention.__file__).parent


def test_private_symbols_stand_in_one_module():
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)|\bforward_ad\._")
    allowed = {PACKAGE / "ops" / "torch_private.py"}
    found = {path for path in PACKAGE.rglob("*.py") if private.search(path.read_text())}
    assert found == allowed


def test_imports_lead_downwards():
    for path in (PACKAGE / "ops").rglob("*.py"):
        above = re.findall(r"from retention(?: import|\.\w+).*", path.read_text())
        assert all(line.startswith("from retention.ops") for line in above), path


@pytest.mark.parametrize("private", [True, False])
def test_below_autograd_there_are_no_gradients(monkeypatch, private):
    if not private:
        monkeypatch.setattr(torch_private, "_below_autograd", None)
    x = torch.ones(2, requires_grad=True)
    assert not torch_private.below_autograd(torch.square)(x).requires_grad
    assert torch.square(x).requires_grad


@pytest.mark.parametrize("state", [False, True])
def test_without_a_way_below_autograd(monkeypatch, state):
    case = Case(t=20, state=state)
    names = [name for name, x in make(case).items() if x is not None]

    def gradients():
        inputs = {name: x if x is None else x.requires_grad_() for name, x in make(case).items()}
        out = retention.power_retention(**inputs, chunk_size=8)
        return out, *torch.autograd.grad(out.square().sum(), [inputs[name] for name in names])

    expected = gradients()
    called = []
    monkeypatch.setattr(torch_private, "_below_autograd", None)
    inference_mode = torch.inference_mode
    monkeypatch.setattr(torch, "inference_mode", lambda *x: called.append(x) or inference_mode(*x))
    for x, y in zip(gradients(), expected, strict=True):
        assert error(x, y) < 1e-14  # the same operations
    assert called
    with torch.no_grad():
        assert not retention.power_retention(**make(case)).is_inference()


def test_where_pytorch_does_not_tell(monkeypatch):
    assert not torch_private.functorch_is_active(unknown=True)
    assert not torch_private.forward_mode_is_active()
    monkeypatch.setattr(torch_private, "_functorch_is_active", None)
    monkeypatch.setattr(torch_private, "_levels", torch_private.SimpleNamespace(_current_level=0))
    monkeypatch.setattr(torch_private, "_CUDA_IS_NEXT", None)
    monkeypatch.delattr(torch._dynamo, "mark_static_address")
    torch_private.stays_in_place(torch.zeros(1))
    assert torch_private.functorch_is_active(unknown=True)
    assert not torch_private.functorch_is_active(unknown=False)
    assert torch_private.forward_mode_is_active()
    assert not torch_private.cuda_is_next(None)
    inputs = make(Case(t=20))
    expected = retention.reference(**inputs)
    assert error(retention.power_retention(**inputs, chunk_size=8), expected) < 1e-12


def test_symbols_that_are_missing():
    assert torch_private._find("_no.such_thing", 7) == 7
    assert torch_private._raw_keys("NoSuchKey") is None


def test_groups_that_pytorch_does_not_find(monkeypatch):
    class Group:
        group_name = "seven"

    group = Group()
    monkeypatch.setattr(torch_private, "process_group", torch_private._groups.__getitem__)
    assert torch_private.group_name(group) == "seven"
    assert torch_private.process_group("seven") is group
