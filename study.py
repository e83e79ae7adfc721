"""The study: runs that ask what the report's numbers mean, a few minutes each on one core, resumable.

    python3 study.py                  every run that is not done yet, two side by side    -> logs/study/
    python3 study.py --list           each run, its command, and whether it is done
    python3 study.py --size report    the same at the report's size, for a GPU

A run that is done is skipped, one that was interrupted goes on. `results.py` turns the logs into tables and answers.
Beside the runs' logs are probes.jsonl (what trained models do when the mask is put on, or when the word that they
could copy is replaced), ngrams.jsonl (what counting words and pairs of words gives on the same text), speed.jsonl (the
time of a step at the ranks of each run, interleaved), and compress/ (what compress.py does with trained models).

The small size trains on the first 100,000 words of WikiText-2, in which words that occur less than 3 times have become
<unk>: the output layer is then small enough for the linear layers, which are the subject, to count.
"""
import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import compress  # noqa: E402
import counts  # noqa: E402
import plot_logs  # noqa: E402
import v7_transformer_dense_baseline as v7  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402
import v11_transformer_lowrank_selfguided as selfguided  # noqa: E402
import v11_transformer_lowrank_spectron as v11  # noqa: E402

VARIANTS = {"v10": v10.Variant, "v7": v7.Dense, "v11": v11.LowRankSpectron, "selfguided": selfguided.SelfGuided}
SEEDS = (0, 1, 2)
UNSEEN = (1, 2, 3, 4, 5)  # the seeds of v11's comparison, which is tuned on seed 0
SIZES = {
    "small": """--d-model 256 --n-layers 4 --n-heads 4 --d-ff 1024 --block-size 64 --batch-size 16 --epochs 16
        --steps-per-epoch 40 --lr 1e-3 --val-fraction 0.1 --min-count 3 --dtype float32""",
    "report": ""}  # v10's defaults
SHORT = "--d-model 64 --n-heads 4 --d-ff 256 --n-layers 2 --block-size 16 --epochs 3 --steps-per-epoch 20"
WORDS, FURTHER = 100_000, 200_000  # of the small size, and how many of those that come next are held out for tuning
SCHEDULE = "--lr-schedule cosine --warmup-steps {steps_per_epoch}"
UNMASKED, TRANSPORT = "--attention bidirectional", "--optimizer-on-resize transport"
DEMO = """--d-model 128 --n-layers 3 --n-heads 4 --d-ff 512 --block-size 64 --epochs 10 --steps-per-epoch 45 --lr 2e-3
    --dtype float32 --init-rank 32 --min-rank 4 --data-file synthetic.tokens {short}"""  # as in the Makefile

# Each run is a command; --seed, --data-file and --log-file are added to it. {size} is of SIZES, {test} is --test-file,
# {NAME.log} and {NAME.mean_rank} are of the run NAME of the same seed, {search.best} are the flags of the search's best
# run, {speed.epochs} those that take the dense model the time of tuned_adaptive. A run needs what its command names.
SEARCH = {f"search_rate{rate}_dropout{dropout}": f"v7 {{size}} --lr {{lr_{rate}}} --dropout {dropout} {SCHEDULE}"
          for rate in (1, 2) for dropout in (0.1, 0.3)}  # seed 0 alone; rate: times that of the size
RUNS = {
    "bidirectional": f"v10 {{size}} {UNMASKED}",
    "adaptive": "v10 {size} {test}",
    "dense": "v7 {size} {test}",
    "fixed": "v10 {size} --fixed-rank",
    "bidirectional_dense": f"v7 {{size}} {UNMASKED}",
    "bidirectional_fixed": f"v10 {{size}} {UNMASKED} --fixed-rank",
    "fixed_mean": "v10 {size} --fixed-rank --init-rank {adaptive.mean_rank}",
    "retrained": "v10 {size} --fixed-rank --ranks-from {adaptive.log}",
    "transport": f"v10 {{size}} {TRANSPORT}",
    "exact": "v10 {size} --power-iterations 0",
    "tuned_dense": "v7 {size} {search.best} {test}",
    "tuned_adaptive": "v10 {size} {search.best} {test}",
    "tuned_transport": f"v10 {{size}} {{search.best}} {TRANSPORT}",
    "tuned_fixed": "v10 {size} {search.best} --fixed-rank",
    "tuned_fixed_mean": "v10 {size} {search.best} --fixed-rank --init-rank {tuned_adaptive.mean_rank}",
    "tuned_retrained": "v10 {size} {search.best} --fixed-rank --ranks-from {tuned_adaptive.log}",
}
LATER = {  # after the speed has been measured
    "tuned_dense_equal_time": "v7 {size} {search.best} --epochs {speed.epochs}",
    "untrained": "v10 --lr 1e-12 --batch-size 1 --steps-per-epoch 1 --val-fraction 0.001 --dtype float32 "
                 "--data-file {data_file} {short}",  # of the report's size
    "synthetic": f"v10 {DEMO}",
    "synthetic_bidirectional": f"v10 {DEMO} {UNMASKED}",
    "long": "v10 {size} --epochs {three_times_the_epochs}",
}

# v11's comparison. Each arm is tuned on seed 0 in rounds of tries, each at the best of the rounds before by the last
# loss, and then run on UNSEEN seeds. {NAME.1} are the flags of the best of round 1 of the arm NAME, {NAME.2} those of
# the best of rounds 1 and 2; {equal_flop.RANK} the epochs in which its products cost as much as the dense model's.
STEPS = f"{{size}} --dtype bfloat16 {SCHEDULE} --weight-decay 0.01"
ARMS = {
    "dense_adamw": f"v7 {STEPS}", "dense_adamw_tied": f"v7 {STEPS} --tie-embeddings",
    "dense_muon": f"v7 {STEPS} --optimizer muon", "dense_muon_tied": f"v7 {STEPS} --optimizer muon --tie-embeddings",
    **{f"rank{rank}_{optimizer}": f"v11 {STEPS} --factor-decay 0 --cuts 0 --init-rank {rank} --optimizer {optimizer}"
       for rank in (64, 16) for optimizer in ("adamw", "muon", "spectron")},
    **{f"rank{rank}_selfguided": f"selfguided {STEPS} --factor-decay 0 --init-rank {rank}" for rank in (64, 16)}}
