"""Corpora of any size: data/prepare.py, and training from tokens that stay in their files."""
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import prepare
import v10_transformer_lowrank_scaled as v10
import v11_transformer_lowrank_spectron as v11
from conftest import RANKS, ROOT, SMALL, records, untimed, write_sidecar
from test_parallel import assert_same_training, two_processes

UNTIDY = "\ufeffa bb\u2003ccc\n\u00e9\u4e2d \U0001f600 a\x1c<unk> bb  a\u00a0dd\ta ccc end"


@pytest.fixture
def prepared(text):
    """The small text as a folder of tokens."""
    prepare.prepare([text], text.with_name("folder"))
    return text.with_name("folder")


def numbers_file(path, tokens, count=None):
    """A file as modded-nanogpt writes it."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array([*map(int, tokens)], "<u2").tobytes())
    return path


def nanogpt_folder(path, train, val):
    path.mkdir()
    for name, tokens in (("train", train), ("val", val)):
        np.array([*map(int, tokens)], "<u2").tofile(path / f"{name}.bin")
    return path


# ---- prepare.py ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize(("tokenize", "min_count"), [("words", 1), ("words", 2), ("chars", 1), ("bytes", 1)])
def test_a_folder_has_the_tokens_and_words_of_its_text_wherever_it_is_cut(tmp_path, monkeypatch, tokenize, min_count,
                                                                          chunk):
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    (tmp_path / "text").write_text(UNTIDY, encoding="utf-8")
    prepare.prepare([tmp_path / "text"], tmp_path / "folder", tokenize, min_count)
    ours = v10.load_corpus(tmp_path / "folder", 0.4, 2)
    text = v10.load_corpus(tmp_path / "text", 0.4, 2, tokenize, min_count)
    assert (ours.vocabulary, ours.tokenize) == (text.vocabulary, text.tokenize)
    assert torch.equal(ours.train[:], text.train)
    assert torch.equal(ours.val[:], text.val)


def test_texts_are_read_one_after_the_other(tmp_path):
    for name, words in (("a", "x y"), ("b", "z x")):
        (tmp_path / name).write_text(words)
    index = prepare.prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "folder")
    assert np.fromfile(tmp_path / "folder" / "tokens.bin", "<u2").tolist() == [0, 1, 2, 0]
    assert (index["vocabulary"], index["counts"]) == (["x", "y", "z"], [2, 1, 1])


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_a_smaller_vocabulary_keeps_the_most_frequent_words(tmp_path, size):
    words = "e e e e d d d c c b <unk> a".split()
    (tmp_path / "text").write_text(" ".join(words))
    index = prepare.prepare([tmp_path / "text"], tmp_path / "folder", max_vocab=size)
    kept = sorted({*words} - {"<unk>"}, key=lambda word: (-words.count(word), word))
    kept = kept[:size - 1] if size < 6 else kept
    assert index["vocabulary"] == sorted([*kept, "<unk>"])
    assert sum(index["counts"]) == len(words)
    assert index["counts"][index["vocabulary"].index("<unk>")] == sum(word not in kept for word in words)


def test_more_than_65536_words_take_four_bytes_each(tmp_path):
    (tmp_path / "text").write_text(" ".join(map(str, range(70_000))))
    assert prepare.prepare([tmp_path / "text"], tmp_path / "folder")["bytes_per_token"] == 4
    corpus = v10.load_corpus(tmp_path / "folder", 0.1, 8)
    words = [corpus.vocabulary[i] for i in corpus.train[-3:].tolist()]
    assert words == ["62997", "62998", "62999"]


def test_the_floor_of_a_synthetic_text_goes_with_its_tokens(tmp_path):
    index = prepare.prepare([ROOT / "data" / "synthetic.tokens"], tmp_path / "folder")
    known = json.loads((ROOT / "data" / "synthetic.json").read_text())
    assert v10.load_corpus(tmp_path / "folder", known["val_fraction"], 8).entropy_floor == known["entropy_floor"]
    assert v10.load_corpus(tmp_path / "folder", 0.3, 8).entropy_floor is None
    assert "entropy_floor" in index
    thinned = prepare.prepare([ROOT / "data" / "synthetic.tokens"], tmp_path / "thinned", min_count=30)
    assert "entropy_floor" not in thinned


@pytest.mark.parametrize(("content", "flags", "message"), [
    (b"a b \xff c", [], "not UTF-8 text: its byte 4 cannot"), (b"a b c" + "é".encode()[:1], [], "ends within a char"),
    ("é".encode() * 5 + b"\xff", [], "its byte 10 cannot"), (b"a b\0c", [], "its byte 3 is zero"),
    (b"", [], "0 tokens, 0 of them distinct"), (b"a a a", [], "3 tokens, 1 of them"),
    (b"a b c", ["--min-count", "2"], "only '<unk>' is left of 3 words"), (b"a b", ["--max-vocab", "1"], "at least 2"),
    (b"a b", ["--min-count", "x"], "not a whole number"), (b"a b", ["--out", "folder/text"], "exists")])
def test_what_cannot_be_prepared_is_said_in_one_line_and_leaves_nothing(tmp_path, content, flags, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text").write_bytes(content)
    done = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", "folder/text", "--out", "new", *flags],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("prepare.py: error: ")
    assert message in last
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_is_there_already_stays_as_it_is(tmp_path):
    (tmp_path / "text").write_text("a b")
    for name in ("new.part", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("thesis")
        with pytest.raises(prepare.PrepareError, match="exists"):
            prepare.prepare([tmp_path / "text"], tmp_path / name.removesuffix(".part"))
        assert (tmp_path / name / "mine").read_text() == "thesis"
    with pytest.raises(prepare.PrepareError, match="No such file"):
        prepare.prepare([tmp_path / "typo"], tmp_path / "new")
    assert (tmp_path / "new.part" / "mine").exists()


def test_a_word_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 10)
    monkeypatch.setattr(prepare, "LONGEST", 50)
    (tmp_path / "text").write_text("x" * 1000)
    with pytest.raises(prepare.PrepareError, match="--tokenize chars"):
        prepare.prepare([tmp_path / "text"], tmp_path / "folder")


def test_check_finds_a_changed_token(prepared, capsys):
    assert prepare.main(["--check", str(prepared)]) == 0
    assert "the checksum is right" in capsys.readouterr().out
    tokens = prepared / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[100] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--check", str(prepared)])
    assert ended.value.code == 2
    assert "its checksum differs" in capsys.readouterr().err


# ---- Training from them ----------------------------------------------------------------------------------------------

def same_run(one, other):
    for kind in ("ranks", "cut", "epoch", "end"):
        assert untimed(one, kind) == untimed(other, kind)
    weights = [v10.load_model(log.with_suffix(".pt"))[0].state_dict() for log in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("main", [v10.main, v11.main])
def test_a_run_from_a_folder_equals_the_run_from_the_text_bit_for_bit(run, prepared, main):
    ranks = ["--init-rank", "12", "--min-rank", "2", *(["--rank-budget", "0.3"] if main is v11.main else [])]
    same_run(run(main=main, name="text", ranks=ranks),
             run("--data-file", prepared, main=main, name="folder_run", ranks=ranks))


def test_a_run_from_a_folder_that_is_continued_equals_the_straight_one(run, prepared):
    straight = run("--data-file", prepared, name="straight")
    resumed = run("--data-file", prepared, "--epochs", 2, name="resumed")
    run("--data-file", prepared, "--resume", name="resumed")
    same_run(straight, resumed)


def test_the_log_names_the_folder_and_the_model_knows_its_words(run, prepared, text):
    log = run("--data-file", f"{prepared}/")
    first = records(log, "run")[0]
    assert (first["data_file"], first["tokenize"]) == ("folder", "words")
    assert f"--data-file {prepared.name}/" in first["command"]
    assert str(prepared.parent) not in log.read_text()
    model, vocabulary = v10.load_model(log.with_suffix(".best.pt"))
    assert vocabulary == sorted(set(text.read_text().split()))
    assert v10.generate(model, vocabulary, "w1 w2", n_tokens=3).startswith("w1 w2 ")


@pytest.mark.parametrize("kind", ["nanogpt", "modded"])
def test_tokens_of_other_projects_train_the_same_model(run, text, kind):
    train, val, vocabulary, *_ = v10.load_corpus(text, 0.1, 8)
    data = nanogpt_folder(text.with_name("gpt"), train, val) if kind == "nanogpt" else numbers_file(
        text.with_name("gpt.bin"), torch.cat([train, val]))
    log = run("--data-file", data, "--vocab-size", len(vocabulary), name="numbers")
    same_run(run(name="text"), log)
    model, numbers = v10.load_model(log.with_suffix(".pt"))
    assert numbers == list(range(len(vocabulary)))
    assert v10.generate(model, numbers, [3, 1], n_tokens=4, temperature=0)[:2] == [3, 1]
    run("--data-file", data, "--vocab-size", len(vocabulary), "--resume", name="numbers")
    run("--data-file", data, "--vocab-size", len(vocabulary) + 1, "--resume", name="numbers", code=2)
    with pytest.raises(v10.UserError, match="'50' is not in the training vocabulary"):
        v10.generate(model, numbers, [len(vocabulary)])


def test_a_test_file_of_numbers_is_read_for_a_model_of_numbers(run, text):
    tokens = torch.cat(v10.load_corpus(text, 0.1, 8)[:2])
    data, test = (numbers_file(text.with_name(name), part) for name, part in (
        ("gpt.bin", tokens), ("test.bin", tokens[-305:])))  # the last tenth, which validates
    end = records(run("--data-file", data, "--vocab-size", 50, "--test-file", test), "end")[0]
    assert end["test_loss_last"] == pytest.approx(end["final_val_loss"], abs=1e-4)  # before the ranks' last change


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_validation_is_limited_to_the_first_tokens_and_then_has_no_floor(run, text, prepared, kind):
    write_sidecar(text)
    log = run("--data-file", text if kind == "text" else prepared, "--val-tokens", 100)
    first = records(log, "run")[0]
    assert (first["val_tokens"], first["entropy_floor"]) == (100, None)
    best = v10.load_model(log.with_suffix(".best.pt"))[0]  # saved as it was evaluated
    assert v10.evaluate(best, v10.load_corpus(text, 0.1, 8).val[:100], 4) == pytest.approx(
        min(epoch["val_loss"] for epoch in records(log, "epoch")), rel=1e-6)
    assert v10.load(log.with_suffix(".pt"))["text"]["val_tokens"] == 100


def test_two_processes_read_a_folder_as_one_does_and_agree_on_what_is_wrong(run, prepared, tmp_path):
    flags = ["--data-file", prepared, "--epochs", 2]
    both = two_processes(prepared, tmp_path / "two.jsonl", *flags)
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0)] * 2
    assert_same_training(run(*flags), tmp_path / "two.jsonl")
    change_index(prepared, vocabulary=["a", "b"])
    both = two_processes(prepared, tmp_path / "bad.jsonl")
    assert ["beyond its vocabulary" in "".join(process.communicate()) for process in both] == [True, False]
    assert [process.returncode for process in both] == [2, 2]


@pytest.mark.parametrize("name", ["tokens.bin", "corpus.json"])
def test_a_run_does_not_write_over_its_corpus(run, prepared, capsys, name):
    before = (prepared / name).read_bytes()
    run("--data-file", prepared, "--overwrite", "--checkpoint", prepared / name, code=2)
    assert "need different names" in capsys.readouterr().err
    assert (prepared / name).read_bytes() == before


# ---- One pass --------------------------------------------------------------------------------------------------------

def test_in_one_pass_every_token_is_a_target_once_at_most():
    tokens, B, T = torch.arange(1000), 7, 5
    steps = (len(tokens) - 1) // B // T
    batches = [v10.next_batch(tokens, step, B, T) for step in range(1, steps + 1)]
    targets = Counter(itertools.chain.from_iterable(y.flatten().tolist() for _, y in batches))
    assert max(targets.values()) == 1
    assert len(targets) == steps * B * T
    assert all(torch.equal(y, x + 1) for x, y in batches)
    assert torch.equal(batches[1][0][:, 0], batches[0][1][:, -1]), "each part is read on"


def test_one_pass_resumes_bit_for_bit_and_ends_with_the_text(run):
    straight = run("--one-pass", name="straight")
    run("--one-pass", "--epochs", 3, name="resumed")
    run("--one-pass", "--resume", name="resumed")
    assert untimed(straight) == untimed(run.folder / "resumed.jsonl")
    assert untimed(straight) != untimed(run(name="random"))


def test_one_pass_asks_for_a_text_that_is_long_enough(run, capsys):
    run("--one-pass", "--epochs", 50, code=2)
    assert "ends after 85 steps, not 250" in capsys.readouterr().err  # 2,745 tokens, 4 windows of 8


# ---- What is wrong with files ----------------------------------------------------------------------------------------

def change_index(folder, **change):
    index = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(index | change))


BAD = {
    "a folder of something else": (lambda f: (f / "corpus.json").unlink(), [], "neither a corpus.json"),
    "tokens cut off": (lambda f: (f / "tokens.bin").write_bytes((f / "tokens.bin").read_bytes()[:-1]), [],
                       "cut off or damaged"),
    "tokens missing": (lambda f: (f / "tokens.bin").unlink(), [], "No such file"),
    "an index that is no JSON": (lambda f: (f / "corpus.json").write_text("{"), [], "corpus.json is damaged"),
    "an index of another format": (lambda f: change_index(f, format=2), [], "corpus.json is damaged"),
    "words twice": (lambda f: change_index(f, vocabulary=["a", "a"]), [], "corpus.json is damaged"),
    "numbers for words": (lambda f: change_index(f, vocabulary=[1, 2]), [], "corpus.json is damaged"),
    "fewer tokens than it says": (lambda f: change_index(f, tokens=10**6), [], "those of 1,000,000 tokens"),
    "one word": (lambda f: change_index(f, vocabulary=["a"]), [], "repeats a single word"),
    "a token beyond its words": (lambda f: change_index(f, vocabulary=["a", "b"]), [], "beyond its vocabulary of 2"),
    "a vocabulary twice": (lambda f: None, ["--vocab-size", "50"], "--vocab-size is for tokens without"),
    "another way to read it": (lambda f: None, ["--tokenize", "chars"], "holds tokens already"),
    "rare words": (lambda f: None, ["--min-count", "2"], "holds tokens already"),
    "a block longer than it": (lambda f: None, ["--block-size", "400"], "validation tokens, and a block needs 401"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_in_one_line(run, prepared, capsys, name):
    spoil, flags, message = BAD[name]
    spoil(prepared)
    run("--data-file", prepared, *flags, code=2)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("make", "flags", "message"), [
    (lambda f: numbers_file(f / "x.bin", range(50)), [], "has no vocabulary: --vocab-size"),
    (lambda f: numbers_file(f / "x.bin", range(50), count=51), ["--vocab-size", "50"], "those of 51 tokens"),
    (lambda f: numbers_file(f / "x.bin", range(50), count=-1), ["--vocab-size", "50"], "those of -1 tokens"),
    (lambda f: numbers_file(f / "x.bin", []), ["--vocab-size", "50"], "damaged"),
    (lambda f: numbers_file(f / "x.bin", 1000 * [7]), ["--vocab-size", "7"], "the token 7, beyond its vocabulary of 7"),
    (lambda f: nanogpt_folder(f / "x", 1000 * [9], 100 * [1]), ["--vocab-size", "9"], "beyond its vocabulary of 9"),
    (lambda f: nanogpt_folder(f / "x", 1000 * [1], []), ["--vocab-size", "9"], "val.bin is cut off"),
    (lambda f: f / "text.tokens", ["--vocab-size", "9"], "and {} is not a file of them")])
def test_bad_files_of_numbers_are_refused_in_one_line(run, text, capsys, make, flags, message):
    path = make(text.parent)
    run("--data-file", path, *flags, code=2)
    assert message.format(path) in capsys.readouterr().err.splitlines()[-1]


def test_a_token_beyond_the_vocabulary_ends_the_run_before_its_step_and_keeps_the_last_epoch(run, text, capsys,
                                                                                               monkeypatch):
    """The bad token lies where only the second epoch of a single pass reads."""
    monkeypatch.setattr(v10, "FIRST_LOOK", 10)
    tokens = list(range(20)) * 50
    tokens[8 * 7] = 20  # the 8th step of the first part
    path = numbers_file(text.with_name("x.bin"), tokens)
    log = run("--data-file", path, "--vocab-size", 20, "--one-pass", "--epochs", 4, code=2)
    assert "the token 20, beyond its vocabulary of 20" in capsys.readouterr().err
    assert [epoch["epoch"] for epoch in records(log, "epoch")] == [1]
    assert v10.load(log.with_suffix(".pt"))["state"]["step"] == 5


# ---- Size ------------------------------------------------------------------------------------------------------------

NO_MORE = r"""
import re, resource, sys
from pathlib import Path
import v10_transformer_lowrank_scaled as v10
used = 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 3 * 10**8, -1))
sys.exit(v10.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is limited so on Linux alone")
@pytest.mark.parametrize("kind", ["numbers", "folder"])
def test_a_gigabyte_of_tokens_trains_in_300_megabytes(tmp_path, kind):
    """From a sparse file, in a process that gets no more memory than that once its libraries are loaded."""
    n, flags = 500_000_000, []
    if kind == "numbers":
        path, flags = numbers_file(tmp_path / "x.bin", [], count=n), ["--vocab-size", "50"]
        os.truncate(path, 1024 + 2 * n)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        (path / "corpus.json").write_text(json.dumps({"format": 1, "tokens": n, "bytes_per_token": 2,
                                                      "tokenize": "words", "vocabulary": ["a", "b"]}))
        (path / "tokens.bin").touch()
        os.truncate(path / "tokens.bin", 2 * n)
    done = subprocess.run([sys.executable, "-c", NO_MORE, *SMALL, *RANKS, "--epochs", "1", *flags, "--data-file", path,
                           "--log-file", tmp_path / "log.jsonl", "--val-tokens", "1000"], cwd=ROOT, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
