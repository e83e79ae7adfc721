"""v11: controlled steps of W = U V, tied heads, shared layers, self-guided training."""
import contextlib
import itertools
import os
import signal
import subprocess
from argparse import Namespace

import pytest
import torch

import plot_logs
import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_selfguided as selfguided
import v11_transformer_lowrank_spectron as v11
from conftest import RANKS, ROOT, SMALL, records, unpainted, untimed
from test_optimizer import feed, history, layer_and_optimizer
from test_parallel import TORCHRUN, two_processes
from test_safety import Killed, at_call, die
from test_spectra import factors, relative

SHAPES = [(30, 40), (40, 30), (30, 40), (12, 12), (50, 10)]


def matrices(seed=0, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def parameters(values):
    return [torch.nn.Parameter(value.clone()) for value in values]


def norm(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def give(parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


# ---- Newton-Schulz, power iteration, Muon ----------------------------------------------------------------------------

def test_orthogonalise_gives_each_direction_nearly_the_same_size_and_keeps_the_directions():
    for M, result in zip(matrices(), v11.orthogonalise(matrices()), strict=True):
        P, S, Qt = torch.linalg.svd(M, full_matrices=False)
        inner = P.T @ result @ Qt.T
        a, b, c = 3.4445, -4.7750, 2.0315
        s = S / M.norm()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        assert torch.allclose(inner, torch.diag(s), atol=1e-9)
        assert s.max() < 1.21
    assert not v11.orthogonalise([torch.zeros(3, 4)])[0].any()


def test_in_bfloat16_its_singular_values_stay_within_the_same_bounds():
    for size in ((64, 512), (2048, 64), (256, 256)):
        M, = matrices(3, [size], torch.float32)
        result, = v11.orthogonalise([M], torch.bfloat16)
        S = torch.linalg.svdvals(result)
        assert result.dtype == torch.float32
        assert S.max() < 1.22
        assert S[torch.linalg.svdvals(M) > 0.01 * M.norm()].min() > 0.66


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs_muon_step_for_step(monkeypatch, nesterov, decay):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's would round to it
    ours, theirs = parameters(matrices()), parameters(matrices())
    settings = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": decay}
    one, other = v11.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(1, 8):
        for some, optimizer in ((ours, one), (theirs, other)):
            give(some, matrices(step))
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert relative(a, b) < 1e-12


def test_power_iteration_approaches_the_largest_singular_value_from_below():
    g = torch.Generator().manual_seed(1)
    vectors = [torch.randn(len(M), generator=g, dtype=torch.float64) for M in matrices()]
    for steps, tolerance in ((1, 0.6), (20, 0.05), (2000, 1e-9)):
        norms, found = v11.power_iteration(matrices(), vectors, steps)
        for M, sigma, x in zip(matrices(), norms, found, strict=True):
            assert (1 - tolerance) * norm(M) <= sigma <= norm(M) * (1 + 1e-12)
            assert x.norm() == pytest.approx(1)


def test_power_iteration_finds_a_matrix_again_that_was_zero_for_a_while():
    M = matrices()[0]
    x = torch.randn(len(M), dtype=M.dtype, generator=torch.Generator().manual_seed(1))
    (nothing,), (kept,) = v11.power_iteration([torch.zeros_like(M)], [x])
    assert nothing == 0
    assert torch.equal(kept, x)


# ---- Spectron --------------------------------------------------------------------------------------------------------

def pair_steps(kind, eta, steps=20, exact=False, unbalanced=1.0, **settings):
    """Steps of one pair under random gradients of W -> (||dW||_2 / eta of each, the optimizer, the pair)."""
    U, V = factors(40, 30, 8, unbalanced=False)
    U, V = parameters([U * unbalanced, V / unbalanced])
    optimizer = kind([U, V], lr=eta, **settings)
    g, changes = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        G, before = torch.randn(40, 30, generator=g, dtype=torch.float64), (U @ V).detach()
        give([U, V], [G @ V.detach().T, U.detach().T @ G])
        if exact:
            P, Q = (torch.linalg.svd(factor.detach(), full_matrices=False) for factor in (U, V))
            optimizer.state[U]["vector"], optimizer.state[V]["vector"] = P.U[:, 0], Q.Vh[0]
        optimizer.step()
        changes.append((norm(U @ V - before) / eta).item())
    return changes, optimizer, (U, V)


@pytest.mark.parametrize("eta", [0.01, 0.07, 0.1])
@pytest.mark.parametrize("unbalanced", [1.0, 4.0])
def test_with_exact_norms_the_step_of_w_stays_below_eta_but_for_newton_schulzs_overshoot(eta, unbalanced):
    assert max(pair_steps(v11.Spectron, eta, exact=True, unbalanced=unbalanced)[0]) < 1.21


@pytest.mark.parametrize("eta", [0.01, 0.07, 0.1])
def test_with_an_exact_orthogonalisation_too_it_stays_below_eta(monkeypatch, eta):
    def exactly(matrices, dtype=None):
        return [P @ Qt for P, _, Qt in (torch.linalg.svd(M, full_matrices=False) for M in matrices)]
    monkeypatch.setattr(v11, "orthogonalise", exactly)
    changes = pair_steps(v11.Spectron, eta, exact=True)[0]
    assert max(changes) <= 1
    assert max(changes) > 0.5, "the bound is not idle"


def test_the_warm_started_norms_cost_the_bound_less_than_two_percent():
    for eta in (0.07, 0.1):
        warm, exact = (pair_steps(v11.Spectron, eta, steps=100, exact=exact)[0] for exact in (False, True))
        assert max(warm) < 1.02 * max(exact)


def test_without_renormalisation_unbalanced_factors_take_larger_steps_of_w():
    assert max(pair_steps(v11.FactorMuon, 0.07, unbalanced=4.0)[0]) > 2


def test_the_scales_are_those_of_the_norms_before_the_step():
    U, V = parameters(factors(40, 30, 8))
    optimizer = v11.Spectron([U, V], lr=1.0)
    s_u, s_v = optimizer.scales([U, V])
    assert s_u == s_v
    assert s_u.item() == pytest.approx(1 / (norm(U) + norm(V) + 1).item(), rel=1e-3)


def test_permuted_or_flipped_directions_permute_and_flip_the_step_and_no_more():
    order, signs = torch.randperm(8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -1.0] * 4)
    G = matrices(2, [(40, 30)])[0]
    results = []
    for changed in (False, True):
        U, V = factors(40, 30, 8)
        if changed:
            U, V = U[:, order] * signs, V[order] * signs[:, None]
        U, V = parameters([U, V])
        optimizer = v11.Spectron([U, V], lr=0.07)
        for _ in range(3):
            give([U, V], [G @ V.detach().T, U.detach().T @ G])
            optimizer.step()
        results.append((U.detach(), V.detach()))
    (U, V), (U_, V_) = results
    assert relative(U_, U[:, order] * signs) < 1e-9
    assert relative(V_, V[order] * signs[:, None]) < 1e-9


@pytest.mark.parametrize("kind", [v11.FactorMuon, v11.Spectron])
def test_momentum_through_a_lossy_shrink_is_that_of_the_same_history_fed_to_the_new_factors(kind):
    U, V = factors(30, 40, 12)
    layer, optimizer = layer_and_optimizer(U, V, make=kind)
    feed(layer, optimizer, history(30, 40))
    vectors = [state["vector"].clone() for state in optimizer.state.values() if "vector" in state]
    new_U, new_V, *maps = v10.resize_factors(U, V, 7, torch.Generator())
    layer.set_factors(new_U, new_V)
    v10.transport_moments(optimizer, layer, *maps)
    fresh, reference = layer_and_optimizer(new_U, new_V, make=kind)
    feed(fresh, reference, history(30, 40))
    for ours, theirs in ((layer.U, fresh.U), (layer.V, fresh.V)):
        assert relative(optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"]) < 1e-12
    kept = [state["vector"] for state in optimizer.state.values() if "vector" in state]
    assert len(kept) == (2 if kind is v11.Spectron else 0)
    assert all(map(torch.equal, kept, vectors))


@pytest.mark.parametrize("decay_on", ["factors", "product"])
def test_decay_falls_on_the_factors_or_is_the_gradient_of_half_the_squared_norm_of_the_product(decay_on):
    U, V = parameters(factors(40, 30, 8))
    before = [U.detach().clone().requires_grad_(), V.detach().clone().requires_grad_()]
    give([U, V], [torch.zeros_like(U), torch.zeros_like(V)])
    v11.Spectron([U, V], lr=0.1, weight_decay=0.5, decay_on=decay_on).step()
    ((before[0] @ before[1]).square().sum() / 2).backward()
    for factor, old in zip((U, V), before, strict=True):
        expected = 0.95 * old if decay_on == "factors" else old - 0.05 * old.grad
        assert relative(factor, expected) < 1e-12


@pytest.mark.parametrize(("optimizer", "eta"), [("spectron", 0.07), ("muon", 0.07), ("adamw", None), ("adamw", 0.07)])
@pytest.mark.parametrize("flags", [{}, {"tie_embeddings": True}, {"share_layers": True}])
def test_the_optimizers_cover_every_parameter_once(optimizer, eta, flags):
    args = Namespace(optimizer=optimizer, eta=eta, lr=0.01, weight_decay=0.0, momentum=0.95, nesterov=True,
                     factor_decay=0.0, decay_on="product", epochs=2, steps_per_epoch=5)
    for variant in (v7.Dense(), v11.LowRankSpectron(), selfguided.SelfGuided()):
        if optimizer == "spectron" and isinstance(variant, v7.Dense):
            continue
        model = v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16, **flags), lambda n, m, v=variant: v.linear(n, m, 6))
        groups = v10.parameter_groups(variant.make_optimizers(model, args))
        covered = [parameter for group in groups for parameter in group["params"]]
        assert len(covered) == len(set(covered))
        assert set(covered) == set(model.parameters())


def test_an_eta_beside_adamw_is_the_rate_of_the_linear_layers_alone():
    moved = {}
    for eta in (None, 0.01, 0.03):
        torch.manual_seed(0)
        model = v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16), lambda n, m: v10.DenseLinear(n, m)).double()
        flags = ["--lr", "0.01", "--weight-decay", "0", *(["--eta", str(eta)] if eta else [])]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizers = v7.Dense().make_optimizers(model, v10.parse_flags(v7.Dense(), flags))
        give(model.parameters(), [torch.randn_like(p) for p in model.parameters()])
        for optimizer in optimizers:
            optimizer.step()
        moved[eta] = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    linear = {layer.weight for layer in model.linears().values()}
    for name, parameter in model.named_parameters():
        assert torch.equal(moved[0.01][name], moved[None][name])
        assert relative(moved[0.03][name], (3 if parameter in linear else 1) * moved[None][name]) < 1e-9