# A budget of 9.4% of the dense model's linear parameters is that of rank 16 in the small size.
TENTH = f"v11 {STEPS} --factor-decay 0 --rank-budget 0.09375"
CHANGING = {  # arms whose ranks change
    "v10_report": f"v10 {STEPS}", "v10_transport": f"v10 {STEPS} {TRANSPORT}",
    "v11_tenth": f"{TENTH} --init-rank 64",
    "v11_quarter": f"v11 {STEPS} --factor-decay 0 --rank-budget 0.25 --init-rank {{wide}}"}
# Models as small as v11's tenth at the small size. Dense ones of width 80 have as many parameters in the linear layers,
# those of width 136, with a tied head, in all; so has v11 at a width between. bfloat16 would gain them no time.
NARROW = {f"narrow{width}_{optimizer}{tied and '_tied'}":
          f"v7 {STEPS} --dtype float32 --d-model {width} --d-ff {4 * width} --optimizer {optimizer} {tied}".strip()
          for width, tied in ((80, ""), (80, "--tie-embeddings"), (136, "--tie-embeddings"))
          for optimizer in ("adamw", "muon")}
NARROW["narrow192_spectron"] = (f"v11 {STEPS} --dtype float32 --d-model 192 --d-ff 768 --factor-decay 0 "
                                "--rank-budget 0.35 --init-rank 96")
UNTUNED = ARMS | CHANGING | NARROW | {"tenth_wide": f"{TENTH} --init-rank {{wide}}"}
# Arms on the whole text, 20 times as long, in twice as many steps: most words are read once or not at all, so there
# is no dropout.
WHOLE = ("--dtype float32 --dropout 0 --epochs {twice_the_epochs} --data-file {data_file} --min-count 50 "
         "--val-fraction 0.005")
ON_WHOLE = {f"whole_{arm}": f"{UNTUNED[arm]} {WHOLE}"
            for arm in ("dense_adamw_tied", "tenth_wide", "narrow136_muon_tied", "narrow80_muon_tied")}
# Do those that are measured on the official validation file have the right decays? By the loss on the FURTHER words:
# the 10,000 that all are tuned on hold too many that do not occur in the training part.
HEADLINE = ("dense_muon", "v11_quarter", "tenth_wide", "narrow192_spectron", "narrow136_muon_tied", "dense_adamw",
            "narrow80_muon_tied", "v10_transport", "v10_report")
ON_FURTHER = {f"further_{arm}": f"{UNTUNED[arm]} --dtype float32 {{further}}" for arm in HEADLINE}
# At the report's size, in half of its epochs: v11's tenth, dense models, and one with as many parameters in all as v11.
LARGE = f"{{size}} --epochs {{half_the_epochs}} --lr 1e-3 {SCHEDULE}"
AT_REPORT = {
    "large_v11_tenth": f"v11 {LARGE} --rank-budget 0.1",
    "large_dense_adamw_tied": f"v7 {LARGE} --tie-embeddings",
    "large_dense_muon_tied": f"v7 {LARGE} --tie-embeddings --optimizer muon",
    "large_narrow336_muon_tied": f"v7 {LARGE} --tie-embeddings --optimizer muon --d-model 336 --n-heads 6 --d-ff 1344"}
TUNED = ARMS | CHANGING | NARROW | ON_WHOLE | ON_FURTHER | AT_REPORT
RATES = {"adamw": ("--lr", 1e-3), "selfguided": ("--lr", 1e-3), "muon": ("--eta", 0.02), "spectron": ("--eta", 0.07),
         "report": ("--lr", 1e-3), "transport": ("--lr", 1e-3), "tenth": ("--eta", 0.07), "quarter": ("--eta", 0.07),
         "wide": ("--eta", 0.07)}  # by the second word of an arm's name, the third if its text is the first


def rounds(arm):
    """[{name of a run: its flags} for each round of an arm's tries]"""
    tries = (tries_on_whole if arm in ON_WHOLE else tries_on_further if arm in ON_FURTHER else
             tries_at_report if arm in AT_REPORT else tries_on_words)(arm)
    return [{f"try_{arm}_{name}": flags for name, flags in of_round.items()} for of_round in tries]


def decay(times, flag, middle):
    """Flags: so many times a decay of 1, which with Muon or Spectron takes 0.001 of a weight of the linear layers per
    step at the middle rate."""
    return f"--weight-decay {times:.2g}" + (f" --factor-decay {times * 1e-3 / middle:.2g}" if flag == "--eta" else "")


def tries_on_words(arm):
    """Its rounds on the short text: rates; decays; dropout. AdamW's decays are 0.3 to 3. With Muon or Spectron that of
    the linear layers takes 0.001 to 0.01 of a weight per step at the middle rate."""
    flag, middle = RATES[arm.split("_")[1]]
    other = decay(0.3, flag, middle) if flag == "--lr" else f"--weight-decay 3 --factor-decay {1e-2 / middle:.2g}"
    decays = {"decay": decay(1, flag, middle), "decay3": decay(3, flag, middle), "decay_third": other}
    return [{"rate1": f"{flag} {middle:g} --dropout 0.1", "rate0.5": f"{flag} {middle / 2:g} --dropout 0.1",
             "rate2": f"{flag} {2 * middle:g} --dropout 0.1"},
            {name: f"{{{arm}.1}} {flags}" for name, flags in decays.items()},
            {"dropout": f"{{{arm}.2}} --dropout 0.2"}]


