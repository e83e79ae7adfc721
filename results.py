"""What the study's logs say: the answers, with tables and figures, in RESULTS.md and in README's section "Results".

    python3 results.py                                                 from logs/reference/study   (make results)
    python3 results.py --study logs/study --out logs/study/results     from runs of one's own; README stays

Every number, and every "lower" and "higher", is computed from the logs. Differences are between runs of one seed.
"""
import argparse
import json
import os
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import plot_logs  # noqa: E402
from plot_logs import DASH, LEAK, Cell, Group, LogError, Table, home, perplexity  # noqa: E402

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- make results writes from here -->", "<!-- to here -->"
OURS = "54bfa838"  # SHA-256 of the text that the committed logs were trained on begins with it
NAMES = {"dense": "dense (v7)", "fixed": "fixed at the initial rank", "adaptive": "adaptive (v10)",
         "transport": "adaptive, with transport",
         "fixed_mean": "fixed at the mean found", "retrained": "ranks found and trained afresh"}
COUNTED = {"bigram": "pairs of words, counted", "unigram": "words, counted"}
SETTINGS = {"": "the report's settings", "tuned_": "settings tuned on the dense model"}


class Study:
    """The logs of a folder: groups of ended runs by name, and the other records."""

    def __init__(self, folder):
        records, found = [], defaultdict(list)
        if not folder.is_dir():
            raise LogError(f"{folder}: there is no such folder")
        for path in sorted(folder.glob("*.jsonl")):
            name, _, seed = path.stem.rpartition("_s")
            if seed.isdigit():
                run = plot_logs.read_log(path, path.stem, 64)
                found[name] += [run] * bool(run.end)
            else:
                try:
                    records += map(json.loads, path.read_text(encoding="utf-8").splitlines())
                except ValueError as error:
                    raise LogError(f"{path}: not lines of JSON ({error})") from None
        self.groups = {name: Group(name, runs) for name, runs in found.items() if runs}
        self.ngrams, self.speed = ({k: v for r in records if r["kind"] == kind for k, v in r.items()}
                                   for kind in ("ngrams", "speed"))
        self.probes = defaultdict(list)
        for record in records:
            if record["kind"] == "probe":
                self.probes[record["run"]].append(record)

    def values(self, name, value):
        return self.groups[name].values(value)

    def cell(self, name, value, form=".3f"):
        return Cell(self.values(name, value), form)

    def differences(self, name, other, value):
        """[value of `name` - value of `other`] for the seeds that both have."""
        by_seed = [{run.settings["seed"]: value(run) for run in self.groups[n].runs} for n in (name, other)]
        return [by_seed[0][seed] - by_seed[1][seed] for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]

    def collapses(self, name):
        """[the epoch by which the loss of each run has collapsed, or None]: it is below the text's entropy, or where
        that is not known, a nat below the loss of counted pairs of words."""
        floor = self.groups[name].first.settings["entropy_floor"]
        mark = self.ngrams["val"]["bigram"] - 1 if floor is None else floor
        return [next((epoch["epoch"] for epoch in run.epochs if epoch["val_loss"] < mark), None)
                for run in self.groups[name].runs]

    def probe(self, name, key):
        return [record[key] for record in self.probes[name]]


def best_loss(run):
    return plot_logs.best(run)["val_loss"]


def best_perplexity(run):
    return perplexity(best_loss(run))


def last_loss(run):
    return run.epochs[-1]["val_loss"]


def best_epoch(run):
    return plot_logs.best(run)["epoch"]


def mean_rank(run):
    return run.epochs[-1].get("rank_avg")


def linear_parameters(run):
    return run.epochs[-1]["factor_params_millions"]


def linear_parameters_at_best(run):
    """Those of the model that has the lowest loss: ranks change after its epoch has been evaluated."""
    before = [epoch["factor_params_millions"] for epoch in run.epochs if epoch["epoch"] < best_epoch(run)]
    return before[-1] if before else run.settings["factor_parameters"] / 1e6


