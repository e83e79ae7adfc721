"""Whole runs of v10 and v7: the log, resuming, and what must not change a number."""
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
import torch

import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
from conftest import RANKS, ROOT, SMALL, records, untimed

EPOCH_FIELDS = """kind epoch tokens_seen train_loss val_loss val_ppl lr rank_min rank_max rank_avg ranks stable_ranks
    stable_ranks_exact targets ema reasons resized params_millions factor_params_millions time_sec train_sec eval_sec
    rank_sec tokens_per_sec peak_memory_mb""".split()
RUN_FIELDS = """data_file val_fraction test_file d_model n_layers n_heads d_ff block_size attention dropout init_rank
    ranks_from min_rank max_rank fixed_rank safety_factor ema_decay change_threshold max_step power_iterations
    rank_interval optimizer_on_resize epochs steps_per_epoch batch_size grad_accum lr lr_schedule
    warmup_steps weight_decay grad_clip seed device compile dtype dtype_reason processes log_file checkpoint resume
    overwrite script command versions data_sha256 vocab_size train_tokens val_tokens parameters
    factor_parameters initial_ranks layers leak_check entropy_floor""".split()
RESIZING = ["--rank-interval", 3, "--dropout", 0.1]  # ranks change inside epochs, and every generator is in use


def replay(log):
    """The decisions, taken again from the logged stable ranks -> for each update [what is logged, what comes out],
    each a list of ranks, EMAs, targets and reasons."""
    settings, updates = records(log, "run")[0], []
    controllers = [v10.RankController(**{name: settings[name] for name in (
        "safety_factor", "ema_decay", "change_threshold", "max_step", "min_rank")}, max_rank=min(layer["shape"]))
        for layer in settings["layers"]]
    ranks, emas = settings["initial_ranks"], [float(rank) for rank in settings["initial_ranks"]]
    for record in records(log):
        steps = record["epoch"] * settings["steps_per_epoch"] if record["kind"] == "epoch" else 1
        if record["kind"] == "ranks" or record["kind"] == "epoch" and steps % (settings["rank_interval"] or 1) == 0:
            decisions = [controller.propose(*values) for controller, *values in
                         zip(controllers, ranks, emas, record["stable_ranks"], strict=True)]
            ranks, emas, targets, reasons = map(list, zip(*decisions, strict=True))
            updates.append([[record[name] for name in ("ranks", "ema", "targets", "reasons")],
                            [ranks, emas, targets, reasons]])
    return updates


def test_the_log_has_every_field_and_no_path(run, tmp_path):
    log = run("--checkpoint", tmp_path / "elsewhere.pt")
    (first, *epochs, last) = records(log)
    assert set(RUN_FIELDS) <= set(first)
    assert [list(epoch) for epoch in epochs] == [EPOCH_FIELDS] * 4
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]
    assert last["kind"] == "end"
    assert (first["train_tokens"], first["val_tokens"], first["vocab_size"]) == (2745, 305, 50)
    assert first["layers"][4] == {"name": "0.up", "shape": [32, 16]}
    assert first["leak_check"] == {"leaks": False, "max_change": 0.0}
    assert str(tmp_path) not in log.read_text()
    assert (tmp_path / "elsewhere.pt").exists()
    assert (tmp_path / "elsewhere.best.pt").exists()


def test_the_numbers_of_a_record_agree_with_each_other(run):
    log = run()
    settings = records(log, "run")[0]
    other = settings["parameters"] - settings["factor_parameters"]
    for epoch in records(log, "epoch"):
        factor = sum(rank * sum(layer["shape"]) for rank, layer in zip(epoch["ranks"], settings["layers"], strict=True))
        assert epoch["factor_params_millions"] == factor / 1e6
        assert epoch["params_millions"] == (factor + other) / 1e6
        assert (epoch["rank_min"], epoch["rank_max"]) == (min(epoch["ranks"]), max(epoch["ranks"]))
        assert epoch["rank_avg"] == sum(epoch["ranks"]) / 12
        assert epoch["val_ppl"] == math.exp(epoch["val_loss"])
        assert epoch["tokens_seen"] == epoch["epoch"] * 5 * 4 * 8
        assert epoch["tokens_per_sec"] == pytest.approx(5 * 4 * 8 / epoch["train_sec"])
        assert epoch["train_sec"] + epoch["eval_sec"] + epoch["rank_sec"] <= epoch["time_sec"]
    best = min(records(log, "epoch"), key=lambda epoch: epoch["val_loss"])
    end = records(log, "end")[0]
    assert (end["best_epoch"], end["best_val_loss"]) == (best["epoch"], best["val_loss"])
    assert end["final_val_loss"] == epoch["val_loss"]


