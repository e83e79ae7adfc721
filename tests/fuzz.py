"""Mutated real inputs for whatever reads a file: it has to take them or to refuse them in one line, with no traceback.

    python3 tests/fuzz.py                    2,000 cases for each of the targets below; some minutes
    python3 tests/fuzz.py --cases 20000 --seed 1

A small run, stopped and resumed, makes the real inputs. What has been found stands as a test beside the others.
"""
import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import compress  # noqa: E402
import plot_logs  # noqa: E402
import prepare  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402

FLAGS = """--d-model 8 --n-layers 1 --n-heads 2 --d-ff 16 --block-size 4 --batch-size 2 --steps-per-epoch 4
    --val-fraction 0.1 --rank-interval 3 --init-rank 6 --min-rank 2 --device cpu""".split()
WORDS = [b"NaN", b"1e999", b"-1", b"null", b"[]", b"{}", b'"', b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"9" * 400,
         b"true", b"[" * 5000, "\N{NO-BREAK SPACE}\N{LINE SEPARATOR}".encode(), b"\xed\xa0\x80", b"PK\x03\x04"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, 1e308]),
    lambda values: st.lists(values, max_size=6) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=8)
places = st.floats(0, 1, exclude_max=True)
edits = st.lists(st.tuples(st.sampled_from(["flip", "insert", "delete", "repeat", "cut"]), places,
                           st.integers(1, 300), st.binary(min_size=1, max_size=6) | st.sampled_from(WORDS)),
                 min_size=1, max_size=4)


def mutated(data, changes):
    """Bytes with some places flipped, filled, deleted, repeated or cut off."""
    for kind, place, size, new in changes:
        at = int(place * len(data))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << size % 8)]) + data[at + 1:]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + size:]
        elif kind == "repeat":
            data = data[:at] + data[max(at - size, 0):at] * 2 + data[at:]
        elif kind == "cut":
            data = data[:at]
    return data


@st.composite
def mutated_logs(draw, data):
    """A log in which fields, elements of lists or whole records have become other JSON."""
    records = [json.loads(line) for line in data.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(records) - 1))
        if not isinstance(records[i], dict) or not records[i] or draw(st.integers(0, 9)) == 0:
            records[i] = draw(json_values)
            continue
        name = draw(st.sampled_from(sorted(records[i])))
        value = records[i][name]
        if isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(json_values)
        elif draw(st.integers(0, 4)) == 0:
            del records[i][name]
        else:
            records[i][name] = draw(json_values)
    return "\n".join(map(json.dumps, records)).encode()