def tries_on_further(arm):
    """By the loss on the further words: decays, three times and a third of the first, at the rate and the dropout that
    were the best for each of these arms before."""
    flag, middle = RATES[arm.split("_")[2]]
    return [{name: f"{flag} {middle:g} --dropout 0.1 {decay(times, flag, middle)}"
             for name, times in (("decay", 1), ("decay3", 3), ("decay_third", 0.3))}]


def tries_on_whole(arm):
    """The same on the whole text, whose decays are lower and whose words are more: rates with a third of the short
    text's decay; a tenth and a thirtieth of it; then --lr, which leaves the linear layers alone: with AdamW they get
    the short text's --eta 0.001, whatever was best before."""
    flag, middle = RATES[arm.split("_")[2]]
    is_adamw = flag == "--lr"
    rates = {"rate1": "--lr 0.001", "rate2": "--lr 0.002", "rate4": "--lr 0.004"} if is_adamw else {
        "rate1": f"--eta {middle:g}", "rate2": f"--eta {2 * middle:g} --lr 0.002",
        "rest2": f"--eta {middle:g} --lr 0.002"}
    third, tenth, thirtieth = (decay(1 / part, flag, middle) for part in (3, 10, 30))
    return [{name: f"{flags} {third}" for name, flags in rates.items()},
            {"decay_tenth": f"{{{arm}.1}} {tenth}", "decay_thirtieth": f"{{{arm}.1}} {thirtieth}"},
            {"rate3": f"{{{arm}.2}} --lr 0.003"} if is_adamw else {"rest4": f"{{{arm}.2}} --lr 0.004"},
            {f"rest{times}": f"{{{arm}.3}} {'--eta 0.001' * is_adamw} --lr {times * 1e-3:g}"
             for times in ((4, 8) if is_adamw else (8, 16))}]


def tries_at_report(arm):
    """Few, for a GPU's minutes: two dropouts, with decays that take as much in all as the short text's; then twice the
    rate, and three times the decay."""
    flag, middle = RATES[arm.split("_")[2]]
    dropouts = {f"dropout{p}": f"{flag} {middle:g} {decay(0.213, flag, middle)} --dropout {p}" for p in (0.1, 0.3)}
    return [dropouts, {"rate2": f"{{{arm}.1}} {flag} {2 * middle:g}",
                       "decay3": f"{{{arm}.1}} {decay(0.64, flag, middle)}"}]


TUNING = {name: f"{command} {flags}" for i in range(4) for arm, command in TUNED.items()  # round by round: none waits
          for of_round in rounds(arm)[i:i + 1] for name, flags in of_round.items()}
AT_BEST = {arm: f"{command} {{{arm}.{len(rounds(arm))}}}" for arm, command in TUNED.items()}
CONTROLLED = {arm: f"{AT_BEST[arm]} --telemetry" for arm in ARMS}
CONTROLLED |= {f"{arm}_untied": f"{CONTROLLED[arm]} --no-tie-embeddings"
               for arm in ("rank64_adamw", "rank16_adamw", "rank64_spectron", "rank16_spectron")}
CONTROLLED |= {f"{arm}_equal_flop": f"{CONTROLLED[arm]} --epochs {{equal_flop.{rank}}}"
               for rank, arm in ((64, "rank64_spectron"), (16, "rank16_spectron"))}
CONTROLLED |= {f"first_{arm}": f"{ARMS[arm]} --epochs 1 --steps-per-epoch 1 --warmup-steps 0 --dropout 0.1 --telemetry"
               for arm in ("dense_adamw_tied", "rank64_adamw", "rank16_adamw")}  # the very first step
CONTROLLED |= {f"undecayed_{arm}": f"{ARMS[arm]} --dropout 0.1 --telemetry"
               for arm in ("dense_adamw_tied", "rank64_adamw", "rank16_adamw")}  # next to no decay
CUT = AT_BEST["v11_tenth"]  # the other cuts take the settings of this one
BUDGETED = {
    **{arm: AT_BEST[arm] for arm in CHANGING},
    "tenth_wide": f"{CUT} --init-rank {{wide}}", "tenth_once": f"{CUT} --cuts 1",
    "tenth_plain": f"{CUT} --cut-metric plain",
    **{f"tenth_{signal}": f"{CUT} --rank-signal {signal}" for signal in ("uniform", "stable", "energy", "gradient")},
    "tenth_plain_uniform": f"{CUT} --cut-metric plain --rank-signal uniform",
    "tenth_afresh": f"{TENTH} {{v11_tenth.3}} --cuts 0 --ranks-from {{v11_tenth.log}}",
    "quarter_narrow": AT_BEST["v11_quarter"] + " --init-rank 64"}
NARROWED = {arm: AT_BEST[arm] for arm in NARROW}
# On the whole text, with the settings of the short one; and with those that were tuned on it.
WHOLE_TEXT = {f"whole_{arm}": f"{(AT_BEST | BUDGETED)[arm]} {WHOLE}"
              for arm in ("dense_muon_tied", "dense_adamw", "dense_adamw_tied", "narrow192_spectron",
                          "narrow136_muon_tied", "narrow80_muon_tied", "tenth_wide")}
