"""Wrong input: each row is refused with a clear line and exit code 2, before any long work and without a traceback."""
import argparse
import io
import json
import os
import subprocess
import sys

import pytest
import torch

import plot_logs
import synthetic
import v7_transformer_dense_baseline as v7
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
import wikitext2
from conftest import RANKS, ROOT, SMALL, records

V10 = (v10.main, ROOT / "v10_transformer_lowrank_scaled.py")
SCRIPTS = {"v10": V10, "v10 --ranks-from": V10,
           "v7": (v7.main, ROOT / "v7_transformer_dense_baseline.py"),
           "v11": (v11.main, ROOT / "v11_transformer_lowrank_spectron.py"),
           "plot_logs": (plot_logs.main, ROOT / "plot_logs.py"),
           "synthetic": (synthetic.main, ROOT / "data" / "synthetic.py"),
           "wikitext2": (wikitext2.main, ROOT / "data" / "wikitext2.py")}
WORDS = " ".join(f"w{i * i % 23}" for i in range(2000)).encode()
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20
LOG = json.dumps({"epoch": 1, "train_loss": 2, "val_loss": 2, "ranks": [4] * 6}).encode() + b"\n"

# What the rows may name: files in the folder where each is tried.
FILES = {
    "good": WORDS, "empty": b"", "blank": b" \n\t\n", "png": PNG, "zeros": b"the cat " + bytes(5000),
    "utf16": WORDS.decode().encode("utf-16"), "latin1": WORDS + b" caf\xe9 " + WORDS, "cut": WORDS + "é".encode()[:1],
    "bom16": b"\xfe\xff" + WORDS, "single": b"the " * 3000, "short": b"a b c d e", "tail": WORDS[:200],
    "one": b"w1", "strange": b"w1 w2 elsewhere w3 " * 5,
    "thesis": b"my thesis\n", "deep": b"[" * 100_000 + b"\n" + LOG,
    "huge": LOG.replace(b"2", b"9" * 400) + LOG,
    "bad8": LOG[:10] + b"\xff" + LOG[10:] + LOG, "begun": b'{"kind": "run"}\n', "twice": LOG + LOG,
    "norms": LOG.replace(b'"ranks"', b'"update_norms": [1, null], "ranks"'),
    "bare": LOG + b'{"kind": "cut", "step": 3, "val_loss_before": 2, "val_loss": 2, "ranks": []}\n',
    "noranks": LOG.replace(b'"ranks"', b'"rank"') + LOG,
    "layers": b'{"kind": "run", "layers": 3}\n' + LOG, "sha": b'{"kind": "run", "data_sha256": []}\n' + LOG,
    "two": b'{"kind": "run"}\n' + LOG + b'{"kind": "run"}\n' + LOG,
    "other": b'{"kind": "run", "initial_ranks": [4,4,4,4,4,4,4,4,4,4,4,4]}\n' + LOG,
    "ranks": LOG.replace(b"[4", b"[17, 4, 4, 4, 4, 4, 4"),
    "dense": b'{"epoch": 1, "ranks": []}', "halves": b'{"epoch": 1, "ranks": [%s4.5]}' % (b"4, " * 11)}


def flags(parser):
    """A row for each flag that takes a number."""
    return [([f"{action.option_strings[0]}=nan"], action.option_strings[0]) for action in parser._actions
            if action.type not in (None, os.path.expanduser)]


