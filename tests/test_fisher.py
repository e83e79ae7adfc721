"""The Fisher cut: what it measures, which directions it keeps, what becomes of the momentum, and the budget."""
import argparse
import itertools
import os
import signal

import pytest
import torch

import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
from conftest import RANKS, records, untimed
from test_optimizer import feed, history, layer_and_optimizer
from test_safety import at_call
from test_spectra import factors, relative


def second_moment(size, seed, rank=None):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(size, rank or 3 * size, generator=g, dtype=torch.float64)
    return X @ torch.diag(torch.rand(X.shape[1], generator=g, dtype=torch.float64) ** 3 + 1e-3) @ X.T


def root(matrix):
    values, Q = torch.linalg.eigh(matrix)
    return (Q * values.clamp(min=0).sqrt()) @ Q.T


def layer(m=10, n=12, r=6, **ranks):
    """U, V, the second moments G and C of dL/dy and of x, and the Fisher that they make."""
    U, V = factors(m, n, r)
    G, C = second_moment(m, 1, ranks.get("G")), second_moment(n, 2, ranks.get("C"))
    return U, V, G, C, v11.Fisher(V @ C @ V.T, U.T @ G @ U, (torch.trace(G) / m).item())


def cost(G, C, dW):
    """E[(dL/dy^T dW x)^2] for independent x and dL/dy."""
    return torch.trace(G @ dW @ C @ dW.T).item()


@pytest.mark.parametrize("ranks", [{}, {"C": 4}, {"G": 4}, {"G": 3, "C": 5}])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_no_product_of_that_rank_costs_less(ranks, k):
    U, V, G, C, fisher = layer(**ranks)
    s, A, B = v11.fisher_directions(U, fisher, damping=0)
    P, S, Qt = torch.linalg.svd(root(G) @ U @ V @ root(C))  # the best of all matrices: Eckart and Young
    cut = U @ A[:, :k] @ B[:k] @ V
    assert torch.allclose(s, S[:6], atol=1e-6 * S[0].item())
    assert cost(G, C, U @ V - cut) == pytest.approx((S[k:6] ** 2).sum().item(), rel=1e-6, abs=1e-9 * S[0].item() ** 2)


def test_a_direction_costs_its_s_squared_and_the_costs_add_up():
    U, V, G, C, fisher = layer()
    s, A, B = v11.fisher_directions(U, fisher, damping=0)
    for dropped in itertools.combinations(range(6), 2):
        dW = sum(U @ A[:, [i]] @ B[[i]] @ V for i in dropped)
        assert cost(G, C, dW) == pytest.approx(sum(s[i] ** 2 for i in dropped).item(), rel=1e-9)


@pytest.mark.parametrize("damping", [0, 1e-3])
def test_the_maps_undo_each_other_and_keeping_all_directions_changes_nothing(damping):
    U, V, G, C, fisher = layer()
    _, A, B = v11.fisher_directions(U, fisher, damping)
    assert relative(B @ A, torch.eye(6, dtype=torch.float64)) < 1e-9
    new_U, new_V, A, B, carried = v11.cut_factors(U, V, A, B, None)
    assert carried == 6
    assert relative(new_U @ new_V, U @ V) < 1e-9
    assert relative(B @ A, torch.eye(6, dtype=torch.float64)) < 1e-9


@pytest.mark.parametrize("damping", [0, 1e-3, 0.5])
def test_how_w_is_split_does_not_matter(damping):
    U, V, G, C, fisher = layer()
    M = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    other = v11.Fisher(*((X @ Y @ X.T) for X, Y in ((torch.linalg.inv(M), fisher.H), (M.T, fisher.D))), fisher.g)
    cuts = []
    for U_, V_, fisher_ in ((U, V, fisher), (U @ M, torch.linalg.inv(M) @ V, other)):
        s, A, B = v11.fisher_directions(U_, fisher_, damping)
        cuts.append((s, U_ @ A[:, :3] @ B[:3] @ V_))
    assert relative(cuts[1][0], cuts[0][0]) < 1e-8
    assert relative(cuts[1][1], cuts[0][1]) < 1e-8


