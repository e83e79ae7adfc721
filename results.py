"""The study's tables and figures, from its logs: into RESULTS.md and README.md, whose sentences are written by hand.

    python3 results.py                                                 from logs/reference/study   (make results)
    python3 results.py --study logs/study --out logs/study/results     from runs of one's own, into tables.md there

A page shows a table between <!-- table NAME --> and <!-- end -->. Differences are between runs of one seed. What the
sentences claim is tested against the logs in tests/test_claims.py.
"""
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import law  # noqa: E402
import plot_logs  # noqa: E402
from counts import multiplications  # noqa: E402
from plot_logs import DASH, LEAK, Cell, Group, LogError, Table, home, perplexity  # noqa: E402

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "logs" / "reference" / "study"
PAGES = ("README.md", "RESULTS.md")
NAMES = {"dense": "dense", "fixed": "fixed at 64", "adaptive": "adaptive, as in the report",
         "transport": "adaptive, with transport", "fixed_mean": "fixed at the mean found",
         "retrained": "ranks found, trained afresh"}
COUNTED = {"bigram": "pairs of words, counted", "unigram": "words, counted"}
AT_REPORT_SIZE = {  # a log each
    "v10_bidirectional": f"v10, as in the report, {LEAK}", "v10": "v10, as in the report",
    "v7": "dense, as in the report", "v11": "v11, cut from rank 256 to a tenth",
    "v7_tied": "dense, AdamW, tied, dropout 0.1", "v7_tied_dropout0.3": "dense, AdamW, tied, dropout 0.3"}
SETTINGS = {"": "the report's settings", "tuned_": "settings tuned on the dense model"}
STEPS = {"dense_adamw": "dense, AdamW", "dense_muon": "dense, Muon",  # v11's comparison
         **{f"rank{rank}_{how}": f"rank {rank}, {label}" for rank in (64, 16) for how, label in (
             ("adamw", "AdamW"), ("muon", "Muon on the factors"), ("selfguided", "self-guided"),
             ("spectron", "Spectron"), ("spectron_equal_flop", "Spectron, the dense model's FLOPs"))}}
BUDGETED = {"dense_adamw": "dense, AdamW", "dense_adamw_tied": "dense, AdamW, tied", "dense_muon": "dense, Muon",
            "dense_muon_tied": "dense, Muon, tied", "rank64_spectron": "rank 64, Spectron",
            "v11_quarter": "v11, 128 to a quarter", "quarter_narrow": "v11, 64 to a quarter",
            "tenth_wide": "v11, 128 to a tenth", "v11_tenth": "v11, 64 to a tenth",
            "rank16_spectron": "rank 16, Spectron", "v10_transport": "v10, with transport",
            "v10_report": "v10, as in the report"}
NARROW = {"narrow136_muon_tied": "dense, 136 wide, Muon, tied", "narrow136_adamw_tied": "dense, 136 wide, AdamW, tied",
          "narrow192_spectron": "v11, 192 wide, 96 to 35%", "narrow80_muon": "dense, 80 wide, Muon",
          "narrow80_muon_tied": "dense, 80 wide, Muon, tied", "narrow80_adamw": "dense, 80 wide, AdamW",
          "narrow80_adamw_tied": "dense, 80 wide, AdamW, tied"}  # the others are 256 wide
LABELS = BUDGETED | NARROW
LABELS |= {f"{where}_{name}": label for where in ("whole", "official") for name, label in LABELS.items()}
BROUGHT = [  # (what it brings, the run with it, the run without it)
    ("Spectron instead of AdamW on the factors, rank 16", "rank16_spectron", "rank16_adamw"),
    ("a tied head, rank 16", "rank16_spectron", "rank16_spectron_untied"),
    ("a high starting rank: 64, cut to a tenth, instead of 16 throughout", "v11_tenth", "rank16_spectron"),
    ("the Fisher metric: which directions go", "v11_tenth", "tenth_plain"),
    ("one budget: how many ranks each layer gets, instead of one rank for all", "v11_tenth", "tenth_uniform"),
    ("metric and budget together, instead of plain cuts to one rank", "v11_tenth", "tenth_plain_uniform"),
    ("Fisher instead of the stable rank (v10's signal)", "v11_tenth", "tenth_stable"),
    ("Fisher instead of energy (v8's and v9's)", "v11_tenth", "tenth_energy"),
    ("Fisher instead of groups of gradients (the first versions')", "v11_tenth", "tenth_gradient"),
    ("six cuts instead of one", "v11_tenth", "tenth_once"),
    ("a start from 128 instead of 64", "tenth_wide", "v11_tenth"),
    ("the same to a quarter", "v11_quarter", "quarter_narrow"),
    ("the ranks found, trained from scratch, instead of 16 in all layers", "tenth_afresh", "rank16_spectron"),
    ("all of it, instead of v10 with transport", "v11_tenth", "v10_transport")]
TRIES = {"rate0.5": "half the rate", "rate1": "the rate", "rate2": "twice it", "decay": "decay",
         "decay3": "three times it", "decay_third": "0.3 or 10 times it", "dropout": "dropout 0.2"}


class Study:
    """The logs of a folder: groups of ended runs by name, and the other records. Raises LogError."""

    def __init__(self, folder):
        records, runs = [], defaultdict(list)
        if not folder.is_dir():
            raise LogError(f"{folder}: there is no such folder")
        for path in sorted(folder.glob("*.jsonl")):
            name, _, seed = path.stem.rpartition("_s")
            if seed.isdigit():
                if run := plot_logs.ended(path):
                    runs[name].append(run)
                else:
                    plot_logs.warn(f"{path}: has not ended; left out")
            else:
                records += [record for _, record in plot_logs.records(path)]
        self.groups = {name: Group(name, members) for name, members in runs.items()}
        self.ngrams, self.speed, self.costs = ({k: v for r in records if r["kind"] == kind for k, v in r.items()}
                                               for kind in ("ngrams", "speed", "step_costs"))
        compressed = defaultdict(dict)
        for path in sorted(folder.glob("compress/*.jsonl")):
            name, _, seed = path.stem.rpartition("_s")
            log = plot_logs.read_compression(path, name, plot_logs.records(path))
            if log and len(log.records) >= RECORDS.get(name, 4):
                compressed[name][seed] = log.records
            else:
                plot_logs.warn(f"{path}: compress.py has not done all of its work; left out")
        seeds = sorted(set.intersection(*map(set, compressed.values()))) if compressed else []
        self.compressed = {name: [of_seed[seed] for seed in seeds] for name, of_seed in compressed.items() if seeds}
        self.scaling = law.read(law.scaling_folder(folder))
        large = folder.resolve().parent / "report_size"
        self.report_size = {name: plot_logs.read_log(large / f"{name}.jsonl", label)
                            for name, label in AT_REPORT_SIZE.items() if (large / f"{name}.jsonl").exists()}
        self.report_size_ngrams = {k: v for path in large.glob("ngrams.jsonl") for _, record in plot_logs.records(path)
                                   for k, v in record.items()}
        self.is_reference = folder.resolve() == REFERENCE  # of which the figures' titles and axes speak
        self.probes, self.by_count = defaultdict(list), defaultdict(dict)
        for record in records:
            if record["kind"] == "probe":
                self.probes[record["run"]].append(record)
            if record["kind"] == "losses_by_count":
                self.by_count[record["run"]][record["seed"]] = record

    def values(self, name, value):
        return self.groups[name].values(value)

    def mean(self, name, value):
        return fmean(self.values(name, value))

    def cell(self, name, value, form=".3f"):
        return Cell(self.values(name, value), form)

    def differences(self, name, other, value):
        """[value of `name` - value of `other`] for the seeds that both have."""
        by_seed = [{run.settings["seed"]: value(run) for run in self.groups[n].runs} for n in (name, other)]
        return [by_seed[0][seed] - by_seed[1][seed] for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]

    def collapses(self, name):
        """[the epoch by which the loss of each run has collapsed, or None]: it is below the text's entropy, or if that
        is not known, a nat below the loss of counted pairs of words."""
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
    """In millions."""
    return run.epochs[-1]["factor_params_millions"]


