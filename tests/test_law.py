"""The scaling law's fits, on data whose law is known, and the runs that scaling.py makes."""
import argparse
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import counts
import law
import plot_logs
import scaling
import v10_transformer_lowrank_scaled as v10
from conftest import ROOT
from study import VARIANTS as SCRIPTS

VARIANTS = {script.name: script for script in SCRIPTS.values()}

C = np.array([1e12, 3e12, 9e12, 27e12])
N = np.array([[2e4, 4e4, 8e4, 16e4, 32e4]]) * 3 ** (0.5 * np.arange(4))[:, None]
D = C[:, None] / (3 * N)


def arm(loss):
    return law.Arm(np.broadcast_to(C[:, None], N.shape), N, N + 32_000, D, loss)


def on_parabolas(a, c):
    """Losses of which each budget's are exactly a parabola in log N, lowest at N_opt ~ C^a, where they fall as C^-c."""
    optimum = np.log(8e4) + a * np.log(C / C[0])
    return np.exp(0.1 * (np.log(N) - optimum[:, None]) ** 2 - c * np.log(C / C[0])[:, None])


@pytest.mark.parametrize(("a", "c"), [(0.5, 0.1), (0.4, 0.3)])
def test_parabolas_give_back_the_exponents_that_they_were_made_with(a, c):
    found = law.fit(arm(on_parabolas(a, c)), draws=3)
    for key, value in {"a": a, "b": 1 - a, "c": c}.items():
        assert found.exponents[key] == pytest.approx(np.full(4, value), abs=1e-9)  # residuals are 0, so are the draws'
    assert found.loss[0] == pytest.approx((C / C[0]) ** -c, rel=1e-9)
    assert found.N_opt[0] == pytest.approx(8e4 * (C / C[0]) ** a, rel=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.8, 0.2)])
def test_two_power_laws_give_back_their_exponents(alpha, beta):
    found = law.fit(arm(400 * N**-alpha + 30 * D**-beta), draws=2)
    assert found.exponents["alpha"] == pytest.approx(np.full(3, alpha), abs=1e-4)
    assert found.exponents["beta"] == pytest.approx(np.full(3, beta), abs=1e-4)