OF_V10 = [
    # the text to train on
    (["--data-file", "nowhere"], "cannot read nowhere: No such file"), (["--data-file", "UNREADABLE"], "cannot read"),
    (["--data-file", "folder"], "neither a corpus.json"), (["--data-file", ""], "neither a corpus.json"),
    (["--data-file", "empty"], "gives 0 training tokens"), (["--data-file", "blank"], "gives 0 training tokens"),
    (["--data-file", "png"], "its byte 0 cannot be decoded"), (["--data-file", "zeros"], "its byte 8 is zero"),
    (["--data-file", "utf16"], "its byte 0 cannot be decoded"), (["--data-file", "bom16"], "its byte 0 cannot"),
    (["--data-file", "latin1"], f"its byte {len(WORDS) + 4} cannot be decoded"),
    (["--data-file", "cut"], f"its byte {len(WORDS)} cannot be decoded"),
    (["--data-file", "single"], "repeats a single word, 'the'"),
    (["--data-file", "short"], "gives 4 training tokens, and a block needs 9"),
    (["--data-file", "tail"], "validation tokens, and a block needs 9"),
    (["--block-size", "1000000"], "training tokens, and a block needs 1,000,001"),
    (["--val-fraction", "0.001"], "gives 2 validation tokens"),
    (["--val-fraction", "0.999"], "gives 2 training tokens"),
    (["--val-fraction", "1"], "below 1"), (["--data-file"], "expected one argument"),
    # the text to test on
    (["--test-file", "nowhere"], "cannot read nowhere"), (["--test-file", "folder"], "Is a directory"),
    (["--test-file", "UNREADABLE"], "cannot read"), (["--test-file", "empty"], "has 0 words"),
    (["--test-file", "one"], "has 1 words"), (["--test-file", "png"], "its byte 0 cannot be decoded"),
    (["--test-file", "zeros"], "its byte 8 is zero"),
    (["--test-file", "strange"], "'elsewhere' is not in the training vocabulary"),
    # where to write
    (["--log-file", "folder"], "folder: Is a directory"), (["--log-file", ""], "needs the name of a file"),
    (["--log-file", "/"], "needs the name of a file"), (["--log-file", "good/log.jsonl"], "cannot write good"),
    (["--log-file", "good"], "need different names"), (["--checkpoint", "log.jsonl"], "need different names"),
    (["--log-file", "thesis", "--overwrite"], "thesis is not a log of this suite"),
    (["--log-file", "png", "--overwrite"], "png is not a log of this suite"),
    (["--log-file", "thesis"], "thesis is not a log"), (["--log-file", "x" * 300], "File name too long"),
    (["--checkpoint", "good"], "need different names"), (["--checkpoint", "."], "needs the name of a file"),
    (["--checkpoint", "good/a.pt"], "cannot"), (["--checkpoint", "folder", "--resume"], "Is a directory"),
    (["--checkpoint", "thesis"], "thesis exists: --resume continues its run"),
    (["--checkpoint", "folder", "--overwrite"], "folder: Is a directory"),
    # going on
    (["--resume", "--overwrite"], "exclude each other"), (["--resume", "--log-file", "thesis"], "is not a log"),
    (["--resume", "--checkpoint", "thesis"], "thesis is not a checkpoint of this suite"),
    (["--resume", "--checkpoint", "png"], "png is not a checkpoint of this suite"),
    # what does not fit together
    (["--d-model", "15"], "not a multiple of --n-heads"), (["--n-heads", "3"], "not a multiple of --n-heads 3"),
    (["--n-heads", "32"], "not a multiple"), (["--n-layers", "1000"], "below 1,000"),
    (["--block-size", "1"], "at least 2"), (["--batch-size", "1048576"], "below 1,048,576"),
    (["--warmup-steps", "20"], "leaves nothing of the run"), (["--grad-accum", "3"], "cannot be split evenly"),
    (["--batch-size", "4", "--grad-accum", "8"], "cannot be split evenly"),
    (["--dropout", "1"], "below 1"),
    # what is not there
    (["--device", "tpu"], "invalid choice"), (["--device", ""], "invalid choice"),
    (["--attention", "sparse"], "invalid choice"),
    (["--dtype", "int8"], "invalid choice"), (["--lr-schedule", "linear"], "invalid choice"),
    (["--unknown"], "unrecognized arguments"), (["word"], "unrecognized arguments: word"),
    (["--epoch", "3"], "unrecognized arguments"), (["--epochs"], "expected one argument"),
    (["--resume=yes"], "ignored explicit argument"), (["--device", "cuda"], "--device cuda is not available"),
    (["--device", "mps"], "--device mps is not available")]
OF_V10 += [
    (["--init-rank", "17"], "--init-rank 17 is not between 2 and 16"), (["--min-rank", "13"], "not between 13 and 16"),
    (["--max-rank", "11"], "not between 2 and 11"), (["--init-rank", "17", "--fixed-rank"], "not between 1 and 16"),
    (["--min-rank", "20", "--max-rank", "10"], "not between 20 and 10"), (["--ema-decay", "1"], "below 1"),
    (["--optimizer-on-resize", "keep"], "invalid choice"), (["--fixed-rank", "7"], "unrecognized arguments: 7"),
    (["--ranks-from", "log"], "--ranks-from: not allowed with argument --init-rank")]
