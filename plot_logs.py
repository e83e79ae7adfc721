"""Tables and figures from the logs of v7, v10, v11 and compress.py, and from logs in the report's own format.

    python3 plot_logs.py logs/v10.jsonl
    python3 plot_logs.py logs/v10_s0.jsonl logs/v10_s1.jsonl logs/v7.jsonl --out figures
    python3 plot_logs.py logs/v10_bidirectional.jsonl --report --x tokens

Prints the report's Table 1 (training) and Table 2 (final ranks), the phases of training, a table of costs and, for
several logs, a comparison, in which runs that differ only in their seed are one row and one curve: mean and range.
Writes all of it to DIR/index.html, one page to look at, and to DIR/tables.md; each table to DIR/*.csv and *.tex
(booktabs); and the figures, as PNG and PDF: losses, telemetry if it was logged, and for each run NAME_ranks (rank
against epoch), NAME_heatmap (layer by epoch), NAME_final-ranks (block by projection) and NAME_cuts (v11's). With
--report the report's own numbers stand beside each run's, in tables and in NAME_report. Of a log of compress.py: its
cuts, comparisons, fine-tuning and spectra. A run without a causal mask is marked everywhere: it sees its targets. A log
that cannot be read is named and left out.
"""
import argparse
import base64
import contextlib
import csv
import html
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

PROJECTIONS = {"q": "Q", "k": "K", "v": "V", "o": "O", "up": "FFN \N{UPWARDS ARROW}",
               "down": "FFN \N{DOWNWARDS ARROW}"}  # as the report shows them, in its order
LEAK = "SEES ITS TARGETS"
DASH = "\N{EN DASH}"  # for what a log does not say

# The report's Table 1, {epoch: train loss, validation loss, lowest, highest and mean rank}, and its Table 2.
REPORT_TRAINING = {1: (7.156, 6.740, 60, 60, 60.0), 5: (5.778, 6.167, 44, 44, 44.0), 10: (5.313, 6.123, 24, 32, 26.1),
                   15: (5.020, 5.909, 10, 32, 19.9), 20: (4.819, 6.021, 10, 32, 17.9),
                   25: (2.964, 3.327, 9, 32, 17.0), 30: (0.572, 1.155, 9, 32, 16.6)}
REPORT_PHASES = {"uniform compression": 1, "differentiation": 8, "collapse": 23}  # the first epoch of each
REPORT_RANKS = [[10, 10, 18, 24, 10, 10], [10, 10, 22, 23, 24, 22], [17, 14, 15, 20, 17, 27], [10, 13, 11, 25, 18, 32],
                [11, 10, 10, 22, 13, 27], [9, 10, 11, 23, 14, 26]]
REPORT_MEANS = {name: fmean(ranks) for name, ranks in zip(PROJECTIONS.values(), zip(*REPORT_RANKS, strict=True),
                                                           strict=True)}
REPORT_MEAN = fmean(REPORT_MEANS.values())