@pytest.mark.parametrize("flags", [[], ["--power-iterations", 0], ["--max-step", 1, "--ema-decay", 0.5]])
def test_replaying_the_controller_over_the_logged_stable_ranks_gives_the_logged_ranks(run, flags):
    log, seen = run("--epochs", 6, *flags), set()
    for logged, replayed in replay(log):
        assert logged == replayed
        seen.update(replayed[0])
    assert len(seen) > 3, "no rank changed"
    if "--power-iterations" in flags:
        assert all(epoch["stable_ranks"] == epoch["stable_ranks_exact"] for epoch in records(log, "epoch"))


def test_a_rank_interval_inside_an_epoch_logs_every_decision(run):
    log = run("--rank-interval", 2)
    assert [record["step"] for record in records(log, "ranks")] == [2, 4, 6, 8, 12, 14, 16, 18]
    assert all(logged == replayed for logged, replayed in replay(log))
    for epoch in records(log, "epoch"):
        inside = [r for r in records(log, "ranks") if 5 * (epoch["epoch"] - 1) < r["step"] < 5 * epoch["epoch"]]
        own = epoch["epoch"] in (2, 4)  # the update at its end; the other epochs repeat their last one
        assert own or all(epoch[name] == inside[-1][name] for name in v10.NO_UPDATE)
        assert epoch["resized"] >= sum(record["resized"] for record in inside)


def test_an_interval_longer_than_an_epoch_leaves_epochs_without_an_update(run):
    epochs = records(run("--rank-interval", 10), "epoch")
    assert [bool(epoch["stable_ranks"]) for epoch in epochs] == [False, True, False, True]
    assert epochs[0]["ranks"] == [12] * 12


def test_fixed_ranks_stay_and_are_still_measured(run):
    for epoch in records(run("--fixed-rank"), "epoch"):
        assert epoch["ranks"] == [12] * 12
        assert len(epoch["stable_ranks"]) == 12
        assert epoch["reasons"] == epoch["ema"] == epoch["targets"] == []


@pytest.mark.parametrize("choice", ["reinit", "transport"])
@pytest.mark.parametrize("flags", [[], RESIZING, [*RESIZING, "--dtype", "bfloat16"]],
                         ids=["epoch", "interval", "bfloat16"])