def told(values, form=".3f"):
    """Mean, range and n, in words."""
    mean, low, high = (format(value, form) for value in Cell(values, form).numbers())
    return f"{mean} ({low} to {high}, n = {len(values)})" if len(values) > 1 else f"{mean} (n = 1)"


def compared(values):
    """Differences of losses in words: how far below or above on average, and in how many seeds."""
    below = fmean(values) < 0
    count = sum((value < 0) == below for value in values)
    return f"{abs(fmean(values)):.3f} nats {'lower' if below else 'higher'} ({count} of {len(values)} seeds)"


def listed(parts):
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def wrapped(text, indent=""):
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def size_flags(study):
    """The flags that the causal runs of the study's own size have in common."""
    commands = [study.groups[name].first.settings["command"].split()[1:] for name in ("adaptive", "dense", "fixed")]
    return os.path.commonprefix(commands)


def commands(study, *names):
    """The commands of the first seed, as a block of Markdown, with $SIZE for the flags of the study's size."""
    size = " ".join(size_flags(study))
    lines = (f"python3 {study.groups[name].first.settings['command']}".replace(size, "$SIZE") for name in names)
    return "\n".join(["```", *lines, "```"])


# ---- The questions ---------------------------------------------------------------------------------------------------

PROBED = {"val_loss_masked": ("with the mask put on", ".3f"), "loss_at_last_position": ("last position", ".3f"),
          "loss_at_other_positions": ("others", ".3f"), "accuracy": ("right", ".0%"),
          "predicts_word_put_there": ("word put there", ".0%"), "predicts_word_of_the_text": ("of the text", ".0%")}


def leak(study):
    """Is the collapse a leak?"""
    def row(name, label):
        return [label, str(len(study.groups[name].runs)), study.cell(name, best_loss),
                study.cell(name, best_perplexity, ",.2f"), Cell(study.collapses(name), ".0f"),
                *(Cell(study.probe(name, key), form) for key, (_, form) in PROBED.items())]

    def mark(label, loss):
        return [label, DASH, Cell(loss, ".3f"), Cell(perplexity(loss), ",.2f"), *[DASH] * 7]
    floor = study.groups["synthetic"].first.settings["entropy_floor"]
    table = Table("leak", "", ["", "n", "best val loss", "perplexity", "collapsed by epoch",
                               *(title for title, _ in PROBED.values())], [
        row("bidirectional", f"adaptive, {LEAK}"), row("bidirectional_fixed", f"fixed ranks, {LEAK}"),
        row("bidirectional_dense", f"dense, {LEAK}"), row("adaptive", "adaptive, causal"),
        *(mark(label, study.ngrams["val"][kind]) for kind, label in COUNTED.items()),
        row("synthetic_bidirectional", f"synthetic text: adaptive, {LEAK}"),
        row("synthetic", "synthetic text: adaptive, causal"), mark("entropy of the synthetic text", floor)])
    masked, at_last, at_others, right, put_there, of_the_text = (
        Cell(study.probe("bidirectional", key), form) for key, (_, form) in PROBED.items())
    copies = fmean(put_there.values) > fmean(of_the_text.values)
    text = (f"Without the mask the validation loss falls to {told(study.values('bidirectional', best_loss))}, in the "
            f"report to {plot_logs.REPORT_TRAINING[30][1]}, where counting pairs of words gives "
            f"{study.ngrams['val']['bigram']:.3f}; with it, the same run stays at "
            f"{told(study.values('adaptive', best_loss))}. On a synthetic text whose entropy is {floor:.3f} it is "
            f"{told(study.values('synthetic_bidirectional', best_loss))} and "
            f"{told(study.values('synthetic', best_loss))}. "
            + ("It is a leak: the" if copies else "Whether it is a leak is open: the")
            + f" unmasked weights score {masked} once the mask is put on; at the last position of each block, whose "
            f"target is not among the inputs, {at_last}, and {at_others} at the others; and where a word of the input "
            f"is replaced, the prediction before it is the replacement in {put_there} of cases, the word of the "
            f"text in {of_the_text} (with nothing replaced it is right in {right}).")
    return [table], text


