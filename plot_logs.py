"""Tables and figures from the logs of v10 and v7, and from logs in the report's own format.

    python3 plot_logs.py logs/v10.jsonl
    python3 plot_logs.py logs/v10.jsonl logs/v7.jsonl --out figures

Prints the report's Table 1 (training) and Table 2 (final ranks), a table of costs and, for several logs, a comparison;
writes them to DIR/tables.md, and beside it the figures: losses.png, and for each run NAME_ranks.png (rank against
epoch), NAME_heatmap.png (layer by epoch) and NAME_final_ranks.png (block by projection). A run without a causal mask
is marked everywhere: it sees its targets.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

PROJECTIONS = ("Q", "K", "V", "O", "FFN \N{UPWARDS ARROW}", "FFN \N{DOWNWARDS ARROW}")  # in the order of `ranks`
LEAK = "SEES ITS TARGETS"
DASH = "\N{EN DASH}"  # for what a log does not say


class LogError(ValueError):
    """A log that cannot be read: main() prints it in one line, with file and line, and returns 2."""


# ---- Reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    settings: dict = field(default_factory=dict)  # the run record; empty in the report's own format
    epochs: list = field(default_factory=list)  # the epoch records, in order
    initial_rank: float | None = None  # mean over the layers; None for a dense model
    assumed: bool = False  # the initial rank is --init-rank, not the log's

    @property
    def sees_targets(self):
        """True, False, or None where the log does not say."""
        return self.settings["attention"] == "bidirectional" if "attention" in self.settings else None

    @property
    def title(self):
        return f"{self.name} ({LEAK})" if self.sees_targets else self.name

    def blocks(self):
        """The final ranks, a list of six a block; [] for a dense model."""
        ranks = self.epochs[-1]["ranks"]
        return [ranks[i:i + 6] for i in range(0, len(ranks), 6)]

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


NUMBERS = ("rank_min", "rank_max", "rank_avg", "params_millions", "factor_params_millions", "time_sec", "train_sec",
           "eval_sec", "rank_sec", "tokens_seen", "tokens_per_sec", "peak_memory_mb", "parameters", "factor_parameters",
           "entropy_floor", "train_tokens", "val_tokens", "vocab_size")
TEXTS = ("attention", "data_file", "data_sha256", "device", "device_name", "dtype")


def is_number(value, kind=(int, float)):
    """A number that all of the arithmetic here can take: no truth value, and of at most 15 digits."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e15


def check(record, run):
    """-> the record's kind. Raises ValueError for a record that is not one of ours, or not one of the report's."""
    if not isinstance(record, dict):
        raise ValueError("a record is an object, {...}")
    kind = record.get("kind", "epoch")
    if kind not in ("run", "epoch", "ranks", "resume", "end"):
        raise ValueError(f"unknown kind of record {str(kind)[:60]!r}")
    needed = {"epoch": ("epoch", "train_loss", "val_loss"), "resume": ("epoch",)}.get(kind, ())
    for name in (*needed, *NUMBERS, *TEXTS):
        value = record.get(name)
        if value is None and name not in needed:
            continue
        if name in TEXTS and not isinstance(value, str) or name not in TEXTS and not is_number(value):
            raise ValueError(f"{name} should be a {'text' if name in TEXTS else 'number'}, "
                             f"not {json.dumps(value)[:60]}")
    ranks = {"epoch": record.get("ranks"), "run": record.get("initial_ranks", [])}.get(kind, [])
    if not isinstance(ranks, list) or len(ranks) % 6 or not all(is_number(rank, int) and rank > 0 for rank in ranks):
        raise ValueError(f"{'initial_' * (kind == 'run')}ranks should be a list of ranks, six for each block")
    if kind == "epoch" and run.epochs and len(ranks) != len(run.epochs[-1]["ranks"]):
        raise ValueError(f"{len(ranks)} ranks, where the epoch before has {len(run.epochs[-1]['ranks'])}")
    if kind == "epoch" and run.settings.get("initial_ranks") and len(ranks) != len(run.settings["initial_ranks"]):
        raise ValueError(f"{len(ranks)} ranks, where the run began with {len(run.settings['initial_ranks'])}")
    layers = record.get("layers", []) if kind == "run" else []
    if not isinstance(layers, list) or not all(
            isinstance(layer, dict) and isinstance(layer.get("shape"), list) and len(layer["shape"]) == 2
            and all(is_number(side, int) for side in layer["shape"]) for layer in layers):
        raise ValueError("layers should be a list of objects, each with a shape of two sides")
    if kind == "epoch" and record["epoch"] <= (run.epochs[-1]["epoch"] if run.epochs else 0):
        raise ValueError(f"epoch {record['epoch']} after epoch {run.epochs[-1]['epoch'] if run.epochs else 0}")
    return kind