WHOLE_TEXT |= {f"tuned_{arm}": AT_BEST[arm] for arm in ON_WHOLE}
# Arms at the best of these decays, measured on the official validation file, which has 20 times the words of the text
# that they hold out.
OFFICIAL = {f"official_{arm}": f"{UNTUNED[arm]} --dtype float32 {{further_{arm}.1}} {{test}}" for arm in HEADLINE}
LARGEST = {arm: f"{AT_BEST[arm]} {{test}}" for arm in AT_REPORT}
# Trained models, three seeds of each, and what compress.py does with them: a record per command in compress/NAME.jsonl.
COMPRESSED = {f"compressed_{name}": AT_BEST[arm] for name, arm in (
    ("dense", "dense_adamw"), ("muon", "dense_muon"), ("v11", "v11_tenth"), ("narrow136", "narrow136_muon_tied"),
    ("narrow80", "narrow80_muon_tied"), ("narrow192", "narrow192_spectron"))}
TO_CUT, TO_TUNED = ("--out {cut} --overwrite {text}", "--uncut {model} --out {tuned} --overwrite {text} --steps 80")
COMPRESSIONS = ["spectrum {model}", "compare {model} --only linear {text}", "compare {model} {text}",
                f"fit {{model}} --loss +5% {TO_CUT}"]
OF_DENSE = [  # of compressed_dense and compressed_muon; the others' ranks and widths are too low for these
    *(f"cut {{model}} --only linear --rank {{width_over_{part}}} --metric {metric} {TO_CUT}" for part in (16, 8, 4, 2)
      for metric in ("plain", "fisher")),
    f"cut {{model}} --keep 0.0625 {TO_CUT}", f"tune {{cut}} --train factors {TO_TUNED}",
    *(f"tune {{cut}} --train lora --lora-rank {rank} {TO_TUNED}" for rank in (2, 8, 32))]
COMMANDS = (SEARCH | RUNS | LATER | TUNING | CONTROLLED | BUDGETED | NARROWED | WHOLE_TEXT | OFFICIAL | COMPRESSED
            | LARGEST)
PROBED = {"bidirectional", "adaptive", "bidirectional_dense", "bidirectional_fixed", "synthetic",
          "synthetic_bidirectional"}
TIMED = [name for name, command in RUNS.items()
         if command.startswith("v10") and UNMASKED not in command and name != "exact"]


def variant_of(command):
    """The Variant whose script a command begins with."""
    return VARIANTS[command.split()[0]]()


# What a placeholder begins with: a run, an arm, `search`, `speed`, `equal_flop` or a plain value; what follows its dot.
PLACEHOLDER = re.compile(r"{(\w+)\.?(\w*)}")


def tries_before(arm, last):
    """{name of a run: its flags}: the tries of an arm in rounds 1 to `last`."""
    return {name: flags for of_round in rounds(arm)[:int(last)] for name, flags in of_round.items()}


# ---- One run ---------------------------------------------------------------------------------------------------------

class Run(NamedTuple):
    name: str
    seed: int = 0

    @property
    def stem(self):
        return f"{self.name}_s{self.seed}"