def comparison_rows(study, prefix):
    """A row for each configuration of one regime, and its name."""
    dense, adaptive = f"{prefix}dense", f"{prefix}adaptive"
    for name in (prefix + name for name in NAMES):
        speed = study.speed.get("over_dense", {}).get(name, 1.0 if name == dense else None)
        yield name, [NAMES[name.removeprefix(prefix)], str(len(study.groups[name].runs)),
                     study.cell(name, mean_rank, ".1f"), study.cell(name, linear_parameters, ".2f"),
                     Cell(speed and 1 / speed, ".2f"), study.cell(name, best_loss), study.cell(name, best_epoch, ".0f"),
                     study.cell(name, linear_parameters_at_best, ".2f"),
                     Cell(study.differences(name, adaptive, best_loss) if name != adaptive else None, "+.3f"),
                     study.cell(name, last_loss), study.cell(name, best_perplexity, ",.1f")]
    losses, epochs = equal_time(study, prefix)
    difference = [losses[run.settings["seed"]] - best_loss(run) for run in study.groups[adaptive].runs]
    yield f"{prefix}dense_equal_time", [
        f"dense, {epochs} epochs: as long as adaptive takes", str(len(losses)), DASH,
        study.cell(dense, linear_parameters, ".2f"), Cell(1.0, ".2f"), Cell(list(losses.values()), ".3f"), DASH, DASH,
        Cell(difference, "+.3f"), DASH, Cell([perplexity(loss) for loss in losses.values()], ",.1f")]


def equal_time(study, prefix):
    """-> ({seed: the dense model's best loss within the time that the adaptive run takes}, in how many epochs). Under a
    constant rate a shorter run is the beginning of a longer one; under a cosine it is a run of its own."""
    runs = study.groups[f"{prefix}dense_equal_time" if prefix else "dense"].runs
    epochs = len(runs[0].epochs) if prefix else round(study.speed["over_dense"]["adaptive"] * len(runs[0].epochs))
    return {run.settings["seed"]: min(epoch["val_loss"] for epoch in run.epochs[:epochs]) for run in runs}, epochs


def comparison(study):
    """Is adaptive rank worth it?"""
    header = ["", "n", "mean rank at the end", "M parameters in the linear layers", "speed (dense: 1)", "best val loss",
              "at epoch", "M parameters there", f"{DASH} adaptive", "last val loss", "perplexity"]
    return [Table(f"{prefix}comparison", f"With {settings}", header, [row for _, row in comparison_rows(study, prefix)])
            for prefix, settings in SETTINGS.items()], " ".join(verdict(study))


def verdict(study):
    """Who wins in each regime, and whether adaptive ranks are worth their while -> (the short answer, the numbers)."""
    first, places, said, worth = [], defaultdict(list), [], {"adaptive": [], "transport": []}
    for prefix, settings in SETTINGS.items():
        mean = {name: fmean(study.values(prefix + name, best_loss)) for name in NAMES}
        order = sorted(mean, key=mean.get)
        first.append(NAMES[order[0]])
        for kind in worth:
            places[kind].append(str(order.index(kind) + 1))
            fixed = {name: study.differences(prefix + name, prefix + kind, last_loss)
                     for name in ("fixed_mean", "retrained")}
            if min(fixed["fixed_mean"] + fixed["retrained"]) > 0:
                worth[kind].append(settings)
            said.append(f"With {settings}, compared with {NAMES[kind]}, the last loss is: " + "; ".join(
                f"{NAMES[name]}, {compared(values)}" for name, values in fixed.items()) + ".")

    afresh = [f"{compared(study.differences(prefix + 'retrained', prefix + 'fixed_mean', best_loss))} with {settings}"
              for prefix, settings in SETTINGS.items()]

    def where(found):
        return "in both settings" if len(found) == 2 else f"only with {found[0]}" if found else "in neither setting"
    winners = f"{first[0]} in both settings" if len(set(first)) == 1 else listed(
        [f"{name} with {settings}" for name, settings in zip(first, SETTINGS.values(), strict=True)])
    return (f"**The lowest loss is that of {winners}. Of {len(NAMES)} configurations adaptive ranks come in as number "
            f"{listed(places['adaptive'])}, and with AdamW's moments transported through each resize as number "
            f"{listed(places['transport'])}. At the last epoch, with about as many parameters, adaptive ranks beat "
            f"ranks fixed from the start in every seed {where(worth['adaptive'])}, with transport "
            f"{where(worth['transport'])}.** Trained afresh, the ranks found reach a best loss that is, beside that of "
            f"one fixed rank of their mean, {listed(afresh)}.", " ".join(said))