class LogError(ValueError):
    """A log that cannot be read: main() prints it in one line, with file and line, and returns 2."""


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    written: float = 0.0  # when the log was, in seconds since 1970
    settings: dict = field(default_factory=dict)  # the run record; empty in the report's own format
    epochs: list = field(default_factory=list)  # the epoch records, in order
    initial_rank: float | None = None  # mean over the layers; None for a dense model
    assumed: bool = False  # the initial rank is --init-rank, not the log's
    updates: list = field(default_factory=list)  # the records of rank updates inside epochs, in order
    cuts: list = field(default_factory=list)  # the records of v11's cuts
    end: dict = field(default_factory=dict)  # the end record; empty as long as the run has not ended

    @property
    def sees_targets(self):
        """True, False, or None where the log does not say."""
        return self.settings["attention"] == "bidirectional" if "attention" in self.settings else None

    @property
    def mark(self):
        """What follows its name wherever it appears."""
        return f" ({LEAK})" if self.sees_targets else ""

    def label(self):
        """As a figure shows it."""
        return label(self.name) + self.mark

    @property
    def final_ranks(self):
        """[] for a dense model."""
        return self.epochs[-1]["ranks"]

    def places(self):
        """[(block, projection as it is shown)] in the order of `ranks`. A log without names has the report's layers,
        six for each block."""
        given, n = self.settings.get("layers"), len(self.final_ranks)
        names = [plain(name).rpartition(".") for layer in given or [] if isinstance(name := layer.get("name"), str)]
        places = [(block, PROJECTIONS.get(kind, kind)) for block, _, kind in names]
        if len(places) == n == len(set(places)):
            return places
        if given or n % len(PROJECTIONS):
            return [(str(i), "layer") for i in range(n)]
        return [(str(i // len(PROJECTIONS)), [*PROJECTIONS.values()][i % len(PROJECTIONS)]) for i in range(n)]

    def by_projection(self):
        """{projection: the indices of its layers}."""
        indices = {}
        for i, (_, projection) in enumerate(self.places()):
            indices.setdefault(projection, []).append(i)
        return indices

    def grid(self):
        """-> (names of the blocks, {projection: the final rank in each block, None if it has no such layer})."""
        ranks = dict(zip(self.places(), self.final_ranks, strict=True))
        blocks = list(dict.fromkeys(block for block, _ in ranks))
        return blocks, {kind: [ranks.get((block, kind)) for block in blocks] for kind in self.by_projection()}

    @property
    def family(self):
        """What decides a run's colour."""
        if self.sees_targets:
            return LEAK
        if not self.final_ranks:
            return "dense"
        if self.cuts:
            return "cut"
        if self.settings.get("optimizer") in ("muon", "spectron"):
            return "controlled"
        return "fixed" if self.settings.get("fixed_rank") else "adaptive"

    def total(self, name):
        """Sum of a quantity over all epochs, None where one is missing or does not say."""
        values = [epoch.get(name) for epoch in self.epochs]
        return None if None in values or len(values) < self.epochs[-1]["epoch"] else sum(values)

    def tokens_per_second(self):
        """Over the whole of training, None where the log does not say."""
        tokens, seconds = self.epochs[-1].get("tokens_seen"), self.total("train_sec")
        return tokens / seconds if tokens is not None and seconds else None


def not_finite(constant):
    raise ValueError(f"{constant} is not JSON")


def is_number(value, kind=(int, float)):
    """A number that all of the arithmetic here can take: no truth value, and of at most 15 digits."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e15


# What records hold. A form is one of KINDS; [form], a list; [form, ...], one that is not empty; (form, form), a list of
# two; {name: form}, an object; {...: form}, one of any names, but not empty. "name?" may be missing or null.
NUMBER, COUNT, RANK, TEXT = "a number", "a whole number above 0", "a rank or null", "text"
KINDS = {NUMBER: is_number, COUNT: lambda value: is_number(value, int) and value > 0,
         RANK: lambda value: value is None or is_number(value, int) and value > 0,
         TEXT: lambda value: isinstance(value, str)}
TELEMETRY = {"update_norms": "The step: its spectral norm", "weight_norms": "The weights: their spectral norm",
             "output_changes": "The outputs: RMS change"}  # by the last step of an epoch, for each layer
ALL = {f"{name}?": NUMBER for name in (
    "step", "steps_per_epoch", "rank_min", "rank_max", "rank_avg", "params_millions", "factor_params_millions",
    "time_sec", "train_sec", "eval_sec", "rank_sec", "tokens_seen", "tokens_per_sec", "peak_memory_mb", "parameters",
    "factor_parameters", "entropy_floor", "train_tokens", "val_tokens", "vocab_size", "lr")}
ALL |= {f"{name}?": TEXT for name in ("attention", "data_file", "data_sha256", "device", "device_name", "dtype")}
FORMS = {
    "run": {"initial_ranks?": [COUNT], "layers?": [{"shape": (COUNT, COUNT)}]},
    "epoch": {"epoch": NUMBER, "train_loss": NUMBER, "val_loss": NUMBER, "ranks": [COUNT],
              **{f"{name}?": [NUMBER] for name in TELEMETRY}},
    "ranks": {"step": NUMBER, "ranks": [COUNT]},
    "cut": {"step": NUMBER, "val_loss_before": NUMBER, "val_loss": NUMBER, "ranks": [COUNT, ...]},
    "resume": {"epoch": NUMBER}}
SIZES = {"all": COUNT, "linear": COUNT, "ends": NUMBER}
CUT = {"checkpoint": TEXT, "metric": TEXT, "target": TEXT, "loss_before": NUMBER, "loss": NUMBER,
       "loss_error?": NUMBER, "plain_increase?": NUMBER, "before": SIZES, "after": SIZES, "ranks": {...: RANK},
       "shapes": {...: (COUNT, COUNT)}}
COMPRESSIONS = {  # by the command of compress.py
    "cut": CUT, "fit": CUT,
    "compare": {"checkpoint": TEXT, "loss_before": NUMBER, "before": {"all": NUMBER}, "rows": [
        {"keep": NUMBER, "cuts": {...: {"increase": NUMBER, "parameters": NUMBER}}}, ...]},
    "tune": {"checkpoint": TEXT, "models": [{"model": TEXT, "train": TEXT, "parameters": NUMBER, "trained": NUMBER,
                                             "loss_before": NUMBER, "loss": NUMBER}, ...]},
    "spectrum": {"checkpoint": TEXT, "matrices": {...: {
        "shape": (COUNT, COUNT), "stable_rank": NUMBER, "break_even": NUMBER, "singular_values": [NUMBER, ...],
        "ranks": (NUMBER,) * 4}}}}


def fit(value, form, name=""):
    """Raises ValueError if a value is not of this form."""
    inside, of_some = [], " that is not empty"
    if isinstance(form, str):
        good, wanted = KINDS[form](value), form
    elif isinstance(form, dict):
        good, wanted = isinstance(value, dict) and (value or ... not in form), "an object" + of_some * (... in form)
        if good and ... in form:
            inside = [(item, form[...], f"{name}[{json.dumps(key)[:60]}]") for key, item in value.items()]
        elif good:
            inside = [(value.get(key.removesuffix("?")), of, f"{name}.{key.removesuffix('?')}".lstrip("."))
                      for key, of in form.items()
                      if not key.endswith("?") or value.get(key.removesuffix("?")) is not None]
    else:
        least = len(form) - isinstance(form, list)
        good = isinstance(value, list) and (len(value) == least if isinstance(form, tuple) else len(value) >= least)
        wanted = f"a list of {least}" if isinstance(form, tuple) else "a list" + of_some * least
        inside = [(item, form[0], f"{name}[{i}]") for i, item in enumerate(value)] if good else []
    if not good:
        raise ValueError(f"{name or 'a record'} should be {wanted}, not {json.dumps(value)[:60]}")
    for item, of, its_name in inside:
        fit(item, of, its_name)


def check(record, run):
    """-> the record's kind. Raises ValueError for a record that is not one of ours, or not one of the report's, or does
    not go on from those before it."""
    fit(record, {})
    kind = record.get("kind", "epoch")
    fit(kind, TEXT, "kind")
    fit(record, ALL | FORMS.get(kind, {}))
    if kind == "run" and (run.settings or run.epochs):
        raise ValueError("a second run begins here: each run needs a log of its own")
    if kind in ("epoch", "ranks", "cut"):
        n, initial = len(record["ranks"]), run.settings.get("initial_ranks")
        if kind == "epoch" and run.epochs and n != len(run.epochs[-1]["ranks"]):
            raise ValueError(f"{n} ranks, where the epoch before has {len(run.epochs[-1]['ranks'])}")
        if initial and n != len(initial):
            raise ValueError(f"{n} ranks, where the run began with {len(initial)}")
    if kind == "epoch" and record["epoch"] <= (run.epochs[-1]["epoch"] if run.epochs else 0):
        raise ValueError(f"epoch {record['epoch']} after epoch {run.epochs[-1]['epoch'] if run.epochs else 0}")
    return kind


def records(path: Path, quiet: bool = False) -> list[tuple[int, object]]:
    """[(line number, record)] of a log. Raises LogError. A last line that was cut off in the middle is left out, with a
    warning if not `quiet`."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line.decode("utf-8"), parse_constant=not_finite)))
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1:
                if not quiet:
                    warn(f"{path}:{number}: the last line is cut off and left out")
                break
            raise LogError(f"{path}:{number}: not a line of JSON ({error})") from None
    return found


def ended(path: Path) -> Run | None:
    """The run of a log, None if it has not ended. Raises LogError."""
    run = read_run(path, path.stem, records(path, quiet=True))
    return run if run.end else None


def read_log(path: Path, name: str, init_rank: float = 64) -> Run:
    """A log -> Run. Raises LogError, also if it has no epoch yet."""
    return begun(path, read_run(path, name, records(path), init_rank))


def begun(path, run):
    """-> the run. Raises LogError if it has no epoch yet."""
    if not run.epochs:
        raise LogError(f"{path}: no epoch in it yet")
    return run


def read_run(path: Path, name: str, lines: list[tuple[int, object]], init_rank: float = 64) -> Run:
    """The records of a log -> Run, which may have only begun. Raises LogError."""
    run, unknown = Run(name), set()
    for number, record in lines:
        try:
            kind = check(record, run)
        except ValueError as error:
            raise LogError(f"{path}:{number}: {error}") from None
        if kind == "run":
            run.settings = record
        elif kind in ("ranks", "cut"):
            (run.updates if kind == "ranks" else run.cuts).append(record)
        elif kind == "epoch":
            run.epochs.append(record)
        elif kind == "resume":  # what was logged after the checkpoint was trained again
            if run.settings and "epochs" in record:
                run.settings = run.settings | {"epochs": record["epochs"]}
            run.epochs, run.end = [epoch for epoch in run.epochs if epoch["epoch"] <= record["epoch"]], {}
            run.updates, run.cuts = ([update for update in updates if update["step"] <= (record.get("step") or 0)]
                                     for updates in (run.updates, run.cuts))
        elif kind == "end":
            run.end = record
        elif str(kind) not in unknown:  # of each, once is enough
            unknown.add(str(kind))
            warn(f"{path}:{number}: left out: a record of an unknown kind, {str(kind)[:60]!r}")
    run.written = path.stat().st_mtime
    if run.epochs and run.final_ranks:
        run.assumed = not run.settings.get("initial_ranks")
        run.initial_rank = init_rank if run.assumed else fmean(run.settings["initial_ranks"])
    return run


class Compression(NamedTuple):
    """A log of compress.py."""

    name: str
    records: list


def check_compression(record):
    """Raises ValueError for a record that compress.py did not write."""
    fit(record, {})
    if record.get("kind") != "compress":
        raise ValueError("not a record of compress.py, as others here are")
    command = record.get("command")
    if not isinstance(command, str) or command not in COMPRESSIONS:
        raise ValueError(f"an unknown command, {json.dumps(command)[:60]}")
    fit(record, COMPRESSIONS[command])
    if command in ("cut", "fit") and record["ranks"].keys() != record["shapes"].keys():
        raise ValueError("ranks and shapes should be of the same matrices")
    if command == "compare" and len({json.dumps([*row["cuts"]]) for row in record["rows"]}) > 1:
        raise ValueError("rows of other cuts than the first one's")


def read_compression(path: Path, name: str, lines: list[tuple[int, object]]) -> Compression | None:
    """The records of a log of compress.py, or None if it is another log. Raises LogError."""
    if not any(isinstance(record, dict) and record.get("kind") == "compress" for _, record in lines):
        return None
    for number, record in lines:
        try:
            check_compression(record)
        except ValueError as error:
            raise LogError(f"{path}:{number}: {error}") from None
    return Compression(name, [record for _, record in lines])


def read_logs(paths: list[Path], init_rank: float = 64) -> tuple[list[Run], list[Compression]]:
    """Logs -> (Runs, Compressions), each with a name of its own, also where capitals do not count: the file's, and its
    folder's where two files share a name. A log that cannot be read is left out, with a warning; raises LogError if
    none can be."""
    found, problems = [], []
    names = [plain(path.name if path.suffix != ".jsonl" else path.stem) for path in paths]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            name = f"{plain(path.resolve().parent.name)}_{name}"
        taken, unique, i = {log.name.casefold() for log in found}, name, 2
        while unique.casefold() in taken:
            unique, i = f"{name}_{i}", i + 1
        try:
            lines = records(path)
            found.append(read_compression(path, unique, lines) or begun(path, read_run(path, unique, lines, init_rank)))
        except LogError as problem:
            problems.append(problem)
    if not found:
        raise problems[0]
    for problem in problems:
        warn(f"{problem}; left out")
    return tuple([log for log in found if isinstance(log, kind)] for kind in (Run, Compression))


def plain(name):
    """A file's name as text in one line: no line ends, and a ? for each byte that is no letter."""
    return " ".join(name.encode("utf-8", "replace").decode("utf-8").split()) or "?"


def warn(message):
    with contextlib.suppress(OSError, ValueError):  # a screen that is gone
        print(f"plot_logs.py: warning: {message}", file=sys.stderr)


# ---- Seeds of one configuration, and the phases of a run -------------------------------------------------------------

OF_ONE_RUN = {"seed", "log_file", "checkpoint", "checkpoint_minutes", "command", "resume", "overwrite", "device_name",
              "dtype_reason", "versions", "leak_check", "telemetry", "initial_ranks", "parameters",
              "factor_parameters"}


SINCE = {"tokenize": "words", "min_count": 1, "tie_embeddings": False, "share_layers": False, "optimizer": "adamw",
         "eta": None, "momentum": 0.95, "nesterov": True, "factor_decay": 0.0, "init_from": None,
         "one_pass": False, "ranks_from": None}  # not in older logs


@dataclass
class Group:
    """Runs of one configuration, which differ in their seeds."""

    name: str
    runs: list
    apart: str = ""  # why a run is not in the group of its configuration

    @property
    def first(self):
        return self.runs[0]

    def label(self):
        """As a figure shows it."""
        return label(self.name) + self.first.mark + (f", {len(self.runs)} seeds" if len(self.runs) > 1 else "")

    def values(self, value):
        """[value(run) for each run], leaving out those that do not say."""
        return [found for found in map(value, self.runs) if found is not None]


def grouped(runs: list[Run]) -> list[Group]:
    """Runs -> Groups, in order: together are runs of one length and of distinct seeds, whose records differ only in
    what belongs to one run. What else has the same settings stands apart, with the reason."""
    groups = {}
    for i, run in enumerate(runs):
        settings = SINCE | {name: value for name, value in run.settings.items() if name not in OF_ONE_RUN}
        settings["ranks_from"] = re.sub(r"[_-](seed|s)\d+(?=\.|$)", "", str(settings["ranks_from"]))  # of its seed
        if settings.get("lr_schedule") != "cosine":  # else as many as there are, which --resume may have changed
            settings["epochs"] = None
        groups.setdefault(json.dumps(settings, sort_keys=True) if run.settings else i, []).append(run)
    found = []
    for members in groups.values():
        lengths = {run.epochs[-1]["epoch"] for run in members}
        for length in sorted(lengths, reverse=True):
            seeds = {}  # each seed's first run
            for run in (run for run in members if run.epochs[-1]["epoch"] == length):
                first = seeds.setdefault(json.dumps(run.settings.get("seed")), run)
                if run is not first:
                    seed = "" if run.settings.get("seed") is None else f" {run.settings['seed']}"
                    found.append(Group(run.name, [run], f"it has the seed{seed} of {first.name}"))
            found.append(Group("", [*seeds.values()],
                               f"it has {length} epochs, others of its settings {max(lengths - {length})}"
                               if len(lengths) > 1 else ""))
    found.sort(key=lambda group: runs.index(group.first))
    for group in found:
        common = os.path.commonprefix([run.name for run in group.runs])
        group.name = re.sub(r"[_-]((seed|s)\d*)?$", "", common) if len(group.runs) > 1 else group.first.name
    names = [group.name for group in found]
    for group in found:
        if not group.name or names.count(group.name) > 1:
            group.name = group.first.name
    return found


PHASES = ("Phases, by rules. Uniform compression: the first epochs, as long as all layers have one rank, and it falls. "
          "Differentiation: from the epoch in which their ranks part to the end, or to the collapse. Collapse: to the "
          "end from the first epoch whose validation loss is 5% or more below the lowest before it, once an epoch has "
          "brought less than 2%.")  # they divide the report's run as the report does: 1 to 7, 8 to 22, 23 to 30


def phases(run: Run) -> list[tuple[str, list[dict]]]:
    """[(name, epochs)] of the phases that a log shows, by the rules of PHASES; `epochs` are the records of each."""
    found, epochs = [], run.epochs
    lowest, slowed, collapse = math.inf, False, len(epochs)  # the place of the first one that belongs to it
    for i, epoch in enumerate(epochs):
        loss = epoch["val_loss"]
        if slowed and loss <= 0.95 * lowest:
            collapse = i
            break
        slowed, lowest = slowed or loss > 0.98 * lowest, min(loss, lowest)
    rank = run.initial_rank
    for i, epoch in enumerate(epochs[:collapse] if run.final_ranks else []):
        low, high = min(epoch["ranks"]), max(epoch["ranks"])
        if low < high and i:
            found.append(("differentiation", epochs[i:collapse]))
        if low < high or low >= rank:
            break
        rank, found = low, [("uniform compression", epochs[:i + 1])]
    return found + [("collapse", epochs[collapse:])] * (collapse < len(epochs))


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Cell:
    """A number as a table shows it; of several, their mean and range; a dash for none."""

    def __init__(self, value, form=",.0f", unit=""):
        values = value if isinstance(value, list) else [value]
        self.values, self.form, self.unit = [value for value in values if value is not None], form, unit

    def __str__(self):
        if not self.values:
            return DASH
        mean, low, high = (format(value, self.form) for value in self.numbers())
        return mean + self.unit + f" ({low} to {high})" * (low != high)

    def numbers(self):
        return (fmean(self.values), min(self.values), max(self.values)) if self.values else ("", "", "")


TEX = {letter: "\\" + letter for letter in "&%$#_{}"} | {letter: f"{{{letter}}}" for letter in "[]*"} | {
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", DASH: "--",
    "\N{UPWARDS ARROW}": r"$\uparrow$", "\N{DOWNWARDS ARROW}": r"$\downarrow$"}  # what LaTeX does not take as it is


@dataclass
class Table:
    """A table with a name for its files. Its cells are texts and Cells."""

    name: str
    title: str
    header: list
    rows: list

    def markdown(self):
        """As Markdown, with columns aligned as plain text too; all but the first flush right."""
        rows = [[re.sub(r"([|*`<\[])", r"\\\1", str(cell)) for cell in row] for row in [self.header, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        first, *others = ("| " + " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(
            zip(row, widths, strict=True))) + " |" for row in rows)
        rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
        return "\n".join([first, rule, *others])

    def latex(self):
        """As a LaTeX table; it needs the package booktabs."""
        def row(cells):
            return " & ".join("".join(TEX.get(letter, letter) for letter in str(cell)) for cell in cells)
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{row([self.title])}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", r"\toprule", row(self.header) + r" \\",
            r"\midrule", *(row(cells) + r" \\" for cells in self.rows), r"\bottomrule", r"\end{tabular}",
            r"\end{table}", ""])

    def records(self):
        """As rows for csv: plain numbers; a column of means gets two more, of the lowest and highest values."""
        wide = [any(isinstance(row[i], Cell) and len(row[i].values) > 1 for row in self.rows)
                for i in range(len(self.header))]
        yield [name for i, title in enumerate(self.header)
               for name in ([title, f"{title}, lowest", f"{title}, highest"] if wide[i] else [title])]
        for row in self.rows:
            yield [value for i, cell in enumerate(row) for value in (
                (cell.numbers() if isinstance(cell, Cell) else (cell, "", ""))[:3 if wide[i] else 1])]


def millions(value):
    return None if value is None else round(value * 1e6)


def training_table(run):
    """The report's Table 1: epochs 1, 5, 10, ... and the last."""
    chosen = [e for e in run.epochs if e["epoch"] == 1 or e["epoch"] % 5 == 0 or e is run.epochs[-1]]
    return Table(f"{run.name}_training", f"Table 1, {run.name}: training and ranks",
                 ["Epoch", "Train Loss", "Val Loss", "R min", "R max", "R avg"], [
        [str(e["epoch"]), Cell(e["train_loss"], ".3f"), Cell(e["val_loss"], ".3f"), Cell(e.get("rank_min")),
         Cell(e.get("rank_max")), Cell(e.get("rank_avg"), ".1f")] for e in chosen])


def projection_means(run: Run) -> dict[str, float]:
    """{projection: the mean of its final ranks}."""
    return {name: fmean(run.final_ranks[i] for i in of_type) for name, of_type in run.by_projection().items()}


def rank_table(run):
    """The report's Table 2: final ranks, a row for each block, and their means."""
    blocks, grid = run.grid()
    return Table(f"{run.name}_final-ranks", f"Table 2, {run.name}: ranks after epoch {run.epochs[-1]['epoch']}",
                 ["Block", *grid], [*([block, *map(Cell, ranks)] for block, *ranks in
                                      zip(blocks, *grid.values(), strict=True)),
                                    ["Mean", *(Cell(mean, ".1f") for mean in projection_means(run).values())]])


def report_tables(run):
    """The report's tables beside this run's, with the differences: losses and ranks of the epochs that both have, where
    the phases begin, and the mean final ranks of the projections."""
    def beside(name, ours, theirs, form):
        return [name, Cell(ours, form), Cell(theirs, form), Cell(None if ours is None else ours - theirs, f"+{form}")]
    epochs = {epoch["epoch"]: epoch for epoch in run.epochs}
    quantities = (("Train Loss", "train_loss", ".3f"), ("Val Loss", "val_loss", ".3f"), ("R min", "rank_min", ".0f"),
                  ("R max", "rank_max", ".0f"), ("R avg", "rank_avg", ".1f"))
    header = [run.name, "report", "difference"]
    yield Table(f"{run.name}_report-training", f"Table 1 beside the report's, {run.name}", ["Epoch", *header], [
        beside(f"{number} {name}", epochs[number].get(key), theirs, form)
        for number, report in REPORT_TRAINING.items() if number in epochs
        for (name, key, form), theirs in zip(quantities, report, strict=True)])
    begins = {name: phase[0]["epoch"] for name, phase in phases(run)}
    yield Table(f"{run.name}_report-phases", f"Phases beside the report's, {run.name}: first epoch of each", [
        "Phase", *header], [beside(name, begins.get(name), theirs, ".0f") for name, theirs in REPORT_PHASES.items()])
    if run.final_ranks:
        ours, theirs = projection_means(run) | {"all": fmean(run.final_ranks)}, REPORT_MEANS | {"all": REPORT_MEAN}
        yield Table(f"{run.name}_report-ranks", f"Table 2 beside the report's, {run.name}: mean final ranks",
                    ["Projection", *header], [beside(name, ours.get(name), theirs[name], ".1f") for name in theirs])


def phase_table(run):
    """The phases, with the loss and the mean rank before the first and after the last epoch of each."""
    rows = []
    for name, epochs in phases(run):
        i = run.epochs.index(epochs[0])
        before = run.epochs[i - 1] if i else {"rank_avg": run.initial_rank}
        rows.append([name, f"{epochs[0]['epoch']} to {epochs[-1]['epoch']}",
                     *(Cell(epoch.get("val_loss"), ".3f") for epoch in (before, epochs[-1])),
                     *(Cell(epoch.get("rank_avg"), ".1f") for epoch in (before, epochs[-1]))])
    return Table(f"{run.name}_phases", f"Phases, {run.name}", [
        "Phase", "Epochs", "Val Loss before", "at its end", "R avg before", "at its end"], rows)


def cut_table(run):
    """v11's cuts: the mean rank after each, and what it did to the validation loss at once."""
    return Table(f"{run.name}_cuts", f"Cuts, {run.name}", ["After step", "R min", "R max", "R avg", "Val Loss before",
                                                           "after", "difference"], [
        [str(cut["step"]), Cell(min(cut["ranks"])), Cell(max(cut["ranks"])), Cell(fmean(cut["ranks"]), ".1f"),
         Cell(cut["val_loss_before"], ".3f"), Cell(cut["val_loss"], ".3f"),
         Cell(cut["val_loss"] - cut["val_loss_before"], "+.4f")] for cut in run.cuts])


def reduction(run):
    """How much of the initial mean rank is gone, in %; None for a dense model."""
    final = run.epochs[-1].get("rank_avg")
    return None if None in (run.initial_rank, final) else 100 * (1 - final / run.initial_rank)


def cost_table(run):
    """What the run costs at its start and its end, and what a dense model would."""
    last, layers = run.epochs[-1], run.settings.get("layers")
    start, factors = run.settings.get("parameters"), run.settings.get("factor_parameters")
    dense = sum(m * n for m, n in (layer["shape"] for layer in layers)) if layers else None
    memory = [epoch["peak_memory_mb"] for epoch in run.epochs if epoch.get("peak_memory_mb") is not None]
    seconds = [[name, "", Cell(run.total(f"{key}_sec"), ",.1f")] for name, key in
               (("seconds in all", "time"), ("seconds of training", "train"), ("seconds of evaluation", "eval"),
                ("seconds of rank control", "rank"))]
    return Table(f"{run.name}_cost", f"Cost, {run.name}", ["", "start", "end"], [
        ["mean rank", Cell(run.initial_rank, ".1f"), Cell(last.get("rank_avg"), ".1f")],
        ["rank reduction", "", Cell(reduction(run), ".1f", "%")],
        ["parameters in the linear layers", Cell(factors), Cell(millions(last.get("factor_params_millions")))],
        ["parameters in all", Cell(start), Cell(millions(last.get("params_millions")))],
        ["linear layers of a dense model", Cell(dense), Cell(dense)],
        ["dense model in all", *[Cell(None if None in (start, factors, dense) else start - factors + dense)] * 2],
        *seconds,
        ["training tokens per second", "", Cell(run.tokens_per_second())],
        ["peak memory in MB", "", Cell(max(memory, default=None))]])


def best(run: Run) -> dict:
    """The epoch of lowest validation loss."""
    return min(run.epochs, key=lambda epoch: epoch["val_loss"])


def text_of(run):
    """What losses have to share to be compared: the text, its tokens, and the part held out."""
    return tuple(json.dumps(run.settings.get(name)) for name in ("data_sha256", "vocab_size", "val_tokens"))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def comparison_table(groups):
    """A row for each configuration: n seeds, and where n > 1 means with ranges."""
    rows = []
    for group in groups:
        attention = {True: f"none: {LEAK}", False: "causal", None: DASH}[group.first.sees_targets]
        rows.append([
            group.name, str(len(group.runs)), attention,
            Cell(group.values(lambda run: run.epochs[-1].get("rank_avg")), ".1f"),
            Cell(group.values(lambda run: millions(run.epochs[-1].get("params_millions")))),
            Cell(group.values(lambda run: best(run)["val_loss"]), ".3f"),
            Cell(group.values(lambda run: best(run)["epoch"])),
            Cell(group.values(lambda run: perplexity(best(run)["val_loss"])), ",.2f"),
            Cell(group.values(lambda run: run.epochs[-1]["val_loss"]), ".3f"),
            Cell(group.first.settings.get("entropy_floor"), ".3f"),
            Cell(group.values(Run.tokens_per_second))])
    return Table("comparison", "Comparison", ["run", "n", "attention", "mean rank", "parameters", "best val loss",
                                              "at epoch", "perplexity", "final val loss", "floor", "tokens/s"], rows)


def compression_tables(log):
    """What compress.py did, by command."""
    def marked(cell, error):
        return f"{cell:+.4f}" + (f" \N{PLUS-MINUS SIGN} {error:.4f}" if error is not None else "")
    cuts = [record for record in log.records if record["command"] in ("cut", "fit")]
    if cuts:
        yield Table(f"{log.name}_cut", f"Cuts, {log.name}", [
            "checkpoint", "command", "metric", "parameters", "kept", "in linear layers", "kept there", "loss",
            "change", "perplexity", "plain SVD of this size"], [
            [record["checkpoint"], plain(f"{record['command']} {record['target']}"), plain(record["metric"]),
             Cell(record["after"]["all"]), Cell(record["after"]["all"] / record["before"]["all"], ".1%"),
             Cell(record["after"]["linear"]),
             Cell(record["after"]["linear"] / record["before"]["linear"], ".1%"), Cell(record["loss"], ".4f"),
             marked(record["loss"] - record["loss_before"], record.get("loss_error")),
             Cell(perplexity(record["loss"] - record["loss_before"]) - 1, "+.1%"),
             Cell(record.get("plain_increase"), "+.4f")] for record in cuts])
    for i, record in enumerate(record for record in log.records if record["command"] == "compare"):
        names = [*record["rows"][0]["cuts"]]
        yield Table(f"{log.name}_compare{i + 1}", f"Change of the loss, {record['checkpoint']}", ["kept", *names], [
            [f"{row['keep']:.2%}", *(Cell(row["cuts"][name]["increase"], "+.4f") for name in names)]
            for row in record["rows"]])
    tuned = [record for record in log.records if record["command"] == "tune"]
    if tuned:
        yield Table(f"{log.name}_tune", f"Fine-tuning, {log.name}", [
            "checkpoint", "model", "trained", "parameters", "of these", "loss before", "after"], [
            [record["checkpoint"], model["model"], model["train"], Cell(model["parameters"]), Cell(model["trained"]),
             Cell(model["loss_before"], ".4f"), Cell(model["loss"], ".4f")]
            for record in tuned for model in record["models"]])
    for i, record in enumerate(record for record in log.records if record["command"] == "spectrum"):
        yield Table(f"{log.name}_spectrum{i + 1}", f"Spectra, {record['checkpoint']}: ranks that hold so much energy", [
            "matrix", "shape", "stable rank", "90%", "95%", "99%", "99.9%", "break-even"], [
            [plain(name), f"{matrix['shape'][0]} x {matrix['shape'][1]}", Cell(matrix["stable_rank"], ".1f"),
             *map(Cell, matrix["ranks"]), Cell(matrix["break_even"])] for name, matrix in record["matrices"].items()])


def contents(runs, compressions=(), report=False):
    """What the logs say, in order: paragraphs of text, and Tables. With the report's numbers beside them if asked."""
    for run in runs:
        s, mark = run.settings, f" {DASH} {LEAK}" if run.sees_targets else ""
        yield f"# {run.name}{run.mark}"
        if run.sees_targets:
            yield ("Attention without a causal mask: each position sees the word that it has to predict. "
                   "These losses are not those of a language model.")
        if s:
            yield (f"{Cell(s.get('train_tokens'))} training and {Cell(s.get('val_tokens'))} validation tokens of "
                   f"{s.get('data_file')}, {Cell(s.get('vocab_size'))} words; seed {s.get('seed')}, "
                   f"{s.get('device')} ({s.get('device_name')}), {s.get('dtype')}.")
        else:
            yield "No run record: the log does not say what trained it, nor whether its attention had a mask."
        if run.assumed:
            yield f"The log does not say the initial rank: {run.initial_rank:g} is assumed (--init-rank)."
        found = [training_table(run), *([rank_table(run)] if run.final_ranks else []),
                 *([cut_table(run)] if run.cuts else []),
                 *(report_tables(run) if report else ()), *([phase_table(run)] if phases(run) else []), cost_table(run)]
        for table in found:
            table.title += mark
            yield table
    if len(runs) > 1:
        groups = grouped(runs)
        yield "# Comparison"
        yield comparison_table(groups)
        for group in (group for group in groups if group.apart):
            yield f"The run {group.name} is not averaged with runs of the same settings: {group.apart}."
        if len({text_of(run) for run in runs if run.settings}) > 1:
            yield "The runs were not trained on the same data: their losses cannot be compared."
        if len({run.epochs[-1].get("tokens_seen") for run in runs} - {None}) > 1:
            yield "The runs were not trained on the same number of tokens."
    if any(map(phases, runs)):
        yield PHASES
    for log in compressions:
        yield f"# {log.name}"
        yield from compression_tables(log)


def page(parts):
    """What contents() gave, as Markdown."""
    return "\n\n".join(part if isinstance(part, str) else part.markdown() if part.name == "comparison" else
                       f"{part.title}\n\n{part.markdown()}" for part in parts) + "\n"


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Training logs</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; font-size: 0.9rem }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; white-space: nowrap }
td, th { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
div { overflow-x: auto } img { max-width: 100%; margin: 0.5rem 0 } h1 { margin-top: 3rem }
</style>"""


def html_page(parts, pictures):
    """The same with the figures, {name: PNG}, in one page that needs no other file: the comparison first, then each run
    with its figures before its tables."""
    def shown(part):
        if isinstance(part, str):
            return f"<p>{html.escape(part)}</p>"
        rows = [(part.header, "th"), *((cells, "td") for cells in part.rows)]
        return f"<div><table><caption>{html.escape(part.title)}</caption>" + "\n".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
            for cells, tag in rows) + "</table></div>"
    sections = []  # of each: its heading, and what is below it
    for part in parts:
        if isinstance(part, str) and part.startswith("# "):
            sections.append((part[2:], []))
        else:
            sections[-1][1].append(part)
    lines, left = [PAGE], dict(pictures)
    for heading, below in sorted(sections, key=lambda section: section[0] != "Comparison"):
        tables = [part for part in below if isinstance(part, Table)]
        run = tables[0].name.rpartition("_")[0]  # "" for the comparison
        mine = [name for name in left if name in ("losses", "telemetry") or run and name.rpartition("_")[0] == run]
        lines += [f"<h1>{html.escape(heading)}</h1>", *(shown(part) for part in below if isinstance(part, str))]
        lines += [f'<img alt="{html.escape(name)}" src="data:image/png;base64,'
                  f'{base64.b64encode(left.pop(name)).decode()}">' for name in mine]
        lines += map(shown, tables)
    return "\n".join(lines) + "\n"


# ---- Figures ---------------------------------------------------------------------------------------------------------


def history(run):
    """-> (epochs, ranks (epochs, layers)), the initial ranks first, as epoch 0; updates and cuts inside epochs at their
    part."""
    initial = run.settings.get("initial_ranks") or [run.initial_rank] * len(run.final_ranks)
    ranks = {0: initial} | {epoch["epoch"]: epoch["ranks"] for epoch in run.epochs}
    if steps := run.settings.get("steps_per_epoch"):
        ranks |= {update["step"] / steps: update["ranks"] for update in [*run.updates, *run.cuts]
                  if len(update["ranks"]) == len(initial)}
    return sorted(ranks), np.array([ranks[at] for at in sorted(ranks)], dtype=float)


def minutes(run):
    """From the start of a run to the end of each epoch; None where one is missing or does not say."""
    if run.total("time_sec") is None:
        return [None] * len(run.epochs)
    return [total / 60 for total in accumulate(epoch["time_sec"] for epoch in run.epochs)]


def logged(name):
    return lambda run: [epoch.get(name) for epoch in run.epochs]


AXES = {"epoch": ("epoch", logged("epoch")), "tokens": ("training tokens", logged("tokens_seen")),
        "time": ("minutes of training, evaluation and rank control", minutes),
        "parameters": ("million parameters in use", logged("params_millions"))}


def label(text, longest=48):
    """A run's name as matplotlib shows it: plain, and not too long."""
    if len(text) > longest:
        text = text[:longest // 2] + "\N{HORIZONTAL ELLIPSIS}" + text[-longest // 2:]
    text = "".join(letter if ord(letter) in letters else "?" for letter in text)
    return text.replace("$", r"\$")


def curve(axes, at, seeds, color, **line):
    """The mean of (seeds, points) as a line, and a band from the lowest to the highest seed."""
    axes.plot(at, seeds.mean(0), color=color, **line)
    axes.fill_between(at, seeds.min(0), seeds.max(0), color=color, alpha=0.2, linewidth=0)


COLORS = {"dense": "#0072B2", "fixed": "#CC79A7", "adaptive": "#009E73", "controlled": "#E69F00",
          "cut": "#7B3294", LEAK: "#D55E00"}  # Okabe and Ito's, but for the cut ones


def shades(families: list[str]) -> list[tuple]:
    """A colour for each: that of its family, lighter for the second and the next ones of it."""
    seen, colors = {}, []
    for family in families:
        step = seen[family] = seen.get(family, -1) + 1
        red, green, blue = (int(COLORS[family][i:i + 2], 16) / 255 for i in (1, 3, 5))
        weight = 0.75 ** step
        colors.append(tuple(weight * part + (1 - weight) * 0.85 for part in (red, green, blue)))
    return colors


def label_ends(axes, ends: list[tuple]) -> None:
    """Write each (y, text, color) at the right edge, beside the end of its line, without overlaps."""
    axes.figure.canvas.draw()  # settles the scale
    line, ends = 1.3 * plt.rcParams["font.size"] / 72 * axes.figure.dpi, sorted(ends, key=lambda end: end[0])
    places = [axes.transData.transform((0, y))[1] for y, *_ in ends]
    for _ in range(200):  # two that are too close push each other apart
        for i in range(1, len(places)):
            push = (line - (places[i] - places[i - 1])) / 2
            if push > 0:
                places[i - 1], places[i] = places[i - 1] - push, places[i] + push
    for (_, text, color), place in zip(ends, places, strict=True):
        axes.annotate(text, (1, axes.transAxes.inverted().transform((0, place))[1]), xycoords="axes fraction",
                      xytext=(5, 0), textcoords="offset points", color=color, va="center", annotation_clip=False)


def shade_impossible(axes, floor):
    """Mark the losses below the entropy of the text."""
    axes.axhspan(min(axes.get_ylim()[0], 0), floor, color="gray", alpha=0.15, linewidth=0)
    axes.annotate(f"below {floor:.3f}, the entropy of the text:\nno honest model gets here", (0.02, floor),
                  xycoords=("axes fraction", "data"), xytext=(0, -4), textcoords="offset points", va="top",
                  color="#444444", fontsize=8)


def losses_title(groups):
    """What the losses say, in one line."""
    def lowest(group):
        return fmean(best(run)["val_loss"] for run in group.runs)

    def below(group):  # its own text's entropy
        return lowest(group) < (group.first.settings.get("entropy_floor") or -math.inf)
    masked = [group for group in groups if group.first.sees_targets is False]
    if any(map(below, groups)) and not any(below(group) for group in groups if not group.first.sees_targets):
        return "Only a model that sees its targets falls below the entropy of the text"
    texts = {text_of(run) for group in groups for run in group.runs}
    if not masked or any(map(below, masked)) or len(texts) > 1:
        return "Losses"
    winner, of_those = min(masked, key=lowest), " of those with a mask" if len(masked) < len(groups) else ""
    return f"Lowest validation loss{of_those}: {label(winner.name)}, {lowest(winner):.3f}"


def losses_figure(groups, x="epoch"):
    """Validation and training losses: a line for each configuration, with a band over its seeds."""
    name, where = AXES[x]
    families = [group.first.family for group in groups]
    many = (len(groups) > 10 or max(map(families.count, families)) > 4
            or max(len(group.label()) for group in groups) > 40)  # too many, or too long, for the ends of the lines
    figure, axes = plt.subplots(figsize=(12 if many else 7, max(4.5, 1 + 0.24 * len(groups))), layout="constrained")
    colors = plt.cm.turbo(np.linspace(0, 1, len(groups))) if many else shades(families)
    ends = []
    for color, group in zip(colors, groups, strict=True):
        curves = [[(e["epoch"], at, e["val_loss"], e["train_loss"])
                   for e, at in zip(run.epochs, where(run), strict=True)] for run in group.runs]
        common = set.intersection(*({point[0] for point in curve if point[1] is not None} for curve in curves))
        if not common:
            raise LogError(f"{group.name}: its log does not say the {name}, which --x {x} asks for")
        seeds = np.array([[point for point in curve if point[0] in common] for curve in curves])  # (seeds, epochs, 4)
        _, at, val, train = seeds.mean(0).T
        shown = group.label()
        curve(axes, at, seeds[..., 2], color, marker="o", markersize=3,
              label=f" {shown}" if shown.startswith("_") else shown)  # a legend leaves out what begins with _
        axes.plot(at, train, color=color, linestyle="--", linewidth=1)
        ends.append((val[-1], shown, color))
    several = any(len(group.runs) > 1 for group in groups)
    axes.set(xlabel=name, ylabel="loss (nats per token)", title=losses_title(groups))
    leaks = any(group.first.sees_targets for group in groups)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if leaks else None)
    floors = {run.settings.get("entropy_floor") or 0 for group in groups for run in group.runs} - {0}
    if floors and max(floors) < 100:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, min(floors) - 0.5), max(high, min(floors) + 0.2))
        shade_impossible(axes, min(floors))
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.annotate("validation (line" + (", mean and range of the seeds)" if several else ")")
                  + ", training (dashed, mean over the epoch)",
                  (1, 0), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8,
                  color="#444444")
    if many:
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    elif x == "parameters":  # which go from right to left
        axes.legend(fontsize=9)
    else:
        label_ends(axes, ends)
    return figure