class Study:
    """A folder of logs, and how its runs are made."""

    def __init__(self, args):
        self.out, self.args = Path(args.out), args
        self.failed, self.stopping, self.running = [], threading.Event(), {}
        self.diverged = set()  # the stems of tries whose loss was not finite: another one of the arm is the best
        self.runs, self.later = self.plan(args)

    def plan(self, args):
        """-> (runs, those that come when the first are done)"""
        self.size = SIZES[args.size] + (f" {SHORT}" if args.short else "")
        self.defaults = v10.build_parser(v10.Variant()).parse_args(self.size.split())
        runs = [*map(Run, [*SEARCH, *TUNING]), *(Run(name, seed) for seed in SEEDS[:args.seeds] for name in RUNS),
                *(Run(name, seed) for seed in UNSEEN[:args.seeds] for name in CONTROLLED | BUDGETED | NARROWED),
                *(Run(name, seed) for seed in UNSEEN[:min(args.seeds, 3)]
                  for name in WHOLE_TEXT | OFFICIAL | COMPRESSED | LARGEST)]
        if args.size == "small":
            runs = [run for run in runs if LARGE not in COMMANDS[run.name]]
        else:  # without those whose widths and text are the small size's
            runs = [run for run in runs if LARGE in COMMANDS[run.name] or not any(
                words in COMMANDS[run.name] for words in ("--d-model", WHOLE, "{further"))]
        later = [Run(name, seed) for name in LATER for seed in SEEDS[:args.seeds]]
        wanted = {run.stem for run in [*runs, *later] if run.name in (args.only or [run.name])}
        for run in reversed([*runs, *later]):  # what a run needs comes before it
            wanted |= set(self.needs(run)) if run.stem in wanted else set()
        return tuple([run for run in some if run.stem in wanted] for some in (runs, later))

    def log(self, stem):
        return self.out / f"{stem}.jsonl"

    def records(self, stem, kind):
        """The records of this kind in a log; [] if it is not there yet or damaged, of which v10 itself says more."""
        try:
            records = [record for _, record in plot_logs.records(self.log(stem), quiet=True)]
        except plot_logs.LogError:
            return []
        return [record for record in records if isinstance(record, dict) and record.get("kind") == kind]

    def done(self, run):
        return bool(self.records(run.stem, "end")) and not self.unprobed(run) and not self.uncompressed(run)

    def describe(self, run):
        """Its command, as far as it is known before other runs have ended."""
        return " ".join(COMMANDS[run.name].split())

    def needs(self, run):
        """The stems of the runs that must have ended before this one, as its command names them."""
        needed = []
        for name, what in PLACEHOLDER.findall(COMMANDS[run.name]):
            if name in TUNED and what.isdigit():
                needed += [f"{name}_s0" for name in tries_before(name, what)]
            elif name in COMMANDS:
                needed.append(f"{name}_s{run.seed}")
            if name == "search":
                needed += [f"{name}_s0" for name in SEARCH]
            if name == "speed":
                needed += [f"{name}_s0" for name in ("dense", *TIMED)]
        return needed

    def unprobed(self, run):
        """The function that has still to look at a run's model, if there is one."""
        look = probe if run.name in PROBED else losses_by_count if run.name in OFFICIAL else None
        return look if look and all(record["run"] != run.name or record["seed"] != run.seed
                                    for record in self.records("probes", look.__name__)) else None

    def uncompressed(self, run):
        """What compress.py has still to do with a run's model."""
        if run.name not in COMPRESSED:
            return []
        wanted = COMPRESSIONS + (OF_DENSE if run.name in ("compressed_dense", "compressed_muon") else [])
        return wanted[len(self.records(f"compress/{run.stem}", "compress")):]

    def command(self, run):
        """The command line of a run, as a user would type it."""
        words = shlex.split(self.fill(COMMANDS[run.name], run.seed))
        given = [] if "--data-file" in words else ["--data-file", str(self.data())]
        return [sys.executable, str(v10.HERE / VARIANTS[words[0]].name), *words[1:], *given, "--seed", str(run.seed),
                "--log-file", str(self.log(run.stem))]

    def parse(self, command):
        """The flags of a command, as seed 0 fills it in."""
        return v10.parse_flags(variant_of(command), shlex.split(self.fill(command, seed=0))[1:])

    def fill(self, command, seed):
        """A command with its placeholders filled in."""
        return PLACEHOLDER.sub(lambda found: str(self.value(*found.groups(), seed)), command)

    def value(self, name, what, seed):
        """What {name} or {name.what} stands for in a run of this seed."""
        if name in TUNED and what.isdigit():
            loss = "test_loss_last" if name in ON_FURTHER else "final_val_loss"
            return self.fill(self.lowest(tries_before(name, what), loss), seed)
        match name, what:
            case "search", "best":
                return self.fill(self.lowest(SEARCH, "best_val_loss").removeprefix("v7 {size}"), seed)
            case "speed", "epochs":
                return round(self.records("speed", "speed")[0]["over_dense"]["tuned_adaptive"] * self.defaults.epochs)
            case "equal_flop", rank:
                return self.equal_flop_epochs(int(rank))
            case _, "log":
                return shlex.quote(str(self.log(f"{name}_s{seed}")))
            case _, "mean_rank":
                return round(self.records(f"{name}_s{seed}", "epoch")[-1]["rank_avg"])
        return {"size": self.size, "short": SHORT if self.args.short else "",
                "data_file": shlex.quote(self.args.data_file), "steps_per_epoch": self.defaults.steps_per_epoch,
                "lr_1": f"{self.defaults.lr:g}", "lr_2": f"{2 * self.defaults.lr:g}",
                "half_the_epochs": (self.defaults.epochs + 1) // 2, "twice_the_epochs": 2 * self.defaults.epochs,
                "three_times_the_epochs": 3 * self.defaults.epochs,
                "wide": min(128, self.defaults.d_model),
                "test": f"--test-file {shlex.quote(self.args.test_file)}" if self.args.test_file else "",
                "further": f"--test-file {shlex.quote(str(self.further()))}"}[name]

    def lowest(self, commands, loss):
        """Of {name: command} the one whose run ended with the lowest loss."""
        ends = {name: end for name in commands for end in self.records(f"{name}_s0", "end")}
        return commands[min(ends, key=lambda name: ends[name][loss])]

    def equal_flop_epochs(self, rank):
        """The epochs in which layers of a rank, stepped by Spectron, cost as many multiplications as dense ones,
        stepped by AdamW, in those of the size."""
        size = self.defaults
        settings = counts.settings_of(size.d_model, size.n_layers, len(self.corpus().vocabulary), size.block_size,
                                      size.batch_size, size.d_ff)
        dense = counts.step_multiplications(settings, None)
        factored = counts.step_multiplications(settings | {"optimizer": "spectron"}, [rank] * len(settings["layers"]))
        return round(self.defaults.epochs * dense / factored)

    def corpus(self):
        return v10.load_corpus(v10.find_data(str(self.data())), self.defaults.val_fraction, self.defaults.block_size,
                               min_count=self.defaults.min_count)

    def data(self):
        """The text that a run trains on, if its command names no other."""
        return self.args.data_file if self.args.size == "report" else self.out / "words.tokens"

    def further(self):
        """A text like that of the small size, to tune on."""
        return self.out / "further.tokens"

    def prepare(self):
        """Make the small size's text, and count on it. Raises UserError if the folder has runs of another size or text,
        or if there is no text."""
        for name in (self.args.data_file, *([self.args.test_file] if self.args.test_file else [])):
            if not v10.existing_data(name):
                raise v10.UserError(f"there is no {name}: `make data` fetches WikiText-2")
        for run in (run for run in [*self.runs, *self.later] if "{size}" in COMMANDS[run.name]):
            for record in self.records(run.stem, "run"):
                own = {name.replace("-", "_"): int(width)
                       for name, width in re.findall(r"--(d-model|d-ff) (\d+)", COMMANDS[run.name])}
                for name in ("d_model", "n_layers", "d_ff", "block_size", "batch_size", "steps_per_epoch"):
                    if record.get(name) != own.get(name, getattr(self.defaults, name)):
                        raise v10.UserError(f"{self.log(run.stem)} is of another size: choose another --out")
        path = self.out / "words.tokens"
        is_new = not path.exists()
        if self.args.size != "report":
            words, _ = v10.read_words(v10.find_data(self.args.data_file))
            text = " ".join(words[:WORDS])
            if is_new:
                path.write_text(text, encoding="utf-8")
            elif path.read_text(encoding="utf-8") != text:
                raise v10.UserError(f"{path} was made of another text than {self.args.data_file}: choose another --out")
            if not self.further().exists():
                if len(words) >= WORDS + FURTHER:
                    self.further().write_text(" ".join(words[WORDS:WORDS + FURTHER]), encoding="utf-8")
                elif any("{further" in COMMANDS[name] for name in self.args.only or []):
                    raise v10.UserError(f"{self.args.data_file} has {len(words):,} words, and runs that are tuned on "
                                        f"further ones need {WORDS + FURTHER:,}")
                else:
                    self.runs = tuple(run for run in self.runs if "{further" not in COMMANDS[run.name])
        try:
            corpus = self.corpus()
            texts = {"val": corpus.val}
            if self.args.test_file:
                texts["test"] = v10.read_tokens(v10.find_data(self.args.test_file), "words", corpus.vocabulary)
        except v10.UserError:
            if is_new:
                path.unlink(missing_ok=True)
            raise
        if not any(record.keys() >= texts.keys() for record in self.records("ngrams", "ngrams")):
            unk = corpus.vocabulary.index("<unk>") if "<unk>" in corpus.vocabulary else -1
            v10.write_record(self.log("ngrams"), "ngrams", **{
                name: ngram_losses(corpus.train, text) | {"unk": (text == unk).float().mean().item()}
                for name, text in texts.items()})

    def train(self, run):
        """Start or resume a run, wait for it, probe it, keep only its log."""
        if self.stopping.is_set() or self.done(run):
            return
        log = self.log(run.stem)
        missing = [needed for needed in self.needs(run) if not self.records(needed, "end")]
        if set(missing) - self.diverged or missing and missing == self.needs(run):
            self.failed.append(f"{run.stem}: it needs {missing[0]}, which has not ended")
            return
        command = self.command(run)
        if not self.records(run.stem, "end"):
            code = self.execute(run, command + (["--resume"] if log.exists() and log.stat().st_size else []))
            if code:
                return
        data = command[command.index("--data-file") + 1]
        if look := self.unprobed(run):
            test = [v10.find_data(self.args.test_file)] if look is losses_by_count and self.args.test_file else []
            look(log, v10.find_data(data), self.log("probes"), run, *test)
        if self.uncompressed(run) and self.compress(run, data):
            return
        for kind in (".pt", ".prev.pt", ".best.pt", ".cut.pt", ".tuned.pt", ".txt"):
            log.with_suffix(kind).unlink(missing_ok=True)

    def compress(self, run, data):
        """Do with a run's model what compress.py has still to do -> the exit code of the last command."""
        names = {name: shlex.quote(str(self.log(run.stem).with_suffix(f".{kind}.pt")))
                 for name, kind in (("model", "best"), ("cut", "cut"), ("tuned", "tuned"))}
        names |= {f"width_over_{part}": self.defaults.d_model // part for part in (16, 8, 4, 2)}
        names["text"] = shlex.join(["--data-file", data, "--seed", str(run.seed)])
        for compression in self.uncompressed(run):
            code = self.execute(run, [sys.executable, str(v10.HERE / "compress.py"),
                                      *shlex.split(compression.format(**names)), "--log-file",
                                      str(self.log(f"compress/{run.stem}"))])
            if code:
                return code
        return 0

    def execute(self, run, command):
        """Run a command to its end, its screen in a file beside the log -> its exit code."""
        screen = self.log(run.stem).with_suffix(".txt")
        threads = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
        with open(screen, "a", encoding="utf-8") as output:
            output.write(shlex.join(command) + "\n")
            output.flush()
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                       env=os.environ | {"OMP_NUM_THREADS": threads})
        self.running[run.stem] = process
        if self.stopping.is_set():  # which may have been since train() looked
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        del self.running[run.stem]
        if code and not self.stopping.is_set():
            last = screen.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
            if run.name in TUNING and "is not finite" in last:  # no other run has to do without it
                self.diverged.add(run.stem)
                v10.say(f"study.py: {run.stem} is left out: {last}")
            else:
                self.failed.append(f"{run.stem}: exit code {code}: {last}")
        return code

    def measure(self):
        """Measure the time of steps, once, if there are runs that ask for it."""
        if not self.records("speed", "step_costs") and {*ARMS, *BUDGETED} <= {run.name for run in self.runs}:
            measure_step_costs(self)
        if not self.records("speed", "speed") and any("{speed" in COMMANDS[run.name] for run in self.later):
            measure_speed(self)

    def stop(self):
        """End the runs that are going on; each saves where it stands."""
        self.stopping.set()
        for process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)

    def all(self, runs):
        """Train these runs, `jobs` side by side, in order: what a run needs is before it."""
        left = [run for run in runs if not self.done(run)]
        with ThreadPoolExecutor(self.args.jobs) as pool, \
                tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", disable=None) as bar:
            waiting = {}
            for run in left:
                needed = [waiting[stem] for stem in self.needs(run) if stem in waiting]
                waiting[run.stem] = pool.submit(lambda run=run, needed=needed: (wait(needed), self.train(run)))
            try:
                for run in left:
                    while not waiting[run.stem].done():
                        bar.set_postfix_str(", ".join(self.running))
                        time.sleep(0.5)
                    waiting[run.stem].result()
                    bar.update()
                    if bar.disable and self.done(run):
                        print(f"{run.stem} is done", flush=True)
            except BaseException:
                self.stop()
                raise
        return not self.failed