def hypotheses(study):
    """The report's three explanations (its section 5.2)."""
    def when(name):
        found, losses = study.collapses(name), told(study.values(name, best_loss))
        came = [epoch for epoch in found if epoch]
        by = f", by epoch {Cell(came, '.0f')}" if came else ""
        return f"the loss collapses in {len(came)} of {len(found)} seeds{by}; the lowest is {losses}"

    def row(explanation, name, label, refuted):
        return [explanation, label, when(name), "against it" if refuted else "not against it"]
    long = study.groups["long"].first.epochs
    moving = [run.epochs[epoch - 1]["resized"] for run, epoch in zip(
        study.groups["bidirectional"].runs, study.collapses("bidirectional"), strict=True) if epoch]
    table = Table("hypotheses", "", ["the report's explanation", "a run that could refute it", "what happens",
                                     "speaks"], [
        row("Rank stabilization enables optimization", "bidirectional_fixed", "no mask, ranks fixed from the start",
            None not in study.collapses("bidirectional_fixed")),
        row("Compression as regularization", "bidirectional_dense", "no mask, dense layers",
            None not in study.collapses("bidirectional_dense")),
        row("Delayed feature learning", "long", f"causal, adaptive, {len(long)} epochs",
            set(study.collapses("long")) == {None})])
    dense, fixed, adaptive = (Cell(study.collapses(f"bidirectional{kind}"), ".0f") for kind in ("_dense", "_fixed", ""))
    n_ranks = len(study.groups["bidirectional"].first.epochs[-1]["ranks"])
    text = (f"Without the mask the loss has collapsed by epoch {dense} in the dense model, {fixed} with ranks fixed "
            f"from the start, and {adaptive} with adaptive ranks, {Cell(moving, '.0f')} of {n_ranks} of which change "
            f"in that very epoch. With the mask {when('long')}, at epoch "
            f"{Cell(study.values('long', best_epoch), '.0f')} of {len(long)}.")
    return [table], text


def choices(study):
    """What becomes of the optimizer at a resize, and how the stable rank is estimated."""
    rows = [[label, str(len(study.groups[name].runs)), study.cell(name, best_loss), study.cell(name, best_epoch, ".0f"),
             Cell(study.differences(name, "adaptive", best_loss) if name != "adaptive" else None, "+.3f"),
             study.cell(name, last_loss), study.cell(name, mean_rank, ".1f")]
            for name, label in (("adaptive", "reinit, 5 power iterations (the report's)"),
                                ("transport", "transport, 5 power iterations"), ("exact", "reinit, exact stable rank"))]
    over = [measured / exact - 1 for run in study.groups["adaptive"].runs for epoch in run.epochs
            for measured, exact in zip(epoch["stable_ranks"], epoch["stable_ranks_exact"], strict=True)]
    text = (f"Carrying AdamW's moments through a resize makes the best loss "
            f"{compared(study.differences('transport', 'adaptive', best_loss))} than dropping them, and the last one "
            f"{compared(study.differences('transport', 'adaptive', last_loss))}. Five power iterations over-state the "
            f"stable rank by {fmean(over):.1%} on average over the epochs and layers of the adaptive runs; with exact "
            f"values the mean rank ends at {study.cell('exact', mean_rank, '.1f')} instead of "
            f"{study.cell('adaptive', mean_rank, '.1f')}, and the best loss is "
            f"{compared(study.differences('exact', 'adaptive', best_loss))}.")
    return [Table("choices", "", ["", "n", "best val loss", "at epoch", f"{DASH} the report's", "last val loss",
                                  "mean rank at the end"], rows)], text