RANKS_FROM = [  # in the place of --init-rank
    (["nowhere"], "cannot read nowhere: No such file"), (["folder"], "cannot read folder: Is a directory"),
    (["UNREADABLE"], "cannot read"), (["empty"], "does not end with the ranks of a factored model"),
    (["png"], "of a factored"),
    (["deep"], "12 layers"), (["log"], "does not end with the ranks of 12 layers"), (["begun"], "of a factored"),
    (["noranks"], "of a factored"),
    (["ranks"], "ranks: rank 17 is not between 2 and 16"), (["dense"], "of a factored"),
    (["halves"], "of a factored"),
    (["ranks", "--fixed-rank"], "ranks: rank 17 is not between 1 and 16"), ([], "expected one argument")]
ZERO_IS_GOOD = {"dropout", "ema_decay", "change_threshold", "power_iterations", "warmup_steps", "weight_decay",
                "grad_clip", "seed"}
OUT_OF_BOUNDS = [([f"{action.option_strings[0]}={-1 if action.dest in ZERO_IS_GOOD else 0}"], action.option_strings[0])
                 for action in v10.build_parser(v10.Variant())._actions
                 if action.type not in (None, os.path.expanduser)]
OF_V7 = [(["--data-file", "nowhere"], "cannot read nowhere: No such file"), (["--data-file", "utf16"], "byte 0 cannot"),
         (["--data-file", "tail"], "validation tokens, and a block needs 9"), (["--n-heads", "3"], "not a multiple"),
         (["--log-file", "thesis"], "thesis is not a log")]
OF_V7 += [([flag, "4"], f"unrecognized arguments: {flag}") for flag in (
    "--init-rank", "--min-rank", "--max-rank", "--safety-factor", "--rank-interval", "--optimizer-on-resize",
    "--ranks-from")]
OF_V7 += [(["--optimizer", "spectron"], "invalid choice"), (["--factor-decay", "1"], "is that of spectron")]
OF_V11 = [
    (["--optimizer", "sgd"], "invalid choice"), (["--optimizer", "adamw", "--factor-decay", "1"], "is that of"),
    (["--eta", "0"], "above 0"), (["--eta", "nan"], "is not a number"), (["--momentum", "1"], "below 1"),
    (["--factor-decay", "-1"], "at least 0"), (["--decay-on", "both"], "invalid choice"),
    (["--telemetry", "--compile"], "exclude each other"), (["--warmup-steps", "20"], "leaves nothing of the run"),
    (["--init-rank", "17"], "--init-rank 17 is not between 1 and 16"), (["--data-file", "tail"], "a block needs 9"),
    (["--init-rank", "17", "--no-fixed-rank", "--cuts", "0"], "--init-rank 17 is not between 2 and 16"),
    (["--test-file", "strange"], "strange: 'elsewhere' is not in the training vocabulary, which has no <unk> for it"),
    (["--no-fixed-rank"], "--cuts and --no-fixed-rank exclude each other"), (["--cuts", "-1"], "at least 0"),
    (["--optimizer-on-resize", "reinit"], "--optimizer-on-resize reinit needs --cuts 0"),
    (["--cut-from", "0.7"], "--cut-to 0.65 is before --cut-from 0.7"), (["--cut-to", "1"], "below 1"),
    (["--rank-budget", "0"], "above 0"), (["--rank-budget", "0.1"], "and --min-rank 2 needs 896"),
    (["--rank-budget", "1.5"], "allows 672 parameters in the linear layers, and --min-rank 2 needs 896"),
    (["--rank-signal", "entropy"], "invalid choice"), (["--cut-metric", "cosine"], "invalid choice")]
OF_PLOT_LOGS = [  # more in test_plot_logs.py
    ([], "required: LOG"), (["nowhere"], "nowhere: No such file"), (["folder"], "folder: Is a directory"),
    (["UNREADABLE"], ": "), (["empty"], "no epoch in it yet"), (["png"], "png:1: not a line of JSON"),
    (["zeros"], "zeros:1: not a line of JSON"), (["deep"], "deep:1: not a line of JSON"),
    (["huge"], "huge:1: train_loss should be a number"), (["twice"], "twice:2: epoch 1 after epoch 1"),
    (["bad8"], "bad8:1: not a line of JSON ('utf-8' codec can't decode byte 0xff in position 10"),
    (["bare"], "bare:2: ranks should be a list that is not empty"), (["norms"], "update_norms[1] should be a number"),
    (["noranks"], "ranks should be a list"), (["layers"], "layers should be a list"),
    (["sha"], "data_sha256 should be text"), (["other"], "6 ranks, where the run began with 12"),
    (["begun", "nowhere"], "begun: no epoch in it yet"), (["two"], "two:3: a second run begins here"),
    (["log", "--out", "good"], "cannot write good"), (["log", "--out", "good/figures"], "cannot write good/figures"),
    *((["log", f"--init-rank={value}"], "init-rank") for value in ("x", "0", "9" * 30, "9" * 5000)),
    (["log", "--unknown"], "unrecognized arguments")]