# ---- What trained models do ------------------------------------------------------------------------------------------

@torch.no_grad()
def probe(log, data, out, run, every=8):
    """What the best model of a run does on the validation text -> a record in `out`.

    The loss as it was trained, and with the mask put on for the evaluation only. The loss at the last position of each
    block, whose target is not among the inputs, and at all others. And a test of what it reads: every eighth input word
    is replaced by one from elsewhere in the text; how often is the top prediction at the position before it the word
    that was put there, and how often the word of the text? How often is it the latter with nothing replaced?
    """
    content = v10.load(log.with_suffix(".best.pt"))
    args = v10.read_records(log)[0]
    tokens = v10.load_corpus(data, args["val_fraction"], args["block_size"], min_count=args["min_count"]).val
    record = {"kind": "probe", "run": run.name, "seed": run.seed, "attention": args["attention"]}
    generator, T = torch.Generator().manual_seed(0), args["block_size"]
    blocks = (len(tokens) - 1) // T
    x, y = (tokens[i:i + blocks * T].view(-1, T) for i in (0, 1))
    swapped, before = x.clone(), slice(every - 1, -1, every)
    elsewhere = torch.randint(len(tokens), swapped[:, every::every].shape, generator=generator)
    swapped[:, every::every] = tokens[elsewhere]
    for attention in (args["attention"], "causal"):
        model = v10.build_model(content | {"config": content["config"] | {"attention": attention}})
        model.eval()
        losses, hits = [], []
        for part in range(0, blocks, 16):
            some = slice(part, part + 16)
            logits = model(x[some])
            losses.append(torch.nn.functional.cross_entropy(logits.mT, y[some], reduction="none"))  # (B, T)
            top, word = model(swapped[some]).argmax(-1)[:, before], y[some, before]
            hits.append(torch.stack([logits.argmax(-1)[:, before] == word, top == word,
                                     top == swapped[some, every::every]], dim=-1).float())
        losses, hits = torch.cat(losses), torch.cat(hits).mean((0, 1))
        if attention == args["attention"]:
            record |= {"val_loss": losses.mean().item(), "loss_at_last_position": losses[:, -1].mean().item(),
                       "loss_at_other_positions": losses[:, :-1].mean().item(),
                       **dict(zip(("accuracy", "predicts_word_of_the_text", "predicts_word_put_there"), hits.tolist(),
                                  strict=True))}
        record["val_loss_masked"] = losses.mean().item()  # the second pass has the mask on
    v10.write_record(out, **record)