def test_damping_is_that_of_the_second_moment_of_the_outputs_gradient():
    U, V, G, C, fisher = layer()
    damped = fisher._replace(D=U.T @ (G + 0.3 * fisher.g * torch.eye(10, dtype=torch.float64)) @ U)
    ours, theirs = v11.fisher_directions(U, fisher, damping=0.3), v11.fisher_directions(U, damped, damping=0)
    assert relative(ours[0], theirs[0]) < 1e-12


def test_the_plain_cut_is_the_truncated_svd_and_so_is_the_fisher_cut_for_white_inputs_and_gradients():
    U, V, *_ = layer()
    white = v11.Fisher(2.5 * V @ V.T, 0.4 * U.T @ U, 0.4)
    P, S, Qt = torch.linalg.svd(U @ V)
    for _, A, B in (v11.plain_directions(U, V), v11.fisher_directions(U, white)):
        assert relative(U @ A[:, :3] @ B[:3] @ V, (P[:, :3] * S[:3]) @ Qt[:3]) < 1e-9
    assert relative(v11.plain_directions(U, V)[0], S[:6]) < 1e-9


def test_cut_factors_are_balanced_and_come_from_their_maps():
    U, V, G, C, fisher = layer()
    _, A, B = v11.fisher_directions(U, fisher)
    new_U, new_V, A_, B_, _ = v11.cut_factors(U, V, A[:, :3], B[:3], None)
    assert relative(new_U @ new_V, U @ A[:, :3] @ B[:3] @ V) < 1e-9
    assert relative(new_U.T @ new_U, new_V @ new_V.T) < 1e-9
    assert relative(U @ A_, new_U) < 1e-9
    assert relative(B_ @ V, new_V) < 1e-9


@pytest.mark.parametrize("kind", [v11.FactorMuon, v11.Spectron])
def test_momentum_through_a_cut_is_that_of_the_same_history_fed_to_the_cut_factors(kind):
    U, V, G, C, fisher = layer()
    ours, optimizer = layer_and_optimizer(U, V, make=kind)
    feed(ours, optimizer, history(10, 12))
    _, A, B = v11.fisher_directions(U, fisher)
    new_U, new_V, *maps = v11.cut_factors(U, V, A[:, :3], B[:3], None)
    ours.set_factors(new_U, new_V)
    v10.transport_moments(optimizer, ours, *maps)
    theirs, reference = layer_and_optimizer(new_U, new_V, make=kind)
    feed(theirs, reference, history(10, 12))
    for one, other in ((ours.U, theirs.U), (ours.V, theirs.V)):
        assert relative(optimizer.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"]) < 1e-9


@pytest.mark.parametrize("left", [0, 2])
def test_directions_that_w_does_not_have_are_grown_so_that_they_can_learn(left):
    """A layer without a gradient, and one of which only `left` directions are not zero."""
    U, V = factors(10, 12, 6)
    few = U * (torch.arange(6) < left)
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    for U_, fisher in ((U, v11.Fisher(nothing, nothing, 0.0)), (few, v11.Fisher(V @ V.T, few.T @ few, 0.0))):
        _, A, B = v11.fisher_directions(U_, fisher)
        new_U, new_V, *maps, carried = v11.cut_factors(U_, V, A[:, :3], B[:3], torch.Generator().manual_seed(0))
        assert (new_U.shape, new_V.shape) == ((10, 3), (3, 12))
        assert all(torch.isfinite(matrix).all() for matrix in (new_U, new_V, *maps))
        assert carried == (3 if U_ is U else left)
        if left or U_ is U:
            assert new_V.norm(dim=1).min() > 0.1, "a row of zeros never learns"


# ---- Measuring it ----------------------------------------------------------------------------------------------------

def small_model(**flags):
    torch.manual_seed(0)
    return v10.GPT(v10.GPTConfig(31, 24, 2, 3, 40, 16, dropout=0.2, **flags),
                   lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 6)).double()


def batches(count=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(31, (2, 16), generator=g) for _ in range(count)]


