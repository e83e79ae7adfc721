"""compress.py: its metrics against what they promise, its budgets against brute force, its commands as a user types
them."""
import argparse
import errno
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

import compress
import plot_logs
import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
from conftest import records, unpainted
from test_fisher import root
from test_spectra import relative

WORDS, C = 31, 12


def small_model(rank=None, **flags):
    """A GPT in float64, dense or factored."""
    torch.manual_seed(0)
    config = v10.GPTConfig(WORDS, C, 2, 3, 20, 8, **flags)
    model = v10.GPT(config, lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, rank) if rank else
                    v10.DenseLinear(n, m)).double()
    model.head.weight.data *= 3
    for module in model.modules():  # else its outputs add up to zero
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)
    return model.eval()


def calibration(n=320):
    return torch.randint(WORDS, (n,), generator=torch.Generator().manual_seed(1)) ** 2 % WORDS


def content_of(model):
    return v10.model_content(model, [f"w{i:02}" for i in range(WORDS)])


def moments(model):
    """{name of a matrix: (C of its inputs, G of its outputs' gradients)} in full, from hooks of our own."""
    tokens, kept, hooks = calibration().view(-1, 8), {}, []
    for name, layer in [*model.linears().items(), ("embedding", model.token_embedding)]:
        def hook(_, x, y, name=name):
            y.retain_grad()
            kept.setdefault(name, []).append((x[0], y))
        hooks.append(layer.register_forward_hook(hook))
    batches = tokens.split(2048 // 8)
    assert len(batches) == 1
    x = model.features(batches[0])
    labels = v11.draw_labels(model, x.detach(), v11.seeded(0, 0))
    (model.loss(x, labels) * labels.numel()).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    found, n = {}, tokens.numel()
    for name, ((inputs, outputs),) in kept.items():
        g = outputs.grad.flatten(0, 1)
        h = torch.nn.functional.one_hot(inputs, WORDS).double() if name == "embedding" else inputs.detach()
        h = h.flatten(0, 1)
        found[name] = h.T @ h / n, g.T @ g / n
    h, p = x.detach().flatten(0, 1), model.logits(x.detach()).flatten(0, 1).double().softmax(-1).detach()
    h = h - h.mean(0)
    found["head"] = h.T @ h / n, (p * (1 - p)).mean(0).diag()
    return found


def in_model(matrix):
    """W (out, in) as its metric takes it."""
    U, V = matrix.pair()
    return U @ V


# ---- The metrics -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", compress.METRICS)
@pytest.mark.parametrize("rank", [None, 5])
def test_the_squared_error_of_a_cut_in_its_metric_is_the_discarded_tail(metric, rank):
    model = small_model(rank)
    full = moments(model)
    measured = compress.measure(model, calibration(), seed=0)
    for matrix in compress.matrices(model, metric, measured):
        inputs, outputs = full[matrix.name]
        damped = outputs + v11.DAMPING * outputs.trace() / len(outputs) * torch.eye(len(outputs))
        if metric == "plain":
            inputs = torch.eye(len(inputs)).double()
        if metric != "fisher":
            damped = torch.eye(len(outputs)).double()
        for k in (1, 3, 4):
            U, V = matrix.factors(k, torch.Generator())
            error = (root(damped) @ (in_model(matrix) - U @ V) @ root(inputs)).square().sum().item()
            assert error == pytest.approx(matrix.tails[k], rel=1e-6, abs=1e-12 * matrix.tails[0]), (matrix.name, k)


@pytest.mark.parametrize("metric", ["inputs", "fisher"])
def test_the_error_of_a_tied_matrix_is_that_of_both_its_uses(metric):
    model = small_model(tie_embeddings=True)
    full, one = moments(model), torch.eye(C, dtype=torch.float64)
    (as_word, G), (covariance, p) = full["embedding"], full["head"]
    a, B = as_word.diag(), G
    if metric == "inputs":
        B, p = one, torch.eye(WORDS, dtype=torch.float64)
    a, B = compress.nearest_kronecker([(a, B), (p.diag(), covariance)])
    if metric == "fisher":
        B = B + v11.DAMPING * B.trace() / C * one
    *_, matrix = compress.matrices(model, metric, compress.measure(model, calibration(), seed=0), "ends")
    for k in (1, 4):
        U, V = matrix.factors(k, torch.Generator())
        error = (root(B) @ (in_model(matrix) - U @ V) * a.sqrt()).square().sum().item()
        assert error == pytest.approx(matrix.tails[k], rel=1e-6)


def test_what_all_rows_of_the_head_share_does_not_count_in_the_fisher_metric():
    model = small_model()
    spectra = []
    for shared in (0.0, 3.0):
        model.head.weight.data += shared * torch.arange(C)
        spectra.append(compress.matrices(model, "fisher", compress.measure(model, calibration(), 0), "ends")[1].squares)
    assert relative(*spectra) < 1e-6


@pytest.mark.parametrize("metric", compress.METRICS)
def test_no_other_matrix_of_the_rank_has_a_smaller_error_in_the_metric(metric):
    model = small_model()
    measured, g = compress.measure(model, calibration(), seed=0), torch.Generator().manual_seed(0)
    full = moments(model)
    for matrix in compress.matrices(model, metric, measured, "linear")[:6]:
        C_, G = full[matrix.name]
        one = torch.eye(len(G), dtype=torch.float64)
        C_ = torch.eye(len(C_), dtype=torch.float64) if metric == "plain" else C_
        G = G + v11.DAMPING * G.trace() / len(G) * one if metric == "fisher" else one
        W, (U, V), outer, inner = in_model(matrix), matrix.factors(3, g), root(G), root(C_)

        def error(U, V, W=W, outer=outer, inner=inner):
            return (outer @ (W - U @ V) @ inner).square().sum().item()
        for size in (1e-2, 1e-4):
            for _ in range(10):
                noise = [size * torch.randn(F.shape, dtype=F.dtype, generator=g) for F in (U, V)]
                assert error(U + noise[0], V + noise[1]) > error(U, V)


def test_the_inputs_metric_is_that_of_a_cholesky_factor_where_there_is_one():
    model = small_model()
    full = moments(model)
    for matrix in compress.matrices(model, "inputs", compress.measure(model, calibration(), 0), "linear"):
        L = torch.linalg.cholesky(full[matrix.name][0])
        W = in_model(matrix)
        P, S, Qt = torch.linalg.svd(W @ L, full_matrices=False)
        theirs = (P[:, :4] * S[:4]) @ torch.linalg.solve_triangular(L, Qt[:4], upper=False, left=False)
        U, V = matrix.factors(4, torch.Generator())
        assert relative(U @ V, theirs) < 1e-8
        assert matrix.squares.tolist() == pytest.approx(S.square().tolist(), rel=1e-8)


def test_white_inputs_and_gradients_give_the_truncated_svd():
    W = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = torch.eye(7, dtype=torch.float64)
    for fisher in (None, v11.Fisher(one, W.T @ W, 1.0)):
        matrix = compress.Matrix("w", "linear", W, one, True, fisher, 0.0)
        U, V = matrix.factors(3, torch.Generator())
        P, S, Qt = torch.linalg.svd(W, full_matrices=False)
        assert relative(U @ V, (P[:, :3] * S[:3]) @ Qt[:3]) < 1e-10


def test_inputs_that_are_never_used_and_a_matrix_of_zeros_do_no_harm():
    g = torch.Generator().manual_seed(0)
    W, one = torch.randn(9, 7, dtype=torch.float64, generator=g), torch.eye(7, dtype=torch.float64)
    x = torch.randn(50, 7, dtype=torch.float64, generator=g)
    x[:, 2:6] = 0  # two live inputs and one more that is their sum
    x[:, 6] = x[:, 0] + x[:, 1]
    matrix = compress.Matrix("w", "linear", W, one, True, v11.Fisher(x.T @ x / 50, W.T @ W, 0.0), 0.0)
    U, V = matrix.factors(2, g)
    assert relative(x @ V.T @ U.T, x @ W.T) < 1e-6
    assert matrix.tails[2] < 1e-12 * matrix.tails[0]
    for fisher in (None, v11.Fisher(one, 0 * one, 0.0)):
        U, V = compress.Matrix("w", "linear", 0 * W, one, True, fisher, 0.0).factors(2, g)
        assert torch.equal(U @ V, 0 * W)


def test_the_metric_of_a_tied_matrix_is_the_nearest_product_to_the_sum_of_its_uses():
    g = torch.Generator().manual_seed(0)
    terms = [(torch.rand(5, dtype=torch.float64, generator=g), (lambda x: x.T @ x)(torch.randn(
        9, 3, dtype=torch.float64, generator=g))) for _ in range(2)]
    a, B = compress.nearest_kronecker(terms)
    total = sum(torch.outer(w, M.flatten()) for w, M in terms)
    P, S, Qt = torch.linalg.svd(total, full_matrices=False)
    assert relative(torch.outer(a, B.flatten()), S[0] * torch.outer(P[:, 0], Qt[0])) < 1e-12
    assert a.min() >= 0
    assert torch.linalg.eigvalsh(B).min() > -1e-12
    alone, M = compress.nearest_kronecker([terms[0], (0 * terms[0][0], terms[1][1])])
    assert relative(torch.outer(alone, M.flatten()), torch.outer(terms[0][0], terms[0][1].flatten())) < 1e-12


def test_the_heads_weights_are_the_diagonal_of_the_second_moment_of_its_gradients():
    model = small_model()
    measured = compress.measure(model, calibration(), seed=0)
    x = model.features(calibration().view(-1, 8))
    q = model.logits(x).double().softmax(-1).flatten(0, 1).detach()
    exact = q.mean(0).diag() - q.T @ q / len(q)  # E over labels of (q - onehot) (q - onehot)^T
    assert measured.p.tolist() == pytest.approx(exact.diag().tolist(), rel=1e-5)
    assert measured.words.tolist() == pytest.approx((torch.bincount(calibration(), minlength=WORDS) / 320).tolist())


# ---- Budgets ---------------------------------------------------------------------------------------------------------

def lists(seed, n=4, options=4):
    g = np.random.default_rng(seed)
    costs = [np.sort(g.integers(1, 20, options)) for _ in range(n)]
    errors = [np.sort(g.random(options))[::-1].copy() for _ in range(n)]
    for error in errors:
        error[-1] = 0
    return costs, errors


def test_the_exact_allocation_is_that_of_an_exhaustive_search_and_the_priced_one_within_its_bound():
    for seed in range(40):
        costs, errors = lists(seed)
        for budget in (sum(cost[0] for cost in costs) + extra for extra in (0, 5, 17, 60)):
            best = min(sum(error[i] for error, i in zip(errors, picks, strict=True))
                       for picks in itertools.product(range(4), repeat=4)
                       if sum(cost[i] for cost, i in zip(costs, picks, strict=True)) <= budget)
            exact = compress.exact_allocation(costs, errors, int(budget))
            priced, gap = compress.priced_allocation(costs, errors, budget)
            for picks in (exact, priced):
                assert sum(cost[i] for cost, i in zip(costs, picks, strict=True)) <= budget
            assert sum(error[i] for error, i in zip(errors, exact, strict=True)) == pytest.approx(best)
            ours = sum(error[i] for error, i in zip(errors, priced, strict=True))
            assert best - 1e-12 <= ours <= best + gap + 1e-9


@pytest.mark.parametrize("how", ["uniform", "energy", "global"])
@pytest.mark.parametrize("rank", [None, 5])
def test_a_budget_is_never_exceeded_and_nothing_grows(how, rank):
    model = small_model(rank)
    found = compress.matrices(model, "fisher", compress.measure(model, calibration(), 0))
    total = sum(matrix.now for matrix in found)
    for share in (0.3, 0.5, 0.9, 0.999):
        ranks, _ = compress.ranks_within(found, share * total, how)
        assert compress.kept(found, ranks) <= share * total
        assert all(k is None or 1 <= k and k * matrix.side < matrix.now for matrix, k in zip(found, ranks, strict=True))
        cut = v10.build_model(compress.cut_model(content_of(model), model, found, ranks))
        fewer = total - compress.kept(found, ranks)
        assert v10.count_parameters(cut) == v10.count_parameters(model) - fewer
    with pytest.raises(v10.UserError, match="rank 1 needs"):
        compress.ranks_within(found, 10, how)


def test_a_matrix_is_factored_up_to_its_break_even_rank_and_not_beyond():
    W, one = torch.randn(6, 12, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    matrix = compress.Matrix("w", "linear", one, W, True, None, 0.0)
    assert matrix.limit == 3, "4 * (6 + 12) = 6 * 12"
    assert [cost for _, cost, _ in matrix.options()] == [18, 36, 54, 72]
    assert compress.uniform_ranks([matrix], 0.99) == [3]
    assert compress.uniform_ranks([matrix], 1.0) == [None]


def test_one_budget_is_no_worse_in_its_metric_than_one_share():
    model = small_model()
    found = compress.matrices(model, "fisher", compress.measure(model, calibration(), 0))

    def error(ranks):
        return sum(matrix.tails[k] for matrix, k in zip(found, ranks, strict=True) if k)
    for share in (0.3, 0.5, 0.8):
        uniform = compress.uniform_ranks(found, share)
        budget = compress.kept(found, uniform)
        best, gap = compress.allocate(found, budget)
        assert error(best) - gap <= error(uniform)


# ---- The cut model ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", compress.METRICS)
@pytest.mark.parametrize("flags", [{}, {"tie_embeddings": True}, {"share_layers": True}])
@pytest.mark.parametrize("dense", [False, True])
def test_at_full_rank_the_predictions_stay(metric, flags, dense):
    model = small_model(**flags)
    found = compress.matrices(model, metric, compress.measure(model, calibration(), 0))
    content = compress.cut_model(content_of(model), model, found, [matrix.U.shape[1] for matrix in found], dense)
    cut = v10.build_model(content).double()
    cut.load_state_dict(content["model"])  # in float64
    x = calibration().view(-1, 8)
    assert relative(cut(x).double().log_softmax(-1), model(x).double().log_softmax(-1)) < 1e-5  # logits are float32
    assert (cut.end_ranks() == [None, None]) == dense
    if flags.get("tie_embeddings"):
        a, b = (cut.head.weight, cut.token_embedding.weight) if dense else (cut.head.U, cut.token_embedding.U)
        assert a is b


def test_the_mean_error_of_the_heads_outputs_is_zero():
    model = small_model()
    measured = compress.measure(model, calibration(), 0)
    x = model.features(calibration().view(-1, 8)).flatten(0, 1).detach()
    for metric in ("inputs", "fisher"):
        found = [matrix for matrix in compress.matrices(model, metric, measured) if matrix.kind == "head"]
        content = compress.cut_model(content_of(model), model, found, [3])
        U, V, b = (content["model"][f"head.{name}"] for name in ("U", "V", "bias"))
        error = x @ (model.head.weight.T.detach() - (U @ V).T) + model.head.bias.detach() - b
        error = error - (error @ measured.p / measured.p.sum())[:, None] if metric == "fisher" else error  # of each row
        assert error.mean(0).abs().max() < 1e-8


def test_a_tied_matrix_is_counted_once_and_still_tied_in_a_file(tmp_path):
    model = small_model(tie_embeddings=True)
    found = compress.matrices(model, "fisher", compress.measure(model, calibration(), 0))
    assert [matrix.kind for matrix in found].count("tied") == 1
    v10.save(tmp_path / "cut.pt", compress.cut_model(content_of(model), model, found, [3] * len(found)))
    cut, vocabulary = v10.load_model(tmp_path / "cut.pt")
    assert cut.head.U is cut.token_embedding.U
    assert cut.head.V is cut.token_embedding.V
    x = calibration().view(-1, 8)
    assert cut.loss(cut.features(x), x).item() == pytest.approx(
        torch.nn.functional.cross_entropy(cut(x).flatten(0, 1), x.flatten()).item(), rel=1e-5)
    assert len(v10.generate(cut, vocabulary, vocabulary[0], 5).split()) == 6


def test_words_and_hidden_units_in_another_order_change_nothing():
    model = small_model()
    order, hidden = torch.randperm(WORDS), torch.randperm(20)
    other = small_model()
    other.token_embedding.weight.data = model.token_embedding.weight.data[order]
    other.head.weight.data, other.head.bias.data = model.head.weight.data[order], model.head.bias.data[order]
    block = other.blocks[0]
    block.up.weight.data, block.down.weight.data = block.up.weight.data[hidden], block.down.weight.data[:, hidden]
    tokens, position = calibration(), torch.empty(WORDS, dtype=torch.long)
    position[order] = torch.arange(WORDS)
    for metric in ("plain", "inputs"):  # labels are drawn by place, so fisher would draw others
        spectra = [[matrix.squares for matrix in compress.matrices(m, metric, compress.measure(m, text, 0))]
                   for m, text in ((model, tokens), (other, position[tokens]))]
        for ours, theirs in zip(*spectra, strict=True):
            assert relative(theirs, ours) < 1e-8


# ---- Its log ---------------------------------------------------------------------------------------------------------

def test_plots_show_what_compress_did_beside_runs_or_alone(trained, tmp_path, capsys, monkeypatch):
    log, common = tmp_path / "log.jsonl", ["--data-file", str(trained / "text.tokens"), "--log-file",
                                           str(tmp_path / "log.jsonl")]
    ckpt, cut = str(trained / "v7.best.pt"), str(tmp_path / "cut.pt")
    for flags in (["cut", ckpt, "--keep", "0.3", "--out", cut], ["compare", ckpt],
                  ["tune", cut, "--uncut", ckpt, "--steps", "2"]):
        assert compress.main([*flags, *common]) == 0
    assert compress.main(["spectrum", ckpt, "--log-file", str(log)]) == 0
    for logs in ([log], [log, trained / "v7.jsonl"]):
        capsys.readouterr()
        assert plot_logs.main([*map(str, logs), "--out", str(tmp_path / "figures")]) == 0
        out, err = capsys.readouterr()
        assert not err
        for title in ("Cuts, log", "Change of the loss, v7.best.pt", "Fine-tuning, log", "Spectra, v7.best.pt"):
            assert title in out
        kept, = (line for line in out.splitlines() if "| v7.best.pt " in line and " cut --keep 0.3 |" in line)
        record = records(log, "compress")[0]
        assert f"{record['after']['all']:,}" in kept
        assert f"{record['loss']:.4f}" in kept
        assert ("Comparison" in out) == ("# v7" in out and "# v11" in out)
        for name in ("log_compare1", "log_spectrum1", "log_kept"):
            assert len(logs) == 2 or (tmp_path / "figures" / f"{name}.png").stat().st_size > 5000
            assert name in (tmp_path / "figures" / "index.html").read_text()
        monkeypatch.setattr(plot_logs, "save", unpainted)
    assert plot_logs.main([str(log), str(trained / "v11.jsonl"), "--out", str(tmp_path / "figures")]) == 0
    page = (tmp_path / "figures" / "index.html").read_text()
    assert page.index("<h1>v11</h1>") < page.index('alt="losses"') < page.index("<h1>log</h1>")


@pytest.mark.parametrize(("change", "said"), [
    ({"loss": "low"}, 'loss should be a number, not "low"'), ({"command": "shrink"}, "an unknown command"),
    ({"metric": 3}, "metric should be text"), ({"after": {}}, "after.all should be a whole number above 0, not null"),
    ({"checkpoint": None}, "checkpoint should be text"), ({"ranks": {"0.q": 3}}, "of the same matrices"),
    ({"ranks": {"0.q": 3, "0.k": "all"}}, 'ranks["0.k"] should be a rank or null, not "all"'),
    ({"ranks": {"0.q\n?": 0, "0.k": 3}}, r'ranks["0.q\n?"] should be a rank or null, not 0'),
    ({"ranks": {}}, "ranks should be an object that is not empty, not {}"),
    ({"kind": "epoch"}, "epoch should be a number, not null"),
    ({"command": "spectrum", "matrices": {"w": {"shape": [3]}}}, 'matrices["w"].shape should be a list of 2, not [3]'),
    ({"command": "tune", "models": []}, "models should be a list that is not empty")])
def test_a_damaged_record_of_compress_is_told_in_one_line(tmp_path, capsys, change, said):
    sizes = {"all": 9, "linear": 5, "ends": 3}
    record = {"kind": "compress", "command": "cut", "checkpoint": "v7.pt", "metric": "fisher", "target": "--keep 0.5",
              "loss_before": 5.0, "loss": 5.1, "before": sizes, "after": sizes, "ranks": {"0.q": 3, "0.k": None},
              "shapes": {"0.q": [8, 8], "0.k": [8, 8]}}
    (tmp_path / "log.jsonl").write_text(json.dumps(record | change) + "\n")
    code = plot_logs.main([str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


# ---- Fine-tuning -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("flags", [{}, {"share_layers": True}])
def test_lora_changes_nothing_at_first_and_merged_it_computes_the_same(rank, flags):
    model, x = small_model(rank, **flags), calibration().view(-1, 8)
    before = model(x)
    compress.replace_layers(model, lambda layer: compress.LoRA(layer, 3, alpha=6).double())
    assert torch.equal(model(x), before)
    additions = {module for module in model.modules() if isinstance(module, compress.LoRA)}
    assert len(additions) == (6 if flags else 12)
    for addition in additions:
        torch.nn.init.normal_(addition.B)
    added = model(x)
    assert relative(added, before) > 0.1
    compress.replace_layers(model, compress.LoRA.merged)
    assert relative(model(x), added) < 1e-6
    assert model.ranks() == ([] if rank is None else [rank + 3] * len(additions))


@pytest.mark.parametrize("kind", ["factors", "lora", "all"])
def test_fine_tuning_trains_what_it_says_and_nothing_else(kind):
    model = small_model()
    found = compress.matrices(model, "plain", None, "linear")
    cut = v10.build_model(compress.cut_model(content_of(model), model, found, [3] * 11 + [None])).eval()
    before = {name: value.clone() for name, value in cut.state_dict().items()}
    args = argparse.Namespace(seed=0, lora_rank=2, lora_alpha=None, lr=1e-2, weight_decay=0.0, steps=3, batch_size=4)
    trained = compress.fine_tune(cut, kind, calibration(), args)
    after = cut.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if name.split(".")[-2] in ("q", "k", "v", "o", "up", "down")}
    factors = {name for name in linear if not name.endswith("weight")}
    if kind == "all":
        assert trained == v10.count_parameters(cut)
        assert changed > linear
    if kind == "factors":
        assert changed == factors
        assert trained == v10.count_parameters(*cut.linears().values()) - 12 * 20
    if kind == "lora":
        assert changed == linear
        assert trained == sum(2 * sum(layer.shape) for layer in cut.linears().values())
        assert cut.ranks() == [5] * 11
    assert not cut.training


def test_tune_improves_a_cut_model_and_reports_the_uncut_one_beside_it(trained, tmp_path):
    log, common = tmp_path / "log.jsonl", ["--data-file", str(trained / "text.tokens")]
    common += ["--log-file", str(tmp_path / "log.jsonl")]
    assert compress.main(["cut", str(trained / "v7.best.pt"), "--keep", "0.2", "--out", str(tmp_path / "cut.pt"),
                          *common]) == 0
    for kind in ("factors", "lora", "all"):
        assert compress.main(["tune", str(tmp_path / "cut.pt"), "--train", kind, "--steps", "20", "--lr", "2e-3",
                              "--uncut", str(trained / "v7.best.pt"), "--out", str(tmp_path / f"{kind}.pt"),
                              *common]) == 0
        cut, uncut = records(log, "compress")[-1]["models"]
        assert cut["loss"] < cut["loss_before"]
        assert uncut["trained"] == uncut["parameters"] > cut["trained"]
        model, _ = v10.load_model(tmp_path / f"{kind}.pt")
        assert v10.count_parameters(model) == cut["parameters"]
    (tmp_path / "other").write_text((trained / "text.tokens").read_text()[:4000])
    content = v10.load(tmp_path / "cut.pt")
    v10.save(tmp_path / "cut.pt", content | {"config": content["config"] | {"dropout": 0.3}})  # as of a run from it
    assert compress.main(["tune", str(tmp_path / "cut.pt"), "--steps", "2", "--uncut", str(trained / "v7.best.pt"),
                          "--on", str(tmp_path / "other"), "--out", str(tmp_path / "on.pt"), *common]) == 0


# ---- The commands ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a dense and a factored model, trained for a moment on a text with structure."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.tokens"
    g = np.random.default_rng(0)
    words = [0]
    for _ in range(6000):
        words.append((words[-1] * 3 + int(g.integers(4))) % 40)
    text.write_text(" ".join(f"w{i:02}" for i in words))
    flags = ["--data-file", str(text), *"""--d-model 32 --n-layers 2 --n-heads 2 --d-ff 64 --block-size 16 --epochs 2
        --batch-size 8 --steps-per-epoch 60 --lr 5e-3 --val-fraction 0.2 --device cpu --dtype float32""".split()]
    assert v7.main([*flags, "--log-file", str(folder / "v7.jsonl")]) == 0
    assert v11.main([*flags, "--log-file", str(folder / "v11.jsonl"), "--init-rank", "16", "--cuts", "0"]) == 0
    return folder


SIZES = """--d-model 32 --n-layers 2 --n-heads 2 --d-ff 64 --block-size 16 --epochs 1 --batch-size 8 --steps-per-epoch 4
    --lr 1e-6 --val-fraction 0.2 --device cpu --dtype float32""".split()


@pytest.mark.parametrize(("script", "start"), [
    (v10, "v7"), (v10, "v11"), (v11, "v7"), (v7, "v7"), (v7, "v11"), (v10, "cut"), (v7, "cut"), (v11, "cut")])
def test_training_starts_from_a_checkpoint_of_another_script_or_a_cut_one(trained, tmp_path, script, start):
    ckpt, tied = trained / f"{start}.best.pt", ["--tie-embeddings"] if start == "v11" else []
    if start == "cut":
        ckpt = tmp_path / "cut.pt"
        assert compress.main(["cut", str(trained / "v7.best.pt"), "--keep", "0.4", "--out", str(ckpt), "--data-file",
                              str(trained / "text.tokens"), "--log-file", str(tmp_path / "c.jsonl")]) == 0
    if script is v11:
        tied += ["--cuts", "0"] if tied else ["--no-tie-embeddings", "--cuts", "2", "--rank-budget", "0.3"]
    flags = [*SIZES, *tied, "--data-file", str(trained / "text.tokens"), "--init-from", str(ckpt), "--log-file",
             str(tmp_path / "run.jsonl")]
    assert script.main(flags) == 0
    first, epoch = (records(tmp_path / "run.jsonl", kind)[0] for kind in ("run", "epoch"))
    source, _ = v10.load_model(ckpt)
    model, _ = v10.load_model(tmp_path / "run.pt")
    corpus = v10.load_corpus(trained / "text.tokens", 0.2, 16)
    assert first["init_from"] == ckpt.name
    assert model.end_ranks() == source.end_ranks()
    assert bool(model.ranks()) == (script is not v7)
    if script is not v11:  # which has cut
        assert epoch["val_loss"] == pytest.approx(v10.evaluate(source, corpus.val, 8), abs=1e-3)
        assert first["factor_parameters"] == sum(
            (layer.rank or min(layer.shape)) * sum(layer.shape) if script is v10 else layer.shape[0] * layer.shape[1]
            for layer in source.linears().values())
    else:
        assert epoch["factor_params_millions"] <= 0.3 * 2 * (4 * 32 * 32 + 2 * 32 * 64) / 1e6
    assert script.main([*flags, "--resume", "--epochs", "2"]) == 0


@pytest.mark.parametrize(("flags", "said"), [
    (["--d-model", "16"], "holds another model, of --d-model 32"),
    (["--tie-embeddings"], "of --no-tie-embeddings"), (["--share-layers"], "of --no-share-layers"),
    (["--ranks-from", "{log}"], "--init-from and --ranks-from exclude each other"),
    (["--init-from", "{text}"], "is not a checkpoint of this suite"),
    (["--min-count", "150"], "has another vocabulary, of 40 words"),
    (["--min-rank", "33"], "--min-rank 33 is not between 33 and 32")])
def test_a_start_from_a_model_that_is_not_of_these_flags_is_refused(trained, tmp_path, capsys, flags, said):
    names = {"log": trained / "v11.jsonl", "text": tmp_path / "text"}
    (tmp_path / "text").write_text("no model")
    assert v10.main([*SIZES, "--data-file", str(trained / "text.tokens"), "--init-from", str(trained / "v7.best.pt"),
                     "--log-file", str(tmp_path / "run.jsonl"), *(flag.format(**names) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["v7", "v11"])
def test_cut_keeps_its_share_and_the_result_is_a_model_of_the_suite(trained, tmp_path, capsys, name):
    out, log = tmp_path / "cut.pt", tmp_path / "log.jsonl"
    assert compress.main(["cut", str(trained / f"{name}.best.pt"), "--keep", "0.5", "--out", str(out), "--data-file",
                          str(trained / "text.tokens"), "--log-file", str(log)]) == 0
    record, = records(log, "compress")
    model, vocabulary = v10.load_model(out)
    assert v10.count_parameters(model) == record["after"]["all"]
    cuttable = record["before"]["all"] - 32 * 16 - 32 * 2 * 5 - 40  # positions, norms and the head's bias
    assert record["after"]["all"] - (record["before"]["all"] - cuttable) <= 0.5 * cuttable
    assert record["loss"] == pytest.approx(record["loss_before"], abs=0.5)
    assert f"{record['after']['all']:,}" in capsys.readouterr().out
    assert len(v10.generate(model, vocabulary, "w00", 3).split()) == 4
    assert compress.main(["cut", str(out), "--keep", "0.5", "--data-file", str(trained / "text.tokens"),
                          "--log-file", str(log)]) == 0, "what is cut may be cut again"


def test_fit_finds_the_smallest_model_within_the_loss_on_text_that_it_does_not_report(trained, tmp_path, monkeypatch):
    log, found, report = tmp_path / "log.jsonl", [], compress.report
    monkeypatch.setattr(compress, "report", lambda *given: (found.append(given[:2]), report(*given)))
    common = ["--data-file", str(trained / "text.tokens"), "--log-file", str(log), "--out", str(tmp_path / "o.pt"),
              "--overwrite"]
    for loss in ("+1%", "+20%"):
        assert compress.main(["fit", str(trained / "v7.best.pt"), "--loss", loss, *common]) == 0
    tight, loose = records(log, "compress")
    assert loose["after"]["all"] < tight["after"]["all"] < tight["before"]["all"]
    for (job, ranks), allowed in zip(found, (1.01, 1.2), strict=True):
        text, matrices = job.text.decide, job.matrices("fisher")
        fewer, _ = compress.ranks_within(matrices, 0.85 * compress.kept(matrices, ranks), "global")
        losses = [compress.mean_loss(compress.block_losses(job.model, text)),
                  *(compress.mean_loss(job.losses("fisher", of, text)) for of in (ranks, fewer))]
        assert losses[1] - losses[0] <= math.log(allowed) < losses[2] - losses[0]


def test_the_text_that_fit_decides_on_is_not_the_one_that_is_reported_on(trained):
    args = argparse.Namespace(data_file=str(trained / "text.tokens"), val_fraction=None, min_count=None)
    content, model = compress.load(str(trained / "v7.best.pt"))
    text, corpus = compress.read_text(args, content, model.config), v10.load_corpus(trained / "text.tokens", 0.2, 16)
    assert torch.equal(torch.cat([text.decide[:-1], text.report]), corpus.val)
    assert torch.equal(text.train, corpus.train)
    assert abs(len(text.decide) - len(text.report)) <= 2 * 16


def test_what_is_cut_from_a_last_checkpoint_holds_a_model_and_no_run(trained, tmp_path):
    for name in ("v7.pt", "v7.best.pt"):
        assert compress.main(["cut", str(trained / name), "--keep", "0.5", "--out", str(tmp_path / name), "--data-file",
                              str(trained / "text.tokens"), "--log-file", str(tmp_path / "log.jsonl"),
                              "--export", str(tmp_path / f"{name}.safetensors")]) == 0
        assert set(v10.load(tmp_path / name)) == {*content_of(small_model()), "text", "cut_from"}
        with safetensors.safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            model, _ = v10.load_model(tmp_path / name)
            assert {key: file.get_tensor(key).tolist() for key in file.keys()} == {  # noqa: SIM118
                key: parameter.tolist() for key, parameter in model.named_parameters()}
        ours, exported = (sorted((key, V is not None) for key, _, V in compress.read_matrices(path))
                          for path in (tmp_path / name, tmp_path / f"{name}.safetensors"))
        assert ours == exported, "factors are one matrix in both"
        assert ("blocks.0.q", True) in ours


def test_an_export_that_the_disk_does_not_take_costs_neither_the_cut_model_nor_its_record(trained, tmp_path,
                                                                                         monkeypatch, capsys):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", full)
    assert compress.main(["cut", str(trained / "v7.best.pt"), "--keep", "0.5", "--out", str(tmp_path / "cut.pt"),
                          "--data-file", str(trained / "text.tokens"), "--log-file", str(tmp_path / "log.jsonl"),
                          "--export", str(tmp_path / "cut.safetensors")]) == 2
    assert f"cannot write {tmp_path / 'cut.safetensors'}: No space left on device\n" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"cut.pt", "log.jsonl"}
    assert len(records(tmp_path / "log.jsonl", "compress")) == 1


def test_held_out_text_of_little_more_than_a_block_is_enough(trained, tmp_path):
    words = (trained / "text.tokens").read_text().split()
    (tmp_path / "text").write_text(" ".join(words[:2800]))
    flags = [*SIZES, "--data-file", str(tmp_path / "text"), "--val-fraction", "0.01", "--log-file",
             str(tmp_path / "run.jsonl")]
    assert v7.main(flags) == 0
    assert compress.main(["cut", str(tmp_path / "run.best.pt"), "--keep", "0.5", "--data-file", str(tmp_path / "text"),
                          "--log-file", str(tmp_path / "log.jsonl")]) == 0
    assert 10 < records(tmp_path / "log.jsonl", "compress")[0]["report_tokens"] < 17


def test_a_model_that_lora_has_widened_can_be_cut_again(trained, tmp_path):
    log = ["--data-file", str(trained / "text.tokens"), "--log-file", str(tmp_path / "log.jsonl")]
    ckpt, cut, tuned = (str(path) for path in (trained / "v7.best.pt", tmp_path / "cut.pt", tmp_path / "tuned.pt"))
    for flags in (["cut", ckpt, "--keep", "0.5", "--out", cut], ["cut", tuned, "--keep", "0.97"]):
        assert compress.main([*flags, *log]) == 0
        if flags[1] == ckpt:
            assert compress.main(["tune", cut, "--train", "lora", "--lora-rank", "40", "--steps", "1", "--uncut", ckpt,
                                  "--out", tuned, *log]) == 0


def test_a_dense_result_has_no_factors_whatever_it_was_cut_from(trained, tmp_path):
    assert compress.main(["cut", str(trained / "v11.best.pt"), "--keep", "0.9", "--dense", "--out",
                          str(tmp_path / "o.pt"), "--data-file", str(trained / "text.tokens"), "--log-file",
                          str(tmp_path / "log.jsonl")]) == 0
    model, _ = v10.load_model(tmp_path / "o.pt")
    assert (model.ranks(), model.end_ranks()) == ([], [None, None])


def test_calibration_with_the_text_that_is_reported_on_is_told(trained, tmp_path, capsys):
    words = (trained / "text.tokens").read_text().split()
    for name, part, told in (("end", words[-600:], True), ("start", words[:600], False)):
        (tmp_path / name).write_text(" ".join(part))
        capsys.readouterr()
        assert compress.main(["cut", str(trained / "v7.best.pt"), "--keep", "0.5", "--data-file",
                              str(trained / "text.tokens"), "--calibration", str(tmp_path / name), "--out",
                              str(tmp_path / f"{name}.pt"), "--log-file", str(tmp_path / "log.jsonl")]) == 0
        assert ("the losses below are too good" in capsys.readouterr().out) == told


def test_spectra_of_odd_types_and_scales_are_told_or_refused(tmp_path, capsys):
    W = torch.randn(6, 5)
    for i, (tensor, code) in enumerate(((W.to(torch.float8_e4m3fn), 0), (1e20 * W, 0), (1e-30 * W, 0),
                                        (1e300 * W.double(), 0), (W.to_sparse(), 2), (W.to("meta"), 2))):
        torch.save({"w": tensor}, tmp_path / f"{i}.pt")
        log = tmp_path / f"{i}.jsonl"
        assert compress.main(["spectrum", str(tmp_path / f"{i}.pt"), "--log-file", str(log)]) == code
        if not code:
            row = records(log, "compress")[0]["matrices"]["w"]
            assert row["stable_rank"] == pytest.approx(v10.stable_rank_of(torch.linalg.svdvals(W)), rel=0.1)
    torch.save({"w": W}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert compress.main(["spectrum", str(tmp_path / "old.pt")]) == 0


def test_the_fisher_metric_loses_less_than_the_plain_one(trained, tmp_path):
    log = tmp_path / "log.jsonl"
    assert compress.main(["compare", str(trained / "v7.best.pt"), "--data-file", str(trained / "text.tokens"),
                          "--log-file", str(log)]) == 0
    record, = records(log, "compress")
    quarter = next(row["cuts"] for row in record["rows"] if row["keep"] == 0.25)
    assert quarter["fisher, uniform"]["increase"] < 0.7 * quarter["plain, uniform"]["increase"]


def test_a_spectrum_is_that_of_the_matrices(trained, tmp_path, capsys):
    from safetensors.torch import save_file
    W = torch.randn(40, 30)
    tensors = {"w": W, "b": torch.zeros(5), "half": W.bfloat16(), "whole": torch.arange(6).view(2, 3)}
    save_file(tensors, tmp_path / "m.safetensors")
    torch.save(tensors, tmp_path / "m.pt")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "m.safetensors"}}))
    for name in ("m.safetensors", "m.pt", "m.safetensors.index.json"):
        log = tmp_path / f"{name}.jsonl"
        assert compress.main(["spectrum", str(tmp_path / name), "--log-file", str(log)]) == 0
        found, = records(log, "compress")
        assert set(found["matrices"]) == {"w", "half"}
        assert found["matrices"]["w"]["singular_values"] == pytest.approx(torch.linalg.svdvals(W).tolist(), rel=1e-5)
        assert found["matrices"]["w"]["break_even"] == 17
    log = tmp_path / "v11.jsonl"
    assert compress.main(["spectrum", str(trained / "v11.best.pt"), "--log-file", str(log)]) == 0
    layer = records(log, "compress")[0]["matrices"]["blocks.0.q"]
    model, _ = v10.load_model(trained / "v11.best.pt")
    own = v10.product_singular_values(*model.blocks[0].q.factors())
    assert layer["singular_values"] == pytest.approx(own.tolist(), rel=1e-4)
    assert capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (["cut", "{ckpt}"], "one of the arguments --keep --params --rank --energy is required"),
    (["cut", "{ckpt}", "--keep", "0.5", "--rank", "3"], "not allowed with argument"),
    (["cut", "{ckpt}", "--keep", "1"], "--keep"), (["cut", "{ckpt}", "--keep", "0"], "--keep"),
    (["cut", "{ckpt}", "--keep", "0.001"], "rank 1 needs"), (["cut", "{ckpt}", "--params", "5M"], "within --params"),
    (["cut", "{ckpt}", "--params", "five"], "is not a number of parameters"),
    (["cut", "{ckpt}", "--rank", "30"], "nothing becomes smaller"),
    (["cut", "{ckpt}", "--keep", "0.5", "--out", "{ckpt}", "--overwrite"], "is one of the other files"),
    (["cut", "{ckpt}", "--keep", "0.5", "--out", "{last}"], "exists: --overwrite replaces it"),
    (["cut", "{ckpt}", "--keep", "0.5", "--out", "/dev/full"], "needs the name of a file"),
    (["cut", "{ckpt}", "--keep", "0.5", "--out", "{folder}"], "needs the name of a file"),
    (["cut", "{ckpt}", "--keep", "0.5", "--log-file", "{ckpt}"], "is one of the other files"),
    (["cut", "{ckpt}", "--keep", "0.5", "--log-file", "{training}"], "is not a log of compress.py"),
    (["cut", "{ckpt}", "--keep", "0.5", "--val-fraction", "0.5"], "--val-fraction was 0.2 in the run"),
    (["cut", "{ckpt}", "--keep", "0.5", "--data-file", "{shuffled}"], "its checksum differs"),
    (["cut", "{ckpt}", "--keep", "0.5", "--data-file", "nowhere"], "there is no nowhere, the text that"),
    (["cut", "{broken}", "--keep", "0.5"], "norm.weight holds a number that is not finite"),
    (["tune", "{ckpt}", "--uncut", "{tied}"], "was not cut from"),
    (["compare", "{ckpt}", "--log-file", "{text}"], "is not a log of compress.py"),
    (["cut", "{ckpt}", "--keep", "0.5", "--data-file", "{other}"], "has another vocabulary"),
    (["cut", "{ckpt}", "--keep", "0.5", "--calibration", "{short}"], "calibration tokens, and a block needs 16"),
    (["cut", "{text}", "--keep", "0.5"], "is not a checkpoint of this suite"),
    (["cut", "nowhere.pt", "--keep", "0.5"], "cannot read nowhere.pt"),
    (["fit", "{ckpt}", "--loss", "5 percent"], "neither a share of the perplexity"),
    (["fit", "{ckpt}", "--loss=-3"], "no cut is within -3.0000 nats; the best of 10 loses"),
    (["spectrum", "{text}"], "cannot be read without running code"), (["spectrum", "nowhere"], "there is no nowhere"),
    (["spectrum", "{bad}"], "is not a good safetensors file"), (["spectrum", "{nan}"], "w holds a number that is not"),
    (["spectrum", "{flat}"], "has no matrix"), (["spectrum", "{code}"], "cannot be read without running code"),
    (["tune", "{ckpt}"], "is compared with the model that it was cut from"),
    (["tune", "{ckpt}", "--uncut", "{ckpt}"], "there are no factors to train"),
    (["tune", "{cut}", "--out", "{ckpt}", "--overwrite"], "cut.pt was cut from: choose another name"),
    (["tune", "{ckpt}", "--uncut", "{ckpt}", "--on", "{short}"], "gives 2 tokens; a fifth of them"),
    ([], "required: COMMAND"), (["shrink"], "invalid choice")])