@pytest.mark.parametrize("flags", ["", "--optimizer adamw", "--optimizer adamw --eta 0.003"])
@pytest.mark.parametrize(("steps", "share"), [(640, 0.001), (6400, 0.0001), (5, 0.01)])
def test_decays_that_are_left_open_take_less_of_a_weight_per_step_in_longer_runs(steps, share, flags):
    flags = [*flags.split(), "--epochs", str(steps // 5), "--steps-per-epoch", "5"]
    args = v10.parse_flags(v11.LowRankSpectron(), flags)
    model = v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16), lambda n, m: v11.LowRankSpectron().linear(n, m, 6))
    for optimizer in v11.make_optimizers(model, args):
        for group in optimizer.param_groups:
            assert group["lr"] * group["weight_decay"] == pytest.approx(share)
    given = ["--weight-decay", "0", "--factor-decay", "3"]
    args = v10.parse_flags(v11.LowRankSpectron(), given)
    assert [g["weight_decay"] for o in v11.make_optimizers(model, args) for g in o.param_groups] == [0, 3]
    dense = v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16), lambda n, m: v10.DenseLinear(n, m))
    args = v10.parse_flags(v7.Dense(), ["--optimizer", "muon"])
    assert [g["weight_decay"] for o in v7.Dense().make_optimizers(dense, args) for g in o.param_groups] == [0.01, 0]


