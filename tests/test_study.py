"""The study's runs, what they measure, and the answers that results.py makes of their logs."""
import argparse
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from statistics import fmean

import pytest
import torch

import counts
import plot_logs
import results
import study
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
from conftest import ROOT, records, reference, unpainted, untimed

REFERENCE = ROOT / "logs" / "reference" / "study"
TINY = [sys.executable, ROOT / "study.py", "--short", "--seeds", "1", "--test-file", "", "--only", "retrained",
        "bidirectional"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a study of three tiny runs, two that were asked for and one that another needs."""
    out, text = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("text") / "text.tokens"
    text.write_text(" ".join((ROOT / "data" / "synthetic.tokens").read_text().split()[:20_000]))
    subprocess.run([*TINY, "--out", out, "--data-file", text], check=True, capture_output=True)
    return out


def of_tiny(tiny, out, *but):
    """The flags of that study in another folder, but for these."""
    flags = [str(word) for word in TINY[2:] if word not in but]
    return [*flags, "--out", str(out), "--data-file", str(tiny / "words.tokens")]


def asked(out, **flags):
    """The Study that these flags ask for."""
    defaults = {"out": out, "size": "small", "short": False, "seeds": 5, "only": None}
    return study.Study(argparse.Namespace(**defaults | flags))


# ---- Runs ------------------------------------------------------------------------------------------------------------

def test_a_study_trains_what_is_asked_for_and_what_that_needs(tiny):
    assert {path.name for path in tiny.iterdir()} == {
        "words.tokens", "ngrams.jsonl", "probes.jsonl",
        *(f"{name}_s0.jsonl" for name in ("adaptive", "retrained", "bidirectional"))}
    adaptive, retrained = (tiny / f"{name}_s0.jsonl" for name in ("adaptive", "retrained"))
    assert records(retrained, "run")[0]["initial_ranks"] == records(adaptive, "epoch")[-1]["ranks"] != [64] * 12
    assert records(retrained, "epoch")[-1]["ranks"] == records(retrained, "run")[0]["initial_ranks"]
    assert sorted(record["run"] for record in records(tiny / "probes.jsonl")) == ["adaptive", "bidirectional"]


def test_the_study_text_is_the_beginning_of_the_data_and_its_rare_words_are_unk(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORDS", 900)
    monkeypatch.setattr(study, "FURTHER", 100)
    text = "a b a c b a a b d d a b c c d ".split() * 2
    (tmp_path / "text").write_text(" ".join(["rare", "twice", "thrice", *text * 40, "twice"]))
    ours = asked(tmp_path, data_file=str(tmp_path / "text"), test_file="")
    ours.prepare()
    words = ours.data().read_text().split()
    assert words == ["rare", "twice", "thrice", *(text * 40)[:897]]
    assert ours.further().read_text().split() == (text * 40)[897:997], "what comes next, to tune on"
    train, val, vocabulary, *_ = v10.load_corpus(ours.data(), ours.defaults.val_fraction, ours.defaults.block_size,
                                                 min_count=ours.defaults.min_count)
    replaced = ["<unk>", "<unk>", "<unk>", *(text * 40)[:897]]
    assert [vocabulary[i] for i in torch.cat([train, val])] == replaced
    counted, = records(tmp_path / "ngrams.jsonl")
    assert counted["val"]["unk"] == 0
    assert set(counted["val"]) == {"unigram", "bigram", "unseen", "unk"}
    asked(tmp_path, data_file=str(tmp_path / "text"), test_file=str(tmp_path / "text")).prepare()
    ours.prepare()
    assert [{"val", "test"} & record.keys() for record in records(tmp_path / "ngrams.jsonl")] == [
        {"val"}, {"val", "test"}], "counted once more, for a second text"
    (tmp_path / "text").write_text("something else " * 1000)
    with pytest.raises(v10.UserError, match="was made of another text"):
        ours.prepare()
    assert ours.data().read_text().split() == words
    assert asked(tmp_path, size="report", data_file="text").data() == "text"


def test_what_is_done_is_skipped(tiny, monkeypatch):
    monkeypatch.setattr(study.Study, "execute", lambda *_: pytest.fail("a run has begun"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny.iterdir()}
    assert study.main(of_tiny(tiny, tiny)) == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tiny.iterdir()} == before


def test_an_interrupted_study_goes_on_to_the_same_logs(tiny, tmp_path):
    flags = of_tiny(tiny, tmp_path, "bidirectional")
    process = subprocess.Popen([*TINY[:2], *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "adaptive_s0.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 2:  # an epoch is done
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert "the same command goes on" in process.communicate()[1]
    assert not records(log, "end")
    assert not (tmp_path / "retrained_s0.jsonl").exists()
    before = log.read_bytes()
    assert study.main(flags) == 0
    assert log.read_bytes().startswith(before)
    for name in ("adaptive_s0.jsonl", "retrained_s0.jsonl"):
        assert untimed(tmp_path / name) == untimed(tiny / name)


def test_a_run_that_fails_is_told_and_those_that_need_it_do_not_start(tiny, tmp_path, capsys):
    shutil.copy(tiny / "words.tokens", tmp_path)
    (tmp_path / "adaptive_s0.jsonl").write_text("my thesis\n")
    assert study.main(of_tiny(tiny, tmp_path)) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("study.py: error: ")]
    assert len(failed) == 2
    assert "adaptive_s0: exit code 2: " in failed[0]
    assert "adaptive_s0.jsonl is not a log of this suite" in failed[0]
    assert failed[1].endswith("retrained_s0: it needs adaptive_s0, which has not ended")
    assert records(tmp_path / "bidirectional_s0.jsonl", "end")
    assert (tmp_path / "adaptive_s0.jsonl").read_text() == "my thesis\n"


def test_the_commands_are_those_that_made_the_reference_logs(monkeypatch):
    ours, compared = asked(REFERENCE, data_file="wiki.train.tokens", test_file="wiki.valid.tokens"), 0
    parsers = {script: v10.build_parser(variant()) for script, variant in study.VARIANTS.items()}
    words = records(REFERENCE / "dense_s0.jsonl", "run")[0]["vocab_size"]
    monkeypatch.setattr(ours, "corpus", lambda: argparse.Namespace(vocabulary=["w"] * words))
    monkeypatch.setattr(ours, "records", functools.cache(ours.records))
    for run in [*ours.runs, *ours.later]:
        _, _, *flags = ours.command(run)
        script = study.COMMANDS[run.name].split()[0]
        with ours.log(run.stem).open() as log:
            settings = json.loads(log.readline())
        assert settings["script"] == study.VARIANTS[script].name
        for name, value in vars(parsers[script].parse_args(flags)).items():
            if name not in ("dtype", "device", "grad_accum", "checkpoint", "min_count", "init_rank", "vocab_size",
                            "val_tokens"):  # chosen, new, or in the record as what came of it
                value = value.rpartition("/")[2] if isinstance(value, str) else value
                assert settings.get(name, value) == value, (run.stem, name)
                compared += 1
    assert compared > 590 * 20


@pytest.mark.parametrize(("script", "flags", "log"), [
    ("v7", "--min-count 3", "study/narrow136_muon_tied_s1"),
    ("v7", "--min-count 50", "study/tuned_whole_narrow136_muon_tied_s1"),
    ("v7", "--epochs 15", "report_size/v7_tied"), ("v11", "--epochs 15", "report_size/v11")])
def test_a_command_of_the_results_is_the_one_that_was_measured(script, flags, log):
    commands = re.findall(rf"    python3 {script}_.*\n(?:        .*\n)*", (ROOT / "RESULTS.md").read_text())
    command, = (command for command in commands if f"{flags} " in command.replace("\\\n", ""))
    settings, = records(REFERENCE.parent / f"{log}.jsonl", "run")
    variant = study.VARIANTS[script]()
    for name, value in vars(v10.build_parser(variant).parse_args(command.replace("\\\n", "").split()[2:])).items():
        if name not in ("data_file", "log_file", "checkpoint", "seed", "device", "dtype", "grad_accum", "vocab_size",
                        "val_tokens") and (name, value) != ("init_rank", None):  # half of the width
            assert settings[name] == value, name


def test_a_short_study_is_short_in_every_run(tmp_path):
    ours = asked(tmp_path, short=True, data_file="t", test_file="")
    for name in ("untrained", "synthetic", "bidirectional", "long"):
        flags = ours.command(study.Run(name))[2:]
        assert v10.build_parser(v10.Variant()).parse_args(flags).d_model == 64, name
    for size in study.SIZES:
        ours = asked(tmp_path, size=size, short=True, data_file="t", test_file="")
        for arm in study.TUNED if size == "small" else study.AT_REPORT:
            for command in study.tries_before(arm, 1):
                ours.parse(study.TUNING[command])  # refuses impossible flags


def test_a_try_that_diverges_is_left_out_and_one_that_fails_otherwise_is_not(tmp_path, monkeypatch, capsys):
    runs = [study.Run(f"try_large_v11_tenth_{name}") for name in ("dropout0.1", "dropout0.3", "rate2")]

    def all_but(broken, name):
        """Let the runs end, but for {run: its last words} -> the study"""
        def command(ours, run):
            ends = f"open({str(ours.log(run.stem))!r}, 'w').write('{{\"kind\": \"end\", \"final_val_loss\": 5.0}}')"
            code = f"raise SystemExit('error: {broken[run]}')" if run in broken else ends
            return [sys.executable, "-c", code, "--data-file", "t"]
        monkeypatch.setattr(study.Study, "command", command)
        ours = asked(tmp_path / name, size="report", data_file="t", test_file="", jobs=1)
        ours.out.mkdir()
        ours.all(runs)
        return ours
    ours = all_but({runs[1]: "a loss or its gradient is not finite: in a new run, try"}, "one")
    assert ours.failed == []
    assert "try_large_v11_tenth_dropout0.3_s0 is left out: error: a loss" in capsys.readouterr().out
    assert "--dropout 0.1 --eta 0.14" in ours.fill(study.TUNING["try_large_v11_tenth_rate2"], seed=0)
    assert len(all_but({runs[1]: "out of memory"}, "other").failed) == 2
    assert len(all_but(dict.fromkeys(runs[:2], "a loss is not finite"), "both").failed) == 1


def test_every_run_comes_after_those_that_it_needs(tmp_path):
    ours, seen = asked(tmp_path), set()
    for run in [*ours.runs, *ours.later]:
        assert seen >= set(ours.needs(run)), run.stem
        seen.add(run.stem)
    assert len(seen) == 4 + 3 * 21 + 23 * 7 + 4 * 8 + 9 * 3 + 5 * (24 + 14 + 7) + 3 * (7 + 4 + 9 + 6)
    assert f"in {len(seen)} small runs" in (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert f"the {len(seen)} runs" in (ROOT / "Makefile").read_text()


def test_a_log_of_another_width_is_refused_and_a_narrow_arm_has_its_own(tiny, tmp_path):
    shutil.copy(tiny / "words.tokens", tmp_path)
    shutil.copy(tiny / "ngrams.jsonl", tmp_path)
    for name, width, fits in (("adaptive_s0", 256, True), ("adaptive_s0", 80, False),
                              ("narrow80_muon_s1", 80, True), ("narrow80_muon_s1", 256, False)):
        settings = {"d_model": width, "d_ff": 4 * width, "n_layers": 4, "block_size": 64, "batch_size": 16,
                    "steps_per_epoch": 40}
        (tmp_path / f"{name}.jsonl").unlink(missing_ok=True)
        v10.write_record(tmp_path / f"{name}.jsonl", "run", **settings)
        ours = asked(tmp_path, data_file=str(tiny / "words.tokens"), test_file="", only=[name[:-3]])
        if fits:
            ours.prepare()
        else:
            with pytest.raises(v10.UserError, match="is of another size"):
                ours.prepare()
        (tmp_path / f"{name}.jsonl").unlink()


def test_a_study_of_the_reports_size_has_no_arms_of_the_small_ones_alone_and_still_measures_its_steps(tmp_path):
    names = {run.name for run in asked(tmp_path, size="report").runs}
    assert not names & (study.NARROW | study.WHOLE_TEXT | study.ON_WHOLE).keys()
    assert not any(word in name for word in ("whole", "further") for name in names)
    assert names >= {*study.ARMS, *study.BUDGETED}, "or measure() waits for ever"


@pytest.mark.parametrize(("flags", "said"), [
    (["--only", "nothing"], "argument --only: invalid choice: 'nothing'"), (["--seeds", "6"], "is not a whole number"),
    (["--seeds", "0"], "--seeds"), (["--jobs", "0"], "--jobs"), (["--size", "large"], "invalid choice"),
    (["--data-file", "nowhere"], "there is no nowhere: `make data` fetches WikiText-2"),
    (["--test-file", "nowhere"], "there is no nowhere"), (["--unknown"], "unrecognized"),
    (["--data-file", "{tiny}/ngrams.jsonl"], "training tokens, and a block needs"),
    (["--size", "report", "--out", "{tiny}"], "is of another size"),
    (["--size", "report", "--only", "narrow80_muon"], "--only narrow80_muon: there is no such run of this size"),
    (["--test-file", str(ROOT / "README.md")], "README.md: ")])
def test_wrong_requests_are_refused_in_one_line(tiny, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(study.Study, "all", lambda *_: pytest.fail("runs have begun"))
    out = tmp_path / "out"
    base = ["--out", str(out), "--data-file", str(ROOT / "data" / "synthetic.tokens"), "--test-file", ""]
    assert study.main([*base, *(flag.format(tiny=tiny) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


# ---- Measurements ----------------------------------------------------------------------------------------------------

def test_ngram_losses_are_those_of_a_count_by_hand():
    found = study.ngram_losses(torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor([0, 1, 2]))
    unigram = [3 / 9, 2 / 9]  # of 1 and of 2, of three words: (count + 1) / (6 + 3)
    bigram = [(2 + 2 * unigram[0]) / 5, (0 + 1 * unigram[1]) / 3]  # after 0 came 1, 1, 2; after 1 came 0, 0
    for name, p in (("unigram", unigram), ("bigram", bigram)):
        assert found[name] == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2)
    assert found["unseen"] == 0
    assert study.ngram_losses(torch.tensor([0, 1]), torch.tensor([2, 1, 2, 3]))["unseen"] == pytest.approx(2 / 3)


def test_the_pairs_after_a_word_sum_to_one():
    train = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0))
    for word in range(7):
        total = sum(math.exp(-study.ngram_losses(train, torch.tensor([word, then]))["bigram"]) for then in range(7))
        assert total == pytest.approx(1)


class Oracle:
    """A model that is sure of the next input word where it sees it, else of the last one that it has seen."""

    def __init__(self, attention, words):
        self.attention, self.words = attention, words

    def eval(self):
        return self

    def __call__(self, x):
        seen = torch.cat([x[:, 1:], x[:, :1] * 0], dim=1) if self.attention == "bidirectional" else x
        logits = 50.0 * torch.nn.functional.one_hot(seen, self.words)
        if self.attention == "bidirectional":
            logits[:, -1] = 0
        return logits


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_probe_tells_a_model_that_copies_what_comes_next_from_one_that_does_not(
        run, text, tmp_path, monkeypatch, attention):
    log = run("--attention", attention, "--epochs", 1)
    monkeypatch.setattr(v10, "build_model", lambda content: Oracle(content["config"]["attention"], 50))
    study.probe(log, text, tmp_path / "probes.jsonl", study.Run("r", seed=3), every=4)
    found, = records(tmp_path / "probes.jsonl")
    assert (found["run"], found["seed"], found["attention"]) == ("r", 3, attention)
    by_chance = 0.3  # that a word of this text is the one before it, or one from elsewhere
    if attention == "bidirectional":
        assert (found["accuracy"], found["predicts_word_put_there"]) == (1, 1)
        assert found["predicts_word_of_the_text"] < by_chance
        assert found["loss_at_last_position"] == pytest.approx(math.log(50), rel=1e-3)
        assert found["loss_at_other_positions"] == pytest.approx(0, abs=1e-3)
        assert found["val_loss_masked"] > 30
    else:
        assert found["predicts_word_put_there"] < by_chance
        assert found["predicts_word_of_the_text"] == found["accuracy"] < by_chance
        assert found["val_loss_masked"] == found["val_loss"] > 30


def test_losses_by_count_are_those_of_each_kind_of_word_by_hand(run, text, tmp_path, monkeypatch):
    text.write_text(f"once {text.read_text()} late late")  # one is <unk>, one is in the held-out part alone
    (tmp_path / "other").write_text("w1 unknown w2 late w3 w40 w1")
    log = run("--epochs", 1, "--min-count", 2)
    corpus = v10.load_corpus(text, 0.1, 8, min_count=2)
    loss = -torch.arange(len(corpus.vocabulary), dtype=torch.float64).div(10).log_softmax(0)  # of each word, anywhere
    model = torch.nn.Module()
    model.config = argparse.Namespace(block_size=8, vocab_size=len(corpus.vocabulary))
    model.forward = lambda x: -loss.expand(*x.shape, -1)
    monkeypatch.setattr(v10, "build_model", lambda content: model)
    study.losses_by_count(log, text, tmp_path / "probes.jsonl", study.Run("r", seed=3), test=tmp_path / "other")
    found, = records(tmp_path / "probes.jsonl")
    count = Counter(corpus.train.tolist())
    unk = corpus.vocabulary.index("<unk>")
    other = v10.read_tokens(tmp_path / "other", "words", corpus.vocabulary)
    for name, tokens in (("val", corpus.val), ("test", other)):
        words = tokens[1:].tolist()
        kinds = [[word for word in words if word != unk and least <= count[word] <= most]
                 for least, most in ((0, 0), (1, 9), (10, 99), (100, math.inf))]
        for i, of_kind in enumerate([*kinds, [word for word in words if word == unk]]):
            share, mean = found[name][i]
            assert share == pytest.approx(len(of_kind) / len(words))
            assert mean == (pytest.approx(fmean(loss[word].item() for word in of_kind)) if of_kind else None)


# ---- Answers ---------------------------------------------------------------------------------------------------------

def test_the_tables_of_the_pages_are_those_of_the_reference_logs():
    found = reference()
    tables, figures = results.available(found)
    tables, shown = {name: table(found) for name, table in tables.items()}, []
    for name in results.PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert results.filled(page, tables) == page
        here = re.findall("<!-- table (.*) -->", page)
        assert len(here) == len(set(here)), "a page has a table once"
        shown += here
    assert set(shown) == set(tables)
    for name in figures:
        assert (REFERENCE / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_gets_the_tables_that_it_names_and_keeps_the_rest():
    page = "before\n\n<!-- table one -->\nold\n<!-- end -->\n\nbetween\n<!-- table two -->\n<!-- end -->\nafter"
    one, two = (plot_logs.Table(name, "", ["a", "b"], [[name, "1"]]) for name in ("one", "two"))
    assert results.filled(page, {"one": one, "two": two}) == page.replace("old\n", f"\n{one.markdown()}\n\n").replace(
        "two -->\n", f"two -->\n\n{two.markdown()}\n\n")
    with pytest.raises(LookupError):
        results.filled(page, {"one": one})
    unended = page.replace("<!-- end -->", "", 1)
    assert results.filled(unended, {"one": one, "two": two}).startswith(unended[:unended.index("<!-- table two")])


def test_the_reference_study_has_three_seeds_of_one_configuration_each():
    found = reference()
    for name in results.NEEDED:
        runs = found.groups[name].runs
        assert [run.settings["seed"] for run in runs] == [0, 1, 2], name
        other = name if name in ("untrained", "synthetic", "synthetic_bidirectional") else "dense"
        assert {run.settings["data_sha256"] for run in runs} == {found.groups[other].first.settings["data_sha256"]}
    shared = ("lr", "dropout", "lr_schedule", "warmup_steps", "epochs", "steps_per_epoch", "batch_size", "attention")
    for prefix in results.SETTINGS:
        of = [{key: run.settings[key] for key in shared} for name in results.NAMES for run in
              found.groups[prefix + name].runs]
        assert all(settings == of[0] for settings in of)
        assert of[0]["attention"] == "causal"


def test_no_honest_loss_of_the_reference_study_is_too_good():
    """None is more than half a nat below what counting pairs of words gives: a leak is several nats. On the whole text,
    where pairs were not counted, none is below 4 nats; an AWD-LSTM reaches 4.2, with eight times the vocabulary."""
    found = reference()
    for name, group in found.groups.items():
        if "whole_" in name:
            assert min(map(results.best_loss, group.runs)) > 4, name
        elif name not in ("untrained", "synthetic") and not group.first.sees_targets:
            assert min(map(results.best_loss, group.runs)) > found.ngrams["val"]["bigram"] - 0.5, name
    floor = found.groups["synthetic"].first.settings["entropy_floor"]
    assert min(found.values("synthetic", results.best_loss)) > floor
    assert max(found.values("synthetic_bidirectional", results.best_loss)) < floor
    assert max(found.values("bidirectional", results.best_loss)) < found.ngrams["val"]["bigram"] - 2


def copied(folder, *changed, only="*.jsonl"):
    """A folder with the logs of the reference study, or some: links, and copies of those that will be changed."""
    for path in REFERENCE.rglob(only):
        copy = folder / path.relative_to(REFERENCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copy if path.stem in changed else os.symlink)(path, copy)


@pytest.mark.parametrize(("name", "line", "said"), [
    ("speed", "{", "speed.jsonl:1: not a line of JSON"), ("probes", "[]", "holds other logs"),
    ("speed", '{"kind": "speed", "over_dense": null}', "holds other logs"),
    ("dense_s0", "{", "dense_s0.jsonl:1: not a line of JSON"), ("ngrams", '{"kind": "ngrams"}', "is not complete")])
def test_damaged_logs_are_told_in_one_line(tmp_path, capsys, name, line, said):
    copied(tmp_path / "study", name, only=f"{name}.jsonl" if line in ("{", "[]") else "*.jsonl")
    (tmp_path / "study" / f"{name}.jsonl").write_text(line + "\n\n" * (name == "dense_s0"))
    assert results.main(["--study", str(tmp_path / "study"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert results.main(["--study", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_ones_own_study_is_told_elsewhere_and_readme_stays(tmp_path, capsys, monkeypatch):
    readme, painted, own = (ROOT / "README.md").read_bytes(), [], copy.copy(reference())
    own.is_reference = False
    monkeypatch.setattr(results, "Study", lambda folder: own)
    monkeypatch.setattr(plot_logs, "save", lambda figure, path: (painted.append(path), unpainted(figure, path)))
    assert results.main(["--study", str(tmp_path), "--out", str(tmp_path)]) == 0
    tables, figures = results.available(reference())
    assert (tmp_path / "tables.md").read_text().count("\n## ") == len(tables) - 1
    assert painted == [tmp_path / "figures" / name for name in figures]
    assert (ROOT / "README.md").read_bytes() == readme


def test_a_study_of_one_seed_and_no_second_text_has_its_tables_and_figures_without_intervals():
    one, all_seeds = copy.copy(reference()), reference()
    one.groups = {name: plot_logs.Group(name, group.runs[:1]) for name, group in all_seeds.groups.items()}
    one.ngrams = {name: counted for name, counted in one.ngrams.items() if name != "test"}
    plot_logs.start_matplotlib()
    (tables, figures), (in_full, _) = results.available(one), results.available(all_seeds)
    assert in_full.keys() - tables.keys() == {"official"}
    for name in ("steps", "budget", "narrow", "brought", "official_arms"):
        text = tables[name](one).markdown()
        assert "\N{PLUS-MINUS SIGN}" not in text
        assert "nan" not in text
        assert " to +" not in text
    for name, arm in (("steps", "rank64_spectron"), ("budget", "v11_tenth"), ("brought", "v11_tenth")):
        assert f"{one.mean(arm, results.last_loss):.3f}" in tables[name](one).markdown()
    assert f"{one.mean('official_tenth_wide', results.official_loss):.3f}" in tables["official_arms"](one).markdown()
    for name in ("steps", "budget"):
        figures[name](one).canvas.draw()
        plot_logs.plt.close("all")


def test_a_run_that_has_not_ended_does_not_count_and_is_named(tmp_path, capsys):
    copied(tmp_path / "study", "dense_s1", only="dense_s*.jsonl")
    v10.write_record(tmp_path / "study" / "just_begun_s0.jsonl", "run", seed=0)
    log = tmp_path / "study" / "dense_s1.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert [run.settings["seed"] for run in results.Study(tmp_path / "study").groups["dense"].runs] == [0, 2]
    said = capsys.readouterr().err
    assert said.count("has not ended; left out") == 2
    assert "just_begun_s0.jsonl" in said


def test_a_kind_of_word_that_a_text_lacks_has_no_loss():
    found = copy.copy(reference())
    found.by_count = copy.deepcopy(found.by_count)
    for record in (record for seeds in found.by_count.values() for record in seeds.values()):
        record["val"][0] = [0.0, None]
    rows = results.by_count(found).rows
    assert {str(row[-1]) for row in rows} == {results.DASH}
    assert results.DASH not in {str(cell) for row in rows for cell in row[1:-1]}


def test_a_difference_is_between_runs_of_one_seed():
    some, whole = copy.copy(reference()), reference().groups
    some.groups = whole | {"fixed": plot_logs.Group("fixed", whole["fixed"].runs[1:])}
    found = some.differences("fixed", "dense", results.best_loss)
    by_hand = [results.best_loss(a) - results.best_loss(b) for a, b in zip(
        some.groups["fixed"].runs, whole["dense"].runs[1:], strict=True)]
    assert found == by_hand


def test_compressions_that_are_not_whole_are_named_and_all_rows_are_of_the_seeds_that_have_them_all(tmp_path, capsys):
    assert results.RECORDS == dict.fromkeys(results.RECORDS, len(study.COMPRESSIONS + study.OF_DENSE))
    assert len(study.COMPRESSIONS) == 4
    stems = ["compressed_dense_s1", "compressed_narrow80_s2"]
    copied(tmp_path / "study", *stems, only="compress/*.jsonl")
    for stem, left in zip(stems, (16, 0), strict=True):
        log = tmp_path / "study" / "compress" / f"{stem}.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:left]))
    some = results.Study(tmp_path / "study")
    said = capsys.readouterr().err
    assert all(f"{stem}.jsonl: compress.py has not done all of its work" in said for stem in stems)
    assert some.compressed == {name: of_seeds[2:] for name, of_seeds in reference().compressed.items()}
    some.groups = reference().groups
    assert results.ways(some).header[0] == "n = 1"


def test_the_folder_of_a_study_may_be_named_from_here_and_elsewhere_needs_a_place_for_its_pages(tmp_path, capsys,
                                                                                                      monkeypatch):
    for name in ("results.py", "counts.py", "law.py", "plot_logs.py", "README.md", "RESULTS.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("study", "scaling", "report_size"):
        shutil.copytree(REFERENCE.parent / name, tmp_path / "logs" / "reference" / name)
    program = ("import plot_logs, results; plot_logs.save = lambda figure, path: path.touch()\n"  # make results paints
               "raise SystemExit(results.main(['--study', 'logs/reference/study']))")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("README.md", "RESULTS.md"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    for name in results.available(reference())[1]:
        assert (tmp_path / "logs" / "reference" / "study" / "figures" / name).exists()
    monkeypatch.setattr(results, "Study", lambda folder: reference())
    assert results.main(["--study", str(tmp_path / "logs" / "reference" / "study")]) == 2
    assert "the pages here show logs/reference/study: --out names a folder" in capsys.readouterr().err


def test_a_text_without_further_words_has_no_arms_that_are_tuned_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORDS", 900)
    monkeypatch.setattr(study, "FURTHER", 100)
    (tmp_path / "text").write_text("a b c d " * 249)
    ours = asked(tmp_path, data_file=str(tmp_path / "text"), test_file="")
    before = {run.name for run in ours.runs}
    ours.prepare()
    assert before - {run.name for run in ours.runs} == {
        name for name in before if name.startswith(("try_further_", "official_"))} != set()
    assert not ours.further().exists()
    ours = asked(tmp_path, data_file=str(tmp_path / "text"), test_file="", only=["try_further_dense_muon_decay"])
    with pytest.raises(v10.UserError, match=r"text has 996 words, and runs that are tuned on further ones need 1,000"):
        ours.prepare()


def test_tries_on_further_words_are_measured_there(tmp_path):
    ours = asked(tmp_path, data_file="t", test_file="t")
    flags = ours.fill(study.TUNING["try_further_dense_muon_decay3"], seed=0)
    assert f"--test-file {tmp_path / 'further.tokens'} " in flags
    assert flags.endswith("--weight-decay 3 --factor-decay 0.15")
    for name, on_held_out, on_further in (("decay", 5.0, 4.5), ("decay3", 4.9, 4.6), ("decay_third", 5.1, 4.7)):
        v10.write_record(ours.log(f"try_further_dense_muon_{name}_s0"), "end", final_val_loss=on_held_out,
                         test_loss_last=on_further)
    of_official = ours.parse(study.OFFICIAL["official_dense_muon"])
    assert (of_official.weight_decay, of_official.test_file) == (1, "t")
    assert asked(tmp_path, data_file="t", test_file="").parse(study.OFFICIAL["official_dense_muon"]).test_file is None


def test_a_round_of_tries_starts_from_the_best_of_the_rounds_before(tmp_path):
    ours = asked(tmp_path, data_file="t", test_file="")
    losses = {"rate1": 5.0, "rate0.5": 4.0, "rate2": 6.0, "decay": 3.9, "decay3": 3.7, "decay_third": 3.8}
    for name, loss in losses.items():
        v10.write_record(ours.log(f"try_rank64_spectron_{name}_s0"), "end", final_val_loss=loss)
    flags = [ours.fill(study.TUNING[f"try_rank64_spectron_{name}"], seed=0) for name in ("decay3", "dropout")]
    assert [f.partition("--optimizer spectron ")[2] for f in flags] == [
        "--eta 0.035 --dropout 0.1 --weight-decay 3 --factor-decay 0.043",
        "--eta 0.035 --dropout 0.1 --weight-decay 3 --factor-decay 0.043 --dropout 0.2"]
    v10.write_record(ours.log("try_rank64_spectron_dropout_s0"), "end", final_val_loss=3.75)
    assert ours.fill(study.CONTROLLED["rank64_spectron"], seed=4).endswith("--factor-decay 0.043 --telemetry")
    assert ours.needs(study.Run("rank64_spectron", 4)) == [
        f"try_rank64_spectron_{name}_s0" for name in [*losses, "dropout"]]


def test_tries_on_the_whole_text_go_on_from_the_best_too_and_change_one_of_two_rates_last(tmp_path):
    ours = asked(tmp_path, data_file="t", test_file="")
    losses = {"rate1": 5.0, "rate2": 4.0, "rest2": 6.0, "decay_tenth": 3.9, "decay_thirtieth": 4.1, "rest4": 3.85}
    for name, loss in losses.items():
        v10.write_record(ours.log(f"try_whole_tenth_wide_{name}_s0"), "end", final_val_loss=loss)
    flags = ours.fill(study.TUNING["try_whole_tenth_wide_rest8"], seed=0)
    assert flags.partition("--val-fraction 0.005 ")[2].split() == (
        "--eta 0.14 --lr 0.002 --weight-decay 0.33 --factor-decay 0.0048 --weight-decay 0.1 --factor-decay 0.0014 "
        "--lr 0.004 --lr 0.008").split()
    for name in ("rest8", "rest16"):
        v10.write_record(ours.log(f"try_whole_tenth_wide_{name}_s0"), "end", final_val_loss=3.98)
    assert ours.fill(study.COMMANDS["tuned_whole_tenth_wide"], seed=2).endswith("--factor-decay 0.0014 --lr 0.004")
    assert ours.needs(study.Run("tuned_whole_tenth_wide", 2)) == [
        f"try_whole_tenth_wide_{name}_s0" for name in [*losses, "rest8", "rest16"]]


def test_the_equal_flop_epochs_are_those_of_a_count_by_hand(tmp_path, monkeypatch):
    ours = asked(tmp_path)
    monkeypatch.setattr(ours, "corpus", lambda: argparse.Namespace(vocabulary=["w"] * 4491))
    tokens, head, attention = 16 * 64, 256 * 4491, 4 * 256 * 64  # 4 layers of 64 positions, half of them masked, twice
    dense, factored = 4 * 12 * 256**2, 4 * 64 * (8 * 256 + 2 * 1280)
    steps = 4 * 5 * (10 * (2 * 64**2 * 256 + 64**3) + 2 * (2 * 64**2 * 1024 + 64**3))
    ratio = 3 * tokens * (dense + head + attention) / (3 * tokens * (factored + head + attention) + steps)
    assert ours.equal_flop_epochs(64) == round(16 * ratio)


def test_the_multiplications_of_a_run_follow_its_ranks_step_by_step():
    settings = {"batch_size": 2, "block_size": 3, "d_model": 4, "n_layers": 1, "vocab_size": 10, "steps_per_epoch": 10,
                "layers": [{"shape": [4, 6]}], "initial_ranks": [3]}
    run = plot_logs.Run("r", settings=settings, epochs=[{"epoch": 1, "ranks": [2]}, {"epoch": 2, "ranks": [1]}],
                        cuts=[{"step": 5, "ranks_before": [3], "ranks": [2]},
                              {"step": 14, "ranks_before": [2], "ranks": [1]}])
    assert counts.ranks_of_steps(run) == [(5, [3]), (9, [2]), (6, [1])]
    token = {rank: 10 * rank + 4 * (10 + 3) for rank in (1, 2, 3)}
    of_steps = 3 * 6 * (5 * token[3] + 9 * token[2] + 6 * token[1])
    assert counts.multiplications(run) == of_steps + counts.CUT_TOKENS * (3 * (token[3] + token[2]) + 2 * 40)
    settings["optimizer"] = "spectron"
    newton_schulz = {rank: sum(5 * (2 * rank**2 * side + rank**3) for side in (4, 6)) for rank in (1, 2, 3)}
    assert counts.multiplications(run) == (
        of_steps + counts.CUT_TOKENS * (3 * (token[3] + token[2]) + 2 * 40)
        + 5 * newton_schulz[3] + 9 * newton_schulz[2] + 6 * newton_schulz[1])
    assert sum(counts.token_multiplications(settings, None).values()) == 24 + 4 * 13
    assert counts.CUT_TOKENS == v11.FISHER_TOKENS