OF_SYNTHETIC = [
    *(([f"--{name}={value}"], name) for name, value in (
        ("tokens", "nan"), ("words", "-1"), ("topics", "2.5"), ("classes", "x"), ("seed", ""), ("tokens", "9" * 30),
        ("words", "0"), ("switch", "nan"), ("switch", "1.5"), ("topic-zipf", "nan"), ("val-fraction", "-1"))),
    (["--val-fraction", "0"], "--val-fraction"), (["--val-fraction", "1"], "--val-fraction"),
    (["--tokens", "100"], "--tokens must leave room"), (["--words", "10"], "--classes"),
    (["--classes", "200"], "--classes"),
    (["--tokens", "999999999999"], "--tokens"), (["--topics", "999999999"], "memory"), (["--out", "a.json"], ".json"),
    (["--out", "nowhere/a.tokens"], "cannot write"), (["--out", "folder"], "folder is not a plain file"),
    (["--out", ""], "needs the name of a file"), (["--out", "good/a"], "cannot write"), (["word"], "unrecognized")]
OF_WIKITEXT2 = [(["--out", "good"], "cannot write good"), (["--out", "good/a"], "cannot write good/a"),
                (["--out"], "expected one argument"), (["word"], "unrecognized"), (["--unknown"], "unrecognized")]

ROWS = [(script, *row) for script, rows in {
    "v10": [*OF_V10, *flags(v10.build_parser(v10.Variant())), *OUT_OF_BOUNDS],
    "v10 --ranks-from": RANKS_FROM,
    "v7": [*OF_V7, *flags(v10.build_parser(v7.Dense()))], "v11": OF_V11,
    "plot_logs": OF_PLOT_LOGS, "synthetic": OF_SYNTHETIC, "wikitext2": OF_WIKITEXT2}.items() for row in rows]
BASE = {"v10": ["--data-file", "good", "--log-file", "log.jsonl", *SMALL, *RANKS],
        "v10 --ranks-from": ["--data-file", "good", *SMALL, "--min-rank", "2", "--ranks-from"],
        "v7": ["--data-file", "good", "--log-file", "log.jsonl", *SMALL],
        "v11": ["--data-file", "good", "--log-file", "log.jsonl", *SMALL, *RANKS, "--rank-budget", "0.4"],
        "plot_logs": [], "synthetic": ["--tokens", "2000", "--words", "100", "--out", "new.tokens"], "wikitext2": []}
BY_COMMAND = [  # the rows that are tried through the real command as well
    ("v10", "latin1"), ("v10", "--lr=nan"), ("v7", "tail"), ("plot_logs", "deep"), ("synthetic", "--switch=nan"),
    ("wikitext2", "good")]


@pytest.mark.parametrize(("kind", "bounds", "text", "value"), [
    (int, {}, "12", 12), (int, {"least": 0}, "0", 0), (float, {"above": 0}, "1e-12", 1e-12),
    (float, {"least": 0, "below": 1}, "0", 0.0), (int, {}, "-3", -3), (int, {"below": 2**63}, "9" * 18, int("9" * 18)),
    *((int, {}, text, None) for text in ("", "x", "nan", "inf", "2.5", "1e3", "9" * 30, "9" * 5000, "2147483648")),
    *((float, {}, text, None) for text in ("", "x", "nan", "inf", "-inf", "1e400", "9" * 400)),
    (int, {"least": 1}, "0", None), (float, {"above": 0}, "0", None), (float, {"least": 0, "below": 1}, "1", None),
    (float, {"least": 0}, "-1", None)])
def test_a_number_of_a_flag_is_finite_and_within_its_bounds(kind, bounds, text, value):
    parse = v10.number(kind, **bounds)
    if value is None:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            parse(text)
    else:
        assert parse(text) == value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with all the files that the rows name; the current one."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "log").write_bytes(LOG)
    (tmp_path / "folder").mkdir()
    return tmp_path


def unreadable(folder):
    """A file that may not be read; root may read any file but the memory of a process."""
    if os.geteuid() == 0:
        return "/proc/self/mem"
    (folder / "secret").write_text("x")
    (folder / "secret").chmod(0)
    return "secret"