def test_the_moments_are_those_of_each_tokens_input_and_gradient(monkeypatch):
    model, tokens = small_model().eval(), batches(1)[0]
    labels = torch.randint(31, tokens.shape, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(v11, "draw_labels", lambda *_: labels)
    found = v11.measure_fisher(model, [tokens], seed=0)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for i, (name, factored) in enumerate(model.linears().items()):
        kept = {}
        hook = factored.register_forward_hook(lambda _, x, y, kept=kept: kept.update(x=x[0], y=y))
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
        gradient, = torch.autograd.grad(loss, kept["y"])
        hook.remove()
        h, d = (kept["x"] @ factored.V.T).flatten(0, 1), (gradient @ factored.U).flatten(0, 1)
        assert relative(found[i].H, h.T @ h / 32) < 1e-9, name
        assert relative(found[i].D, d.T @ d / 32) < 1e-6, name  # these logits are rounded to float32
        assert found[i].g == pytest.approx(gradient.square().mean().item(), rel=1e-6)


def test_labels_are_drawn_from_the_models_own_predictions():
    model, x = small_model(), torch.randn(1, 1, 24, dtype=torch.float64).expand(1, 20_000, 24)
    p = model.logits(x[:, :1]).softmax(-1).flatten()
    labels = v11.draw_labels(model, x, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels.flatten(), minlength=31)
    chi_squared = ((counts - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert chi_squared < 60, "30 degrees of freedom"
    assert not torch.equal(labels, v11.draw_labels(model, x, torch.Generator().manual_seed(1)))


def test_the_texts_own_labels_would_give_something_else(monkeypatch):
    """A model that is sure of what it predicts has small gradients for its own labels, and large ones for others."""
    model = small_model()
    model.head.weight.data *= 30
    own = v11.measure_fisher(model, batches(), seed=0)
    monkeypatch.setattr(v11, "draw_labels", lambda model, x, generator: torch.randint(31, x.shape[:2]))
    other = v11.measure_fisher(model, batches(), seed=0)
    assert all(torch.trace(a.D) < 0.7 * torch.trace(b.D) for a, b in zip(own, other, strict=True))


def test_measuring_is_the_same_again_and_for_any_share_of_the_processes(monkeypatch):
    model = small_model().train()
    state = torch.get_rng_state()
    whole = v11.measure_fisher(model, batches(), seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    shares = []
    monkeypatch.setattr(v10, "process_count", lambda: 2)
    monkeypatch.setattr(v10, "gather", lambda sums: shares.append(sums) or shares)  # the second one has both
    for index in range(2):
        monkeypatch.setattr(v10, "process_index", lambda index=index: index)
        found = v11.measure_fisher(model, batches(), seed=4)
    for one, both in zip(whole, found, strict=True):
        assert relative(both.H, one.H) < 1e-12
        assert relative(both.D, one.D) < 1e-12
        assert both.g == pytest.approx(one.g)


# ---- The budget ------------------------------------------------------------------------------------------------------

def test_the_budget_buys_the_best_score_per_parameter_first_and_is_never_exceeded():
    g = torch.Generator().manual_seed(0)
    for seed in range(50):
        sides = torch.randint(4, 30, (4,), generator=g).tolist()
        scores = [sorted(torch.rand(6, generator=g).tolist(), reverse=True) for _ in sides]
        budget = sum(sides) + 200 * seed / 50
        ranks = v11.spend(budget, sides, scores, min_rank=1)
        assert sum(rank * side for rank, side in zip(ranks, sides, strict=True)) <= budget
        kept = [score / side for rank, side, of_layer in zip(ranks, sides, scores, strict=True)
                for score in of_layer[1:rank]]
        dropped = [score / side for rank, side, of_layer in zip(ranks, sides, scores, strict=True)
                   for score in of_layer[rank:]]
        assert min(kept, default=1) >= max(dropped, default=0)


def test_a_budget_of_what_there_is_keeps_all_and_one_below_the_minimum_is_refused():
    sides, scores = [10, 20], [[3.0, 2.0, 1.0], [5.0, 1.0]]
    assert v11.spend(70, sides, scores, 1) == [3, 2]
    assert v11.spend(1000, sides, scores, 1) == [3, 2]
    assert v11.spend(30, sides, scores, 1) == [1, 1]
    with pytest.raises(v10.UserError, match="--rank-budget allows 29 parameters.* --min-rank 1 needs 30"):
        v11.spend(29, sides, scores, 1)


def test_a_budget_that_nothing_exceeds_is_told(capsys):
    for budget, told in (("0.9", True), ("0.1", False)):
        v10.parse_flags(v11.LowRankSpectron(), ["--rank-budget", budget])
        assert ("nothing will be cut" in capsys.readouterr().out) == told


def test_ranks_in_proportion_fill_the_budget_between_their_bounds():
    sides, present = [10, 10, 20], [64, 64, 64]
    ranks = v11.in_proportion(600, sides, [1.0, 2.0, 4.0], present, 4)
    assert sum(rank * side for rank, side in zip(ranks, sides, strict=True)) <= 600
    assert ranks == [5, 11, 22]
    assert v11.in_proportion(10_000, sides, [1.0, 2.0, 4.0], present, 4) == present
    assert v11.in_proportion(1e9, sides, [3.7, 7.4, 0.0], present, 4) == present
    assert v11.in_proportion(500, sides, [0.0, 1.0, 1.0], present, 4) == [4, 15, 15]
    assert v11.in_proportion(300, sides, [1.0, 1.0, 100.0], present, 4) == [4, 4, 11]


# ---- Runs ------------------------------------------------------------------------------------------------------------

CUTS = [*RANKS, "--cuts", "4", "--cut-from", "0.2", "--cut-to", "0.8", "--rank-budget", "0.4"]


def linear_parameters(run_record, ranks):
    return sum(rank * sum(layer["shape"]) for rank, layer in zip(ranks, run_record["layers"], strict=True))


@pytest.mark.parametrize("flags", [[], *(["--rank-signal", signal] for signal in (
    "uniform", "stable", "energy", "gradient")), ["--cut-metric", "plain"], ["--cut-metric", "plain", "--rank-signal",
                                                                             "uniform", "--optimizer", "adamw"]])
def test_every_signal_and_metric_ends_within_the_budget_and_in_equal_shares(run, flags):
    log = run(*flags, main=v11.main, ranks=CUTS)
    (first,), cuts, epochs = (records(log, kind) for kind in ("run", "cut", "epoch"))
    assert [cut["step"] for cut in cuts] == [4, 8, 12, 16]
    dense = sum(m * n for m, n in (layer["shape"] for layer in first["layers"]))
    sizes = [linear_parameters(first, ranks) for ranks in (first["initial_ranks"], *(cut["ranks"] for cut in cuts))]
    smallest = min(sum(layer["shape"]) for layer in first["layers"])
    assert 0.4 * dense - 2 * smallest * (12 if "uniform" in flags else 2) < sizes[-1] <= 0.4 * dense
    for i, (before, after, cut) in enumerate(zip(sizes, sizes[1:], cuts, strict=False)):
        assert after <= cut["budget"] < before
        assert cut["budget"] / before == pytest.approx((0.4 * dense / before) ** (1 / (4 - i)))
    assert epochs[-1]["ranks"] == cuts[-1]["ranks"]
    assert cuts[0]["ranks_before"] == first["initial_ranks"]
    assert len(set(cuts[-1]["ranks"])) == 1 or "uniform" not in flags
    assert linear_parameters(first, epochs[-1]["ranks"]) == epochs[-1]["factor_params_millions"] * 1e6


@pytest.mark.parametrize("decider", ["fisher", "energy", "stable", "gradient", "uniform"])
def test_the_decisions_replay_from_the_log(run, decider):
    log = run("--rank-signal", decider, "--cut-metric", "fisher" if decider == "fisher" else "plain", main=v11.main,
              ranks=CUTS)
    sides = [sum(layer["shape"]) for layer in records(log, "run")[0]["layers"]]
    for cut in records(log, "cut"):
        spectra = [torch.tensor(of_layer) for of_layer in cut["singular_values"]]
        if decider in ("fisher", "energy"):
            ranks = v11.spend(cut["budget"], sides, [s.square().tolist() for s in spectra], 2)
        else:
            ranks = v11.in_proportion(cut["budget"], sides, cut["numbers"], cut["ranks_before"], 2)
        assert ranks == cut["ranks"]
        if decider == "stable":
            assert cut["numbers"] == pytest.approx([v10.stable_rank_of(s) for s in spectra], rel=1e-5)
        if decider == "gradient":
            assert all(isinstance(number, int) and 1 <= number <= 32 for number in cut["numbers"])
    assert (decider == "uniform") == (len(set(cut["ranks"])) == 1)


@pytest.mark.parametrize("left", [4, 2, 1, 0])
def test_a_resume_with_fewer_epochs_ends_within_the_budget_or_says_that_it_does_not(run, monkeypatch, capsys, left):
    flags = [*CUTS, "--epochs", "10", "--lr-schedule", "constant"]
    with monkeypatch.context() as patch:
        stop = at_call(15 - left, v10.train_step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(v10, "train_step", stop)
        run(*flags, main=v11.main, ranks=[], code=143)
    log = run(*flags, "--epochs", 3, "--resume", main=v11.main, ranks=[])
    first, = records(log, "run")
    within = linear_parameters(first, records(log, "epoch")[-1]["ranks"]) <= first["rank_budget"] * sum(
        m * n for m, n in (layer["shape"] for layer in first["layers"]))
    assert within == (left >= 2)
    assert ("*** the linear layers are above --rank-budget: --resume with" in capsys.readouterr().out) != within


@pytest.mark.parametrize("flags", [["--share-layers"], ["--optimizer", "adamw"], ["--no-tie-embeddings"]])
def test_cuts_fit_shared_layers_untied_heads_and_adamw(run, flags):
    log = run(*flags, main=v11.main, ranks=CUTS)
    assert len(records(log, "cut")) == 4
    model, _ = v10.load_model(log.with_suffix(".pt"))
    assert model.ranks() == records(log, "cut")[-1]["ranks"]
    assert len(model.ranks()) == (6 if "--share-layers" in flags else 12)


def test_a_budget_above_the_present_size_changes_nothing(run):
    cut = run(main=v11.main, ranks=[*RANKS, "--rank-budget", "12"], name="cut")
    uncut = run(main=v11.main, ranks=[*RANKS, "--cuts", "0"], name="uncut")
    assert {tuple(record["ranks"]) for record in records(cut, "cut")} == {(12,) * 12}
    assert all(record["val_loss"] == record["val_loss_before"] for record in records(cut, "cut"))
    assert untimed(cut) == untimed(uncut)


def test_the_first_cut_in_the_fisher_metric_costs_less_than_the_plain_one(run):
    flags = ["--rank-signal", "uniform", "--epochs", 1, "--steps-per-epoch", 300, "--cuts", 1, "--cut-to", "0.9",
             "--dropout", 0, "--weight-decay", 0.01, "--factor-decay", 0]
    losses = {metric: records(run("--cut-metric", metric, *flags, main=v11.main, ranks=CUTS[:4] + CUTS[8:],
                                  name=metric), "cut")[0] for metric in ("fisher", "plain")}
    fisher, plain = (cut["val_loss"] - cut["val_loss_before"] for cut in losses.values())
    assert losses["fisher"]["val_loss_before"] == losses["plain"]["val_loss_before"]
    assert losses["fisher"]["ranks"] == losses["plain"]["ranks"]
    assert fisher < 0.7 * plain


def test_cuts_fall_evenly_between_their_ends():
    def at(**flags):
        return v11.cut_steps(argparse.Namespace(**{"epochs": 16, "steps_per_epoch": 40, "cuts": 6, "cut_from": 0.2,
                                                   "cut_to": 0.65} | flags))
    assert at() == [128, 186, 243, 301, 358, 416]
    assert at(cuts=1) == [416]
    assert at(cuts=0) == []
    assert at(epochs=1, steps_per_epoch=3) == [1, 2]
    assert at(cut_to=0.9999)[-1] == 639, "none falls after the last step"


def test_similar_gradients_are_one_group():
    rows = torch.tensor([[1.0, 0], [2, 0.1], [0, 1], [-1, 0], [0, 3]])
    assert v11.gradient_groups(rows) == 3
    assert v11.gradient_groups(torch.zeros(3, 2)) == 3
