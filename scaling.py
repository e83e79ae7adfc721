"""The scaling law: how the loss falls with compute, dense and of low rank, on a text whose entropy is known.

    python3 scaling.py               every run that is not done yet, two side by side    -> logs/scaling/
    python3 scaling.py --list        each run, and whether it is done
    python3 law.py logs/scaling      what they say

Three arms: dense layers with AdamW, dense layers with Muon, and factors of a quarter of the width with Spectron, which
is the ratio of its paper. The head is tied in all. Each arm has four budgets of compute, a factor of 3 apart, and five
widths at each budget, trained for as many steps as the budget allows. The text is synthetic, and no run reads a token
of it twice. It has 64 topics, and Zipf's law for them, so that a larger model has always more to learn, and rarer: with
four equal topics the loss falls in one step, once a model finds them. Rates are tuned at two ends, the smallest width
of the smallest budget and the largest of the last but one, by a parabola through the best try and those beside it; the
others lie on the line through these two. So what is due to a run's length counts as due to its width. Near the best
size each arm is run again on two other seeds, at two budgets, and at one of them at half and twice its rate. law.py
fits power laws to the logs.
"""
import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import counts  # noqa: E402
import study  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402

ARMS = {"adamw": "v7 --tie-embeddings", "muon": "v7 --tie-embeddings --optimizer muon --factor-decay 0",
        "spectron": "v11 --cuts 0 --factor-decay 0"}
RATES = {"adamw": {"--lr": 8e-3}, "muon": {"--eta": 0.04, "--lr": 8e-3}, "spectron": {"--eta": 0.07, "--lr": 4e-3}}
TRIED = (0.25, 0.5, 1, 2, 4, 8)  # times these, the linear layers' and the others' together; even in the logarithm
WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
BLOCKS = dict(zip(WIDTHS, (2, 2, 2, 2, 3, 3, 4, 4, 5), strict=True))
BUDGETS = [5e11 * 3**i for i in range(4)]  # multiplications of a run, forward and backward
FIRST, PER_BUDGET = {"adamw": 0, "muon": 0, "spectron": 1}, 5  # an arm's smallest width; each budget begins one later
AGAIN = {1: {"adamw": 32, "muon": 32, "spectron": 64}, 3: {"adamw": 64, "muon": 64, "spectron": 128}}  # by budget
SEEDS, TIMES = (1, 2), (0.5, 2)  # of the widths above; times the rate, at the first of these budgets
HELD_OUT = 0.005  # of the text
SIZE = {"vocab_size": 500, "block_size": 64, "batch_size": 32}
TEXT = (f"--words {SIZE['vocab_size']} --topics 64 --topic-zipf 1.5 --classes 20 --switch 0.01 --seed 1 "
        f"--context {SIZE['block_size']} --val-fraction {HELD_OUT}")
COMMON = (f"--block-size {SIZE['block_size']} --batch-size {SIZE['batch_size']} --epochs 1 --one-pass --dropout 0 "
          f"--lr-schedule cosine --weight-decay 0.01 --checkpoint-minutes 60 --val-fraction {HELD_OUT} "
          "--dtype {dtype} --n-heads {heads}")


def points(arm):
    """[(budget, width)] of an arm, budgets by number."""
    first = FIRST[arm]
    return [(i, width) for i in range(len(BUDGETS)) for width in WIDTHS[first + i:first + i + PER_BUDGET]]


def tries(arm):
    """{width: names of the runs that its rate is tuned by}, at the smallest budget and at the last but one."""
    ends = min(points(arm)), max(point for point in points(arm) if point[0] == len(BUDGETS) - 2)
    return {width: [f"{arm}_c{i}_d{width}_rate{factor}" for factor in TRIED] for i, width in ends}


def of_name(name):
    """A run's name -> (arm, budget, width, the factor of its rate if it is a try, else None, what the factor of its
    width is multiplied by)."""
    arm, budget, width, kind, factor = re.fullmatch(r"(\w+)_c(\d)_d(\d+)(?:_(rate|times)([\d.]+))?", name).groups()
    return (arm, int(budget), int(width), float(factor) if kind == "rate" else None,
            float(factor) if kind == "times" else 1)