def targets(folder):
    """-> {name: (a strategy of cases, what to do with one)}. A target returns, or raises what its script reports."""
    text, log, checkpoint, compression, tensors, pickled, index, numbers = ((folder / name).read_bytes() for name in (
        "text.tokens", "log.jsonl", "log.pt", "compress.jsonl", "m.safetensors", "m.pt", "prepared/corpus.json",
        "numbers.bin"))
    report = b"\n".join(json.dumps({name: record[name] for name in (
        "epoch", "train_loss", "val_loss", "rank_min", "rank_max", "rank_avg", "ranks", "params_millions", "time_sec")}
        ).encode() for record in map(json.loads, log.splitlines()) if record["kind"] == "epoch")
    here, plot_logs.np = folder / "case", np

    def read_log(data):
        here.write_bytes(data)
        runs = [plot_logs.read_log(path, path.stem) for path in (here, folder / "log.jsonl")]
        parts = [*plot_logs.contents(runs)]
        plot_logs.page(parts)
        plot_logs.html_page(parts, {})
        for run in runs:
            if run.final_ranks:
                plot_logs.history(run)

    def read_compression(data):
        here.write_bytes(data)
        if log := plot_logs.read_compression(here, "case", plot_logs.records(here)):
            parts = [*plot_logs.contents([], [log])]
            plot_logs.page(parts)
            plot_logs.html_page(parts, {})

    def read_tensors(suffix):
        def action(data):
            path = here.with_suffix(suffix)
            path.write_bytes(data)
            for matrix in compress.read_matrices(path):
                json.dumps(compress.of_matrix(path, *matrix), allow_nan=False)
        return action

    def read_text(data):
        here.write_bytes(data)
        v10.load_corpus(here, 0.1, 4)

    def prepare_text(data):
        here.write_bytes(data)
        shutil.rmtree(folder / "new", ignore_errors=True)
        try:
            words = v10.read_words(here)[0]
        except v10.UserError:
            words = []
        try:
            vocabulary = prepare.prepare([here], folder / "new")["vocabulary"]
        except prepare.PrepareError:
            assert len(set(words)) < 2, "v10 takes this text"
            raise
        assert [vocabulary[i] for i in np.fromfile(folder / "new" / "tokens.bin", "<u2")] == words

    def read_tokens(path, **settings):
        def action(data):
            path.write_bytes(data)
            corpus = v10.load_corpus(path.parent if path.suffix == ".json" else path, 0.1, 4, **settings)
            assert len(corpus.train[:]) + len(corpus.val[:]) == 200
            json.dumps(corpus.entropy_floor, allow_nan=False)
        return action

    def read_sidecar(data):
        (folder / "text.json").write_bytes(data)
        json.dumps(v10.load_corpus(folder / "text.tokens", 0.1, 4).entropy_floor, allow_nan=False)

    def read_ranks(data):
        here.write_bytes(data)
        assert all(isinstance(rank, int) for rank in v10.final_ranks(here))

    def read_checkpoint(data):
        here.write_bytes(data)
        v10.load_model(here)

    def read_sealed(data):
        here.write_bytes(data)
        with open(here, "r+b") as file:
            file.write(v10.SEAL + v10.sha256_of(file, len(data)))  # which has read up to the end
        v10.load_model(here)

    def read_fields(change):
        v10.save(here, content | change)
        v10.load_model(here)

    content = v10.load(folder / "log.pt")
    fields = st.one_of(
        st.dictionaries(st.sampled_from(["config", "ranks", "end_ranks", "vocabulary", "model", "format"]), json_values,
                        min_size=1),
        st.dictionaries(st.sampled_from(sorted(content["config"])), json_values.filter(lambda value: not isinstance(
            value, (int, float)) or abs(value) < 1000), min_size=1).map(
            lambda change: {"config": content["config"] | change}),
        st.dictionaries(st.sampled_from(sorted(content["model"])), json_values, min_size=1).map(
            lambda change: {"model": content["model"] | change}))
    sealed = checkpoint[:-len(v10.SEAL) - 64]
    sidecar = json.dumps({"sha256": v10.read_words(folder / "text.tokens")[1], "val_fraction": 0.1,
                          "entropy_floor": 2.5}).encode()

    def of_bytes(data):
        return edits.map(lambda changes: mutated(data, changes))
    return {
        "plot_logs: log, bytes": (of_bytes(log) | of_bytes(report), read_log),
        "plot_logs: log, fields": (mutated_logs(log) | mutated_logs(report), read_log),
        "plot_logs: log of compress.py": (of_bytes(compression) | mutated_logs(compression), read_compression),
        "compress: .safetensors": (of_bytes(tensors), read_tensors(".safetensors")),
        "compress: .pt": (of_bytes(pickled), read_tensors(".pt")),
        "v10: ranks of a log": (of_bytes(log) | mutated_logs(log), read_ranks),
        "v10: text": (of_bytes(text), read_text),
        "prepare: text": (of_bytes(text), prepare_text),
        "v10: folder of tokens": (of_bytes(index) | mutated_logs(index), read_tokens(folder / "prepared/corpus.json")),
        "v10: file of tokens": (of_bytes(numbers), read_tokens(folder / "numbers.bin", vocab_size=23)),
        "v10: sidecar": (of_bytes(sidecar) | mutated_logs(sidecar), read_sidecar),
        "v10: checkpoint": (of_bytes(checkpoint), read_checkpoint),
        "v10: checkpoint, right checksum": (of_bytes(sealed), read_sealed),
        "v10: checkpoint, fields": (fields, read_fields)}


def fuzz(cases, action, n, seed):
    """Run action(case) for n cases -> how many it took and how many it refused. Whatever else it raises is raised,
    for the smallest case found."""
    counts = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=n, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases)
    def check(case):
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                action(case)
                counts["taken"] += 1
                return
            except (v10.UserError, plot_logs.LogError, prepare.PrepareError) as error:
                said = str(error)
        counts["refused"] += 1
        assert len(said.splitlines()) == 1, said
    check()
    return counts


def main():
    parser = argparse.ArgumentParser(description="Feeds mutated inputs to all that reads a file.", allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=2000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text.tokens").write_bytes(b" ".join(b"w%d" % (i * i % 23) for i in range(200)))
        prepare.prepare([folder / "text.tokens"], folder / "prepared")
        prepare.CHUNK = 7  # so that pieces end anywhere
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, 200
        (folder / "numbers.bin").write_bytes(header.tobytes() + np.array([i % 23 for i in range(200)], "<u2").tobytes())
        for flags in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
            with contextlib.redirect_stdout(io.StringIO()):
                assert v10.main(["--data-file", place + "/text.tokens", "--log-file", place + "/log.jsonl",
                                 *FLAGS, *flags]) == 0
        ckpt, cut, logged = (f"{place}/{name}" for name in ("log.best.pt", "cut.pt", "compress.jsonl"))
        for flags in (["cut", ckpt, "--keep", "0.7", "--out", cut], ["compare", ckpt, "--only", "ends"],
                      ["tune", cut, "--uncut", ckpt, "--steps", "1"]):
            with contextlib.redirect_stdout(io.StringIO()):
                assert compress.main([*flags, "--data-file", place + "/text.tokens", "--log-file", logged]) == 0
        some = {"w": torch.randn(3, 4), "b": torch.zeros(2), "U": torch.randn(3, 2, dtype=torch.bfloat16)}
        torch.save(some, folder / "m.pt")
        save_file(some, folder / "m.safetensors")
        with contextlib.redirect_stdout(io.StringIO()):
            assert compress.main(["spectrum", place + "/m.pt", "--log-file", logged]) == 0
        for name, (cases, action) in targets(folder).items():
            counts = fuzz(cases, action, args.cases, args.seed)
            print(f"{name:40} {counts.total():6,} cases: {counts['taken']:,} taken, {counts['refused']:,} refused",
                  flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