COUNTS = (1, 10, 100)  # a word is in the training text never, less than 10 times, less than 100 times, or more often


def losses_by_count(log, data, out, run, test=None):
    """What the last model of a run loses on words by how often the training text has them, see COUNTS, and on <unk>,
    in the held-out text and the test file -> a record in `out`: [share of the words, mean loss] for each."""
    model, args = v10.build_model(v10.load(log.with_suffix(".pt"))), v10.read_records(log)[0]
    corpus = v10.load_corpus(data, args["val_fraction"], args["block_size"], min_count=args["min_count"])
    record = {"kind": "losses_by_count", "run": run.name, "seed": run.seed}
    texts = {"val": corpus.val}
    if test:
        texts["test"] = v10.read_tokens(test, "words", corpus.vocabulary)
    count = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
    kinds = torch.bucketize(count, torch.tensor(COUNTS), right=True)
    kinds[[word == "<unk>" for word in corpus.vocabulary]] = len(COUNTS) + 1
    for name, tokens in texts.items():
        losses = torch.cat([batch.flatten() for batch in compress.token_losses(model, tokens)])
        kind = kinds[tokens[1:]]
        record[name] = [[(kind == i).float().mean().item(), losses[kind == i].mean().item() if i in kind else None]
                        for i in range(len(COUNTS) + 2)]
    v10.write_record(out, **record)


def ngram_losses(train, val):
    """The loss of counting, on val (N,) in nats per token: unigrams with one added to each count, and bigrams mixed
    with them after Witten and Bell (1991): a new word after w has the weight of the distinct words seen after w. And
    `unseen`: the share of words that the training text does not have, whose losses are the highest."""
    words = int(max(train.max(), val.max())) + 1
    train, val = train.tolist(), val.tolist()
    count, pairs = Counter(train), Counter(zip(train, train[1:], strict=False))
    after, kinds = Counter(train[:-1]), Counter(first for first, _ in pairs)
    unigram = torch.tensor([(count[word] + 1) / (len(train) + words) for word in val[1:]], dtype=torch.float64)
    bigram = torch.tensor([
        (pairs[first, second] + kinds[first] * p) / (after[first] + kinds[first]) if after[first] else p
        for first, second, p in zip(val, val[1:], unigram.tolist(), strict=False)], dtype=torch.float64)
    return {"unigram": -unigram.log().mean().item(), "bigram": -bigram.log().mean().item(),
            "unseen": sum(not count[word] for word in val[1:]) / (len(val) - 1)}


# ---- The time of a step ----------------------------------------------------------------------------------------------

def stepper(corpus, device, variant, args, ranks=None):
    """-> (a function that takes a step of training as these flags ask and gives its seconds, the model)."""
    left = iter(ranks) if ranks else itertools.repeat(getattr(args, "init_rank", None))
    config = v10.GPTConfig.of_flags(args, len(corpus.vocabulary))
    model = v10.place(v10.GPT(config, lambda n, m: variant.linear(n, m, next(left))), device)
    dtype = v10.choose_dtype(device, args.d_model)[0] if args.dtype == "auto" else args.dtype
    model.low_precision = dtype == "bfloat16"
    optimizers, generator = variant.make_optimizers(model, args), torch.Generator().manual_seed(0)
    train, parts = corpus.train.to(device), v10.default_grad_accum(args.batch_size, args.block_size, device)

    def step():
        batch = v10.sample_batch(train, args.batch_size, args.block_size, generator)
        began = v10.now(device)
        v10.train_step(model, optimizers, *batch, grad_accum=parts)
        return v10.now(device) - began
    return step, model


def interleaved(steps, rounds):
    """Each of {kind: a function that gives seconds} in turn, several rounds -> {kind: the median}."""
    taken = {kind: [] for kind in steps}
    for number in tqdm(range(rounds + 1), desc="speed", unit="round", disable=None):  # the first one warms up
        for kind, step in steps.items():
            seconds = step()
            if number:
                taken[kind].append(seconds)
    return {kind: median(values) for kind, values in taken.items()}