def telemetry(run, name):
    """{epoch: the median over the layers of what its last step did to them}, without the end of a cosine, where the
    rate has fallen below a hundredth of its highest."""
    highest = max((epoch.get("lr") or 0 for epoch in run.epochs), default=0)
    return {epoch["epoch"]: median(epoch[name]) for epoch in run.epochs
            if epoch.get(name) and (epoch.get("lr") or highest) >= highest / 100}


def telemetry_figure(groups):
    """What --telemetry logs, over time: a line for each configuration, with a band over its seeds (Spectron, figures 2
    and 3)."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    families = [group.first.family for group in groups]
    for axes, (name, title) in zip(panels, TELEMETRY.items(), strict=True):
        for i, (color, group) in enumerate(zip(shades(families), groups, strict=True)):
            medians = [found for run in group.runs if (found := telemetry(run, name))]
            common = sorted(set.intersection(*map(set, medians))) if medians else []
            seeds = np.array([[of_run[epoch] for epoch in common] for of_run in medians])
            if common:
                curve(axes, common, seeds, color, label=f" {group.label()}", marker="o", markersize=3,
                      linestyle=("-", "--", ":", "-.")[families[:i].count(families[i]) % 4])
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if name != "weight_norms":
            axes.set_yscale("log")
    panels[0].set_ylabel("median of the layers, at the last step of the epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def ranks_figure(run):
    epochs, ranks = history(run)
    projections = run.by_projection()
    columns = min(3, len(projections))
    rows = math.ceil(len(projections) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9, min(100, 0.5 + 2.5 * rows)), sharex=True, sharey=True,
                                  layout="constrained", squeeze=False)
    for axes, (name, layers) in zip(panels.flat, projections.items(), strict=False):
        of_type = ranks[:, layers]
        axes.fill_between(epochs, of_type.min(1), of_type.max(1), color=COLORS[run.family], alpha=0.25, linewidth=0)
        axes.plot(epochs, of_type.mean(1), color=COLORS[run.family])
        axes.plot(epochs, ranks.mean(1), color="gray", linestyle=":", linewidth=1)
        axes.set_title(f"{label(name)}: {of_type[-1].mean():.1f} at the end", fontsize=10)
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("rank (line: mean of the blocks, band: their range, dotted: mean of all layers)", fontsize=9)
    figure.suptitle(ranks_title(run), fontsize=11)
    return figure


def ranks_title(run):
    """Where the ranks began and where they ended, in one line."""
    ranks = run.final_ranks
    return (f"{run.label()}: ranks from {run.initial_rank:.3g} to {fmean(ranks):.1f} on average, "
            f"{min(ranks)} to {max(ranks)}")


def heatmap_figure(run):
    figure, axes = plt.subplots(figsize=(7.5, min(100, 1.5 + 0.15 * len(run.final_ranks))), layout="constrained")
    draw_heatmap(axes, run)
    axes.set_title(ranks_title(run))
    return figure


def draw_heatmap(axes, run: Run) -> None:
    """The rank of each layer after each epoch, the method's own picture."""
    epochs, ranks = history(run)
    places, n_layers = run.places(), ranks.shape[1]
    edges = np.concatenate([[-0.5], np.add(epochs[:-1], epochs[1:]) / 2, [epochs[-1] + 0.5]])
    image = axes.pcolormesh(edges, np.arange(n_layers + 1), ranks.T, cmap="viridis", rasterized=True)
    axes.set_yticks(np.arange(n_layers) + 0.5, [label(f"{block} {kind}") for block, kind in places], fontsize=7)
    begins = [i for i in range(1, n_layers) if places[i][0] != places[i - 1][0]]  # of the next block
    axes.hlines(begins, edges[0], edges[-1], color="white", linewidth=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="epoch (0: at initialisation)", ylabel="block and projection")
    axes.figure.colorbar(image, ax=axes, label="rank")