@pytest.mark.parametrize("kind", [v11.Muon, v11.FactorMuon, v11.Spectron])
def test_a_step_whose_gradient_is_not_finite_is_not_taken(kind):
    pair = parameters(factors(40, 30, 8))
    optimizer = kind(pair, lr=0.1, weight_decay=0.5)
    for found_inf, gradient in ((0.0, 1.0), (1.0, float("nan"))):
        before = [p.detach().clone() for p in pair], [optimizer.state[p].get("momentum_buffer") for p in pair]
        before = [[tensor if tensor is None else tensor.clone() for tensor in some] for some in before]
        give(pair, [torch.full_like(p, gradient) for p in pair])
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    assert all(map(torch.equal, pair, before[0]))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], old) for p, old in zip(pair, before[1], strict=True))


# ---- Self-guided training --------------------------------------------------------------------------------------------

def test_a_guided_layer_mixes_where_it_should():
    torch.manual_seed(0)
    layer, x = selfguided.SelfGuidedLinear(24, 40, 6), torch.randn(5, 24)
    G, low = layer.guide.weight, layer.U @ layer.V
    layer.guide.alpha.fill_(0.3)
    mixed = x @ (0.3 * G + 0.7 * low).T
    for training, uses_guide, expected in ((True, True, mixed), (True, False, x @ low.T), (False, False, mixed),
                                           (False, True, mixed)):
        layer.train(training).uses_guide = uses_guide
        assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.guide = None
    assert torch.allclose(layer(x), x @ low.T, atol=1e-5)
    P, S, Qt = torch.linalg.svd(G)
    assert relative(low, (P[:, :6] * S[:6]) @ Qt[:6]) < 1e-5