def read_log(path, name, init_rank):
    """A log -> Run. Raises LogError. A last line that was cut off in the middle is left out, with a warning."""
    run = Run(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from None
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=not_finite)
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1:
                print(f"plot_logs.py: warning: {path}:{number}: the last line is cut off and left out", file=sys.stderr)
                break
            raise LogError(f"{path}:{number}: not a line of JSON ({error})") from None
        try:
            kind = check(record, run)
        except ValueError as error:
            raise LogError(f"{path}:{number}: {error}") from None
        if kind == "run":
            run = Run(name, settings=record)
        elif kind == "epoch":
            run.epochs.append(record)
        elif kind == "resume":  # what was logged after the checkpoint was trained again
            run.epochs = [epoch for epoch in run.epochs if epoch["epoch"] <= record["epoch"]]
    if not run.epochs:
        raise LogError(f"{path}: no epoch in it yet")
    if run.epochs[-1]["ranks"]:
        run.assumed = not run.settings.get("initial_ranks")
        run.initial_rank = init_rank if run.assumed else fmean(run.settings["initial_ranks"])
    return run


def read_logs(paths, init_rank):
    """Logs -> Runs, each with a name of its own: the file's, and its folder's where two files share a name."""
    stems = [path.stem for path in paths]
    names = [stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}_{stem}"
             for stem, path in zip(stems, paths, strict=True)]
    names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names, start=1)]
    return [read_log(path, name, init_rank) for path, name in zip(paths, names, strict=True)]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def show(value, form=",.0f"):
    return DASH if value is None else format(value, form)


def millions(value):
    return None if value is None else round(value * 1e6)


def markdown(header, rows):
    """A Markdown table whose columns are also aligned as plain text; all but the first flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        return "| " + " | ".join(cell.rjust(w) if i else cell.ljust(w)
                                 for i, (cell, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def training_table(run):
    """The report's Table 1: epochs 1, 5, 10, ... and the last."""
    chosen = [e for e in run.epochs if e["epoch"] == 1 or e["epoch"] % 5 == 0 or e is run.epochs[-1]]
    return markdown(["Epoch", "Train Loss", "Val Loss", "R min", "R max", "R avg"], [
        [str(e["epoch"]), show(e["train_loss"], ".3f"), show(e["val_loss"], ".3f"), show(e.get("rank_min")),
         show(e.get("rank_max")), show(e.get("rank_avg"), ".1f")] for e in chosen])


def rank_table(run):
    """The report's Table 2: final ranks, a row a block, and their means."""
    rows = [[str(i), *map(str, block[:4]), f"{block[4]} / {block[5]}"] for i, block in enumerate(run.blocks())]
    means = [f"{fmean(column):.1f}" for column in zip(*run.blocks(), strict=True)]
    return markdown(["Block", "Q", "K", "V", "O", "/".join(PROJECTIONS[4:]).replace("/FFN ", "/")],
                    [*rows, ["Mean", *means[:4], f"{means[4]} / {means[5]}"]])


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
    seconds = [[name, "", show(run.total(f"{key}_sec"), ",.1f")] for name, key in
               (("seconds in all", "time"), ("seconds of training", "train"), ("seconds of evaluation", "eval"),
                ("seconds of rank control", "rank"))]
    return markdown(["", "start", "end"], [
        ["mean rank", show(run.initial_rank, ".1f"), show(last.get("rank_avg"), ".1f")],
        ["rank reduction", "", show(reduction(run), ".1f") + "%" * (reduction(run) is not None)],
        ["parameters in the linear layers", show(factors), show(millions(last.get("factor_params_millions")))],
        ["parameters in all", show(start), show(millions(last.get("params_millions")))],
        ["linear layers of a dense model", show(dense), show(dense)],
        ["dense model in all", *[show(None if None in (start, dense) else start - factors + dense)] * 2],
        *seconds,
        ["training tokens per second", "", show(run.tokens_per_second())],
        ["peak memory in MB", "", show(max(memory, default=None))]])