def test_wrong_requests_are_refused_in_one_line_before_any_work(trained, tmp_path, capsys, flags, said):
    from safetensors.torch import save_file
    (tmp_path / "other").write_text("a b c d " * 200)
    (tmp_path / "short").write_text("w00 w01")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 40)
    torch.save({"w": torch.full((3, 3), float("nan"))}, tmp_path / "nan.pt")
    save_file({"b": torch.zeros(3)}, tmp_path / "flat.safetensors")
    torch.save({"w": small_model}, tmp_path / "code.pt")
    words = (trained / "text.tokens").read_text().split()
    (tmp_path / "shuffled").write_text(" ".join(words[3000:] + words[:3000]))
    broken = v10.load(trained / "v7.best.pt")
    broken["model"]["norm.weight"][3] = float("nan")
    v10.save(tmp_path / "broken.pt", broken)
    v10.save(trained / "cut.pt", v10.load(trained / "v7.best.pt") | {"cut_from": "v7.best.pt"})
    names = {"ckpt": trained / "v7.best.pt", "text": trained / "text.tokens", "other": tmp_path / "other",
             "last": trained / "v7.pt", "folder": tmp_path, "training": trained / "v7.jsonl",
             "tied": trained / "v11.best.pt", "shuffled": tmp_path / "shuffled", "broken": tmp_path / "broken.pt",
             "short": tmp_path / "short", "bad": tmp_path / "bad.safetensors", "nan": tmp_path / "nan.pt",
             "flat": tmp_path / "flat.safetensors", "cut": trained / "cut.pt", "code": tmp_path / "code.pt"}
    flags = [flag.format(**names) for flag in flags]
    if flags[:1] in (["cut"], ["fit"], ["tune"]):
        if "--out" not in flags:
            flags += ["--out", str(tmp_path / "out.pt")]
        if "--log-file" not in flags:
            flags += ["--log-file", str(tmp_path / "log.jsonl")]
        if "--data-file" not in flags:
            flags += ["--data-file", str(trained / "text.tokens")]
    before = {path: path.read_bytes() for folder in (trained, tmp_path) for path in folder.iterdir() if path.is_file()}
    assert compress.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for folder in (trained, tmp_path) for path in folder.iterdir()} == before
    assert not (tmp_path / "log.jsonl").exists()