def test_the_guides_share_follows_the_table():
    assert [selfguided.guide_share(step, 400) for step in (1, 101, 201, 400)] == pytest.approx([1, 0.5, 0, 0])
    assert selfguided.guide_share(200, 400) == 0, "what is left of it is rounding"


def test_a_guide_is_used_with_the_probability_of_its_share_and_gone_in_the_second_half(run, monkeypatch):
    seen, train_step = [], v10.train_step

    def spy(model, *rest):
        seen.append([(layer.guide is not None, layer.guide is not None and layer.uses_guide)
                     for layer in model.linears().values()])
        return train_step(model, *rest)
    monkeypatch.setattr(v10, "train_step", spy)
    log = run("--epochs", 4, "--steps-per-epoch", 50, "--lr", 1e-3, main=selfguided.main)
    used = torch.tensor(seen).float().mean(1)  # (steps, 2)
    assert used[:95, 0].min() == 1
    assert used[105:].max() == 0
    for quarter, share in ((0, 0.9), (1, 0.5), (2, 0.1)):  # around the first step, a quarter, and the half
        around = used[[range(0, 40), range(35, 65), range(60, 100)][quarter], 1].mean()
        assert around == pytest.approx(share, abs=0.1)
    sizes = [epoch["factor_params_millions"] for epoch in records(log, "epoch")]
    assert sizes[0] > sizes[-1] == sizes[2]