RANKED = {"bidirectional": LEAK, "adaptive": "causal", "exact": "causal, exact stable rank",
          "transport": "causal, transport", "tuned_adaptive": "causal, tuned", "long": "causal, longer"}


def projections(study):
    """Do the projection types differ as the report's Table 2 says?"""
    report = plot_logs.projection_means(plot_logs.REPORT_RANKS)
    rows = [["the report", DASH, *(Cell(mean, ".1f") for mean in [*report, fmean(report)])]]
    for name, label in RANKED.items():
        means = [plot_logs.projection_means(run.blocks()) for run in study.groups[name].runs]
        rows.append([label, str(len(means)), *(Cell(list(column), ".1f") for column in zip(*means, strict=True)),
                     Cell([fmean(mean) for mean in means], ".1f")])
    causal = [plot_logs.projection_means(run.blocks()) for run in study.groups["adaptive"].runs]
    lowest = sum(max(mean[:2]) < min(mean[2:]) for mean in causal)
    highest = sum(mean[3] > max(mean[:3]) for mean in causal)
    means = [fmean(column) for column in zip(*causal, strict=True)]  # over the seeds
    order = sorted(range(6), key=means.__getitem__)
    names = [plot_logs.PROJECTIONS[i] for i in order]
    text = (f"In the report Q and K have the lowest mean ranks ({report[0]:.1f} both) and O the highest of the "
            f"attention projections ({report[3]:.1f}). Under the mask Q and K are the two lowest in {lowest} of "
            f"{len(causal)} seeds, and O is the highest of the four in {highest} of {len(causal)}; from the lowest "
            f"mean to the highest the order here is {', '.join(names)}, between {means[order[0]]:.1f} and "
            f"{means[order[-1]]:.1f}.")
    return [Table("projections", "", ["", "n", *plot_logs.PROJECTIONS, "all"], rows)], text


def untrained(study):
    """How much of the reduction is the controller's own?"""
    epochs = [epoch for epoch in plot_logs.REPORT_TRAINING if epoch <= len(study.groups["untrained"].first.epochs)]
    rows = [[str(epoch), Cell(study.values("untrained", lambda run, e=epoch: run.epochs[e - 1]["rank_avg"]), ".1f"),
             Cell(plot_logs.REPORT_TRAINING[epoch][4], ".1f")] for epoch in epochs]
    left, start = study.values("untrained", mean_rank), study.groups["untrained"].first.initial_rank
    end = plot_logs.REPORT_TRAINING[30][4]
    text = (f"In a model of the report's size whose weights learn nothing (a learning rate of 1e-12), the same "
            f"controller takes the mean rank from {start:g} to {told(left, '.1f')} in {epochs[-1]} updates: the stable "
            f"rank of a random product is well below its rank, and falls with it. That is "
            f"{(start - fmean(left)) / (start - end):.0%} of the report's reduction from {start:g} to {end:g}, with "
            f"nothing learnt at all.")
    return [Table("untrained", "", ["update", "mean rank, untrained", "the report's"], rows)], text