def final_ranks_figure(run):
    names, grid = run.grid()
    blocks = np.array([[np.nan if rank is None else rank for rank in ranks] for ranks in grid.values()], float).T
    figure, axes = plt.subplots(figsize=(max(7, len(grid)), min(100, 1.8 + 0.45 * len(blocks))), layout="constrained")
    image = axes.imshow(blocks, cmap="viridis", aspect="auto")
    middle = (np.nanmin(blocks) + np.nanmax(blocks)) / 2
    for (i, j), rank in np.ndenumerate(blocks):
        if not np.isnan(rank):
            axes.text(j, i, f"{rank:.0f}", ha="center", va="center", color="white" if rank <= middle else "black")
    axes.set_xticks(range(len(grid)), [f"{label(name)}\n{mean:.1f}" for name, mean in zip(
        grid, np.nanmean(blocks, 0), strict=True)])
    axes.set_yticks(range(len(blocks)), map(label, names))
    axes.grid(False)
    axes.set(xlabel="projection, and its mean rank", ylabel="block",
             title=f"{run.label()}: ranks after epoch {run.epochs[-1]['epoch']}")
    figure.colorbar(image, label="rank")
    return figure


def cuts_figure(run):
    """Losses and ranks around v11's cuts."""
    color, steps = COLORS[run.family], run.settings.get("steps_per_epoch") or 1
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    points = sorted([(epoch["epoch"], -1, epoch["val_loss"]) for epoch in run.epochs] + [
        (cut["step"] / steps, i, cut[name]) for cut in run.cuts for i, name in enumerate(("val_loss_before",
                                                                                         "val_loss"))])
    left.plot([at for at, *_ in points], [loss for *_, loss in points], color=color)
    cuts = [cut["step"] / steps for cut in run.cuts]
    left.plot(cuts, [cut["val_loss_before"] for cut in run.cuts], "o", color=color, label="before a cut")
    left.plot(cuts, [cut["val_loss"] for cut in run.cuts], "v", color="black", label="right after it")
    left.set(xlabel="epoch", ylabel="validation loss (nats per token)", title=f"A cut changes the loss by "
             f"{max((cut['val_loss'] - cut['val_loss_before'] for cut in run.cuts), key=abs):+.4f} at most")
    epochs, ranks = history(run)
    for i, layer in enumerate(ranks.T):
        right.step(epochs, layer, where="post", color=color, alpha=0.35, linewidth=1, label="a layer" if not i else "")
    right.step(epochs, ranks.mean(1), where="post", color="black", label="mean")
    right.set(xlabel="epoch", ylabel="rank", ylim=(0, None), title=f"{ranks.mean(1)[0]:.3g} to {ranks.mean(1)[-1]:.1f} "
              f"on average, {ranks[-1].min():.0f} to {ranks[-1].max():.0f} at the end")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=9)
    figure.suptitle(f"{run.label()}: its cuts", fontsize=11)
    return figure