def arguments(script, given, folder):
    return [unreadable(folder) if word == "UNREADABLE" else word for word in [*BASE[script], *given]]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "secret"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_input_is_refused_in_one_line_before_any_work(folder, monkeypatch, capsys, script):
    def too_late(*_, **__):
        raise AssertionError("long work has begun")
    late = "leak_check" if script == "v10 --ranks-from" else "GPT"  # its log is compared with the model
    for module, name in ((v10, late), (wikitext2, "fetch")):
        monkeypatch.setattr(module, name, too_late)
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    before, wrong = contents(folder), []
    for row in ROWS:
        if row[0] == script:
            try:
                code = SCRIPTS[script][0](arguments(script, row[1], folder))
            except SystemExit as stop:  # argparse's own
                code = stop.code
            except Exception as failure:
                code = repr(failure)
            error = capsys.readouterr().err
            message = error.splitlines()[-1] if error else ""
            one_line = error.count("\n") == 1 or error.startswith("usage: ")
            if code != 2 or row[2] not in message or not one_line or contents(folder) != before:
                wrong.append((row[1], code, error[-300:]))
    assert not wrong, "\n".join(map(repr, wrong))


def test_wrong_input_is_refused_by_the_real_commands(folder):
    started = []
    for script, word in BY_COMMAND:
        given, said = next(row[1:] for row in ROWS if row[0] == script and word in row[1])
        command = [sys.executable, SCRIPTS[script][1], *arguments(script, given, folder)]
        started.append((subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), said))
    for process, said in started:
        output, error = process.communicate()
        assert (process.returncode, output) == (2, ""), error
        assert said in error
        assert "Traceback" not in error


@pytest.mark.parametrize("change", [
    lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b"\n", b" "),
    lambda text: b"\n\n\t" + text + b"   ", lambda text: text.replace(b" ", "\N{NO-BREAK SPACE}".encode())],
    ids=["byte order mark", "CRLF", "one giant line", "white space", "other white space"])
def test_the_same_words_in_another_dress_are_the_same_training(run, text, change):
    text.write_bytes(text.read_bytes().replace(b" w1 ", b"\nw1\n"))
    plain = run("--epochs", 1, name="plain")
    text.write_bytes(change(text.read_bytes()))
    other = run("--epochs", 1, name="other")
    assert records(other, "epoch")[0]["train_loss"] == records(plain, "epoch")[0]["train_loss"]
    assert records(other, "run")[0]["data_sha256"] != records(plain, "run")[0]["data_sha256"]


@pytest.mark.parametrize("sidecar", ["", "[", "[]", "null", '"x"', "[" * 100_000, '{"sha256": 1}', "\0", "\x80"])
def test_a_sidecar_that_is_something_else_is_no_floor(text, sidecar):
    text.with_suffix(".json").write_bytes(sidecar.encode("latin-1"))
    assert v10.load_corpus(text, 0.1, 8).entropy_floor is None


@pytest.mark.parametrize("floor", ["NaN", "Infinity", '"3"', "[3]", "9" * 400, "null"])
def test_a_floor_that_is_no_number_is_none(text, floor):
    sha256 = v10.read_words(text)[1]
    text.with_suffix(".json").write_text(f'{{"sha256": "{sha256}", "val_fraction": 0.1, "entropy_floor": {floor}}}')
    assert v10.load_corpus(text, 0.1, 8).entropy_floor is None


def test_a_generation_needs_a_word(run):
    loaded = v10.load_model(run("--epochs", 1).with_suffix(".pt"))
    with pytest.raises(v10.UserError, match="at least one token"):
        v10.generate(*loaded, "  ")
    for wrong in ({"temperature": -1}, {"temperature": float("inf")}, {"temperature": float("nan")}, {"top_k": 0}):
        with pytest.raises(v10.UserError, match=next(iter(wrong))):
            v10.generate(*loaded, "w1", **wrong)


def test_a_message_stays_readable_whatever_the_input(text, run, capsys):
    text.write_text("w" * 3_000_000 + " w1" * 3000)
    (run.folder / "test").write_text("x" * 3_000_000 + " w1")
    run("--test-file", run.folder / "test", code=2)
    assert len(capsys.readouterr().err) < 2000
    run("--log-file", "y" * 5000, code=2)
    assert len(capsys.readouterr().err) < 2000


def test_help_is_not_an_error():
    for script, (main, _) in SCRIPTS.items():
        with pytest.raises(SystemExit) as stop, io.StringIO() as _:
            main(["--help"])
        assert stop.value.code == 0, script