def official(study):
    """The official validation file."""
    rows = []
    for name in ("dense", "adaptive", "tuned_dense", "tuned_adaptive"):
        tests = [[run.end.get(f"test_loss_{which}") for run in study.groups[name].runs] for which in ("best", "last")]
        rows.append([f"{NAMES[name.removeprefix('tuned_')]}, {SETTINGS['tuned_' * name.startswith('tuned_')]}",
                     str(len(study.groups[name].runs)), study.cell(name, best_loss), *(Cell(t, ".3f") for t in tests),
                     Cell([perplexity(loss) for loss in tests[0] if loss is not None], ",.1f")])
    on = study.ngrams["test"]
    rows += [[label, DASH, Cell(study.ngrams["val"][kind], ".3f"), Cell(on[kind], ".3f"), DASH,
              Cell(perplexity(on[kind]), ",.1f")] for kind, label in COUNTED.items()]
    gap = [run.end["test_loss_best"] - on["bigram"] for run in study.groups["tuned_dense"].runs]
    text = (f"For the study's small vocabulary {on['unk']:.0%} of the official file is `<unk>`, which is easy to "
            "predict, so that no perplexity here compares with a published one. The tuned dense model's loss there, "
            f"less that of counted pairs of words, is {told(gap, '+.3f')}.")
    return [Table("official", "", ["", "n", "best val loss", "official file, best epoch", "last epoch",
                                   "perplexity, best epoch"], rows)], text


QUESTIONS = [  # title, function, the runs whose commands are shown
    ("Is the collapse a leak?", leak, ("bidirectional", "adaptive", "synthetic_bidirectional", "synthetic")),
    ("Is adaptive rank worth it?", comparison,
     ("dense", "fixed", "adaptive", "transport", "fixed_mean", "retrained", "tuned_dense", "tuned_dense_equal_time")),
    ("The report's three explanations", hypotheses, ("bidirectional_fixed", "bidirectional_dense", "long")),
    ("How much of the reduction is the controller's own?", untrained, ("untrained",)),
    ("Reinit or transport, five power iterations or the exact value?", choices, ("transport", "exact")),
    ("Do the projection types differ?", projections, ("adaptive",)),
    ("The official validation file", official, ("tuned_dense",)),
]
NEEDED = {"bidirectional", "bidirectional_fixed", "bidirectional_dense", "synthetic", "synthetic_bidirectional", "long",
          "untrained", "exact", "tuned_dense_equal_time",
          *(prefix + name for prefix in SETTINGS for name in NAMES)}


# ---- Figures ---------------------------------------------------------------------------------------------------------

def leak_figure(study):
    """Validation losses with and without the mask, and what the unmasked weights score once it is put on."""
    plt, np = plot_logs.plt, plot_logs.np
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for i, (name, label) in enumerate((("adaptive", "causal, adaptive"), ("dense", "causal, dense"),
                                       ("bidirectional", f"{LEAK}, adaptive"),
                                       ("bidirectional_fixed", f"{LEAK}, fixed"),
                                       ("bidirectional_dense", f"{LEAK}, dense"))):
        runs = study.groups[name].runs
        epochs, losses = [epoch["epoch"] for epoch in runs[0].epochs], np.array(
            [[epoch["val_loss"] for epoch in run.epochs] for run in runs])
        plot_logs.curve(axes, epochs, losses, f"C{i}", linestyle="-" if i < 2 else "--",
                        label=f"{label}, n = {len(runs)}")
        masked = study.probe(name, "val_loss_masked") if i >= 2 else []
        axes.plot([epochs[-1]] * len(masked), masked, "x", color=f"C{i}")
    axes.plot([], [], "x", color="gray", label="the same weights, mask put on")
    for (kind, label), style in zip(COUNTED.items(), (":", "-."), strict=True):
        axes.axhline(study.ngrams["val"][kind], color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="epoch", ylabel="validation loss (nats per token)", ylim=(0, None),
             title="Validation losses with and without the causal mask")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def comparison_figure(study):
    """Best and last validation losses of every configuration, a dot a seed, in both regimes."""
    plt = plot_logs.plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, (prefix, settings) in zip(panels, SETTINGS.items(), strict=True):
        for i, name in enumerate(NAMES):
            best, last = (study.values(prefix + name, value) for value in (best_loss, last_loss))
            axes.plot(last, [i] * len(last), "o", color=f"C{i}", markerfacecolor="none")
            axes.plot(best, [i] * len(best), "o", color=f"C{i}")
            axes.plot(fmean(best), i, "|", color=f"C{i}", markersize=18, markeredgewidth=2)
            there, at_end = (f"{fmean(study.values(prefix + name, parameters)):.2f}M" for parameters in (
                linear_parameters_at_best, linear_parameters))
            axes.annotate(there if there == at_end else f"{there} \N{RIGHTWARDS ARROW} {at_end}", (1, i),
                          xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points", va="center",
                          fontsize=8)
        axes.set_yticks(range(len(NAMES)), NAMES.values())
        axes.set_ylim(len(NAMES) - 0.5, -0.5)
        axes.set(xlabel="validation loss (nats per token)", title=settings)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle("Causal, equal steps. A dot a seed: full at the best epoch, with a bar for the mean, hollow at the "
                    "last one.\nBeside them: parameters in the linear layers, at the best epoch and at the end",
                    fontsize=9)
    return figure