def comparison_table(runs):
    rows = []
    for run in runs:
        best, last = min(run.epochs, key=lambda epoch: epoch["val_loss"]), run.epochs[-1]
        attention = {True: f"none: {LEAK}", False: "causal", None: DASH}[run.sees_targets]
        rows.append([run.name, attention, show(last.get("rank_avg"), ".1f"),
                     show(millions(last.get("params_millions"))), show(best["val_loss"], ".3f"), str(best["epoch"]),
                     show(math.exp(min(best["val_loss"], 700)), ",.2f"), show(last["val_loss"], ".3f"),
                     show(run.settings.get("entropy_floor"), ".3f"), show(run.tokens_per_second())])
    return markdown(["run", "attention", "mean rank", "parameters", "best val loss", "at epoch", "perplexity",
                     "final val loss", "floor", "tokens/s"], rows)


def tables(runs):
    """All tables as Markdown."""
    parts = []
    for run in runs:
        s, mark = run.settings, f" {DASH} {LEAK}" if run.sees_targets else ""
        parts.append(f"# {run.title}")
        if run.sees_targets:
            parts.append("Attention without a causal mask: each position sees the word that it has to predict. "
                         "These losses are not those of a language model.")
        if s:
            parts.append(f"{show(s.get('train_tokens'))} training and {show(s.get('val_tokens'))} validation tokens of "
                         f"{s.get('data_file')}, {show(s.get('vocab_size'))} words; seed {s.get('seed')}, "
                         f"{s.get('device')} ({s.get('device_name')}), {s.get('dtype')}.")
        else:
            parts.append("No run record: the log does not say what trained it, nor whether its attention had a mask.")
        if run.assumed:
            parts.append(f"The log does not say the initial rank: {run.initial_rank:g} is assumed (--init-rank).")
        parts.append(f"Table 1, {run.name}: training and ranks{mark}\n\n{training_table(run)}")
        if run.blocks():
            parts.append(f"Table 2, {run.name}: ranks after epoch {run.epochs[-1]['epoch']}{mark}\n\n{rank_table(run)}")
        parts.append(f"Cost, {run.name}{mark}\n\n{cost_table(run)}")
    if len(runs) > 1:
        parts.append(f"# Comparison\n\n{comparison_table(runs)}")
        if len({run.settings.get("data_sha256") for run in runs}) > 1:
            parts.append("The runs were not trained on the same data: their losses cannot be compared.")
        if len({run.epochs[-1].get("tokens_seen") for run in runs}) > 1:
            parts.append("The runs were not trained on the same number of tokens.")
    return "\n\n".join(parts) + "\n"


# ---- Figures ---------------------------------------------------------------------------------------------------------


def history(run):
    """-> (epochs, ranks (epochs, layers)), the initial ranks first, as epoch 0."""
    initial = run.settings.get("initial_ranks") or [run.initial_rank] * len(run.epochs[-1]["ranks"])
    return [0, *(e["epoch"] for e in run.epochs)], np.array([initial, *(e["ranks"] for e in run.epochs)], dtype=float)


