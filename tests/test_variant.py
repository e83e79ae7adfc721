"""The seam for variants: tests/variant.py, through its command line."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import plot_logs
import v10_transformer_lowrank_scaled as v10
import variant
from conftest import RANKS, ROOT, SMALL, records, unpainted, untimed
from test_parallel import TORCHRUN

FLAGS = [*SMALL, *RANKS, "--rank-interval", "3", "--optimizer-on-resize", "transport", "--factor-lr", "0.1",
         "--lr-schedule", "cosine", "--warmup-steps", "4", "--checkpoint-minutes", "0.0005", "--epochs", "8",
         "--test-file", "test.tokens"]


def launch(folder, *flags, launcher=(sys.executable,)):
    """A run of the variant in a folder, where its log is that of its own default."""
    return subprocess.Popen([*launcher, ROOT / "tests" / "variant.py", "--data-file", "text.tokens", *FLAGS, *flags],
                            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished(process):
    _, error = process.communicate()
    assert process.returncode == 0, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, and a run of the variant that nobody touched."""
    folder = tmp_path_factory.mktemp("straight")
    text = " ".join(f"w{i * i % 47} w{i % 5}" for i in range(1500))
    (folder / "text.tokens").write_text(text)
    (folder / "test.tokens").write_text("w1 w2 w4 w0 " * 20)
    finished(launch(folder))
    return folder


def test_a_variant_has_its_own_name_log_flag_layer_rates_and_rank_decisions(folder):
    log = folder / "logs" / "variant.jsonl"
    (first,), epochs = records(log, "run"), records(log, "epoch")
    assert (first["script"], first["factor_lr"]) == ("variant.py", 0.1)
    assert first["factor_parameters"] == sum(12 * sum(layer["shape"]) + layer["shape"][0] for layer in first["layers"])
    updates = [first["initial_ranks"], *(r["ranks"] for r in records(log) if r["kind"] in ("ranks", "epoch"))]
    moves = [abs(b - a) for before, after in zip(updates, updates[1:], strict=False)
             for a, b in zip(before, after, strict=True)]
    assert max(moves) == 1
    assert sum(moves) > 20
    sgd, adamw = v10.load(log.with_suffix(".pt"))["optimizer"]
    assert [group["initial_lr"] for state in (sgd, adamw) for group in state["param_groups"]] == [0.1, 0.01]
    assert epochs[-1]["lr"] == pytest.approx(10 * adamw["param_groups"][0]["lr"]), "one schedule, each group's own rate"
    assert epochs[-1]["lr"] < epochs[0]["lr"]
    assert variant.Biased.description in v10.build_parser(variant.Biased()).format_help()


def test_a_variant_that_is_killed_and_resumed_is_the_one_that_nobody_touched_bit_for_bit(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs"))
    log, straight = tmp_path / "logs" / "variant.jsonl", folder / "logs" / "variant.jsonl"
    process = launch(tmp_path)
    while not log.exists() or len(records(log, "ranks")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished(launch(tmp_path, "--resume"))
    assert records(log, "resume")[0]["step"] > 0
    for kind in ("epoch", "ranks", "end"):
        assert untimed(log, kind) == untimed(straight, kind)


def test_two_processes_train_a_variant_as_one_does(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs"))
    finished(launch(tmp_path, launcher=TORCHRUN))
    for one, two in zip(records(folder / "logs" / "variant.jsonl", "epoch"),
                        records(tmp_path / "logs" / "variant.jsonl", "epoch"), strict=True):
        assert two["ranks"] == one["ranks"]
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


def test_a_variants_model_is_loaded_with_its_layer_and_its_log_is_plotted(folder, tmp_path, monkeypatch):
    log = folder / "logs" / "variant.jsonl"
    model, vocabulary = v10.load_model(log.with_suffix(".pt"), variant.Biased().linear)
    words = (folder / "text.tokens").read_text().split()
    held_out = v10.encode(words[records(log, "run")[0]["train_tokens"]:], vocabulary)
    end = records(log, "end")[0]
    assert v10.evaluate(model, held_out, 4) == pytest.approx(end["final_val_loss"], rel=1e-6)
    assert end["test_loss_best"] > 0
    with pytest.raises(v10.UserError, match="does not hold a model"):
        v10.load_model(log.with_suffix(".pt"))
    monkeypatch.setattr(plot_logs, "save", unpainted)
    assert plot_logs.main([str(log), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "variant_heatmap.png").exists()


def test_a_bug_in_a_variants_layer_is_raised_and_not_taken_for_a_damaged_file(folder):
    def buggy(n, m, rank):
        raise AttributeError("a bug")
    with pytest.raises(AttributeError, match="a bug"):
        v10.load_model(folder / "logs" / "variant.pt", buggy)