def test_a_run_that_is_continued_equals_the_straight_run_bit_for_bit(run, choice, flags):
    straight = run("--optimizer-on-resize", choice, *flags, name="straight")
    for epochs in (1, 3, 4):
        again = ["--resume"] if epochs > 1 else []
        resumed = run("--optimizer-on-resize", choice, *flags, "--epochs", epochs, *again, name="resumed")
    assert sum(epoch["resized"] for epoch in records(straight, "epoch")[1:]) > 12
    assert untimed(resumed) == untimed(straight)
    assert untimed(resumed, "ranks") == untimed(straight, "ranks")
    assert untimed(resumed, "end") == untimed(straight, "end")
    assert [record["epoch"] for record in records(resumed, "resume")] == [1, 3]
    for suffix in (".pt", ".best.pt"):
        a, b = (v10.load(log.with_suffix(suffix))["model"] for log in (straight, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("main", [v10.main, v7.main])
def test_a_run_that_is_interrupted_and_resumed_equals_the_straight_run_bit_for_bit(run, monkeypatch, main):
    flags, ranks = ["--lr-schedule", "cosine", "--dropout", 0.1], RANKS if main is v10.main else []
    straight = run(*flags, name="straight", main=main, ranks=ranks)
    train_step, calls = v10.train_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 13:  # in the third epoch
            raise KeyboardInterrupt
        return train_step(*args)
    monkeypatch.setattr(v10, "train_step", interrupted)
    run(*flags, name="resumed", main=main, ranks=ranks, code=130)
    resumed = run(*flags, "--resume", name="resumed", main=main, ranks=ranks)
    assert untimed(resumed) == untimed(straight)
    assert [record["kind"] for record in records(resumed)] == ["run", *["epoch"] * 2, "resume", *["epoch"] * 2, "end"]


@pytest.mark.parametrize(("speedup", "d_model", "dtype", "reason"), [
    (0.0, 512, "float32", "no native bfloat16"), (1.9, 512, "float32", "1.9 times as fast"),
    (2.0, 512, "bfloat16", "2.0 times as fast"), (5.3, 128, "bfloat16", "5.3 times as fast"),
    (5.3, 64, "float32", "below --d-model 128")])
def test_a_cpu_trains_in_bfloat16_if_the_model_is_large_and_a_product_twice_as_fast(
        monkeypatch, speedup, d_model, dtype, reason):
    monkeypatch.setattr(v10, "bfloat16_speedup", lambda: speedup)
    chosen, why = v10.choose_dtype(torch.device("cpu"), d_model)
    assert chosen == dtype
    assert reason in why


def test_without_native_bfloat16_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    monkeypatch.setattr(v10.time, "perf_counter", lambda: pytest.fail("a product is timed"))
    assert v10.bfloat16_speedup() == 0


def test_a_resumed_run_keeps_the_dtype_that_was_chosen_for_it(run, monkeypatch, capsys):
    large = ["--d-model", 128, "--n-layers", 1, "--dtype", "auto", "--init-rank", 12, "--min-rank", 2]
    monkeypatch.setattr(v10, "bfloat16_speedup", lambda: 2.34)
    straight = run(*large, name="straight", ranks=[])
    first = records(straight, "run")[0]
    assert (first["dtype"], first["dtype_reason"]) == ("bfloat16", "a product in bfloat16 is 2.3 times as fast here")
    run(*large, "--epochs", 2, name="resumed", ranks=[])
    assert "bfloat16 (a product in bfloat16 is 2.3 times as fast here)" in capsys.readouterr().out
    monkeypatch.setattr(v10, "bfloat16_speedup", lambda: pytest.fail("it is chosen again"))
    resumed = run(*large, "--resume", name="resumed", ranks=[])
    assert "bfloat16 (as the run began)" in capsys.readouterr().out
    assert untimed(resumed) == untimed(straight)
    run(*large, "--epochs", 5, "--dtype", "float32", "--resume", name="resumed", ranks=[], code=2)
    assert "dtype was bfloat16 and is now float32" in capsys.readouterr().err


def test_in_a_bfloat16_run_spectra_and_resizes_stay_in_float32(run, monkeypatch):
    plan_ranks, shrunk = v10.plan_ranks, []

    def checked(layers, *args):
        products = [(U.double() @ V.double()) for U, V in (layer.factors() for layer in layers)]
        update, resized = plan_ranks(layers, *args)
        for W, exact in zip(products, update["stable_ranks_exact"], strict=True):
            assert exact == pytest.approx((W.norm() / torch.linalg.matrix_norm(W, 2)).item()**2, rel=1e-5)
        for i, (U, V, *_) in resized.items():
            P, S, Qt = torch.linalg.svd(products[i], full_matrices=False)
            k = U.shape[1]
            best = P[:, :k] * S[:k] @ Qt[:k]
            shrunk.append((U.double() @ V.double() - best).norm() / best.norm())
        return update, resized
    monkeypatch.setattr(v10, "plan_ranks", checked)
    log = run("--dtype", "bfloat16", *RESIZING)
    assert len(shrunk) > 12
    assert max(shrunk) < 1e-5
    content = v10.load(log.with_suffix(".pt"))
    states = [state[name] for state in content["optimizer"][0]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {tensor.dtype for tensor in (*content["model"].values(), *states)} == {torch.float32}


def test_records_later_than_the_checkpoint_are_dropped(run):
    straight = run(name="straight")
    log = run("--epochs", 2, name="resumed")
    with open(log, "a") as file:
        file.write('{"kind": "epoch", "epoch": 3}\n{"kind": "ep')
    run("--resume", name="resumed")
    assert untimed(log) == untimed(straight)


def test_a_finished_run_says_so_and_stays_as_it_is(run, capsys):
    log = run()
    before = log.read_bytes()
    run("--resume")
    assert "finished" in capsys.readouterr().out
    assert log.read_bytes() == before


def test_a_log_without_a_finished_epoch_and_without_a_checkpoint_starts_over(run, capsys):
    log = run()
    expected = untimed(log), untimed(log, "run")
    log.write_bytes(log.read_bytes().splitlines(True)[0])
    for path in run.folder.glob("*.pt"):
        path.unlink()
    run("--resume")
    assert "starting over" in capsys.readouterr().out
    assert (untimed(log), untimed(log, "run")) == expected


def test_only_epochs_may_change_on_a_resume(run, capsys, text):
    log = run()
    before = log.read_bytes()
    for flags, said in ((["--lr", 0.02, "--seed", 1], "lr was 0.01 and is now 0.02, seed was 0 and is now 1"),
                        (["--epochs", 3], "past --epochs 3"), (["--optimizer-on-resize", "transport"], "transport")):
        run("--resume", *flags, code=2)
        assert said in capsys.readouterr().err
    text.write_text(text.read_text() + " w1")
    run("--resume", code=2)
    assert "data_sha256" in capsys.readouterr().err
    assert log.read_bytes() == before


def test_one_command_starts_a_run_and_goes_on_with_it(run, capsys):
    straight = run(name="straight")
    run("--epochs", 2, "--resume")
    assert "nothing to resume yet" in capsys.readouterr().out
    log = run("--resume")
    assert untimed(log) == untimed(straight)
    assert untimed(log, "run")[0]["resume"] is False


def test_ranks_from_a_log_count_also_if_resume_has_nothing_to_resume(run):
    first = run(name="first")
    log = run("--ranks-from", first, "--min-rank", 2, "--resume", name="second", ranks=[])
    assert records(log, "run")[0]["initial_ranks"] == records(first, "epoch")[-1]["ranks"]


def test_an_existing_log_is_replaced_only_with_overwrite(run, capsys):
    log = run()
    before = log.read_bytes()
    run("--seed", 1, code=2)
    assert "--resume continues" in capsys.readouterr().err
    assert log.read_bytes() == before
    run("--seed", 1, "--overwrite")
    assert [record["kind"] for record in records(log)] == ["run", *["epoch"] * 4, "end"]
    assert untimed(log)[0]["train_loss"] != json.loads(before.splitlines()[1])["train_loss"]


def test_the_seed_sets_every_number(run):
    assert untimed(run(name="a")) == untimed(run(name="b"))
    assert untimed(run("--seed", 1, name="c")) != untimed(run(name="d"))


def test_evaluating_and_measuring_more_often_changes_no_training_number(run, monkeypatch):
    flags = ["--dropout", 0.2, "--fixed-rank"]
    once = [epoch["train_loss"] for epoch in records(run(*flags, name="once"), "epoch")]
    more = [epoch["train_loss"] for epoch in records(run(*flags, "--rank-interval", 1, name="more"), "epoch")]
    evaluate = v10.evaluate
    monkeypatch.setattr(v10, "evaluate", lambda *args: (evaluate(*args), evaluate(*args))[1])
    twice = [epoch["train_loss"] for epoch in records(run(*flags, name="twice"), "epoch")]
    assert once == more == twice


def test_v7_and_v10_of_one_seed_see_the_same_batches(run, monkeypatch):
    sample_batch, seen = v10.sample_batch, []
    monkeypatch.setattr(v10, "sample_batch", lambda *args: seen.append(sample_batch(*args)) or seen[-1])
    run(name="v10")
    run(name="v7", main=v7.main, ranks=[])
    assert len(seen) == 40
    assert all(torch.equal(a, b) for ours, theirs in zip(seen[:20], seen[20:], strict=True)
               for a, b in zip(ours, theirs, strict=True))


def test_v7_logs_the_dense_matrices_stable_ranks_and_no_ranks(run):
    log = run(main=v7.main, ranks=[])
    settings, *epochs, _ = records(log)
    assert settings["factor_parameters"] == 2 * (4 * 16 * 16 + 2 * 16 * 32)
    assert settings["initial_ranks"] == []
    for epoch in epochs:
        assert list(epoch) == EPOCH_FIELDS
        assert (epoch["ranks"], epoch["rank_min"], epoch["rank_avg"], epoch["resized"]) == ([], None, None, 0)
        assert len(epoch["stable_ranks"]) == len(epoch["stable_ranks_exact"]) == 12
    dense = v10.load(log.with_suffix(".pt"))["model"]["blocks.0.down.weight"]
    exact = (dense.norm()**2 / torch.linalg.matrix_norm(dense, 2)**2).item()
    assert epochs[-1]["stable_ranks_exact"][5] == pytest.approx(exact, rel=1e-4)


def test_the_ranks_at_the_end_of_a_log_can_be_trained_afresh(run, capsys):
    found = run(name="found")
    last = records(found, "epoch")[-1]["ranks"]
    assert len(set(last)) > 1
    fixed = run("--ranks-from", found, "--fixed-rank", name="fixed", ranks=[])
    settings = records(fixed, "run")[0]
    assert (settings["initial_ranks"], settings["init_rank"], settings["ranks_from"]) == (last, None, "found.jsonl")
    assert all(epoch["ranks"] == last for epoch in records(fixed, "epoch"))
    assert "ranks: found.jsonl -> " in capsys.readouterr().out
    moving = run("--ranks-from", found, "--min-rank", 1, name="moving", ranks=[])
    assert records(moving, "run")[0]["initial_ranks"] == last
    assert all(logged == replayed for logged, replayed in replay(moving))


def test_a_run_with_the_ranks_of_a_log_is_resumed_without_that_log(run):
    found = run(name="found")
    flags = ["--ranks-from", found, "--min-rank", 1]
    straight = run(*flags, name="straight", ranks=[])
    run(*flags, "--epochs", 2, name="halves", ranks=[])
    found.unlink()
    assert untimed(run(*flags, "--resume", name="halves", ranks=[])) == untimed(straight)


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_a_text_is_taken_in_characters_or_in_bytes(run, text, kind):
    text.write_text("der Käse, 你好 und mehr " * 200)
    log = run("--tokenize", kind)
    first = records(log, "run")[0]
    data = text.read_bytes()
    tokens = data if kind == "bytes" else data.decode()
    assert (first["vocab_size"], first["train_tokens"] + first["val_tokens"]) == (len(set(tokens)), len(tokens))
    model, vocabulary = v10.load_model(log.with_suffix(".pt"))
    written = v10.generate(model, vocabulary, "Käse ", n_tokens=20)
    assert written.startswith("Käse ")
    assert kind == "bytes" or len(written) == 25
    train, val, *_ = v10.load_corpus(text, 0.1, 8, kind)
    ids = torch.cat([train, val]).tolist()
    assert "".join(vocabulary[i] for i in ids) == (data.decode("latin-1") if kind == "bytes" else data.decode())


def test_bytes_may_be_any_file(run, text):
    text.write_bytes(bytes(range(256)) * 10)
    assert records(run("--tokenize", "bytes"), "run")[0]["vocab_size"] == 256


def test_a_text_without_spaces_gets_a_hint(run, text, capsys):
    text.write_text(" ".join(f"w{i}" for i in range(2000)))
    run("--epochs", 1)
    assert "more than half of the words of text.tokens are distinct" in capsys.readouterr().out
    text.write_text("w" * 5000)
    run("--overwrite", code=2)
    assert "--tokenize chars if it has no spaces" in capsys.readouterr().err


def test_words_below_the_minimal_count_become_unknown(run, text):
    words = text.read_text().split()
    log = run("--min-count", 20)
    replaced = [word if words.count(word) >= 20 else "<unk>" for word in words]
    text.write_text(" ".join(replaced))
    assert records(log, "run")[0]["vocab_size"] == len(set(replaced)) < 50
    assert untimed(run(name="replaced")) == untimed(log)


def test_v7_takes_no_flag_that_controls_ranks(run, capsys):
    run("--init-rank", 4, main=v7.main, ranks=[], code=2)
    assert "--init-rank" in capsys.readouterr().err


def test_the_validation_loss_is_that_of_the_held_out_tokens(run, text):
    log = run("--fixed-rank")
    model, vocabulary = v10.load_model(log.with_suffix(".pt"))
    held_out = v10.encode(text.read_text().split()[2745:], vocabulary)
    assert v10.evaluate(model, held_out, 4) == pytest.approx(records(log, "end")[0]["final_val_loss"], rel=1e-6)


def test_continuing_a_cosine_schedule_with_other_epochs_is_said(run, capsys):
    run("--lr-schedule", "cosine")
    run("--lr-schedule", "cosine", "--epochs", 5, "--resume")
    assert "an uninterrupted run would have differed" in capsys.readouterr().out


def test_no_file_is_written_over_another(run, text, capsys):
    before = text.read_bytes()
    for flags in (["--log-file", text], ["--checkpoint", text], ["--test-file", text, "--data-file", text]):
        run(*flags, "--overwrite", code=2)
        assert "need different names" in capsys.readouterr().err
    run("--ranks-from", run.folder / "log.jsonl", "--overwrite", ranks=[], code=2)
    assert "need different names" in capsys.readouterr().err
    assert text.read_bytes() == before


def test_training_lowers_the_loss(run):
    still, trained = (records(run(*flags, name=flags[0]), "end")[0]["final_val_loss"]
                      for flags in (["--lr", 1e-9], ["--steps-per-epoch", 40]))
    assert trained < 3.7 < math.log(50) < still


def test_a_bidirectional_run_is_marked_as_seeing_its_targets(run, capsys):
    log = run("--attention", "bidirectional")
    assert records(log, "run")[0]["leak_check"]["leaks"]
    assert capsys.readouterr().out.count("SEES ITS TARGETS") >= 4


def test_a_causal_run_that_leaks_refuses_to_train(run, monkeypatch, capsys):
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(v10.F, "scaled_dot_product_attention",
                        lambda q, k, v, **options: attention(q, k, v))
    log = run(code=1)
    assert "later tokens change earlier logits" in capsys.readouterr().err
    assert not log.exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_a_valid_log(run, capsys):
    for flags in ([], ["--rank-interval", 2], ["--fixed-rank"]):
        log = run("--lr", 1e30, "--overwrite", *flags, code=1)
        assert "try a smaller --lr" in capsys.readouterr().err
        assert [record["kind"] for record in records(log)] == ["run"]


def test_clipping_warm_up_and_weight_decay_reach_the_optimizer(run):
    plain = untimed(run(name="plain"))
    for i, flags in enumerate((["--grad-clip", 0.1], ["--warmup-steps", 10], ["--weight-decay", 1])):
        assert untimed(run(*flags, name=f"changed{i}"))[0]["train_loss"] != plain[0]["train_loss"]


def test_a_test_file_is_evaluated_with_the_training_vocabulary_on_the_best_and_the_last_checkpoint(run, tmp_path, text):
    text.write_text("<unk> " * 20 + text.read_text())
    test = tmp_path / "test.tokens"
    test.write_text("w1 w2 nowhere w3 w4 " * 20)
    log = run("--test-file", test, "--fixed-rank", "--epochs", 11, "--lr", 0.05)
    end = records(log, "end")[0]
    assert end["best_epoch"] < 11, "the best checkpoint is the last one: the test would not tell them apart"
    for name, suffix in (("test_loss_best", ".best.pt"), ("test_loss_last", ".pt")):
        model, vocabulary = v10.load_model(log.with_suffix(suffix))
        tokens = v10.encode(test.read_text().split(), vocabulary)
        assert v10.evaluate(model, tokens, 3) == pytest.approx(end[name], rel=1e-6)


def test_the_best_checkpoint_is_the_model_of_the_lowest_validation_loss_before_its_ranks_change(run, text):
    log = run("--epochs", 12, "--lr", 0.05, "--change-threshold", 0.5, "--max-step", 1)
    end, epochs = records(log, "end")[0], records(log, "epoch")
    assert end["best_epoch"] < 12, "the best checkpoint is the last one: the test would not tell them apart"
    assert epochs[end["best_epoch"] - 1]["resized"]
    model, vocabulary = v10.load_model(log.with_suffix(".best.pt"))
    held_out = v10.encode(text.read_text().split()[2745:], vocabulary)
    assert v10.evaluate(model, held_out, 4) == pytest.approx(end["best_val_loss"], rel=1e-6)


def test_a_loaded_model_is_the_one_that_was_trained(run):
    log = run()
    model, vocabulary = v10.load_model(log.with_suffix(".pt"))
    assert model.ranks() == records(log, "epoch")[-1]["ranks"]
    assert not model.training
    assert len(v10.generate(model, vocabulary, "w1 w2", n_tokens=5).split()) == 7
    dense, _ = v10.load_model(run(name="v7", main=v7.main, ranks=[]).with_suffix(".pt"))
    assert dense.ranks() == []


def test_the_real_command_trains_with_plain_lines_where_there_is_no_terminal(text, tmp_path):
    command = [sys.executable, ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", text.name, *SMALL, *RANKS,
               "--log-file", "new/log.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("epoch")] == ["epoch"] * 4
    for said in ("done: 4 epochs", "training tokens/s", "best val loss", "final val loss", "ranks: 12 -> ",
                 "parameters in use", "peak memory", "new/log.jsonl", "log.best.pt (best)"):
        assert said in done.stdout
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "Traceback" not in again.stderr


def test_the_real_command_draws_one_bar_in_a_terminal(text, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    command = [sys.executable, ROOT / "v10_transformer_lowrank_scaled.py", "--data-file", text, *SMALL, *RANKS]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            screen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    for said in (b"0/20", b"20/20", b"loss ", b"mean rank 12.0", b"epoch   4/4", b"done: 4 epochs"):
        assert said in screen, said