def ranks_figure(study):
    """Mean ranks over the updates: the report's, those of untrained weights of its size, and ours."""
    plt, np = plot_logs.plt, plot_logs.np
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    report = plot_logs.REPORT_TRAINING
    axes.plot([0, *report], [64, *(row[4] for row in report.values())], "k--", marker="s", markersize=4,
              label=f"the report, {LEAK}")
    for i, (name, label) in enumerate((("untrained", "the report's size, nothing learnt"),
                                       ("adaptive", "study, causal"), ("tuned_adaptive", "study, causal, tuned"),
                                       ("long", "study, causal, longer"), ("bidirectional", f"study, {LEAK}"))):
        runs = study.groups[name].runs
        ranks = np.array([[run.initial_rank, *(epoch["rank_avg"] for epoch in run.epochs)] for run in runs])
        plot_logs.curve(axes, range(ranks.shape[1]), ranks, f"C{i}", label=f"{label}, n = {len(runs)}")
    axes.set(xlabel="rank updates (one an epoch)", ylabel="mean rank", ylim=(0, None), title="Mean ranks")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


FIGURES = {"leak": leak_figure, "comparison": comparison_figure, "ranks": ranks_figure}


# ---- The pages -------------------------------------------------------------------------------------------------------

def setup(study):
    """What was run, in a paragraph."""
    run = study.groups["adaptive"].first
    s = run.settings
    seeds = sorted(run.settings["seed"] for run in study.groups["adaptive"].runs)
    text = (f"{s['train_tokens']:,} training and {s['val_tokens']:,} validation words of WikiText-2, "
            f"{s['vocab_size']:,} distinct; d_model {s['d_model']}, {s['n_layers']} layers, block {s['block_size']}, "
            f"batch {s['batch_size']}, {s['epochs']} epochs of {s['steps_per_epoch']} steps, learning rate "
            f"{s['lr']:g}, initial rank {run.initial_rank:g}; seeds {listed([*map(str, seeds)])}; "
            f"torch {s['versions']['torch']}, {s['dtype']}, {s['device']} ({s['device_name']}).")
    if s["data_sha256"].startswith(OURS):
        text += " The training articles stood in another order than in the official file."
    return text


def results_page(study, figures):
    """RESULTS.md."""
    chosen = study.groups["tuned_dense"].first.settings
    searched = sum(name.startswith("search") for name in study.groups)
    parts = [
        "# Results",
        f"Written by `make results` from the logs of `make study`. {setup(study)}",
        "Losses are in nats per token; cells are means over the seeds with their range; a difference is between runs "
        "of one seed. \"The report's settings\" are its optimizer, a constant rate, no dropout. The tuned ones are the "
        f"best of {searched} dense runs of seed 0: learning rate {chosen['lr']:g}, dropout {chosen['dropout']:g}, "
        f"{chosen['warmup_steps']} steps of warm-up, then a cosine schedule. Speed is that of a training step, one of "
        "each configuration in turn, on average over a run's ranks. \"Right\" is how often the top prediction is the "
        "next word, \"word put there\" and \"of the text\" which it is where that word of the input has been replaced.",
        "A loss has collapsed where it is a nat below that of counted pairs of words, on the synthetic text below its "
        "entropy.",
        f"In the commands, `SIZE=\"{' '.join(size_flags(study))}\"`; `python3 study.py --only NAME` runs one of them."]
    parts = [parts[0], *map(wrapped, parts[1:-1]), parts[-1]]
    for number, (title, question, names) in enumerate(QUESTIONS, start=1):
        tables, text = question(study)
        parts += [f"## {number}. {title}", wrapped(text)]
        for table in tables:
            parts += [f"{table.title}:"] * bool(table.title) + [table.markdown()]
        parts += [f"![{title}]({figures}/{name}.png)" for name, of in (
            ("leak", leak), ("comparison", comparison), ("ranks", untrained)) if of is question]
        parts.append(commands(study, *names))
    return "\n\n".join(parts) + "\n"