def linear_parameters_at_best(run):
    """Those of the model that has the lowest loss: ranks change after its epoch has been evaluated."""
    before = [epoch["factor_params_millions"] for epoch in run.epochs if epoch["epoch"] < best_epoch(run)]
    return before[-1] if before else run.settings["factor_parameters"] / 1e6


# ---- Tables ----------------------------------------------------------------------------------------------------------

PROBED = {"val_loss_masked": ("with the mask put on", ".3f"), "loss_at_last_position": ("last position", ".3f"),
          "loss_at_other_positions": ("others", ".3f"), "accuracy": ("right", ".0%"),
          "predicts_word_put_there": ("word put there", ".0%"), "predicts_word_of_the_text": ("of the text", ".0%")}


def leak(study):
    def row(name, label):
        return [label, str(len(study.groups[name].runs)), study.cell(name, best_loss),
                study.cell(name, best_perplexity, ",.2f"), Cell(study.collapses(name), ".0f"),
                *(Cell(study.probe(name, key), form) for key, (_, form) in PROBED.items())]

    def mark(label, loss):
        return [label, DASH, Cell(loss, ".3f"), Cell(perplexity(loss), ",.2f"), *[DASH] * 7]
    return Table("leak", "", ["", "n", "best val loss", "perplexity", "collapsed by epoch",
                              *(title for title, _ in PROBED.values())], [
        row("bidirectional", f"adaptive, {LEAK}"), row("bidirectional_fixed", f"fixed ranks, {LEAK}"),
        row("bidirectional_dense", f"dense, {LEAK}"), row("adaptive", "adaptive, causal"),
        *(mark(label, study.ngrams["val"][kind]) for kind, label in COUNTED.items()),
        row("synthetic_bidirectional", f"synthetic text: adaptive, {LEAK}"),
        row("synthetic", "synthetic text: adaptive, causal"),
        mark("entropy of the synthetic text", study.groups["synthetic"].first.settings["entropy_floor"])])


def equal_time(study, prefix):
    """-> ({seed: the dense model's best loss within the time that the adaptive run takes}, in how many epochs). Under a
    constant rate a shorter run is the beginning of a longer one; under a cosine it is a run of its own."""
    runs = study.groups[f"{prefix}dense_equal_time" if prefix else "dense"].runs
    epochs = len(runs[0].epochs)
    if not prefix:
        epochs = min(epochs, round(study.speed["over_dense"]["adaptive"] * epochs))
    return {run.settings["seed"]: min(epoch["val_loss"] for epoch in run.epochs[:epochs]) for run in runs}, epochs


def comparison(study, prefix=""):
    """Every configuration of one regime, and the dense model in the time of the adaptive one."""
    dense, adaptive, rows = f"{prefix}dense", f"{prefix}adaptive", []
    for name in (prefix + name for name in NAMES):
        speed = study.speed["over_dense"].get(name, 1.0 if name == dense else None)
        rows.append([NAMES[name.removeprefix(prefix)], study.cell(name, mean_rank, ".1f"),
                     study.cell(name, linear_parameters, ".2f"), Cell(speed and 1 / speed, ".2f"),
                     study.cell(name, best_loss), study.cell(name, best_epoch, ".0f"),
                     study.cell(name, linear_parameters_at_best, ".2f"),
                     Cell(study.differences(name, adaptive, best_loss) if name != adaptive else None, "+.3f"),
                     study.cell(name, last_loss), study.cell(name, best_perplexity, ",.1f")])
    losses, epochs = equal_time(study, prefix)
    difference = [losses[run.settings["seed"]] - best_loss(run) for run in study.groups[adaptive].runs
                  if run.settings["seed"] in losses]
    rows.append([
        f"dense, {epochs} epochs: as long as adaptive takes", DASH, study.cell(dense, linear_parameters, ".2f"),
        Cell(1.0, ".2f"), Cell(list(losses.values()), ".3f"), DASH, DASH, Cell(difference, "+.3f"), DASH,
        Cell([perplexity(loss) for loss in losses.values()], ",.1f")])
    return Table(f"{prefix}comparison", "", [
        f"n = {len(study.groups[dense].runs)}", "mean rank at the end", "M parameters in the linear layers",
        "speed (dense: 1)", "best val loss", "at epoch", "M parameters there", f"{DASH} adaptive", "last val loss",
        "perplexity"], rows)


def hypotheses(study):
    """The report's three explanations (its section 5.2), and a run that could refute each."""
    long = len(study.groups["long"].first.epochs)
    return Table("hypotheses", "", ["the report's explanation", "a run that could refute it", "collapsed by epoch",
                                    "lowest val loss"], [
        [explanation, label, Cell(study.collapses(name), ".0f"), study.cell(name, best_loss)]
        for explanation, label, name in (
            ("Rank stabilization enables optimization", "no mask, ranks fixed from the start", "bidirectional_fixed"),
            ("Compression as regularization", "no mask, dense layers", "bidirectional_dense"),
            ("Delayed feature learning", f"causal, adaptive, {long} epochs", "long"))])


def untrained(study):
    """The controller on weights that learn nothing."""
    epochs = [epoch for epoch in plot_logs.REPORT_TRAINING if epoch <= len(study.groups["untrained"].first.epochs)]
    return Table("untrained", "", ["update", "mean rank, untrained", "the report's"], [
        [str(epoch), Cell(study.values("untrained", lambda run, e=epoch: run.epochs[e - 1]["rank_avg"]), ".1f"),
         Cell(plot_logs.REPORT_TRAINING[epoch][4], ".1f")] for epoch in epochs])


def choices(study):
    """What becomes of the optimizer at a resize, and how the stable rank is estimated."""
    return Table("choices", "", ["", "best val loss", "at epoch", f"{DASH} the report's", "last val loss",
                                 "mean rank at the end"], [
        [label, study.cell(name, best_loss), study.cell(name, best_epoch, ".0f"),
         Cell(study.differences(name, "adaptive", best_loss) if name != "adaptive" else None, "+.3f"),
         study.cell(name, last_loss), study.cell(name, mean_rank, ".1f")]
        for name, label in (("adaptive", "reinit, 5 power iterations (the report's)"),
                            ("transport", "transport, 5 power iterations"), ("exact", "reinit, exact stable rank"))])


RANKED = {"bidirectional": LEAK, "adaptive": "causal", "exact": "causal, exact stable rank",
          "transport": "causal, transport", "tuned_adaptive": "causal, tuned", "long": "causal, longer"}


def projections(study):
    """Mean final ranks by projection."""
    rows = [["the report", *(Cell(mean, ".1f") for mean in plot_logs.REPORT_MEANS.values()),
             Cell(plot_logs.REPORT_MEAN, ".1f")]]
    for name, label in RANKED.items():
        runs = study.groups[name].runs
        means = [plot_logs.projection_means(run) for run in runs]
        rows.append([label, *(Cell([mean[kind] for mean in means], ".1f") for kind in plot_logs.REPORT_MEANS),
                     Cell([mean_rank(run) for run in runs], ".1f")])
    return Table("projections", "", ["", *plot_logs.REPORT_MEANS, "all"], rows)