def steps(arm, budget, width):
    """How many steps a budget allows."""
    settings = counts.settings_of(width, BLOCKS[width], **SIZE, optimizer=arm)
    ranks = [width // 4] * len(settings["layers"]) if arm == "spectron" else None
    return round(BUDGETS[budget] / counts.step_multiplications(settings, ranks))


class Scaling(study.Study):
    """The runs, in a folder of logs."""

    def plan(self, args):
        self.folder = self.out / "synthetic"
        names = [name for arm in ARMS for names in tries(arm).values() for name in names]
        names += [f"{arm}_c{i}_d{width}" for arm in ARMS for i, width in points(arm)]
        again = [f"{arm}_c{budget}_d{widths[arm]}" for budget, widths in AGAIN.items() for arm in ARMS]
        names += [f"{name}_times{factor}" for name in again[:len(ARMS)] for factor in TIMES]
        return [*map(study.Run, names), *(study.Run(name, seed) for name in again for seed in SEEDS)], []

    def needs(self, run):
        arm, *_, tried, _ = of_name(run.name)
        return [] if tried else [f"{name}_s0" for names in tries(arm).values() for name in names]

    def factor(self, arm, width):
        """What the rate of a width is multiplied by: in logarithms on a line through the best ones of two widths."""
        (low, first), (high, last) = self.best(arm)
        return first * (last / first) ** (math.log(width / low) / math.log(high / low))

    def best(self, arm):
        """[(a width, its best factor)], the smallest width first: the lowest point of a parabola, in the logarithm of
        the factor, through the best that was tried and the two beside it; the last one tried if that is best."""
        found = []
        for width, names in sorted(tries(arm).items()):
            losses = [self.records(f"{name}_s0", "end")[0]["final_val_loss"] for name in names]
            i = losses.index(min(losses))
            shift = 0
            if 0 < i < len(TRIED) - 1:
                left, middle, right = losses[i - 1:i + 2]
                shift = (left - right) / (left - 2 * middle + right) / 2 if left + right > 2 * middle else 0
            found.append((width, TRIED[i] * (TRIED[1] / TRIED[0]) ** shift))
        return found

    def command(self, run):
        arm, budget, width, tried, times = of_name(run.name)
        script, *flags = ARMS[arm].split()
        factor = tried or self.factor(arm, width) * times
        rates = [word for flag, rate in RATES[arm].items() for word in (flag, f"{rate * factor:.3g}")]
        n_steps = steps(arm, budget, width)
        return [sys.executable, str(v10.HERE / study.VARIANTS[script].name), *flags,
                *COMMON.format(dtype=self.args.dtype, heads=max(1, width // 32)).split(),
                "--d-model", str(width), "--d-ff", str(4 * width), "--n-layers", str(BLOCKS[width]),
                *(["--init-rank", str(width // 4)] if arm == "spectron" else []), *rates,
                "--steps-per-epoch", str(n_steps), "--warmup-steps", str(n_steps // 20),
                "--seed", str(run.seed), "--data-file", str(self.folder), "--log-file", str(self.log(run.stem))]

    def describe(self, run):
        arm, budget, width, tried, times = of_name(run.name)
        rate = f"rates times {tried:g}" if tried else f"{times:g} times the rate of its width"
        return f"{ARMS[arm]}, width {width}, {BLOCKS[width]} blocks, {steps(arm, budget, width):,} steps, {rate}"

    def prepare(self):
        """Make the text, as long as the longest run needs it, and a folder of its tokens. Raises UserError if there are
        runs of another precision, or if the folder is not that of the text."""
        for run in self.runs:
            if any(record["dtype"] != self.args.dtype for record in self.records(run.stem, "run")):
                raise v10.UserError(f"{self.log(run.stem)} is of another --dtype than {self.args.dtype}: choose "
                                    "another --out")
        most = max(steps(arm, i, width) for arm in ARMS for i, width in points(arm))
        tokens = math.ceil((SIZE["batch_size"] * (SIZE["block_size"] * most + 1) + 1) / (1 - HELD_OUT))
        text, folder = self.folder.with_suffix(".tokens"), self.folder
        if not folder.exists():
            shutil.rmtree(folder.with_name(folder.name + ".part"), ignore_errors=True)  # of a start that was cut off
            text.with_name(text.name + ".numbers.part").unlink(missing_ok=True)
            for script, flags in (("synthetic.py", [*TEXT.split(), "--tokens", tokens, "--overwrite", "--out", text]),
                                  ("prepare.py", [text, "--out", folder])):
                if subprocess.run([sys.executable, v10.HERE / "data" / script, *map(str, flags)]).returncode:
                    raise v10.UserError(f"data/{script} could not make {flags[-1]}: see above")
        text.unlink(missing_ok=True)
        try:
            sidecar, corpus = (json.loads(path.read_text(encoding="utf-8"))
                               for path in (text.with_suffix(".json"), folder / "corpus.json"))
            same = sidecar["entropy_floor"] == corpus["entropy_floor"] and sidecar["context"] == SIZE["block_size"]
        except (OSError, ValueError, LookupError, TypeError):
            same = False
        if not same:
            raise v10.UserError(f"{folder} and {text.with_suffix('.json')} are not of one text: remove both, and the "
                                "runs that read it")

    def measure(self):
        """Say where a tuned rate is at the edge of what was tried, and what comes next; compute is counted."""
        for arm in ARMS:
            for width, factor in self.best(arm):
                if factor in (min(TRIED), max(TRIED)):
                    v10.say(f"*** {arm}, width {width}: the best rate is at the edge of those that were tried")
        v10.say(f"python3 law.py {shlex.quote(str(self.out))} makes the tables and the figure")


@v10.screens()
def main(argv=None):
    parser = v10.Parser(prog="scaling.py", description="Runs the scaling law.", allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=os.path.expanduser, default="logs/scaling", help="folder of the logs")
    parser.add_argument("--jobs", type=v10.number(int, least=1, below=1000), default=2, help="runs side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the products")
    parser.add_argument("--list", action="store_true", help="print each run, and whether it is done")
    return study.conduct(Scaling, parser, argv)


if __name__ == "__main__":
    v10.leave(main())