def measure_speed(study, rounds=9):
    """The step time of a run, on average over its epochs' ranks, over the dense model's: one step of each in turn."""
    ranks = {}  # those that the epochs of each run were trained with, of all or of eight
    for name in TIMED:
        (first,), epochs = (study.records(f"{name}_s0", kind) for kind in ("run", "epoch"))
        of_run = [first["initial_ranks"], *(epoch["ranks"] for epoch in epochs[:-1])]
        ranks[name] = [tuple(of_run[i * (len(of_run) - 1) // 7]) for i in range(8)]
    device, corpus = v10.pick_device("auto"), study.corpus()
    kinds = sorted({(), *(r for of_run in ranks.values() for r in of_run)})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // study.args.jobs))
    times = interleaved({kind: stepper(corpus, device, v10.Variant() if kind else v7.Dense(), study.parse(
        "v10 {size}" if kind else "v7 {size}"), kind)[0] for kind in kinds}, rounds)
    v10.write_record(
        study.log("speed"), "speed", rounds=rounds, device=v10.device_name(device), torch=torch.__version__,
        over_dense={name: fmean(times[r] for r in of_run) / times[()] for name, of_run in ranks.items()})


def measure_step_costs(study, rounds=25):
    """The step time of each arm of v11's comparison over that of the dense one with AdamW: one step of each in turn.
    Self-guided training uses its guides in half of the steps of its first half; its second half is AdamW's arm. Where
    ranks change, the mean over up to eight stages of the first run, which also pays for the time of its cuts."""
    device, corpus, steps, shares, cuts = v10.pick_device("auto"), study.corpus(), {}, {}, {}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // study.args.jobs))
    for arm, command in ARMS.items():
        for guided in (False, True) if arm.endswith("_selfguided") else (None,):
            args = study.parse(f"{command} --dropout 0.1")
            steps[arm, guided], model = stepper(corpus, device, variant_of(command), args)
            for layer in model.linears().values():
                layer.uses_guide = guided
        shares[arm] = {(arm, None): 1} if not arm.endswith("_selfguided") else {
            (arm, False): 0.25, (arm, True): 0.25, (arm.replace("selfguided", "adamw"), None): 0.5}
    for arm in (*CHANGING, "tenth_wide", "quarter_narrow"):
        run = plot_logs.read_log(study.log(Run(arm, UNSEEN[0]).stem), arm)
        stages = counts.ranks_of_steps(run)
        chosen = [stages[i * (len(stages) - 1) // 7] for i in range(8)] if len(stages) > 8 else stages
        args = study.parse(COMMANDS[arm])
        for i, (_, ranks) in enumerate(chosen):
            steps[arm, i], _ = stepper(corpus, device, variant_of(COMMANDS[arm]), args, ranks)
        shares[arm] = {(arm, i): length / sum(length for length, _ in chosen) for i, (length, _) in enumerate(chosen)}
        cuts[arm] = sum(cut["cut_sec"] for cut in run.cuts) / run.total("train_sec")
    times = interleaved(steps, rounds)
    v10.write_record(
        study.log("speed"), "step_costs", rounds=rounds, device=v10.device_name(device), torch=torch.__version__,
        over_dense={arm: (1 + cuts.get(arm, 0)) * sum(share * times[kind] for kind, share in of_arm.items())
                    / times["dense_adamw", None] for arm, of_arm in shares.items()})


# ---- Command line ----------------------------------------------------------------------------------------------------

@v10.screens()
def main(argv=None):
    number = v10.number
    parser = v10.Parser(prog="study.py", description="Runs the study.", allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=os.path.expanduser, default="logs/study", help="folder of the logs")
    parser.add_argument("--size", choices=SIZES, default="small", help="report: v10's defaults, for a GPU")
    parser.add_argument("--seeds", type=number(int, least=1, below=len(UNSEEN) + 1), default=len(UNSEEN),
                        help="at most so many of each run's, which are 3 or, for v11's comparison, 5")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=sorted(COMMANDS),
                        help="these runs, as --list names them, and those that they need")
    parser.add_argument("--jobs", type=number(int, least=1, below=1000), default=2, help="runs side by side")
    parser.add_argument("--data-file", type=os.path.expanduser, default=v10.DEFAULT_DATA,
                        help="text; a bare name is looked for in data/ too")
    parser.add_argument("--test-file", type=os.path.expanduser, default="wiki.valid.tokens",
                        help="one more held-out text; '' for none")
    parser.add_argument("--list", action="store_true", help="print each run, its command, and whether it is done")
    parser.add_argument("--short", action="store_true", help="tiny models, minutes in all, to check that all works")
    return conduct(Study, parser, argv)


def conduct(kind, parser, argv):
    """Parse the command line of a study of this kind, and do or list what it asks for -> the exit code."""
    name = parser.prog
    try:
        study = kind(parser.parse_args(argv))
        if not study.runs and not study.later:
            raise v10.UserError(f"--only {' '.join(study.args.only)}: there is no such run of this size")
        if study.args.list:
            for run in [*study.runs, *study.later]:
                print(f"{'done' if study.done(run) else '-':5} {run.stem:30} {study.describe(run)}")
            return 0
        study.out.mkdir(parents=True, exist_ok=True)
        v10.handle_signals(v10.interrupt)
        study.prepare()
        complete = study.all(study.runs)
        if complete:
            study.measure()
            complete = study.all(study.later)
        for failure in study.failed:
            print(f"{name}: error: {failure}", file=sys.stderr)
        return 0 if complete else 1
    except v10.UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: error: cannot use {error.filename or study.out}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    v10.leave(main())