def official(study):
    """The official validation file."""
    rows = []
    for name in ("dense", "adaptive", "tuned_dense", "tuned_adaptive"):
        tests = [[run.end.get(f"test_loss_{which}") for run in study.groups[name].runs] for which in ("best", "last")]
        settings = SETTINGS["tuned_" if name.startswith("tuned_") else ""]
        rows.append([f"{NAMES[name.removeprefix('tuned_')]}, {settings}", study.cell(name, best_loss),
                     *(Cell(losses, ".3f") for losses in tests),
                     Cell([perplexity(loss) for loss in tests[0] if loss is not None], ",.1f")])
    on = study.ngrams["test"]
    rows += [[label, Cell(study.ngrams["val"][kind], ".3f"), Cell(on[kind], ".3f"), DASH,
              Cell(perplexity(on[kind]), ",.1f")] for kind, label in COUNTED.items()]
    return Table("official", "", ["", "best val loss", "official file, best epoch", "last epoch",
                                  "perplexity, best epoch"], rows)


def report_size(study):
    """The report's method at its own size, without the mask and with it, beside the report's Table 1, at its epochs."""
    runs = {"without the mask": study.report_size["v10_bidirectional"], "with it": study.report_size["v10"]}
    rows = []
    for number, (train, val, _, _, mean) in plot_logs.REPORT_TRAINING.items():
        found = [next((epoch for epoch in run.epochs if epoch["epoch"] == number), None) for run in runs.values()]
        ours = [(epoch["train_loss"], epoch["val_loss"], epoch["rank_avg"]) if epoch else 3 * (None,)
                for epoch in found]
        rows.append([str(number), *(cell for train, val, mean in [(train, val, mean), *ours] for cell in (
            Cell(train, ".3f"), Cell(val, ".3f"), Cell(val and perplexity(val), ",.2f"), Cell(mean, ".1f")))])
    return Table("report_size", "", ["epoch", *(f"{who}: {what}" for who in ("the report", *runs) for what in (
        "train loss", "val loss", "perplexity", "mean rank"))], rows)


def report_size_arms(study):
    """All runs at the report's size after their last epoch."""
    rows = [[run.name, f"{run.epochs[-1]['epoch']} of {run.settings['epochs']}", Cell(linear_parameters(run), ".2f"),
             Cell(parameters(run), ".1f"), Cell(last_loss(run), ".3f"), Cell(official_loss(run), ".3f"),
             Cell(official_loss(run) and perplexity(official_loss(run)), ".1f")]
            for run in study.report_size.values()]
    return Table("report_size_arms", "", ["", "epochs", "M parameters in linear layers", "in all", "held-out text",
                                          "official file", "its perplexity"], rows)


def tied(name):
    """The runs of an arm of v11's comparison with a tied head, which low rank has by default."""
    return name if name.startswith("rank") else f"{name}_tied"


def untied(name):
    return f"{name}_untied" if name.startswith("rank") else name


def standard_error(values):
    """Of their mean; not a number for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def plus_minus(values, form="+.3f"):
    """The mean of numbers, and its standard error if there are several; a dash for none."""
    if len(values) < 2:
        return f"{fmean(values):{form}}" if values else DASH
    return f"{fmean(values):{form}} \N{PLUS-MINUS SIGN} {standard_error(values):.3f}"


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantiles of Student's t, by the number of values


def interval(values):
    """The 95% confidence interval of the mean of so many values, after Student -> (low, high)."""
    half = STUDENT[len(values)] * standard_error(values)
    return fmean(values) - half, fmean(values) + half


def parameters(run):
    """All, in millions."""
    return run.epochs[-1]["params_millions"]


def steps(study):
    """v11's comparison: how the linear layers are stepped, with a tied head and without."""
    def loss(name):
        return plus_minus(study.values(name, last_loss), ".3f") if name in study.groups else DASH

    def above(name, other):
        return plus_minus(study.differences(name, other, last_loss)) if name != other else DASH
    rows, cost = [], study.costs["over_dense"]
    for name, label in STEPS.items():
        rows.append([label, study.cell(tied(name), linear_parameters, ".2f"),
                     study.cell(tied(name), parameters, ".2f"), loss(untied(name)), loss(tied(name)),
                     above(tied(name), "dense_adamw_tied"), above(tied(name), "dense_muon_tied"),
                     Cell(study.mean(tied(name), epochs) / study.mean("dense_adamw", epochs), ".2f"),
                     Cell(cost.get(tied(name.removesuffix("_equal_flop"))), ".2f")])
    return Table("steps", "", [
        f"n = {len(study.groups['dense_adamw'].runs)}", "M parameters in the linear layers", "in all, tied",
        "last val loss, untied", "tied", f"tied {DASH} dense, AdamW", f"tied {DASH} dense, Muon", "steps (dense: 1)",
        "time of a step (dense, AdamW, untied: 1)"], rows)


def epochs(run):
    return len(run.epochs)


def tries(study):
    """What each arm of v11's comparison was tuned on: seed 0."""
    rows = []
    later = [arm for arm in LABELS if arm not in ARMS and f"try_{arm}_dropout" in study.groups]
    for arm in [*ARMS, *later]:
        losses = [study.mean(f"try_{arm}_{kind}", last_loss) for kind in TRIES]
        tie = "tied" if arm.endswith("_tied") or arm.startswith("rank") else "untied"
        label = f"{STEPS[arm.removesuffix('_tied')]}, {tie}" if arm in ARMS else LABELS[arm]
        rows.append([label, *best_marked(losses)])
    return Table("tries", "", ["seed 0, last val loss", *TRIES.values()], rows)


def best_marked(losses):
    """A row of tries; None: not tried."""
    best = min(loss for loss in losses if loss is not None)
    return [DASH if loss is None else f"{loss:.3f}{' (best)' * (loss == best)}" for loss in losses]


def sizes(study, name):
    """In millions: the parameters in the linear layers, and all."""
    return study.cell(name, linear_parameters, ".2f"), study.cell(name, parameters, ".2f")


def beside(study, name, other, loss=last_loss):
    """The loss of `name` above that of `other`, seed by seed, with its 95% interval."""
    if name == other:
        return DASH
    return with_interval(study.differences(name, other, loss))


def with_interval(values):
    """Their mean with its 95% interval, if there are several."""
    if len(values) < 2:
        return f"{fmean(values):+.3f}" if values else DASH
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(fmean(values), *interval(values))


def work(study, name):
    """The multiplications of a whole run, over those of the dense model with AdamW."""
    return Cell(study.mean(name, multiplications) / study.mean("dense_adamw", multiplications), ".2f")


def budgeted(study):
    """v11 at its budgets, beside what it competes with."""
    dense = {optimizer: min((f"dense_{optimizer}", f"dense_{optimizer}_tied"),
                            key=lambda name: study.mean(name, last_loss)) for optimizer in ("adamw", "muon")}
    rows = [[label, *sizes(study, name), plus_minus(study.values(name, last_loss), ".3f"),
             Cell(fmean(study.values(name, lambda run: perplexity(last_loss(run)))), ",.0f"),
             *(beside(study, name, other) for other in dense.values()), work(study, name),
             Cell(study.costs["over_dense"].get(name), ".2f")] for name, label in BUDGETED.items()]
    return Table("budget", "", [
        f"n = {len(study.groups['v11_tenth'].runs)}", "M parameters in the linear layers", "in all", "last val loss",
        "perplexity", *(f"{DASH} {BUDGETED[name]} (95% interval)" for name in dense.values()),
        "multiplications in all (dense, AdamW: 1)", "time of steps and cuts"], rows)


def narrow(study):
    """Narrower models beside v11."""
    others = ("tenth_wide", "v11_quarter")
    rows = [[LABELS[name], *sizes(study, name), plus_minus(study.values(name, last_loss), ".3f"),
             *(beside(study, name, other) for other in others), work(study, name)]
            for name in ("dense_adamw", "dense_muon", "v11_quarter", "tenth_wide", "v11_tenth", *NARROW)]
    return Table("narrow", "", [
        f"n = {len(study.groups['narrow80_muon'].runs)}", "M parameters in the linear layers", "in all",
        "last val loss", *(f"{DASH} {LABELS[name]} (95% interval)" for name in others),
        "multiplications in all (dense, AdamW: 1)"], rows)