def test_intervals_at_which_the_guides_would_never_go_are_refused():
    parser = v10.build_parser(selfguided.SelfGuided())
    for steps, interval in itertools.product(range(1, 30), range(1, 32)):
        flags = ["--epochs", "1", "--steps-per-epoch", str(steps), "--rank-interval", str(interval)]
        gone = any(selfguided.guide_share(step, steps) == 0 for step in range(interval, steps + 1, interval))
        with contextlib.nullcontext() if gone else pytest.raises(v10.UserError, match="the guides go at a rank update"):
            selfguided.SelfGuided().complete(parser.parse_args(flags))


def test_a_resume_that_ends_before_the_guides_are_gone_says_so(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", at_call(5, v10.train_step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        run(main=selfguided.main, code=143)
    run("--epochs", 1, "--resume", main=selfguided.main)
    assert "*** the layers still have their guides: --resume with" in capsys.readouterr().out


def test_a_resume_with_more_epochs_takes_the_decays_of_their_number(run):
    log = run("--epochs", 2, "--cuts", 0, main=v11.main)
    run("--epochs", 40, "--cuts", 0, "--resume", main=v11.main)
    other = run("--epochs", 40, "--cuts", 0, main=v11.main, name="other")
    resumed, straight = ([group["weight_decay"] for optimizer in v10.load(path.with_suffix(".pt"))["optimizer"]
                          for group in optimizer["param_groups"]] for path in (log, other))
    assert resumed == straight


# ---- Spectral initialisation, tied heads, shared layers --------------------------------------------------------------

def test_factors_start_as_the_balanced_best_approximation_of_a_dense_layers_start():
    for rank in (5, 24):
        torch.manual_seed(0)
        v10.LowRankLinearAdaptiveSpectral(24, 40, rank)
        W = torch.nn.Linear(24, 40, bias=False).weight.detach()
        torch.manual_seed(0)
        layer = v11.LowRankSpectron().linear(24, 40, rank)
        P, S, Qt = torch.linalg.svd(W)
        assert relative(layer.U.detach() @ layer.V.detach(), (P[:, :rank] * S[:rank]) @ Qt[:rank]) < 1e-5
        assert torch.allclose(layer.U.T @ layer.U, torch.diag(S[:rank]), atol=1e-5)
        assert torch.allclose(layer.V @ layer.V.T, torch.diag(S[:rank]), atol=1e-5)


def model(linear=v10.DenseLinear, **flags):
    torch.manual_seed(0)
    return v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16, **flags), linear)


def test_a_tied_model_starts_with_the_inputs_of_an_untied_one_and_counts_its_matrix_once():
    tied, untied = model(tie_embeddings=True), model()
    tokens = torch.arange(16)[None]
    assert torch.allclose(tied.features(tokens), untied.features(tokens), atol=1e-6)
    assert v10.count_parameters(untied) - v10.count_parameters(tied) == 31 * 24
    assert tied.head.weight.var().item() == pytest.approx(1 / 24, rel=0.2)


def gradients(model, tokens):
    """The gradients of the loss, of each name, also of those that share a parameter."""
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def untangled(model):
    """The same function, every use with a parameter of its own."""
    config = v10.GPTConfig(**vars(model.config) | {"share_layers": False})
    apart = v10.GPT(config, v10.DenseLinear).double()
    apart.load_state_dict(model.state_dict())
    apart.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    return apart


