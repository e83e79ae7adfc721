"""bench.py: it measures what it says, at a small size through its command."""
import functools
import json
from argparse import Namespace

import pytest
import torch

import bench
import v10_transformer_lowrank_scaled as v10

SMALL = {"device": "cpu", "dtype": "float32", "rank": 6, "d_model": 16, "n_layers": 2, "n_heads": 2, "block_size": 8,
         "batch_size": 4, "words": 40}


@pytest.fixture
def results(tmp_path, monkeypatch, capsys):
    """-> results of the command, what it printed. Large products are timed for a short time, and other processes are
    started once for one process and once for two, not for each entry and round."""
    started, elsewhere = {}, bench.elsewhere

    def once(kind, args, processes=1):
        if processes not in started:
            started[processes] = elsewhere(kind, args, processes)
        return started[processes]
    monkeypatch.setattr(bench, "elsewhere", once)
    monkeypatch.setattr(bench, "product_rate", functools.partial(bench.product_rate, least=0.05))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    log = tmp_path / "new" / "bench.json"
    assert bench.main([*flags, "--rounds", "2", "--large", "64", "--log-file", str(log)]) == 0
    return json.loads(log.read_text()), capsys.readouterr().out


def test_its_table_follows_from_the_seconds_it_wrote(results):
    results, printed = results
    assert bench.section(results) in printed
    assert list(results["dtypes"]) == ["float32"]
    found = results["dtypes"]["float32"]
    assert len(found["rounds"]) == 2
    for row, name, over_v10 in (
            ("step time of v10 / floor", "floor", False), ("step time of v7 / v10", "v7", True),
            ("step time of the literal reading / v10", "literal", True),
            ("step time of v10 at rank 3 / 6", "v10@3", True),
            ("step time of v10 with v11's optimizer / with AdamW", "spectron", True),
            ("step time of v10 in one process / in two", "two", False)):
        ratios = sorted((taken[name]["seconds"] / taken[name]["v10"]) ** (1 if over_v10 else -1)
                        for taken in found["rounds"])
        assert list(found["measured"][row].values()) == pytest.approx([sum(ratios) / 2, *ratios])
    updates = sorted(taken["literal update"] / taken["update"] for taken in found["rounds"])
    assert list(found["measured"]["time of the literal rank update / v10's"].values()) == pytest.approx(
        [sum(updates) / 2, *updates])
    uses = sorted(taken["v7, generate"] / taken["cut, generate"] for taken in found["rounds"])
    assert list(found["measured"]["time to generate with v7 / with v7 cut to a quarter"].values()) == pytest.approx(
        [sum(uses) / 2, *uses])
    assert list(results["svds"]) == ["40 x 16 at rank 6", "64 x 64 at rank 12"]
    of_unknown_memory = bench.ratios(Namespace(**SMALL, large=64), found["rounds"], found["large_literal_seconds"],
                                     dict.fromkeys(found["memory_mb"]))
    assert set(found["measured"]) - set(of_unknown_memory) == {row for row in found["measured"] if "memory" in row}


def test_the_ways_to_a_truncated_svd_have_the_errors_that_they_say():
    found = bench.truncated_svds(60, 40, 6, torch.Generator().manual_seed(0))
    assert found["exact"][1] == pytest.approx(1, abs=1e-4)
    assert found["gram"][1] == pytest.approx(1, abs=1e-4)
    assert 1 - 1e-4 < found["randomised"][1] < 1.02
    assert found["nystroem"][1] > 1.05


def test_both_dtypes_are_measured_if_both_are_native(monkeypatch, capsys):
    monkeypatch.setattr(v10, "bfloat16_speedup", lambda: 2.3)
    monkeypatch.setattr(bench, "measure", lambda args: {"rounds": [1], "measured": {
        "float32": {"step": 1.5}, "bfloat16": {"step": 1.7, "beside float32": 2.25}}[args.dtype]})
    monkeypatch.setattr(bench, "truncated_svds", lambda *_: {"exact": (2.0, 1.0), "nystroem": (0.5, 2.25)})
    assert bench.main(["--device", "cpu", "--log-file", "/dev/null"]) == 0
    *table, _, _, _, first, _ = capsys.readouterr().out.splitlines()
    assert first == "| 33,277 x 512 at rank 64 | 1, 1.000 | 4, 2.250 |"
    assert table[-4:] == [
        "| ratio | float32 | bfloat16 |", "|---|--:|--:|", "| step | 1.50 | 1.70 |",
        "| beside float32 | \N{EN DASH} | 2.25 |"]


def test_the_literal_reading_computes_the_same_losses_as_v10():
    literal, ours = (bench.make_step(kind, Namespace(**SMALL)) for kind in ("literal", "v10@6"))
    for _ in range(3):
        assert literal().item() == pytest.approx(ours().item(), rel=1e-4)


def test_the_literal_rank_update_finds_the_same_factors_as_v10():
    torch.manual_seed(0)
    factors = [(torch.randn(30, 8), torch.randn(8, 20))]
    ((_, U, V),) = bench.literal_rank_update(factors, 5)
    ((_, _, ours_U, ours_V, *_),) = bench.factor_rank_update(factors, 5, torch.Generator().manual_seed(0))
    assert torch.allclose(U @ V, ours_U @ ours_V, atol=1e-4)


def test_the_floor_counts_the_reports_products():
    flop = bench.step_flop(Namespace(batch_size=32, block_size=256, d_model=512, n_layers=6, words=33_277), 64)
    assert {name: round(count / 1e9) for name, count in flop.items()} == {"head": 837, "linear": 174, "attention": 39}


@pytest.mark.parametrize(("flags", "message"), [
    (["--show", "nowhere.json"], "No such file"), (["--rank", "3"], "at least 4"), (["--batch-size", "5"], "even"),
    (["--d-model", "20", "--n-heads", "3"], "multiple"), (["--log-file", "/dev/null/x"], "/dev/null"),
    (["--words", "8"], "--words must be at least --d-model"), (["--log-file", "."], "needs the name of a file"),
    *(([flag, "{thesis}"], "thesis does not hold results of bench.py") for flag in ("--log-file", "--show"))])
def test_a_mistake_is_told_in_a_line_before_the_work(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "measure", lambda args: pytest.fail("the work has begun"))
    (tmp_path / "thesis").write_text("[1, 2]")
    assert bench.main([flag.format(thesis=tmp_path / "thesis") for flag in flags]) == 2
    assert (tmp_path / "thesis").read_text() == "[1, 2]"
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