WHOLE_TEXT = [f"whole_{name}" for name in (
    "dense_muon_tied", "dense_adamw", "dense_adamw_tied", "narrow136_muon_tied", "narrow192_spectron", "tenth_wide",
    "narrow80_muon_tied")]
ON_WHOLE = [f"whole_{name}" for name in (  # those that were tuned on it
    "dense_adamw_tied", "narrow136_muon_tied", "tenth_wide", "narrow80_muon_tied")]
TRIES_ON_WHOLE = {"rate1": "rates x 1", "rate2": "x 2", "rate3": "x 3", "rate4": "x 4", "rest2": "--lr x 2",
                  "decay_tenth": "decay / 10", "decay_thirtieth": "decay / 30",
                  **{f"rest{times}": f"--lr x {times}" for times in (4, 8, 16)}}


def whole(study):
    """Some of them on the whole text, and how far they are from a narrower dense model there and on the short one."""
    other = "narrow136_muon_tied"
    rows = [[LABELS[name], *sizes(study, name), plus_minus(study.values(name, last_loss), ".3f"),
             beside(study, name, f"whole_{other}"), beside(study, name.removeprefix("whole_"), other)]
            for name in WHOLE_TEXT]
    return Table("whole", "", [
        f"n = {len(study.groups[WHOLE_TEXT[0]].runs)}", "M parameters in the linear layers", "in all", "last val loss",
        f"{DASH} {LABELS[other]} (95% interval)", "the same on 100,000 words"], rows)


def tuned_on_whole(study):
    """Those that were tuned on the whole text."""
    others = ON_WHOLE[:2]
    rows = [[LABELS[name], *sizes(study, f"tuned_{name}"),
             *(plus_minus(study.values(of, last_loss), ".3f") for of in (name, f"tuned_{name}")),
             *(beside(study, f"tuned_{name}", f"tuned_{other}") for other in others)] for name in ON_WHOLE]
    return Table("tuned_on_whole", "", [
        f"n = {len(study.groups[f'tuned_{ON_WHOLE[0]}'].runs)}", "M parameters in the linear layers", "in all",
        "last val loss, settings of the short text", "tuned on this text",
        *(f"{DASH} {LABELS[name]} (95% interval)" for name in others)], rows)


def tries_on_whole(study):
    """What they were tuned on: seed 0."""
    rows = [[LABELS[name], *best_marked([
        study.mean(f"try_{name}_{kind}", last_loss) if f"try_{name}_{kind}" in study.groups else None
        for kind in TRIES_ON_WHOLE])] for name in ON_WHOLE]
    return Table("tries_on_whole", "", ["seed 0, last val loss", *TRIES_ON_WHOLE.values()], rows)


HEADLINE = ("dense_muon", "v11_quarter", "tenth_wide", "narrow192_spectron", "narrow136_muon_tied", "dense_adamw",
            "narrow80_muon_tied", "v10_transport", "v10_report")
OFFICIAL = [f"official_{name}" for name in HEADLINE]


def has_official(study):
    return set(study.groups) >= set(OFFICIAL) and all(official_loss(study.groups[name].first) for name in OFFICIAL)


def official_loss(run):
    """On the official validation file, or another --test-file, after the last epoch."""
    return run.end.get("test_loss_last")


def official_arms(study):
    """Those arms on the official validation file."""
    others = ("official_dense_adamw", "official_narrow136_muon_tied")
    rows = [[LABELS[name], *(plus_minus(study.values(name, loss), ".3f") for loss in (last_loss, official_loss)),
             Cell(fmean(study.values(name, lambda run: perplexity(official_loss(run)))), ",.1f"),
             *(beside(study, name, other, official_loss) for other in others)] for name in OFFICIAL]
    return Table("official_arms", "", [
        f"n = {len(study.groups[OFFICIAL[0]].runs)}", "held-out text", "official file", "perplexity there",
        *(f"{DASH} {LABELS[name]}, there (95% interval)" for name in others)], rows)


DECAYS = {"decay_third": "a third of the decay", "decay": "the decay", "decay3": "three times it"}


def tries_on_further(study):
    """What their decays were tuned on: seed 0, and more words."""
    rows = [[LABELS[name], *best_marked([study.mean(f"try_further_{name}_{kind}", official_loss) for kind in DECAYS])]
            for name in HEADLINE]
    return Table("tries_on_further", "", ["seed 0, last loss on further words", *DECAYS.values()], rows)


KINDS = {4: "<unk>", 3: "100 times or more", 2: "10 to 99", 1: "1 to 9", 0: "never"}  # in the training text


def seeds_by_count(study):
    """Those of which all arms' losses by count are known."""
    return sorted(set.intersection(*(set(study.by_count[name]) for name in OFFICIAL)))


def by_count(study):
    """Their losses by how often the training text has a word."""
    seeds = seeds_by_count(study)
    columns = [("test", kind) for kind in KINDS] + [("val", 0)]

    def cells(name, of):  # the loss is null where a text has no such word
        found = [[study.by_count[name][seed][text][kind][of] for seed in seeds] for text, kind in columns]
        return [None if None in values else fmean(values) for values in found]
    shares = cells(OFFICIAL[0], 0)
    return Table("by_count", "", [
        f"n = {len(seeds)}; the training text has the word", *(
            f"{KINDS[kind]} ({share:.1%})" for (_, kind), share in zip(columns[:-1], shares, strict=False)),
        f"held-out text: never ({shares[-1]:.1%})"], [
            [LABELS[name], *(Cell(loss, ".3f") for loss in cells(name, 1))] for name in OFFICIAL])


def brought(study):
    """What each part of v11 brings: differences between runs of one seed."""
    return Table("brought", "", ["", "last val loss with it", "without it", "difference"], [
        [label, study.cell(name, last_loss), study.cell(other, last_loss),
         plus_minus(study.differences(name, other, last_loss))] for label, name, other in BROUGHT])


# ---- Trained models, compressed --------------------------------------------------------------------------------------

COMPRESSED = {"compressed_dense": "dense, AdamW", "compressed_muon": "dense, Muon",
              "compressed_v11": "v11, 64 to a tenth"}
RECORDS = {"compressed_dense": 17, "compressed_muon": 17}  # records of a whole log of compress.py; of the others 4
CUT_NARROW = {f"compressed_narrow{width}": NARROW[f"narrow{width}_{how}"]
              for width, how in ((136, "muon_tied"), (80, "muon_tied"), (192, "spectron"))}
WAYS = {  # {a narrower dense model: ways to as few parameters}
    "compressed_narrow136": [("compressed_narrow136", 1), ("compressed_narrow192", 1), ("compressed_v11", 1),
                             ("compressed_muon", 0.25), ("compressed_dense", 0.25)],
    "compressed_narrow80": [("compressed_narrow80", 1), ("compressed_narrow136", 0.5), ("compressed_narrow192", 0.5),
                            ("compressed_v11", 0.5), ("compressed_muon", 0.125), ("compressed_dense", 0.125)]}
CUTS = tuple(f"{metric}, {allocation}" for metric in ("plain", "inputs", "fisher")
             for allocation in ("uniform", "global"))


def commands(study, name, **wanted):
    """[for each seed: those records of a compressed model that hold these values]"""
    return [[record for record in records if all(record.get(key) == value for key, value in wanted.items())]
            for records in study.compressed[name]]


def after_cut(study, name, keep):
    """[for each seed: (the loss on the reporting half, the parameters) of a compressed model that keeps so much of all
    in the Fisher metric under one budget, 1 for the model as it was trained]"""
    found = []
    for record, in commands(study, name, command="compare", only="all"):
        cut = ({1: {"increase": 0, "parameters": record["before"]["all"]}}
               | {row["keep"]: row["cuts"]["fisher, global"] for row in record["rows"]})[keep]
        found.append((record["loss_before"] + cut["increase"], cut["parameters"]))
    return found