def report_figure(run):
    """Losses and ranks of a run, and the points that the report's Table 1 gives of its own."""
    epochs, color = [epoch["epoch"] for epoch in run.epochs], COLORS[run.family]
    reported, (train, val, low, high, mean) = [*REPORT_TRAINING], zip(*REPORT_TRAINING.values(), strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for key, theirs, kind, style in (("val_loss", val, "validation", "-"), ("train_loss", train, "training", "--")):
        left.plot(epochs, [epoch[key] for epoch in run.epochs], style, color=color, label=f"{kind} loss")
        left.plot(reported, theirs, "o" if style == "-" else "s", color="black", markerfacecolor="white",
                  label=f"{kind} loss, report")
    left.set(xlabel="epoch", ylabel="nats per token", title="Losses")
    if run.final_ranks:
        at, ranks = history(run)
        right.fill_between(at, ranks.min(1), ranks.max(1), color=color, alpha=0.2, linewidth=0,
                           label="lowest to highest")
        right.plot(at, ranks.mean(1), color=color, label="mean")
    right.errorbar(reported, mean, [np.subtract(mean, low), np.subtract(high, mean)], fmt="o", color="black",
                   markerfacecolor="white", capsize=3, linewidth=1, label="report: mean, lowest to highest")
    right.set(xlabel="epoch", ylabel="rank", title="Ranks of the layers")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.axvline(REPORT_PHASES["collapse"], color="gray", linestyle=":", linewidth=1)
        axes.legend(fontsize=9)
    figure.suptitle(f"{run.label()}, beside the report's run (dotted: the first epoch of its collapse)",
                    fontsize=11)
    return figure


def plain_ticks(axis, *values):
    """On a logarithmic axis (xaxis or yaxis), these ticks as far as they lie on it, others if fewer than two do."""
    low, high = sorted(axis.get_view_interval())
    shown = [value for value in values if low <= value <= high]
    if len(shown) < 2:
        shown = [value for value in plt.MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    axis.set_ticks(shown, [f"{value:,.6g}" for value in shown])
    axis.set_minor_locator(plt.NullLocator())


def perplexity_figure(record):
    """Perplexity against parameters of a comparison by compress.py, the uncut model as the last point."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names, before = [*record["rows"][0]["cuts"]], perplexity(record["loss_before"])
    colors = {name: plt.cm.viridis(i / max(1, len({n.partition(",")[0] for n in names}) - 1) * 0.85) for i, name in
              enumerate(dict.fromkeys(name.partition(",")[0] for name in names))}
    for name in names:
        cells = [row["cuts"][name] for row in record["rows"]]
        axes.plot([cell["parameters"] / 1e6 for cell in cells],
                  [perplexity(record["loss_before"] + cell["increase"]) for cell in cells], marker="o", markersize=4,
                  color=colors[name.partition(",")[0]], linestyle="--" if name.endswith("uniform") else "-",
                  label=f" {name}")
    axes.plot(record["before"]["all"] / 1e6, before, "k*", markersize=10, label=" not cut")
    axes.set(xscale="log", yscale="log", xlabel="million parameters, all", ylabel="perplexity",
             title=f"{label(record['checkpoint'])}: what cuts cost")
    plain_ticks(axes.xaxis, 0.5, 1, 2, 5, 10, 20, 50, 100)
    plain_ticks(axes.yaxis, *(mark * 10**power for power in range(9) for mark in (1, 1.5, 2, 3, 4, 5, 7)))
    axes.legend(fontsize=9)
    return figure


def kept_figure(record):
    """The rank that a cut leaves to each matrix, in the order of the model: block by block."""
    names, sides = [*record["ranks"]], [min(shape) for shape in record["shapes"].values()]
    figure, axes = plt.subplots(figsize=(7.5, min(100, 1.2 + 0.2 * len(names))), layout="constrained")
    for i, (rank, side) in enumerate(zip(record["ranks"].values(), sides, strict=True)):
        axes.barh(i, side if rank is None else rank, color="#BBBBBB" if rank is None else COLORS["cut"])
        axes.annotate("not cut" if rank is None else str(rank), (side if rank is None else rank, i), (3, 0),
                      textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [label(plain(name)) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="rank", title=f"{label(record['checkpoint'])}: ranks after {plain(record['command'])} "
             f"{label(plain(record['target']))}")
    return figure


def spectra_figure(record):
    """The singular values of each matrix over its largest, against their number over the break-even rank."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, matrix in enumerate(record["matrices"].values()):
        values = np.array(matrix["singular_values"], float)
        if values[0] > 0 and matrix["break_even"] > 0:
            axes.plot(np.arange(1, len(values) + 1) / matrix["break_even"], values / values[0], linewidth=1,
                      color=plt.cm.viridis(i / len(record["matrices"])), alpha=0.8)
    axes.axvline(1, color="gray", linestyle=":")
    axes.annotate("to the right of it, factors are larger than the matrix", (1, 1), (4, -4), va="top", fontsize=8,
                  textcoords="offset points", color="#444444", xycoords=("data", "axes fraction"))
    axes.set(xlabel="number of the singular value / break-even rank", ylabel="singular value / the largest",
             ylim=(0, 1.02), title=f"{label(record['checkpoint'])}: {len(record['matrices'])} spectra")
    return figure


def figures(runs, compressions=(), x="epoch", report=False):
    """Yields (file name without its ending, figure), one after the other."""
    for log in compressions:
        cuts = [record for record in log.records if record["command"] in ("cut", "fit")]
        if cuts:
            yield f"{log.name}_kept", kept_figure(cuts[-1])  # the last one
        for command, draw in (("compare", perplexity_figure), ("spectrum", spectra_figure)):
            for i, record in enumerate(record for record in log.records if record["command"] == command):
                yield f"{log.name}_{command}{i + 1}", draw(record)
    if not runs:
        return
    yield "losses", losses_figure(grouped(runs), x)
    if known := [group for group in grouped(runs) if any(telemetry(run, "update_norms") for run in group.runs)]:
        yield "telemetry", telemetry_figure(known)
    for run in runs:
        if report:
            yield f"{run.name}_report", report_figure(run)
        if run.cuts:
            yield f"{run.name}_cuts", cuts_figure(run)
        if run.final_ranks:
            yield f"{run.name}_ranks", ranks_figure(run)
            yield f"{run.name}_heatmap", heatmap_figure(run)
            yield f"{run.name}_final-ranks", final_ranks_figure(run)


def start_matplotlib(names=()) -> None:
    """Not before it is needed: it takes most of this script's time. The user's display settings do not count; fonts are
    chosen that have the letters of `names`, so far as the machine has such fonts."""
    global np, plt, letters  # what figures are made with, and the letters that their fonts have
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib import font_manager, ft2font
    matplotlib.rcdefaults()
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
                         "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
                         "figure.titleweight": "bold", "font.size": 9, "legend.frameon": False, "savefig.dpi": 300})
    wanted, families, letters = set(map(ord, "".join(names))), [], set()
    for path in (font_manager.findfont("DejaVu Sans"), *(font.fname for font in font_manager.fontManager.ttflist)):
        if families and wanted <= letters:
            break
        try:
            font = ft2font.FT2Font(path)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue
        if not families or (wanted - letters) & {*font.get_charmap()}:
            letters |= {*font.get_charmap()}
            families.append(font.family_name)
    plt.rcParams["font.family"] = families
    if missing := wanted - letters:
        warn(f"no font on this machine has {''.join(map(chr, sorted(missing)))[:40]}: figures show ? instead")