def test_tied_and_shared_weights_have_one_gradient_the_sum_of_all_uses():
    joined = model(tie_embeddings=True, share_layers=True).double()
    assert len(joined.linears()) == 6
    apart, tokens = untangled(joined), torch.randint(31, (3, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = gradients(joined, tokens), gradients(apart, tokens)
    assert relative(ours["head.weight"], theirs["head.weight"] + theirs["token_embedding.weight"]) < 1e-12
    assert ours["head.weight"] is ours["token_embedding.weight"]
    for kind in ("q", "k", "v", "o", "up", "down"):
        assert relative(ours[f"blocks.0.{kind}.weight"],
                        theirs[f"blocks.0.{kind}.weight"] + theirs[f"blocks.1.{kind}.weight"]) < 1e-12
    assert relative(ours["blocks.1.norm_1.weight"], theirs["blocks.1.norm_1.weight"]) < 1e-12
    assert v10.count_parameters(model()) - v10.count_parameters(joined) == 31 * 24 + 4 * 24 * 24 + 2 * 24 * 40


def test_tied_and_shared_weights_are_saved_once(tmp_path):
    sizes = {}
    for flags in ({}, {"tie_embeddings": True, "share_layers": True}):
        made = model(**flags)
        v10.save(tmp_path / "m.pt", {"format": v10.FORMAT, "model": made.state_dict()})
        sizes[v10.count_parameters(made)] = (tmp_path / "m.pt").stat().st_size
    (many, large), (few, small) = sizes.items()
    assert large - small == pytest.approx(4 * (many - few), abs=2000)


# ---- Whole runs ------------------------------------------------------------------------------------------------------

ADAPTIVE = ["--no-fixed-rank", "--cuts", 0, "--rank-interval", 3, *RANKS]
RUNS = {  # how: (main, flags)
    "spectron": (v11.main, [*ADAPTIVE, "--factor-decay", 0.1]),
    "spectron in bfloat16": (v11.main, [*ADAPTIVE, "--dtype", "bfloat16"]),
    "cuts": (v11.main, [*RANKS, "--cuts", 7, "--cut-from", 0.1, "--cut-to", 0.9, "--rank-budget", 0.4]),
    "muon, shared": (v11.main, [*ADAPTIVE, "--optimizer", "muon", "--share-layers", "--no-nesterov"]),
    "adamw, untied": (v11.main, [*ADAPTIVE, "--optimizer", "adamw", "--no-tie-embeddings"]),
    "dense, muon": (v7.main, ["--optimizer", "muon", "--tie-embeddings", "--dropout", 0.1]),
    "self-guided": (selfguided.main, [*ADAPTIVE, "--optimizer", "spectron"]),
    "self-guided, adamw": (selfguided.main, [*RANKS, "--epochs", 6, "--dtype", "bfloat16"])}


@pytest.mark.parametrize("how", RUNS)
def test_a_run_that_dies_goes_on_bit_for_bit_and_its_model_and_its_log_are_read(run, monkeypatch, how):
    main, flags = RUNS[how]
    settings = {"main": main, "ranks": []}
    straight = run(*flags, "--checkpoint-minutes", 1e6, name="straight", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(v10, "train_step", at_call(14, v10.train_step, die))
        with pytest.raises(Killed):
            run(*flags, "--checkpoint-minutes", 1e-6, **settings)
    log = run(*flags, "--checkpoint-minutes", 1e-6, "--resume", **settings)
    assert records(log, "resume")[0]["step"] == 13
    for kind in ("epoch", "ranks", "cut", "end"):
        assert untimed(log, kind) == untimed(straight, kind)
    assert len(records(log, "cut")) == 7 * (how == "cuts")
    assert records(log, "ranks") or "--rank-interval" not in flags
    last, end = v10.load(log.with_suffix(".pt")), records(log, "end")[0]
    assert all(torch.equal(value, v10.load(straight.with_suffix(".pt"))["model"][name])
               for name, value in last["model"].items())
    model, vocabulary = v10.load_model(log.with_suffix(".pt"))  # v10's own reader
    model.low_precision = "bfloat16" in flags
    corpus = v10.load_corpus(run.folder / "text.tokens", 0.1, 8)
    assert v10.evaluate(model, corpus.val, 4) == pytest.approx(end["final_val_loss"], rel=1e-6)
    assert v10.count_parameters(model) == records(log, "epoch")[-1]["params_millions"] * 1e6
    if how in ("cuts", "muon, shared", "dense, muon", "self-guided"):
        monkeypatch.setattr(plot_logs, "save", unpainted)
        assert plot_logs.main([str(log), "--out", str(run.folder / "figures")]) == 0


@pytest.mark.parametrize("how", [
    pytest.param("spectron", marks=pytest.mark.soak), "muon, shared", "cuts", "self-guided"])
def test_two_processes_train_it_as_one_does(run, text, tmp_path, how):
    main, flags = RUNS[how]
    variant = selfguided.SelfGuided if main is selfguided.main else v11.LowRankSpectron
    flags = [*flags, "--dropout", "0", "--telemetry"]
    if how == "cuts":  # as users do
        command = [*TORCHRUN, ROOT / variant.name, "--data-file", text, "--log-file", tmp_path / "two.jsonl", *SMALL]
        subprocess.run([*map(str, [*command, *flags])], check=True, capture_output=True)
    else:
        both = two_processes(text, tmp_path / "two.jsonl", *flags, variant=variant, ranks=[])
        assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    one = run(*flags, main=main, ranks=[])
    assert [cut["ranks"] for cut in records(tmp_path / "two.jsonl", "cut")] == [
        cut["ranks"] for cut in records(one, "cut")]
    for ours, theirs in zip(records(one, "epoch"), records(tmp_path / "two.jsonl", "epoch"), strict=True):
        assert theirs["ranks"] == ours["ranks"]
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=1e-4)
        assert theirs["output_changes"] == pytest.approx(ours["output_changes"], rel=0.05)


def test_both_rates_follow_the_schedule_and_the_warm_up_takes_a_twentieth(run, monkeypatch):
    seen, train_step = [], v10.train_step

    def spy(model, optimizers, *rest):
        seen.append([group["lr"] for group in v10.parameter_groups(optimizers)])
        return train_step(model, optimizers, *rest)
    monkeypatch.setattr(v10, "train_step", spy)
    run("--epochs", 8, "--eta", 0.5, "--cuts", 0, main=v11.main)
    assert seen[0] == [0.005, 0.25]
    assert seen[1] == [0.01, 0.5]
    for lr, eta in seen:
        assert eta == pytest.approx(50 * lr)
    assert seen[-1][0] < 1e-4


# ---- Telemetry -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("main", [v7.main, v10.main, v11.main])
def test_telemetry_changes_no_number_of_the_run(run, main):
    ranks = {v7.main: [], v10.main: RANKS, v11.main: [*RANKS, "--cuts", "0"]}[main]
    plain, told = (run(*flags, "--dropout", 0.1, name=f"log{len(flags)}", main=main, ranks=ranks)
                   for flags in ([], ["--telemetry"]))
    named = {"update_norms", "weight_norms", "output_changes"}
    for one, other in zip(untimed(plain), untimed(told), strict=True):
        assert {name: value for name, value in other.items() if name not in named} == one
        assert named <= other.keys()


@pytest.mark.parametrize("linear", [v10.DenseLinear, lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 6)])
def test_telemetry_is_what_the_dense_products_say(linear):
    ours, tokens = model(linear).double(), torch.randint(31, (4, 16), generator=torch.Generator().manual_seed(0))
    layers = list(ours.linears().values())
    before = [[factor.clone() for factor in layer.factors()] for layer in layers]
    old = {name: W.clone() for name, W in v10.dense_weights(ours).items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, dtype=torch.float64)
    inputs = {}
    for name, layer in ours.linears().items():
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    found, new = v10.telemetry(ours, before, tokens, parts=2), v10.dense_weights(ours)
    ours.features(tokens)
    for i, name in enumerate(new):
        change = inputs[name] @ (new[name] - old[name]).T
        assert found["update_norms"][i] == pytest.approx(norm(new[name] - old[name]).item(), rel=1e-9)
        assert found["weight_norms"][i] == pytest.approx(norm(new[name]).item(), rel=1e-9)
        assert found["output_changes"][i] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-6)
