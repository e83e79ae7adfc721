"""The loss: what F.linear and F.cross_entropy compute, in tiles; and blocks that are compiled once for all ranks."""
import pytest
import torch
import torch.nn.functional as F

import v10_transformer_lowrank_scaled as v10
from conftest import records

N, C, V = 23, 5, 37


def problem(dtype=torch.float64, spread=1.0):
    torch.manual_seed(0)
    x, W, b = (torch.randn(*shape, dtype=dtype).mul_(spread).requires_grad_() for shape in ((N, C), (V, C), (V,)))
    return x, W, b, torch.randint(V, (N,))


def ours(x, W, b, targets, dtype=None, grad=True):
    return v10.LinearCrossEntropy.apply(x, W, b, targets, dtype or x.dtype, grad)


@pytest.mark.parametrize("tokens", [1, 4, 7, 23, 1000])
@pytest.mark.parametrize("reduction", [3, 37, 1000])
def test_loss_and_gradients_are_exact_whatever_the_tiles(monkeypatch, tokens, reduction):
    monkeypatch.setattr(v10, "LOGITS_BYTES", tokens * V * 8)
    monkeypatch.setattr(v10, "REDUCTION", reduction)
    x, W, b, targets = problem()
    want, got = F.cross_entropy(F.linear(x, W, b), targets), ours(x, W, b, targets)
    assert got.item() == pytest.approx(want.item(), rel=1e-14)
    for theirs, mine in zip(torch.autograd.grad(want / 4, (x, W, b)), torch.autograd.grad(got / 4, (x, W, b)),
                            strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("aligned", [1, 8, 37, 64])
def test_words_that_fill_up_a_size_change_nothing(monkeypatch, aligned):
    want = ours(*(given := problem()))
    gradients = torch.autograd.grad(want, given[:3])
    monkeypatch.setattr(v10, "ALIGNED", {("cpu", torch.float64): aligned})
    widths, product = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: widths.add(out.shape[1]) or product(*a, out=out))
    got = ours(*(given := problem()))
    assert widths == {-(-V // aligned) * aligned}
    assert got.item() == pytest.approx(want.item(), rel=1e-14)
    for mine, theirs in zip(torch.autograd.grad(got, given[:3]), gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-16)


def test_no_tile_holds_more_than_its_bytes(monkeypatch):
    shapes, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, out: shapes.append(tuple(out.shape)) or product(*a, out=out))
    monkeypatch.setattr(v10, "LOGITS_BYTES", 7 * V * 8)
    ours(*problem())
    assert sum(tokens for tokens, _ in shapes) == N
    assert max(tokens for tokens, _ in shapes) <= 7


def test_loss_and_gradients_of_extreme_logits_are_those_of_cross_entropy():
    x, W, b, targets = problem(torch.float32, spread=100.0)
    want, got = F.cross_entropy(F.linear(x, W, b), targets), ours(x, W, b, targets)
    assert want > 1e3
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for theirs, mine in zip(torch.autograd.grad(want, (x, W, b)), torch.autograd.grad(got, (x, W, b)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_loss_and_gradients_are_off_by_the_rounding_of_the_products_alone_and_not_to_one_side(monkeypatch):
    monkeypatch.setattr(v10, "LOGITS_BYTES", 300 * 500 * 4)  # tiles of 256, 256 and 88 tokens
    monkeypatch.setattr(v10, "CACHE_BYTES", 100 * 500 * 4)
    torch.manual_seed(0)
    x, W, b = (torch.randn(*shape) for shape in ((600, 32), (500, 32), (500,)))
    x, W = x.bfloat16(), W.bfloat16().float()  # what rounding these does to the loss is not asked here
    logits = F.linear(x.float(), W, b)
    targets = torch.cat([logits[:300].argmax(1), torch.randint(500, (300,))])  # some are all but certain
    ours_in, exact_in = ([t.to(dtype).requires_grad_() for t in (x, W, b)] for dtype in (None, torch.float64))
    ours_in[0] = x.clone().requires_grad_()
    loss = ours(*ours_in, targets, torch.bfloat16)
    want = F.cross_entropy(F.linear(*exact_in), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), abs=2e-3)
    for mine, theirs in zip(torch.autograd.grad(loss, ours_in), torch.autograd.grad(want, exact_in), strict=True):
        mine = mine.double()
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
        assert (mine * theirs).sum() == pytest.approx((theirs * theirs).sum().item(), rel=1e-3), "biased"


def test_evaluation_forms_no_gradient(monkeypatch):
    monkeypatch.setattr(v10, "add_product", lambda *_, **__: pytest.fail("a gradient is formed"))
    model = v10.GPT(v10.GPTConfig(V, 8, 1, 2, 16, 6), lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 3))
    tokens = torch.randint(V, (50,))
    assert v10.evaluate(model, tokens, 2) == pytest.approx(torch.tensor(V).log().item(), rel=0.3)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo itself looks at it
def test_ranks_change_and_nothing_is_compiled_again(run, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward
    compile_block = v10.Block.compile
    monkeypatch.setattr(v10.Block, "compile", lambda self, **how: compile_block(self, backend=backend, **how))
    torch.compiler.reset()
    compiled, plain = run("--compile", "--epochs", 4, name="compiled"), run("--epochs", 4)
    assert sum(record["resized"] for record in records(compiled, "epoch")) > 12
    assert sorted(graphs) in ([False, True], [False, False, True, True]), "more than a graph a mode"
    for one, other in zip(records(plain, "epoch"), records(compiled, "epoch"), strict=True):
        assert other["ranks"] == one["ranks"]
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