def test_a_law_without_one_of_its_terms_is_fitted_by_the_other():
    loss = np.log(30 * D**-0.3)
    *_, fitted = law.parametric(np.log(N), np.log(D), loss[None])
    assert fitted[0] == pytest.approx(loss, abs=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, inside, noise = np.random.default_rng(0), {"a": 0, "c": 0}, 0.02
    for _ in range(300):
        log_loss = np.log(on_parabolas(0.5, 0.2)) + rng.normal(0, noise, N.shape)
        found = law.isoflop(np.log(N), np.log(D), log_loss, np.log(C), 200, rng)[3]
        for key, truth in {"a": 0.5, "c": 0.2}.items():
            low, high = np.percentile(found[key][1:], [2.5, 97.5])
            inside[key] += low <= truth <= high
    assert all(0.91 <= count / 300 <= 0.99 for count in inside.values()), inside


@pytest.fixture
def few_draws(monkeypatch):
    """For tables whose intervals nobody reads."""
    monkeypatch.setattr(law, "fit", functools.partial(law.fit, draws=20))


def test_a_lowest_point_beyond_the_sizes_is_taken_at_the_last_of_them_and_marked(few_draws):
    falling, rising = law.fit(arm(N**-0.1), draws=0), law.fit(arm(N**0.1), draws=0)
    assert falling.N_opt[0] == pytest.approx(N[:, -1])
    assert rising.N_opt[0] == pytest.approx(N[:, 0])
    assert (falling.beyond[0].tolist(), rising.beyond[0].tolist()) == ([1] * 4, [-1] * 4)
    assert not law.fit(arm(on_parabolas(0.5, 0.2)), draws=0).beyond.any()
    table = law.equal_compute({name: arm(N**-0.1) for name in law.ARMS})
    assert all(row[-1].startswith("at least ") for row in table.rows)


def test_in_multiplications_a_token_the_exponents_of_size_and_tokens_add_up_to_1():
    found = law.fit(arm(400 * N**-0.34 + 30 * D**-0.28), "per_token", draws=20).exponents
    assert found["a"] + found["b"] == pytest.approx(np.ones(21), abs=1e-6)


def test_the_tables_set_low_rank_beside_dense_at_equal_compute(few_draws):
    losses = {"adamw": on_parabolas(0.5, 0.2), "muon": 0.8 * on_parabolas(0.4, 0.2), "spectron": on_parabolas(0.5, 0.2)}
    arms = {name: arm(loss) for name, loss in losses.items()}
    table = law.equal_compute(arms)
    assert len(table.rows) == 4
    for i, (_, adamw, muon, spectron, to_adamw, to_muon, *sizes) in enumerate(table.rows):
        best = 3 ** (-0.2 * i)
        assert (adamw[:5], muon[:5], spectron[:5]) == tuple(f"{share * best:.3f}" for share in (1, 0.8, 1))
        assert (to_adamw[:6], to_muon[:6]) == ("+0.000", f"{0.2 * best:+.3f}")
        assert [str(size) for size in sizes] == [f"{80 * 3 ** (a * i):,.0f}" for a in (0.5, 0.4, 0.5)]
    rows = law.exponents(arms).rows
    assert [row[1][:5] for row in rows[::3][:3]] == ["0.500", "0.400", "0.500"]
    assert [row[1][:6] for row in rows[-3:-1]] == ["+0.000", "+0.100"]
    assert rows[-1][1:3] == ["0.479", "0.521"]


def test_the_misfit_of_the_form_is_shown_and_not_only_the_scatter_about_it():
    exact = law.fit(arm(on_parabolas(0.5, 0.2)), draws=0).misfit
    assert exact[0] < 1e-9 < 0.01 < exact[1]  # parabolas are not a sum of powers
    off = np.exp(0.05 * np.array([1, -4, 6, -4, 1]) / 6)  # orthogonal to parabolas through five points
    bent = law.fit(arm(on_parabolas(0.5, 0.2) * off), draws=0).misfit
    assert bent[0] == pytest.approx(0.05 * (70 / 5) ** 0.5 / 6)


@pytest.fixture
def study(tmp_path):
    return scaling.Scaling(argparse.Namespace(out=tmp_path, dtype="float32", jobs=2))


def test_every_run_is_a_command_that_spends_its_budget(study, monkeypatch):
    monkeypatch.setattr(study, "factor", lambda arm, width: 1.0)
    assert len(study.runs) == len(set(study.runs)) == 3 * (2 * 6 + 20 + 2 + 2 * 2)
    for run in study.runs:
        name, budget, width, tried, times = scaling.of_name(run.name)
        command = study.command(run)
        args = v10.parse_flags(VARIANTS[Path(command[1]).name](), command[2:])
        assert (args.d_model, args.d_ff, args.seed, args.one_pass, args.tie_embeddings) == (
            width, 4 * width, run.seed, True, True)
        assert args.optimizer == name
        rates = {flag.strip("-"): rate * (tried or times) for flag, rate in scaling.RATES[name].items()}
        assert {flag: getattr(args, flag) for flag in rates} == pytest.approx(rates, rel=0.01)
        tokens, linear = args.batch_size * args.block_size, 12 * width**2 * args.n_layers
        if name == "spectron":
            assert (args.init_rank, args.cuts) == (width // 4, 0)
            linear = args.n_layers * 18 * width * width // 4  # 4 layers of width + width, 2 of width + 4 width
        products = 3 * tokens * (linear + 500 * width + 64 * width * args.n_layers) * args.steps_per_epoch
        assert products < 1.01 * scaling.BUDGETS[budget]  # Newton-Schulz takes the rest
        assert products > (0.98 if name == "adamw" else 0.4) * scaling.BUDGETS[budget]


def test_rates_lie_on_the_line_through_the_best_of_two_widths(study, capsys):
    x, tuned = np.log2(scaling.TRIED), {}
    for name, (at_small, at_large) in {"adamw": (1.3, -0.4), "muon": (0.0, 5.0), "spectron": (1.3, -0.4)}.items():
        for (width, names), at in zip(scaling.tries(name).items(), (at_small, at_large), strict=True):
            for stem, loss in zip(names, 5 + (x - at) ** 2, strict=True):
                v10.write_record(study.log(f"{stem}_s0"), "end", final_val_loss=loss)
            tuned[name, width] = 2 ** min(at, x[-1])  # beyond the tries it is the last of them
    for name in scaling.ARMS:
        assert study.best(name) == [pytest.approx((width, tuned[name, width])) for width in scaling.tries(name)]
    assert [study.factor("muon", width) for width in (16, 32, 64, 128)] == pytest.approx([1, 2, 4, 8])
    assert study.factor("muon", 256) > 8  # beyond what was tuned the line goes on
    study.measure()
    assert capsys.readouterr().out == (
        "*** muon, width 128: the best rate is at the edge of those that were tried\n"
        f"python3 law.py {study.out} makes the tables and the figure\n")


def test_another_precision_or_text_in_the_folder_is_refused(study):
    study.folder.mkdir()
    (study.folder / "corpus.json").write_text('{"entropy_floor": 2.0}')
    for sidecar in ('{"entropy_floor": 2.5, "context": 64}', '{"entropy_floor": 2.0, "context": 32}', "{", "[]"):
        study.folder.with_suffix(".json").write_text(sidecar)
        with pytest.raises(v10.UserError, match="are not of one text"):
            study.prepare()
    study.folder.with_suffix(".json").write_text('{"entropy_floor": 2.0, "context": 64}')
    study.prepare()
    v10.write_record(study.log("muon_c0_d24_s0"), "run", dtype="bfloat16")
    with pytest.raises(v10.UserError, match="another --dtype than float32"):
        study.prepare()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of all runs of one arm at two small budgets, made by their own commands, in forks of one process: else
    imports of torch, and of what the first optimizer loads, would take most of the time."""
    out = tmp_path_factory.mktemp("scaling")
    script = f"""
import os, sys
import torch._dynamo
sys.path.insert(0, {str(ROOT)!r})
import scaling, v10_transformer_lowrank_scaled as v10, v11_transformer_lowrank_spectron as v11

def execute(self, run, command):
    assert command[1].endswith(v11.LowRankSpectron.name)
    child = os.fork()
    if not child:
        os._exit(v10.main(command[2:], v11.LowRankSpectron()))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

scaling.Scaling.execute = execute
scaling.ARMS, scaling.FIRST = {{"spectron": scaling.ARMS["spectron"]}}, {{"spectron": 0}}
scaling.BUDGETS, scaling.TRIED = [2e8, 6e8], (0.5, 1)
scaling.AGAIN, scaling.SEEDS, scaling.TIMES = {{1: {{"spectron": 16}}}}, (1,), (2,)
scaling.WIDTHS, scaling.PER_BUDGET = (8, 16, 24, 32, 48), 4
scaling.BLOCKS |= {{8: 1, 16: 1}}
scaling.TEXT, scaling.HELD_OUT = scaling.TEXT.replace("0.005", "0.1"), 0.1
scaling.COMMON = scaling.COMMON.replace("0.005", "0.1")
sys.exit(scaling.main(["--out", {str(out)!r}, "--dtype", "float32", "--jobs", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return out


def ended(folder):
    return {path.stem: plot_logs.read_log(path, path.stem) for path in folder.glob("*_s0.jsonl")}


def test_the_runs_read_a_text_once_at_rates_between_the_best_of_two_widths(tiny):
    runs = ended(tiny)
    assert len(runs) == 2 * 2 + 8 + 1
    assert all(run.settings["one_pass"] and run.settings["dropout"] == 0 for run in runs.values())
    best = {width: min((0.5, 1), key=lambda f, w=width: runs[f"spectron_c0_d{w}_rate{f}_s0"].end["final_val_loss"])
            for width in (8, 32)}
    for width in (8, 16, 24, 32):
        share = math.log(width / 8) / math.log(4)
        factor = best[8] ** (1 - share) * best[32] ** share
        settings = runs[f"spectron_c0_d{width}_s0"].settings
        assert (settings["eta"], settings["lr"]) == pytest.approx((0.07 * factor, 4e-3 * factor), rel=0.01)
        assert set(settings["initial_ranks"]) == {width // 4}


def test_the_law_is_read_from_the_logs_above_the_floor_in_context(tiny, tmp_path, few_draws, capsys):
    floor = json.loads((tiny / "synthetic.json").read_text())
    assert floor["context"] == scaling.SIZE["block_size"]
    for path in tiny.glob("*.json*"):  # the other arms' are copies
        for name in law.ARMS:
            (tmp_path / path.name.replace("spectron", name)).write_bytes(path.read_bytes())
    arms, run = law.read(tmp_path), ended(tiny)["spectron_c1_d16_s0"]
    found = arms["spectron"]
    assert found.loss[1, 0] == run.epochs[0]["val_loss"] - floor["context_floor"] > 0
    assert found.linear[:, 0].tolist() == [2 * (4 * 2 * 8 + 2 * 5 * 8), 4 * (4 * 2 * 16 + 2 * 5 * 16)]  # a block each
    again = {how: plot_logs.read_log(tmp_path / f"spectron_c1_d16_{how}.jsonl", how) for how in ("s1", "times2_s0")}
    losses = {how: run.epochs[0]["val_loss"] - floor["context_floor"] for how, run in again.items()}
    assert found.again == ((found.compute[1, 0], found.linear[1, 0], [found.loss[1, 0], losses["s1"]],
                            {"2": losses["times2_s0"]}),)
    assert (again["s1"].settings["seed"], again["s1"].settings["eta"]) == (1, run.settings["eta"])
    assert again["times2_s0"].settings["eta"] == pytest.approx(2 * run.settings["eta"], rel=0.01)
    assert found.tokens[1, 0] == 2048 * run.settings["steps_per_epoch"]
    settings = counts.settings_of(16, 1, **scaling.SIZE, optimizer="spectron")
    assert found.compute[1, 0] == run.settings["steps_per_epoch"] * counts.step_multiplications(settings, [4] * 6)
    assert law.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(table(arms).markdown() in said for table in law.TABLES.values())
    assert said.endswith(f"{tmp_path / 'law.png'}\n")
    assert (tmp_path / "law.png").stat().st_size > 10_000
    sidecar = tmp_path / "synthetic.json"
    for change, message in (({"context": 32}, "mixes runs"), ({"entropy_floor": 1.0}, "mixes runs"),
                            ({"context_floor": 9.0}, "no honest model"), ({"context_floor": None}, "does not say")):
        sidecar.write_text(json.dumps(floor | change))
        with pytest.raises(plot_logs.LogError, match=message):
            law.read(tmp_path)
    assert law.main([str(tmp_path)]) == 2
    assert "does not say what the text's floor is" in capsys.readouterr().err
    sidecar.write_text(json.dumps(floor))
    log = tmp_path / "adamw_c0_d16_s0.jsonl"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:1]))  # it has begun, no more
    assert law.read(tmp_path) == {}
    log.unlink()
    assert law.main([str(tmp_path)]) == 2
    assert f"{tmp_path} does not hold all of scaling.py's runs: `make scaling` goes on" in capsys.readouterr().err
    log.write_text(whole)
    (tmp_path / "muon_c1_d16_s1.jsonl").unlink()  # one arm has fewer seeds
    assert law.read(tmp_path) == {}
    (tmp_path / "muon_c1_d16_s1.jsonl").write_bytes((tmp_path / "adamw_c1_d16_s1.jsonl").read_bytes())
    assert law.read(tmp_path)
    for path in tmp_path.glob("spectron_c1_*"):  # a budget that one arm has not reached
        path.unlink()
    log.write_text(whole)
    assert law.read(tmp_path) == {}


def test_the_list_names_every_run(capsys):
    assert scaling.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * (2 * 6 + 20 + 2 + 2 * 2)
    assert all(line.startswith("-") for line in lines)