def save(figure, path: Path) -> None:
    """A figure as path.png and path.pdf; both are the same, byte for byte, whenever they are made of the same logs."""
    figure.savefig(path.with_name(path.name + ".png"), bbox_inches="tight")
    figure.savefig(path.with_name(path.name + ".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    plt.close(figure)


def write_table(table, folder):
    """A table as NAME.csv and NAME.tex."""
    with open(folder / f"{table.name}.csv", "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows(table.records())
    (folder / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8", errors="replace")


def write_tensorboard(runs, folder):
    """The losses, ranks and costs of each run as TensorBoard event files, FOLDER/NAME/events.*, a step per epoch."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        raise LogError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    for run in (run for run in runs if [*(folder / run.name).glob("events.*")]):
        raise LogError(f"{folder / run.name} has event files already: choose another --tensorboard folder")
    for run in runs:
        writer, spent = EventFileWriter(str(folder / run.name)), minutes(run)
        for epoch, so_far in zip(run.epochs, spent, strict=True):
            values = [Summary.Value(tag=f"{group}/{name}", simple_value=epoch[name]) for group, names in BOARD.items()
                      for name in names if is_number(epoch.get(name))]
            ago = 60 * (spent[-1] - so_far) if so_far is not None else 0
            writer.add_event(Event(wall_time=run.written - ago, step=int(epoch["epoch"]),
                                   summary=Summary(value=values)))
        writer.close()


BOARD = {"loss": ("train_loss", "val_loss", "val_ppl"), "rank": ("rank_min", "rank_avg", "rank_max", "resized"),
         "cost": ("params_millions", "factor_params_millions", "tokens_per_sec", "peak_memory_mb", "lr")}


def screen(text):
    """Print; a screen that is gone, as after `| head`, or lacks a letter, is no error."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        print(text, flush=True)
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at its end, and complains


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def exit_code(name, folder, kind, work) -> int:
    """Of a script that shows a folder of logs: 0 if `work` succeeds, else 2, and one line says what was wrong."""
    try:
        work()
        return 0
    except LogError as error:
        message = str(error)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        message = f"{folder} holds other logs than those of {kind} ({error!r})"
    except OSError as error:
        message = f"cannot use {error.filename or folder}: {error.strerror}"
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    print(f"{name}: error: {message}", file=sys.stderr)
    return 2


def home(name: str) -> Path:
    """A path; a shell expands no ~ in --flag=~/name."""
    return Path(name).expanduser()


def main(argv=None):
    parser = Parser(prog="plot_logs.py", description="Makes tables and figures from training logs.",
                    allow_abbrev=False)
    parser.add_argument("logs", metavar="LOG", nargs="+", type=Path,
                        help="log of v7, v10, v11, compress.py or the report's own script")
    parser.add_argument("--out", metavar="DIR", type=home,
                        help="folder of the page, tables and figures; default: figures/ beside the first log")
    parser.add_argument("--init-rank", type=int, default=64, help="initial rank of logs that do not say (default: 64)")
    parser.add_argument("--x", choices=AXES, default="epoch", help="axis of the losses (default: epoch)")
    parser.add_argument("--report", action="store_true", help="the report's own numbers beside those of each log")
    parser.add_argument("--tensorboard", metavar="DIR", type=home, help="also write TensorBoard event files, to DIR")
    args = parser.parse_args(argv)
    out = args.out or args.logs[0].parent / "figures"
    try:
        if not 0 < args.init_rank < 1e15:
            raise LogError("--init-rank must be a rank: at least 1")
        runs, compressions = read_logs(args.logs, args.init_rank)
        parts = [*contents(runs, compressions, args.report)]
        text, made = page(parts), []
        out.mkdir(parents=True, exist_ok=True)
        (out / "tables.md").write_text(text, encoding="utf-8", errors="replace")
        for table in (part for part in parts if isinstance(part, Table)):
            write_table(table, out)
        start_matplotlib([log.name for log in (*runs, *compressions)])
        for name, figure in figures(runs, compressions, args.x, args.report):
            save(figure, out / name)
            made.append(out / f"{name}.png")
        pictures = {picture.stem: picture.read_bytes() for picture in made}
        (out / "index.html").write_text(html_page(parts, pictures), encoding="utf-8", errors="replace")
        if args.tensorboard:
            write_tensorboard(runs, args.tensorboard)
            made.append(args.tensorboard)
        screen("\n".join([text, *map(str, made), str(out / "tables.md"), str(out / "index.html")]))
    except LogError as error:
        print(f"plot_logs.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_logs.py: error: cannot write {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plot_logs.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