def losses_figure(runs):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, run in enumerate(runs):
        epochs, train, val = zip(*((e["epoch"], e["train_loss"], e["val_loss"]) for e in run.epochs), strict=True)
        axes.plot(epochs, val, color=f"C{i}", marker="o", markersize=3, label=run.title)
        axes.plot(epochs, train, color=f"C{i}", linestyle="--", linewidth=1)
    for floor in sorted({run.settings["entropy_floor"] for run in runs if run.settings.get("entropy_floor")}):
        axes.axhline(floor, color="black", linestyle=":", label=f"entropy floor {floor:.3f}: no honest model is below")
    axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="training loss")
    axes.set(xlabel="epoch", ylabel="validation loss (nats per token)", title="Losses")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if any(run.sees_targets for run in runs) else None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def ranks_figure(run):
    epochs, ranks = history(run)
    figure, panels = plt.subplots(2, 3, figsize=(9, 5.5), sharex=True, sharey=True, layout="constrained")
    for i, (axes, name) in enumerate(zip(panels.flat, PROJECTIONS, strict=True)):
        of_type = ranks[:, i::6]
        axes.fill_between(epochs, of_type.min(1), of_type.max(1), color=f"C{i}", alpha=0.25, linewidth=0)
        axes.plot(epochs, of_type.mean(1), color=f"C{i}")
        axes.plot(epochs, ranks.mean(1), color="gray", linestyle=":", linewidth=1)
        axes.set_title(f"{name}: {of_type[-1].mean():.1f} at the end", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylim(bottom=0)
    panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("rank", fontsize=10)
    figure.suptitle(f"{run.title}: rank by projection\n"
                    "line: mean of the blocks, band: lowest to highest block, dotted: mean of all layers", fontsize=11)
    return figure


def heatmap_figure(run):
    epochs, ranks = history(run)
    n_layers = ranks.shape[1]
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.17 * n_layers), layout="constrained")
    image = axes.pcolormesh(np.arange(len(epochs) + 1) - 0.5, np.arange(n_layers + 1), ranks.T, cmap="viridis")
    axes.set_yticks(np.arange(n_layers) + 0.5, [f"{i // 6} {PROJECTIONS[i % 6]}" for i in range(n_layers)], fontsize=7)
    axes.hlines(np.arange(6, n_layers, 6), -0.5, len(epochs) - 0.5, color="white", linewidth=1)
    ticks = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 11)).round().astype(int))
    axes.set_xticks(ticks, [epochs[i] for i in ticks])
    axes.invert_yaxis()
    axes.set(xlabel="epoch (0: at initialisation)", ylabel="block and projection",
             title=f"{run.title}: rank of each layer")
    figure.colorbar(image, label="rank")
    return figure


def final_ranks_figure(run):
    blocks = np.array(run.blocks())
    figure, axes = plt.subplots(figsize=(7, 1.8 + 0.45 * len(blocks)), layout="constrained")
    image = axes.imshow(blocks, cmap="viridis", aspect="auto")
    middle = (blocks.min() + blocks.max()) / 2
    for (i, j), rank in np.ndenumerate(blocks):
        axes.text(j, i, str(rank), ha="center", va="center", color="white" if rank <= middle else "black")
    axes.set_xticks(range(6), [f"{name}\n{mean:.1f}" for name, mean in zip(PROJECTIONS, blocks.mean(0), strict=True)])
    axes.set_yticks(range(len(blocks)))
    axes.set(xlabel="projection, and its mean rank", ylabel="block",
             title=f"{run.title}: ranks after epoch {run.epochs[-1]['epoch']}")
    figure.colorbar(image, label="rank")
    return figure


def figures(runs):
    """-> {file name: figure}"""
    made = {"losses.png": losses_figure(runs)}
    for run in (run for run in runs if run.blocks()):
        made |= {f"{run.name}_ranks.png": ranks_figure(run), f"{run.name}_heatmap.png": heatmap_figure(run),
                 f"{run.name}_final_ranks.png": final_ranks_figure(run)}
    return made


def main(argv=None):
    global np, plt
    parser = argparse.ArgumentParser(prog="plot_logs.py", description="Makes tables and figures from training logs.",
                                     allow_abbrev=False)
    parser.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="log of v10, v7 or the report's own script")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="folder of tables.md and the figures; default: figures/ beside the first log")
    parser.add_argument("--init-rank", type=int, default=64, help="initial rank of logs that do not say (default: 64)")
    args = parser.parse_args(argv)
    out = args.out or args.logs[0].parent / "figures"
    try:
        if not 0 < args.init_rank < 1e15:
            raise LogError("--init-rank must be a rank: at least 1")
        runs = read_logs(args.logs, args.init_rank)
        text = tables(runs)
        print(text)
        out.mkdir(parents=True, exist_ok=True)
        (out / "tables.md").write_text(text, encoding="utf-8")
        # not before they are needed: they take most of this script's time
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import numpy as np
        for name, figure in figures(runs).items():
            figure.savefig(out / name, dpi=150, bbox_inches="tight")
            plt.close(figure)
            print(out / name)
        print(out / "tables.md")
    except LogError as error:
        print(f"plot_logs.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_logs.py: error: cannot write {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