def ways(study):
    """Ways to a small model: to train it narrow, as v11, or wide and cut it."""
    rows = []
    for narrower, of_size in WAYS.items():
        for name, keep in of_size:
            losses, kept = zip(*after_cut(study, name, keep), strict=True)
            above = [loss - other for loss, (other, _) in zip(losses, after_cut(study, narrower, 1), strict=True)]
            rows.append([(COMPRESSED | CUT_NARROW)[name] + (f", cut to {keep:.4g}" if keep < 1 else ""),
                         Cell(fmean(kept) / 1e6, ".2f"), plus_minus(losses, ".3f"),
                         DASH if keep == 1 and name == narrower else with_interval(above), work(study, name)])
    return Table("ways", "", [f"n = {len(losses)}", "M parameters in all", "loss on the second half",
                              f"{DASH} the narrower model (95% interval)",
                              "multiplications to train (dense, AdamW: 1)"], rows)


def compressed(study):
    """What cuts cost, by metric and by how the budget is shared out."""
    rows = []
    for name, label in COMPRESSED.items():
        for only, what in (("linear", "linear layers"), ("all", "whole model")):
            seeds = [found for found, in commands(study, name, command="compare", only=only)]
            for i, row in enumerate(seeds[0]["rows"]):
                rows.append([f"{label}, {what}", f"{row['keep']:.2%}", *(plus_minus(
                    [seed["rows"][i]["cuts"][cut]["increase"] for seed in seeds]) for cut in CUTS)])
    return Table("compressed", "", [f"n = {len(seeds)}, nats above the uncut model", "kept", *CUTS], rows)


def fitted(study):
    """The smallest models within 5% of the perplexity."""
    rows = []
    for name, label in COMPRESSED.items():
        seeds = [found for found, in commands(study, name, command="fit")]

        def values(of, seeds=seeds):
            return [of(seed) for seed in seeds]
        rows.append([
            label, *(Cell(values(lambda s, w=when: s[w]["all"] / 1e6), ".2f") for when in ("before", "after")),
            *(Cell(values(lambda s, w=what: s["after"][w] / s["before"][w]), ".1%")
              for what in ("all", "linear", "ends")),
            plus_minus(values(lambda s: s["loss"] - s["loss_before"])),
            Cell(values(lambda s: perplexity(s["loss"] - s["loss_before"]) - 1), "+.1%"),
            plus_minus(values(lambda s: s["plain_increase"]))])
    return Table("fitted", "", [
        f"n = {len(seeds)}", "M parameters", "in the smallest", "kept, of all", "of the linear layers",
        "of embedding and head", "loss", "perplexity", "plain SVD, one share for all"], rows)


def by_rank(study):
    """One rank for all linear layers of the dense model."""
    rows = []
    for cut in (record for record in study.compressed["compressed_dense"][0] if record["command"] == "cut"
                and record["only"] == "linear" and record["metric"] == "plain"):
        rank = max(k for k in cut["ranks"].values() if k)
        seeds = {metric: [next(record for record in records if record["after"] == cut["after"])
                          for records in commands(study, "compressed_dense", command="cut", metric=metric)]
                 for metric in ("plain", "fisher")}
        rows.append([str(rank), Cell(cut["after"]["linear"] / cut["before"]["linear"], ".1%"), *(
            Cell([perplexity(record["loss"]) for record in found], ",.0f") for found in seeds.values())])
    before = [loss for loss, _ in after_cut(study, "compressed_dense", 1)]
    rows.append(["not cut", "100%", *2 * [Cell([perplexity(loss) for loss in before], ",.0f")]])
    return Table("by_rank", "", ["rank", "kept", "perplexity, plain SVD", "in the Fisher metric"], rows)


def tuned(study):
    """Fine-tuning after a cut of the whole dense model to a sixteenth."""
    rows, seeds = [], commands(study, "compressed_dense", command="tune")

    def row(label, models):
        before, after = ([model[key] for model in models] for key in ("loss_before", "loss"))
        changes = [a - b for a, b in zip(after, before, strict=True)]
        rows.append([label, *(Cell(models[0][key] / 1e6, ".2f") for key in ("parameters", "trained")),
                     plus_minus(before, ".3f"), plus_minus(after, ".3f"), plus_minus(changes)])
    for i, record in enumerate(seeds[0]):
        factors = record["models"][0]["train"] == "factors"
        row("the cut model, its factors" if factors else f"the cut model, LoRA of rank {record['lora_rank']}",
            [records[i]["models"][0] for records in seeds])
    row("the model that was not cut, all of it", [records[0]["models"][1] for records in seeds])
    return Table("tuned", "", [f"n = {len(seeds)}, {seeds[0][0]['steps']} steps", "M parameters", "of these trained",
                               "loss before", "after", "change"], rows)


def spectra(study):
    """How many singular values of the dense models' matrices hold how much of the energy."""
    kinds = {"attention": "qkvo", "feed-forward": ("up", "down"), "embedding": ("token_embedding",), "head": ("head",)}
    rows = []
    for model in ("compressed_dense", "compressed_muon"):
        for kind, names in kinds.items():
            found = [matrix for (record,) in commands(study, model, command="spectrum")
                     for name, matrix in record["matrices"].items()
                     if name.removesuffix(".weight").rpartition(".")[2] in names]
            shares = [[rank / min(matrix["shape"]) for rank in (*matrix["ranks"][:3], matrix["break_even"])]
                      for matrix in found]
            rows.append([f"{COMPRESSED[model]}: {kind}", Cell([matrix["stable_rank"] for matrix in found], ".0f"),
                         *(Cell(list(share), ".0%") for share in zip(*shares, strict=True))])
    return Table("spectra", "", ["share of the singular values", "stable rank", "for 90% of the energy", "95%", "99%",
                                 "break-even"], rows)


MEASURED = {"dense_adamw_tied": "dense, AdamW", "dense_muon_tied": "dense, Muon",
            **{f"rank{rank}_{how}": STEPS[f"rank{rank}_{how}"] for rank in (64, 16)
               for how in ("adamw", "muon", "spectron")},
            "undecayed_dense_adamw_tied": "dense, AdamW, decay 0.01", "undecayed_rank64_adamw": "rank 64, the same",
            "undecayed_rank16_adamw": "rank 16, the same"}  # with a tied head
PARTS = {"1/8 of the run": 1 / 8, "1/2": 1 / 2, "7/8": 7 / 8}


def measured(study, name, key, part):
    """[for each seed: the median over the layers of what --telemetry logged at this part of the run]"""
    return study.values(name, lambda run: median(run.epochs[max(round(part * len(run.epochs)) - 1, 0)][key]))


def norms(study):
    """Spectron's claims about the norms of steps and weights."""
    rows = []
    for name, label in MEASURED.items():
        if name not in study.groups:
            continue  # those without decay came later
        first = Cell(measured(study, f"first_{name}", "update_norms", 0) if f"first_{name}" in study.groups else None,
                     ".4f")
        rows.append([label, first, *(Cell(measured(study, name, "update_norms", part), ".4f")
                                     for part in PARTS.values()),
                     *(Cell(measured(study, name, "weight_norms", part), ".2f") for part in (0, 1)),
                     Cell(measured(study, name, "output_changes", 1 / 2), ".4f")])
    return Table("norms", "", ["medians over the layers", "norm of the step: the first, at the full rate", *PARTS,
                               "norm of the weights: first epoch", "last", "RMS change of the outputs: 1/2"], rows)


TABLES = {"leak": leak, "comparison": comparison,
          "tuned_comparison": lambda study: comparison(study, "tuned_"), "hypotheses": hypotheses,
          "untrained": untrained, "choices": choices, "projections": projections}
