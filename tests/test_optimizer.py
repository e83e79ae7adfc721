"""AdamW through a resize, and the learning rate."""
from argparse import Namespace

import pytest
import torch

import v10_transformer_lowrank_scaled as v10
from test_spectra import factors, relative

LR = 0.01


def adamw(parameters, lr=LR, **settings):
    optimizer = torch.optim.AdamW(parameters, lr=lr, **settings)
    optimizer.moments = {"exp_avg": 1, "exp_avg_sq": 2}
    return optimizer


def layer_and_optimizer(U, V, lr=0.0, make=adamw):
    """A layer with these factors; with a learning rate of zero an optimizer collects moments and leaves them alone."""
    layer = v10.LowRankLinearAdaptiveSpectral(V.shape[1], U.shape[0], 1).to(U.dtype)
    layer.set_factors(U, V)
    return layer, make(layer.parameters(), lr, weight_decay=0.0)


def feed(layer, optimizer, history):
    """Give the optimizer the factors' gradients for each G = dL/dW of a history."""
    for G in history:
        layer.U.grad, layer.V.grad = G @ layer.V.detach().T, layer.U.detach().T @ G
        optimizer.step()


def history(m, n, steps=7):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(m, n, generator=g, dtype=torch.float64) for _ in range(steps)]


def moments(layer, optimizer, name="exp_avg"):
    return optimizer.state[layer.U][name], optimizer.state[layer.V][name]


@pytest.mark.parametrize(("m", "n", "r", "k"), [(30, 40, 12, 7), (40, 30, 12, 11), (20, 20, 20, 1)])
def test_first_moments_through_a_lossy_shrink_equal_those_of_the_same_history_fed_to_the_new_factors(m, n, r, k):
    layer, optimizer = layer_and_optimizer(*factors(m, n, r))
    feed(layer, optimizer, history(m, n))
    U, V, *maps = v10.resize_factors(*layer.factors(), k, torch.Generator())
    layer.set_factors(U, V)
    v10.transport_moments(optimizer, layer, *maps)
    fresh, reference = layer_and_optimizer(U, V)
    feed(fresh, reference, history(m, n))
    for carried, expected in zip(moments(layer, optimizer), moments(fresh, reference), strict=True):
        assert relative(carried, expected) < 1e-12


def test_second_moments_are_mapped_by_squares():
    layer, optimizer = layer_and_optimizer(*factors(30, 40, 12))
    feed(layer, optimizer, history(30, 40))
    old_U, old_V = (moment.clone() for moment in moments(layer, optimizer, "exp_avg_sq"))
    U, V, A, B, carried = v10.resize_factors(*layer.factors(), 7, torch.Generator())
    layer.set_factors(U, V)
    v10.transport_moments(optimizer, layer, A, B, carried)
    new_U, new_V = moments(layer, optimizer, "exp_avg_sq")
    assert torch.allclose(new_U, old_U @ (B * B).T, rtol=1e-12, atol=0)
    assert torch.allclose(new_V, (A * A).T @ old_V, rtol=1e-12, atol=0)


def test_growth_keeps_old_moments_and_gives_new_directions_none_and_the_mean():
    layer, optimizer = layer_and_optimizer(*factors(30, 40, 6))
    feed(layer, optimizer, history(30, 40))
    first, second = ([m.clone() for m in moments(layer, optimizer, name)] for name in ("exp_avg", "exp_avg_sq"))
    U, V, *maps = v10.resize_factors(*layer.factors(), 9, torch.Generator().manual_seed(0))
    layer.set_factors(U, V)
    v10.transport_moments(optimizer, layer, *maps)
    (m_U, m_V), (s_U, s_V) = moments(layer, optimizer), moments(layer, optimizer, "exp_avg_sq")
    assert torch.equal(m_U[:, :6], first[0])
    assert torch.equal(m_V[:6], first[1])
    assert torch.equal(s_U[:, :6], second[0])
    assert torch.equal(s_V[:6], second[1])
    assert not m_U[:, 6:].any()
    assert not m_V[6:].any()
    assert torch.allclose(s_U[:, 6:], second[0].mean(1, keepdim=True).expand(-1, 3))
    assert torch.allclose(s_V[6:], second[1].mean(0, keepdim=True).expand(3, -1))


def test_the_first_steps_after_growth_are_of_the_size_of_the_learning_rate():
    layer, optimizer = layer_and_optimizer(*factors(30, 40, 6, unbalanced=False), lr=LR)
    feed(layer, optimizer, history(30, 40, steps=50))
    U, V, *maps = v10.resize_factors(*layer.factors(), 9, torch.Generator().manual_seed(0))
    layer.set_factors(U, V)
    v10.transport_moments(optimizer, layer, *maps)
    feed(layer, optimizer, history(30, 40, steps=1))
    assert layer.U.detach()[:, 6:].square().mean().sqrt() < LR