def readme_section(study, figures):
    """README's section: the setup, the comparison in one table, two figures, and the answers."""
    header = [f"causal, n = {len(study.groups['dense'].runs)}", "M parameters in the linear layers", "speed",
              "best val loss", "last", "perplexity", "tuned: best val loss", "last", "perplexity"]
    tuned = {name.removeprefix("tuned_"): row for name, row in comparison_rows(study, "tuned_")}
    rows = [[row[0], row[3], row[4], *(of[i] for of in (row, tuned[name]) for i in (5, 9, 10))]
            for name, row in comparison_rows(study, "")]
    table = Table("results", "", header, rows)
    answers = "\n".join(wrapped(f"- **{title}** {question(study)[1]}", "  ") for title, question in (
        ("The collapse.", leak), ("The report's explanations.", hypotheses), ("The reduction.", untrained),
        ("The projections.", projections)))
    return "\n\n".join([
        BEGIN, wrapped(setup(study)), wrapped(verdict(study)[0]),
        f"![Best losses by configuration]({figures}/comparison.png)", table.markdown(), answers,
        f"![Losses with and without the mask]({figures}/leak.png)", END])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="results.py", description="Writes the study's answers from its logs.",
                                     allow_abbrev=False)
    parser.add_argument("--study", type=home, default=HERE / "logs" / "reference" / "study", help="folder of its logs")
    parser.add_argument("--out", type=home, help="folder of RESULTS.md and figures/; default: RESULTS.md and README.md "
                        "here, figures beside the logs")
    args = parser.parse_args(argv)
    try:
        study = Study(args.study)
        missing = sorted(NEEDED - set(study.groups))
        if missing or not study.speed or not {"val", "test"} <= study.ngrams.keys() or not study.probes:
            raise LogError(f"{args.study} is not complete: {', '.join(missing) or 'speed, ngrams or probes'} "
                           "missing; `make study` goes on with it")
        if not args.out and HERE not in args.study.resolve().parents:
            raise LogError(f"{args.study} lies elsewhere than this page: --out names the folder for its results")
        page = (args.out or HERE) / "RESULTS.md"
        folder = (args.out or args.study) / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        shown = folder.name if args.out else folder.resolve().relative_to(HERE).as_posix()
        page.write_text(results_page(study, shown), encoding="utf-8")
        if not args.out:
            readme = (HERE / "README.md").read_text(encoding="utf-8")
            before, rest = readme.split(BEGIN)
            text = before + readme_section(study, shown) + rest.split(END)[1]
            (HERE / "README.md").write_text(text, encoding="utf-8")
        plot_logs.start_matplotlib()
        for name, figure in FIGURES.items():
            plot_logs.save(figure(study), folder / name)
        print(f"{page}\n" + "\n".join(str(folder / f"{name}.png") for name in FIGURES))
        return 0
    except LogError as error:
        print(f"results.py: error: {error}", file=sys.stderr)
    except (LookupError, TypeError, ArithmeticError) as error:
        print(f"results.py: error: {args.study} holds other logs than those of a study ({error!r})", file=sys.stderr)
    except OSError as error:
        print(f"results.py: error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
