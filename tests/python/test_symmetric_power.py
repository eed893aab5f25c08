"""phi: its dimension, its order, and that it is the symmetric power."""

import gc
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import retention
from retention.ops import symmetric_power

SIZES = [(8, 2), (16, 2), (64, 2), (8, 4), (16, 4), (8, 6), (8, 8)]


@pytest.mark.parametrize(
    ("head_dim", "deg", "rows"),
    [(16, 2, 192), (32, 2, 640), (64, 2, 2304), (128, 2, 8704), (256, 2, 33792), (16, 4, 5280)],
)
def test_state_dim(head_dim, deg, rows):
    assert retention.state_dim(head_dim, deg) == rows


def rows_by_the_book(d, deg):
    """Every row's factors, from the words of the definition alone: (block tuple, offsets)."""
    width = {2: 8, 4: 2}.get(deg, 1)
    tuples = itertools.combinations_with_replacement(range(d // width), deg)
    for blocks in sorted(tuples, key=lambda blocks: blocks[::-1]):
        for offsets in itertools.product(range(width), repeat=deg):
            yield blocks, [width * b + a for b, a in zip(blocks, offsets, strict=True)]


@pytest.mark.parametrize(("d", "deg"), [(8, 2), (24, 2), (8, 4), (8, 6)])
def test_order_and_multiplicity(d, deg):
    x = torch.randn(d, dtype=torch.float64)
    query, key = retention.expand(x, deg, "query"), retention.expand(x, deg, "key")
    rows = list(rows_by_the_book(d, deg))
    assert len(rows) == retention.state_dim(d, deg)
    for m, (blocks, factors) in enumerate(rows):
        value = x[factors].prod()
        permutations = len(set(itertools.permutations(blocks)))
        torch.testing.assert_close(query[m], value)
        torch.testing.assert_close(key[m], permutations * value)


@pytest.mark.parametrize(("d", "deg"), [*SIZES, (24, 2)])
def test_few_queries_have_the_same_rows(d, deg):
    q = torch.randn(2, 3, d, dtype=torch.float64)
    assert torch.equal(symmetric_power.expand_few(q, deg), retention.expand(q, deg, "query"))


@pytest.mark.parametrize(("d", "deg"), SIZES)
def test_inner_product_is_the_power(d, deg):
    q, k = torch.randn(2, 5, 3, d, dtype=torch.float64)
    product = (retention.expand(q, deg, "query") * retention.expand(k, deg, "key")).sum(-1)
    expected = (q * k).sum(-1) ** deg
    # D terms of either sign: the sum of their magnitudes is at most (|q| |k|)^deg.
    bound = (q.norm(dim=-1) * k.norm(dim=-1)) ** deg
    assert ((product - expected).abs() <= 1e-14 * bound).all()


def test_expand_is_differentiable_and_keeps_dtype_and_shape():
    x = torch.randn(2, 0, 3, 16, requires_grad=True)
    assert retention.expand(x).shape == (2, 0, 3, 192)
    assert retention.expand(torch.randn(16).bfloat16()).dtype == torch.bfloat16
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    for deg, side in itertools.product((2, 4), ("key", "query")):
        assert torch.autograd.gradcheck(
            lambda x, deg=deg, side=side: retention.expand(x, deg, side), x
        )


def test_expand_first_used_in_inference_mode_can_train_later():
    with torch.inference_mode():
        retention.expand(torch.randn(40, dtype=torch.float64))
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    retention.expand(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("deg", [2, 4])
def test_nothing_is_kept_on_a_device(deg):
    """Other streams could read it before it is filled."""

    def on_a_device():
        gc.collect()
        tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        return sum(x.is_meta for x in tensors)

    before = on_a_device()
    phi = retention.expand(torch.empty(3, 24, device="meta"), deg)
    assert phi.shape == (3, retention.state_dim(24, deg))
    del phi
    assert on_a_device() == before


@pytest.mark.gpu
@pytest.mark.parametrize("deg", [2, 4])
def test_a_first_call_may_be_captured(deg):
    x = torch.randn(5, 40, dtype=torch.float64, device="cuda")  # no other test has this head dim
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        phi = retention.expand(x, deg)
    graph.replay()
    torch.testing.assert_close(phi.cpu(), retention.expand(x.cpu(), deg))


@pytest.mark.parametrize("deg", [2, 4])
def test_transforms_see_the_same(deg):
    x = torch.randn(3, 24, dtype=torch.float64)

    def phi(x):
        return retention.expand(x, deg)

    torch.compiler.reset()
    ways = [torch.compile(phi, fullgraph=True, backend="aot_eager"), torch.vmap(phi)]
    for way in (*ways, torch.func.functionalize(phi), phi):
        assert torch.equal(way(x), phi(x))


@pytest.mark.parametrize("deg", [2, 4])
def test_fakes_of_tensors_that_were_expanded_before(deg):
    x = torch.randn(3, 24)
    real = retention.expand(x, deg)
    with FakeTensorMode() as mode:
        fake = retention.expand(mode.from_tensor(x), deg)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == real.shape