def layers_and_args(choice, generator):
    torch.manual_seed(0)
    layers = [v10.LowRankLinearAdaptiveSpectral(30, 40, 12) for _ in range(3)]
    other = torch.nn.Linear(30, 40)
    optimizer = adamw([p for module in [*layers, other] for p in module.parameters()])
    x = torch.randn(50, 30, generator=generator)
    sum(module(x).square().mean() for module in [*layers, other]).backward()
    optimizer.step()
    return layers, other, optimizer, Namespace(power_iterations=5, optimizer_on_resize=choice)


@pytest.mark.parametrize("choice", ["reinit", "transport"])
def test_a_resize_drops_all_state_or_keeps_that_of_untouched_layers(choice):
    generator = torch.Generator().manual_seed(0)
    layers, other, optimizer, args = layers_and_args(choice, generator)
    before = {p: {name: value.clone() for name, value in state.items()} for p, state in optimizer.state.items()}
    up, down, still = (v10.RankController(ema_decay=0, min_rank=rank, max_rank=rank) for rank in (14, 9, 12))
    update, resized = v10.update_ranks(layers, [up, down, still], [12.0] * 3, [optimizer], args, generator)
    assert [layer.rank for layer in layers] == [14, 9, 12]
    assert resized == 2
    assert (update["reasons"], update["ema"]) == (["min", "min", "keep"], [14, 9, 12])
    if choice == "reinit":
        assert not optimizer.state
    else:
        for p in [layers[2].U, layers[2].V, other.weight, other.bias]:
            assert all(torch.equal(value, before[p][name]) for name, value in optimizer.state[p].items())
        assert all(optimizer.state[layer.U]["exp_avg"].shape == layer.U.shape for layer in layers)
        assert all(optimizer.state[layer.V]["exp_avg_sq"].shape == layer.V.shape for layer in layers)
    assert set(optimizer.param_groups[0]["params"]) == {p for module in [*layers, other] for p in module.parameters()}
    sum(layer(torch.randn(5, 30)).square().mean() for layer in layers).backward()
    optimizer.step()


@pytest.mark.parametrize("choice", ["reinit", "transport"])
def test_fused_adamw_steps_like_the_plain_one_before_and_after_a_resize(choice):
    results = []
    for fused in (False, True):  # the fused one takes moments as they lie in memory, whatever their strides say
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layers = [v10.LowRankLinearAdaptiveSpectral(30, 40, 12).double() for _ in range(3)]
        optimizer = adamw([p for layer in layers for p in layer.parameters()], fused=fused)
        controllers = [v10.RankController(ema_decay=0, min_rank=rank, max_rank=rank) for rank in (14, 9, 12)]
        args = Namespace(power_iterations=5, optimizer_on_resize=choice)
        for step in range(6):
            if step == 3:
                v10.update_ranks(layers, controllers, [12.0] * 3, [optimizer], args, generator)
            x = torch.randn(50, 30, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            sum(layer(x).square().mean() for layer in layers).backward()
            optimizer.step()
        results.append([p.detach() for layer in layers for p in layer.parameters()])
    for plain, fused in zip(*results, strict=True):
        assert relative(fused, plain) < 1e-9


@pytest.mark.parametrize("choice", ["reinit", "transport"])
def test_without_a_resize_all_state_is_kept(choice):
    generator = torch.Generator().manual_seed(0)
    layers, _, optimizer, args = layers_and_args(choice, generator)
    still = v10.RankController(min_rank=12, max_rank=12)
    v10.update_ranks(layers, [still] * 3, [12.0] * 3, [optimizer], args, generator)
    assert len(optimizer.state) == 8


@pytest.mark.parametrize(("schedule", "warmup", "expected"), [
    ("constant", 0, {0: 1.0, 5: 1.0, 9: 1.0}),
    ("constant", 4, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
    ("cosine", 0, {0: 1.0, 5: 0.5, 10: 0.0}),
    ("cosine", 2, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 10: 0.0}),
])
def test_the_learning_rate_follows_the_table(schedule, warmup, expected):
    args = Namespace(lr_schedule=schedule, warmup_steps=warmup, epochs=5, steps_per_epoch=2)
    for rate in (1.0, 0.3):  # of a parameter group
        assert [v10.learning_rate(step, rate, args) / rate for step in expected] == pytest.approx([*expected.values()])


def test_the_optimizer_covers_every_parameter():
    model = v10.GPT(v10.GPTConfig(31, 24, 1, 3, 40, 16), lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 6))
    (optimizer,) = v10.Variant().make_optimizers(model, Namespace(lr=LR, weight_decay=0.02))
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (LR, 0.02)