TABLES_OF_STEPS = {"steps": steps, "norms": norms}
TABLES_OF_CUTS = {"budget": budgeted, "brought": brought}
TABLES_OF_COMPRESSION = {"compressed": compressed, "fitted": fitted, "by_rank": by_rank, "tuned": tuned,
                         "spectra": spectra}
NEEDED = {"bidirectional", "bidirectional_fixed", "bidirectional_dense", "synthetic", "synthetic_bidirectional", "long",
          "untrained", "exact", "tuned_dense_equal_time",
          *(prefix + name for prefix in SETTINGS for name in NAMES)}
ARMS = [arm for name in STEPS if not name.endswith("_equal_flop") for arm in dict.fromkeys((name, tied(name)))]
NEEDED_FOR_TRIES = {f"try_{arm}_{kind}" for arm in ARMS for kind in TRIES}
NEEDED_FOR_STEPS = {*map(tied, STEPS), *ARMS, "first_dense_adamw_tied", "first_rank64_adamw", "first_rank16_adamw"}

NEEDED_FOR_CUTS = {*BUDGETED, *(name for _, *pair in BROUGHT for name in pair)}


def filled(page, tables):
    """A page with its tables, {name: Table}, as they are now. Raises LookupError for an unknown table."""
    return re.sub(r"(<!-- table (\w+) -->\n)(?:(?!<!-- table ).)*?(?=<!-- end -->)",
                  lambda found: f"{found[1]}\n{tables[found[2]].markdown()}\n\n", page, flags=re.S)


# ---- Figures ---------------------------------------------------------------------------------------------------------

def losses_by_epoch(axes, study, name, label, style="-"):
    """Draw the mean and the range over the seeds -> what label_ends() needs of it."""
    runs = study.groups[name].runs
    losses = plot_logs.np.array([[epoch["val_loss"] for epoch in run.epochs] for run in runs])
    color = plot_logs.COLORS[runs[0].family]
    plot_logs.curve(axes, range(1, losses.shape[1] + 1), losses, color, linestyle=style)
    axes.set(xlabel="epoch", ylabel="validation loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return losses[:, -1].mean(), label, color


def leak_figure(study):
    """Validation losses with and without the mask."""
    figure, axes = plot_logs.plt.subplots(figsize=(7, 4), layout="constrained")
    ends = [losses_by_epoch(axes, study, *line) for line in (
        ("adaptive", "causal, adaptive"), ("dense", "causal, dense"),
        ("bidirectional", f"adaptive, {LEAK}", "-"), ("bidirectional_fixed", f"fixed ranks, {LEAK}", "--"),
        ("bidirectional_dense", f"dense, {LEAK}", ":"))]
    counted = study.ngrams["val"]["bigram"]
    axes.axhline(counted, color="gray", linewidth=1)
    axes.annotate("what counting pairs of words reaches", (0.99, counted), xycoords=("axes fraction", "data"),
                  xytext=(0, -4), textcoords="offset points", va="top", ha="right", fontsize=8, color="#444444")
    axes.set(ylim=(0, None), title="Without the mask every model collapses, whatever its ranks do; with it none does"
             if study.is_reference else "Validation losses with and without the mask")
    plot_logs.label_ends(axes, ends)
    return figure


OFFSETS = {"dense": (-8, 0), "fixed": (8, 3), "adaptive": (13, 1), "transport": (-1, -15), "fixed_mean": (-12, 5),
           "retrained": (-8, -5)}  # of a point's label, in printer's points


def comparison_figure(study):
    """Validation loss against parameters in the linear layers, an arrow from the best epoch to the last one."""
    plt = plot_logs.plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True, layout="constrained")
    for axes, (prefix, settings) in zip(panels, SETTINGS.items(), strict=True):
        for name, label in NAMES.items():
            runs = study.groups[prefix + name].runs
            color = plot_logs.COLORS[runs[0].family]
            at, best = (study.mean(prefix + name, value) for value in (linear_parameters_at_best, best_loss))
            end, last = (study.mean(prefix + name, value) for value in (linear_parameters, last_loss))
            axes.plot(study.values(prefix + name, linear_parameters_at_best), study.values(prefix + name, best_loss),
                      ".", color=color, alpha=0.4)
            if (end, round(last, 2)) != (at, round(best, 2)):  # else the arrow has no length
                axes.annotate("", (end, last), (at, best), arrowprops={"arrowstyle": "->", "color": color,
                                                                     "shrinkA": 0, "shrinkB": 0})
            axes.plot(at, best, "o", color=color)
            axes.annotate(label, (at, best), xytext=OFFSETS[name], textcoords="offset points", color=color, va="center",
                          ha="left" if OFFSETS[name][0] > 0 else "right", fontsize=8)
        axes.set(xscale="log", xlabel="million parameters in the linear layers", title=f"With {settings}")
        if study.is_reference:  # room for the labels
            axes.set_xlim(0.06, 4)
            plot_logs.plain_ticks(axes.xaxis, 0.1, 0.3, 1, 3)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle("By best loss the report's default is last, and third with AdamW's state carried through resizes"
                    if study.is_reference else "Validation loss against parameters", fontsize=11)
    figure.supxlabel("point: the best epoch, mean of the seeds; small point: a seed; arrow: to the last epoch",
                     fontsize=8)
    return figure


def method_figure(study):
    """Ranks finding their place, and what they cost."""
    plt = plot_logs.plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    run = study.groups["tuned_transport"].first
    plot_logs.draw_heatmap(left, run)
    left.set_title(f"Ranks with transport: {run.initial_rank:.0f} to {mean_rank(run):.1f} on average")
    ends = [losses_by_epoch(right, study, f"tuned_{name}", f"{NAMES[name]}, "
                            f"{study.mean(f'tuned_{name}', linear_parameters):.2f}M", style)
            for name, style in (("dense", "-"), ("fixed", "-"), ("transport", "-"), ("adaptive", "--"))]
    right.set_title("What it costs, with tuned settings")
    right.annotate("M: million parameters in the linear layers", (1, 1), xycoords="axes fraction", ha="right", va="top",
                   fontsize=8, color="#444444")
    if study.is_reference:
        right.set_ylim(5.8, 6.6)
    plot_logs.label_ends(right, ends)
    return figure


def ranks_figure(study):
    """Mean ranks over the updates: the report's, those of untrained weights of its size, and ours."""
    figure, axes = plot_logs.plt.subplots(figsize=(7, 4), layout="constrained")
    report, ends = plot_logs.REPORT_TRAINING, []
    axes.plot([0, *report], [64, *(row[4] for row in report.values())], "k--", marker="s", markersize=4)
    ends.append((report[30][4], f"the report, {LEAK}", "black"))
    for name, label, color in (("untrained", "the report's size, nothing learnt", "gray"),
                               ("long", f"study, causal, {epochs(study.groups['long'].first)} epochs",
                                plot_logs.COLORS["adaptive"]),
                               ("bidirectional", f"study, {LEAK}", plot_logs.COLORS[LEAK])):
        runs = study.groups[name].runs
        ranks = plot_logs.np.array([[run.initial_rank, *(epoch["rank_avg"] for epoch in run.epochs)] for run in runs])
        plot_logs.curve(axes, range(ranks.shape[1]), ranks, color)
        if name == "bidirectional":  # it ends early
            axes.annotate(label, (ranks.shape[1] - 1, ranks[:, -1].mean()), (2, 6), color=color,
                          arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7})
        else:
            ends.append((ranks[:, -1].mean(), label, color))
    axes.set(xlabel="rank updates (one per epoch)", ylabel="mean rank", ylim=(0, None),
             title="Even when the weights learn nothing, the controller lowers ranks by a third" if study.is_reference
             else "Mean ranks")
    plot_logs.label_ends(axes, ends)
    return figure


