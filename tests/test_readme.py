"""What the README says is what there is."""
import json
import re
import shutil
from collections import Counter
from statistics import median

import pytest

import bench
import compress
import plot_logs
import prepare
import results
import soak
import study
import synthetic
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
from conftest import ROOT, records
from test_training import replay

README, RESULTS, REFERENCE, CONTRIBUTING = ((ROOT / name).read_text() for name in (
    "README.md", "RESULTS.md", "docs/reference.md", "CONTRIBUTING.md"))
PAGES = README + RESULTS + REFERENCE + CONTRIBUTING
DEMO = ROOT / "logs" / "reference" / "demo"


def test_its_comparison_is_what_plot_logs_makes_of_the_reference_logs():
    runs, _ = plot_logs.read_logs([DEMO / f"{name}.jsonl" for name in ("v10", "v10_bidirectional", "v7")])
    assert plot_logs.comparison_table(plot_logs.grouped(runs)).markdown() in RESULTS


def test_the_reference_runs_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    demo = re.search(r"^DEMO := (.*)", makefile, re.M)[1].split()
    for name in ("v10", "v10_bidirectional", "v7"):
        command = records(DEMO / f"{name}.jsonl", "run")[0]["command"]
        assert " ".join(word.rpartition("/")[2] for word in demo) in command


def test_the_causal_reference_runs_stay_above_the_floor_and_the_other_ends_far_below():
    floor = json.loads((ROOT / "data" / "synthetic.json").read_text())["entropy_floor"]
    for name in ("v10", "v10_bidirectional", "v7"):
        run, *_ = records(DEMO / f"{name}.jsonl", "run")
        losses = [epoch["val_loss"] for epoch in records(DEMO / f"{name}.jsonl", "epoch")]
        assert run["entropy_floor"] == floor
        assert run["leak_check"]["leaks"] == (name == "v10_bidirectional")
        assert losses[-1] < floor / 2 if name == "v10_bidirectional" else min(losses) > floor


def test_the_start_on_real_text_is_told_as_logged_and_does_not_depend_on_the_dtype():
    logs = [DEMO.parent / "wikitext2_start" / f"{name}.jsonl" for name in ("v10", "v10_bfloat16")]
    results, runs = " ".join(RESULTS.split()), [records(log, "epoch") for log in logs]
    for log, epochs, dtype in zip(logs, runs, ("float32", "bfloat16"), strict=True):
        assert records(log, "run")[0]["dtype"] == dtype
        assert ", ".join(f"{epoch['val_loss']:.3f}" for epoch in epochs) + f" in {dtype}" in results
    assert f"in {max(epoch['peak_memory_mb'] for epoch in runs[0]) / 1000:.1f} and " in results
    for ours, theirs in zip(*runs, strict=True):
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], abs=0.01)
        assert theirs["rank_avg"] == pytest.approx(ours["rank_avg"], abs=1)


def test_the_controller_replays_the_reference_logs():
    for log in (DEMO / "v10.jsonl", DEMO / "v10_bidirectional.jsonl", DEMO.parent / "wikitext2_start" / "v10.jsonl"):
        assert len(replay(log)) == len(records(log, "epoch"))
        assert all(logged == replayed for logged, replayed in replay(log))


def test_its_speed_is_what_bench_measured():
    results = json.loads((DEMO.parent / "bench.json").read_text())
    assert bench.section(results) in RESULTS
    floors = [median(taken["floor"]["seconds"] for taken in results["dtypes"][dtype]["rounds"])
              for dtype in ("float32", "bfloat16")]
    assert f"a large product is {floors[0] / floors[1]:.1f} times as fast in bfloat16" in RESULTS


def test_its_kills_are_those_of_the_soak_and_nothing_was_lost():
    found = records(DEMO.parent / "soak.jsonl")
    assert soak.table(found) in RESULTS
    assert [found[-1][name] for name in ("lost", "differing", "tensors", "stops", "unsaved")] == [0, 0, 0, 20, 0]
    kills = Counter(record["moment"] for record in found if record["kind"] == "kill")
    assert kills[soak.RANDOM] >= 15
    assert all(kills[moment] >= 3 for moment in soak.CHOSEN)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^    )make ([a-z0-9]+)", PAGES, re.M))))
def test_every_make_command_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_every_flag_exists(capsys):
    helps = [v10.build_parser(variant).format_help() for variant in (v10.Variant(), v11.LowRankSpectron())]
    for script in (plot_logs, results, study, bench, prepare, synthetic):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    for command in ("fit", "cut", "tune", "compare", "spectrum"):
        with pytest.raises(SystemExit):
            compress.main([command, "--help"])
    named = re.compile(r"(?<!\w)--[a-z][a-z-]*")
    known = {flag for said in (*helps, capsys.readouterr().out) for flag in named.findall(said)}
    elsewhere = {"--nproc-per-node", "--write"}  # torchrun's, golden.py's
    assert set(named.findall(PAGES)) - elsewhere <= known


def test_every_field_of_the_log_is_explained(run, text):
    test = text.with_name("test.tokens")
    test.write_text("w1 w2 " * 20)
    log = run("--test-file", test, "--telemetry", "--rank-budget", 0.4, main=v11.main)
    explained = set(re.findall(r"`(\w+)`", REFERENCE))
    for kind in ("epoch", "cut", "end"):
        assert set(records(log, kind)[0]) <= explained | {"kind"}


def test_it_is_short():
    assert len(README.splitlines()) <= 180
    assert len(README.split()) <= 1800


VARIANT, USE = re.findall(r"```python\n(.*?)```", README, re.S)


def test_its_variant_trains_the_factors_with_momentum(run):
    names = {"__name__": "momentum"}
    exec(VARIANT, names)
    log = run("--optimizer-on-resize", "transport",
              main=lambda argv: v10.main(argv, names["Momentum"]()))
    assert records(log, "run")[0]["script"] == "momentum.py"
    assert records(log, "epoch")[-1]["lr"] == 0.1
    sgd, _ = v10.load(log.with_suffix(".pt"))["optimizer"]
    assert {name for state in sgd["state"].values() for name in state} == {"momentum_buffer"}


def test_its_use_of_a_model_runs(run, tmp_path, monkeypatch, capsys, text):
    log = run()
    (tmp_path / "logs").mkdir()
    shutil.copy(log.with_suffix(".best.pt"), tmp_path / "logs" / "v10.best.pt")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names = {}
    exec(USE, names)
    assert len(capsys.readouterr().out.split()) == 31
    layer = names["model"].linears()["1.down"]
    assert names["weights"]["1.down"].shape == layer.shape == (16, 32)
    assert names["weights"]["1.down"].equal(layer.U.data @ layer.V.data)