def telemetry_figure(study):
    """What the steps do, for four ways to train: Spectron's figures 2 and 3."""
    groups = [Group(label, study.groups[name].runs) for name, label in MEASURED.items()
              if name in ("dense_adamw_tied", "rank64_adamw", "rank64_muon", "rank64_spectron")]
    return plot_logs.telemetry_figure(groups)


LEFT, RIGHT = ((-8, 0), "right"), ((8, 0), "left")  # places of labels: offset in points, alignment


def draw_arms(axes, study, labels, size=linear_parameters, places=None, loss=last_loss):
    """The last loss of each arm, {name: label}, against its size. `places`: {name: that of a label that would meet
    another}."""
    for name, label in labels.items():
        losses, at = study.values(name, loss), study.mean(name, size)
        color = plot_logs.COLORS[study.groups[name].first.family]
        axes.errorbar(at, fmean(losses), 2 * standard_error(losses), fmt="o", color=color, capsize=3)
        place, side = (places or {}).get(name, LEFT if at > 2 else RIGHT)
        axes.annotate(label, (at, fmean(losses)), place, textcoords="offset points", va="center", ha=side, color=color)
    axes.set(xscale="log", xlabel="million parameters, embedding and head included" if size is parameters else
             "million parameters in the linear layers")
    plot_logs.plain_ticks(axes.xaxis, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)


def explain_arms(figure, loss="last validation loss"):
    """What the axis of losses and the bars are."""
    figure.axes[0].set_ylabel(f"{loss} (nats per token)")
    figure.axes[-1].annotate(
        "mean of the seeds, and two standard errors", (1, 1), xycoords="axes fraction", xytext=(-4, -4),
        textcoords="offset points", ha="right", va="top", fontsize=8, color="#444444")


def steps_figure(study):
    """How the linear layers are stepped, with a tied head."""
    figure, axes = plot_logs.plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw_arms(axes, study, {tied(name): label for name, label in STEPS.items() if not name.endswith("_equal_flop")})
    explain_arms(figure)
    axes.set_title("Rank 64 with Spectron beats the dense model with AdamW, not the one with Muon"
                   if study.is_reference else "How the linear layers are stepped")
    return figure


def figure_by_size(study, names, of_linear, of_all, finding, loss=last_loss, what="last validation loss"):
    """The loss of these arms by their linear layers and by all parameters, with the places of labels in each; `finding`
    is the reference study's title."""
    figure, axes = plot_logs.plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for one, size, places in zip(axes, (linear_parameters, parameters), (of_linear, of_all), strict=True):
        draw_arms(one, study, {name: LABELS[name] for name in names}, size, places, loss)
    explain_arms(figure, what)
    figure.suptitle(finding if study.is_reference else f"{what.removeprefix('last ').capitalize()} against parameters")
    return figure


def budget_figure(study):
    """v11 and what it competes with, by their linear layers and by all parameters."""
    names = ("dense_adamw", "dense_muon", "v11_quarter", "tenth_wide", "v11_tenth", "v10_transport", "v10_report",
             "narrow136_muon_tied", "narrow136_adamw_tied", "narrow192_spectron", "narrow80_muon_tied",
             "narrow80_adamw_tied")
    return figure_by_size(study, [name for name in names if name in study.groups], {
        "v11_tenth": ((8, 9), "left"), "tenth_wide": ((8, -8), "left"), "v11_quarter": ((8, 4), "left"),
        "narrow80_muon_tied": ((8, -2), "left"), "narrow192_spectron": LEFT,
        "narrow136_muon_tied": ((8, -6), "left")}, {
        "narrow80_muon_tied": ((-5, -14), "left"), "v11_tenth": ((8, 1), "left"), "tenth_wide": ((8, -3), "left"),
        "v11_quarter": ((8, 3), "left"), "narrow192_spectron": LEFT, "narrow136_muon_tied": ((8, -6), "left"),
        "narrow136_adamw_tied": ((8, 4), "left")},
        "At a tenth of its linear parameters v11 keeps up with the dense model with AdamW.\n"
        "By all parameters, on the held-out text, a narrower dense model with Muon is as good as the best v11")


def mark_bigrams(loss, axes, *others):
    """A line at what counting pairs of words reaches, named in the first of the panels."""
    for panel in (axes, *others):
        panel.axhline(loss, color="#777777", linestyle=":", linewidth=1)
    axes.annotate("bigrams", (0.99, loss), (0, -4), xycoords=("axes fraction", "data"), ha="right", va="top",
                  textcoords="offset points", color="#777777")


def official_figure(study):
    """The same on the official validation file."""
    places = {"official_dense_muon": ((4, -13), "right"), "official_dense_adamw": ((4, 13), "right")}
    finding = ("Trained on 90,000 words, v11's tenth is better on the official validation file than the dense model\n"
               "with AdamW, and than a narrower one with Muon; the full one with Muon is level with v11's quarter")
    figure = figure_by_size(study, OFFICIAL, places, places, finding, official_loss,
                            "loss on the official validation file")
    mark_bigrams(study.ngrams["test"]["bigram"], *figure.axes)
    return figure


def compressed_figure(study):
    """The loss against all parameters, after cuts of trained models."""
    figure, axes = plot_logs.plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    plt = plot_logs.plt
    styles, handles = {"fisher": "-", "inputs": "--", "plain": ":"}, []
    for name, color in (("compressed_dense", "dense"), ("compressed_muon", "controlled"), ("compressed_v11", "cut")):
        seeds = [found for found, in commands(study, name, command="compare", only="all")]
        before, color = fmean(seed["loss_before"] for seed in seeds), plot_logs.COLORS[color]
        for metric, style in styles.items():
            points = []
            for i in range(len(seeds[0]["rows"])):
                cuts = [{key: fmean(seed["rows"][i]["cuts"][f"{metric}, {how}"][key] for seed in seeds)
                         for key in ("parameters", "increase")} for how in ("uniform", "global")]
                points.append(min(cuts, key=lambda cut: cut["increase"]))
            axes.plot([point["parameters"] / 1e6 for point in points], [before + point["increase"] for point in points],
                      style, marker="o", markersize=3, color=color)
        axes.plot(seeds[0]["before"]["all"] / 1e6, before, "*", markersize=13, color=color, markeredgecolor="white")
        handles.append(plt.Line2D([], [], color=color, marker="*", markersize=9, label=COMPRESSED[name]))
    for name in (name for name in CUT_NARROW if name in study.compressed):
        losses, (size, *_) = zip(*after_cut(study, name, 1), strict=True)
        run = study.groups[name].first
        color, place, side = ("cut", (8, -3), "left") if run.cuts else ("controlled", (-8, -8), "right")
        axes.plot(size / 1e6, fmean(losses), "*", markersize=13, color=plot_logs.COLORS[color],
                  markeredgecolor="white")
        axes.annotate(f"{run.settings['d_model']} wide", (size / 1e6, fmean(losses)), place, ha=side,
                      textcoords="offset points", color=plot_logs.COLORS[color])
    handles += [plt.Line2D([], [], color="#444444", linestyle=style, label=label) for style, label in (
        ("-", "metric: fisher"), ("--", "inputs"), (":", "plain SVD"))]
    axes.set(xscale="log", xlabel="million parameters, embedding and head included",
             ylabel="loss on the second half of the held-out text",
             title="Half of a dense model, cut in the Fisher metric, is as good as all of it;\n"
             "at an eighth, narrower models trained from scratch are better"
             if study.is_reference else "Trained models, cut")
    figure.supxlabel("star: not cut; each metric with the better of one share for all matrices and one budget",
                     fontsize=8)
    if study.is_reference:
        axes.set_ylim(5.85, 7.3)
    plot_logs.plain_ticks(axes.xaxis, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)
    axes.legend(handles=handles, fontsize=8, loc="upper right")
    return figure


def cuts_figure(study):
    """The losses and ranks of the first seed around the cuts."""
    return plot_logs.cuts_figure(study.groups["v11_tenth"].first)


def report_size_figure(study):
    """At the report's size: its method with the mask and without, by epoch; the last losses with it, by parameters."""
    figure, (left, right) = plot_logs.plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    runs, report, colors = study.report_size, plot_logs.REPORT_TRAINING, plot_logs.COLORS
    left.plot([*report], [val for _, val, *_ in report.values()], "ks", markerfacecolor="white", markersize=5)
    unmasked, masked = ([epoch["val_loss"] for epoch in runs[name].epochs] for name in ("v10_bidirectional", "v10"))
    left.plot(range(1, len(unmasked) + 1), unmasked, color=colors[LEAK])
    left.plot(range(1, len(masked) + 1), masked, color=colors["adaptive"])
    left.annotate(f"with the mask, {len(masked)} epochs", (len(masked), masked[-1]), (6, 1), va="center",
                  textcoords="offset points", color=colors["adaptive"])
    left.set(xlabel="epoch", ylabel="validation loss (nats per token)", ylim=(0, None),
             title="The report's method (v10)")
    plot_logs.label_ends(left, [(report[30][1], "the report", "black"),
                                (unmasked[-1], f"no mask,\n{LEAK}", colors[LEAK])])
    for run in (run for run in runs.values() if not run.sees_targets):
        x, y, color = linear_parameters(run), last_loss(run), colors[run.family]
        right.plot(x, y, "o", color=color)
        stopped = f" ({run.epochs[-1]['epoch']} of {run.settings['epochs']} epochs)" if not run.end else ""
        place, side = LEFT if x > 2 else ((-4, 12), "left") if run.cuts else RIGHT
        right.annotate(run.name + stopped, (x, y), place, textcoords="offset points", va="center", ha=side, color=color)
    mark_bigrams(study.report_size_ngrams["val"]["bigram"], right)
    right.set(xscale="log", xlabel="million parameters in the linear layers", ylabel="last validation loss",
              title="With the mask, one seed each")
    plot_logs.plain_ticks(right.xaxis, 1, 2, 3, 5, 10, 20)
    if study.is_reference:
        figure.supxlabel("20,520 held-out words; training articles in another order than in WikiText-2's file",
                         fontsize=8)
        figure.suptitle("At the report's size: without a mask its method falls below the report's loss of 1.155; with "
                        "one,\nv11 ends 0.08 nats above the dense model with AdamW, with a tenth of its linear "
                        "parameters", fontsize=11)
    return figure


def law_figure(study):
    """The scaling law."""
    figure = law.law_figure(study.scaling)
    if study.is_reference:
        figure.suptitle("At equal compute low rank with Spectron comes close to the dense model with AdamW at the "
                        "larger two budgets, and stays behind the one with Muon", fontsize=11)
    return figure


FIGURES = {"method": method_figure, "leak": leak_figure, "comparison": comparison_figure, "ranks": ranks_figure}
FIGURES_OF_STEPS = {"steps": steps_figure, "telemetry": telemetry_figure}
FIGURES_OF_CUTS = {"budget": budget_figure, "cuts": cuts_figure}
FIGURES_OF_COMPRESSION = {"compressed": compressed_figure}


def available(study):
    """-> (tables, figures), {name: function} each; those of v11's comparison as far as the study has it."""
    has_steps = study.costs and set(study.groups) >= NEEDED_FOR_STEPS
    parts = [(True, TABLES, FIGURES), ("test" in study.ngrams, {"official": official}, {}),
             (study.report_size.keys() >= AT_REPORT_SIZE.keys() and study.report_size_ngrams,
              {"report_size": report_size, "report_size_arms": report_size_arms}, {"report_size": report_size_figure}),
             (set(study.groups) >= NEEDED_FOR_TRIES, {"tries": tries}, {}),
             (has_steps, TABLES_OF_STEPS, FIGURES_OF_STEPS),
             (has_steps and set(study.groups) >= NEEDED_FOR_CUTS, TABLES_OF_CUTS, FIGURES_OF_CUTS),
             (set(study.groups) >= {*NEEDED_FOR_CUTS, *NARROW}, {"narrow": narrow}, {}),
             (has_official(study), {"official_arms": official_arms}, {"official": official_figure}),
             (has_official(study) and seeds_by_count(study), {"by_count": by_count}, {}),
             (set(study.groups) >= {f"try_further_{name}_{kind}" for name in HEADLINE for kind in DECAYS},
              {"tries_on_further": tries_on_further}, {}),
             (set(study.groups) >= {*BUDGETED, *NARROW, *WHOLE_TEXT}, {"whole": whole}, {}),
             (set(study.groups) >= {f"try_{name}_{kind}" for name in ON_WHOLE for kind in ("rest4", "rest8")},
              {"tries_on_whole": tries_on_whole}, {}),
             (set(study.groups) >= {*WHOLE_TEXT, *(f"tuned_{name}" for name in ON_WHOLE)},
              {"tuned_on_whole": tuned_on_whole}, {}),
             (study.compressed.keys() >= COMPRESSED.keys(), TABLES_OF_COMPRESSION, FIGURES_OF_COMPRESSION),
             ("dense_adamw" in study.groups and study.compressed.keys() >= {*COMPRESSED, *CUT_NARROW},
              {"ways": ways}, {}),
             (study.scaling, {name: lambda study, of=of: of(study.scaling) for name, of in law.TABLES.items()},
              {"law": law_figure})]
    has = [part for part in parts if part[0]]
    return ({name: table for _, tables, _ in has for name, table in tables.items()},
            {name: figure for *_, figures in has for name, figure in figures.items()})


# ---- Command line ----------------------------------------------------------------------------------------------------

def show(folder, out):
    """The tables and figures of a study's folder, into the folder `out`, or if that is None into the pages. Raises
    LogError."""
    study = Study(folder)
    missing = sorted(NEEDED - set(study.groups))
    if missing or not study.speed or "val" not in study.ngrams or not study.probes:
        raise LogError(f"{folder} is not complete: {', '.join(missing) or 'speed, ngrams or probes'} "
                       "missing; `make study` goes on with it")
    if not out and folder.resolve() != REFERENCE:
        raise LogError(f"the pages here show {REFERENCE.relative_to(HERE)}: --out names a folder for the results "
                       f"of {folder}")
    tables, figures = available(study)
    tables = {name: table(study) for name, table in tables.items()}
    figures_folder = (out or folder) / "figures"
    figures_folder.mkdir(parents=True, exist_ok=True)
    if out:
        text = "\n\n".join(f"## {name}\n\n{table.markdown()}" for name, table in tables.items())
        (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    else:
        pages = {HERE / name: filled((HERE / name).read_text(encoding="utf-8"), tables) for name in PAGES}
        for page, text in pages.items():  # once all are known to be good
            page.write_text(text, encoding="utf-8")
    plot_logs.start_matplotlib()
    for name, figure in figures.items():
        plot_logs.save(figure(study), figures_folder / name)
    plot_logs.screen("\n".join(str(figures_folder / f"{name}.png") for name in figures))


def main(argv=None):
    parser = plot_logs.Parser(prog="results.py", description="Makes the study's tables and figures.",
                              allow_abbrev=False)
    parser.add_argument("--study", type=home, default=REFERENCE, help="folder of its logs")
    parser.add_argument("--out", type=home, help="folder of tables.md and figures/; default: the tables go into "
                        "README.md and RESULTS.md, the figures beside the logs")
    args = parser.parse_args(argv)
    return plot_logs.exit_code("results.py", args.study, "a study", lambda: show(args.study, args.out))


if __name__ == "__main__":
    sys.exit(main())
