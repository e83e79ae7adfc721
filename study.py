"""The study: runs that ask what the report's numbers mean, a few minutes each on one core, resumable.

    python3 study.py                  every run that is not done yet, two side by side    -> logs/study/
    python3 study.py --list           what there is to run, and what is done
    python3 study.py --size report    the same at the report's size, for a GPU

A run that is done is skipped, one that was interrupted goes on. `results.py` turns the logs into tables and answers.
Beside the runs' logs three more are written: probes.jsonl (what trained models do when the mask is put on, or when the
word that they could copy is replaced), ngrams.jsonl (what counting words and pairs of words gives on the same text),
and speed.jsonl (the time of a step at the ranks of each run, interleaved).

The small size trains on the first 100,000 words of WikiText-2, in which words that occur less than 3 times have become
<unk>: the output layer is then small enough for the linear layers, which are the subject, to count.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402

SCRIPTS = {"v10": "v10_transformer_lowrank_scaled.py", "v7": "v7_transformer_dense_baseline.py"}
SEEDS = (0, 1, 2)
SIZES = {
    "small": """--d-model 256 --n-layers 4 --n-heads 4 --d-ff 1024 --block-size 64 --batch-size 16 --epochs 16
        --steps-per-epoch 40 --lr 1e-3 --val-fraction 0.1 --min-count 3 --dtype float32""".split(),
    "report": []}  # v10's defaults
SHORT = "--d-model 64 --n-heads 4 --d-ff 64 --n-layers 2 --block-size 16 --epochs 3 --steps-per-epoch 60".split()
WORDS = 100_000  # of the small size
LONG = 3  # times as many epochs in the long run
SEARCHED = [(rate, dropout) for rate in (1, 2) for dropout in (0.1, 0.3)]  # rate: times that of the size


def with_rare_words_as_unk(text):
    """What this script wrote before v10 had --min-count; to v10 it is the same text."""
    count = Counter(text.split())
    return " ".join(word if count[word] >= 3 else "<unk>" for word in text.split())


@dataclass(frozen=True)
class Run:
    """One run: its name, the script, and flags beyond the size's."""

    name: str
    script: str = "v10"
    flags: tuple = ()
    seed: int = 0
    sized: bool = True  # with the flags of --size; else with its own alone
    data: str | None = None  # the text to train on, where it is not the study's
    ranks_of: str | None = None  # the run whose final ranks it starts with and keeps
    as_mean: bool = False  # one rank for all layers, the mean of those
    tuned: bool = False  # with the rate and the dropout that the search chose, and its schedule
    tested: bool = False  # on the official validation file as well
    probed: bool = False
    timed: bool = False  # its step is
    at_equal_time: bool = False  # as long as the adaptive run takes

    @property
    def stem(self):
        return f"{self.name}_s{self.seed}"


UNMASKED, TRANSPORT = ("--attention", "bidirectional"), ("--optimizer-on-resize", "transport")
RUNS = [
    Run("bidirectional", flags=UNMASKED, probed=True),
    Run("adaptive", tested=True, probed=True, timed=True),
    Run("dense", "v7", tested=True),
    Run("fixed", flags=("--fixed-rank",), timed=True),
    Run("bidirectional_dense", "v7", UNMASKED, probed=True),
    Run("bidirectional_fixed", flags=(*UNMASKED, "--fixed-rank"), probed=True),
    Run("fixed_mean", ranks_of="adaptive", as_mean=True, timed=True),
    Run("retrained", ranks_of="adaptive", timed=True),
    Run("transport", flags=TRANSPORT, timed=True),
    Run("exact", flags=("--power-iterations", "0")),
    Run("tuned_dense", "v7", tuned=True, tested=True),
    Run("tuned_adaptive", tuned=True, tested=True, timed=True),
    Run("tuned_transport", flags=TRANSPORT, tuned=True, timed=True),
    Run("tuned_fixed", flags=("--fixed-rank",), tuned=True, timed=True),
    Run("tuned_fixed_mean", ranks_of="tuned_adaptive", as_mean=True, tuned=True, timed=True),
    Run("tuned_retrained", ranks_of="tuned_adaptive", tuned=True, timed=True),
]
UNTRAINED = tuple("--lr 1e-12 --batch-size 1 --steps-per-epoch 1 --val-fraction 0.001 --dtype float32".split())
DEMO = tuple("""--d-model 128 --n-layers 3 --n-heads 4 --d-ff 512 --block-size 64 --epochs 10 --steps-per-epoch 45
    --lr 2e-3 --dtype float32 --init-rank 32 --min-rank 4""".split())  # as in the Makefile
LATER = [  # after the speed has been measured
    Run("tuned_dense_equal_time", "v7", tuned=True, at_equal_time=True),
    Run("untrained", flags=UNTRAINED, sized=False),  # of the report's size
    Run("synthetic", flags=DEMO, sized=False, data="synthetic.tokens", probed=True),
    Run("synthetic_bidirectional", flags=(*DEMO, *UNMASKED), sized=False, data="synthetic.tokens", probed=True),
    Run("long")]


# ---- One run ---------------------------------------------------------------------------------------------------------

class Study:
    """A folder of logs, and how its runs are made."""

    def __init__(self, args):
        self.out, self.args, self.size = Path(args.out), args, SIZES[args.size]
        self.failed, self.stopping, self.running = [], threading.Event(), {}
        self.defaults = base = v10.build_parser(v10.Variant()).parse_args(self.size + SHORT * args.short)
        self.search = [Run(f"search_rate{rate}_dropout{dropout}", "v7", (
            "--lr", f"{rate * base.lr:g}", "--dropout", str(dropout), "--lr-schedule", "cosine",
            "--warmup-steps", str(base.steps_per_epoch))) for rate, dropout in SEARCHED]
        runs = [*self.search, *(replace(run, seed=seed) for seed in SEEDS[:args.seeds] for run in RUNS)]
        later = [replace(run, seed=seed) for run in LATER for seed in SEEDS[:args.seeds]]
        wanted = {run.stem for run in [*runs, *later] if run.name in (args.only or [run.name])}
        for run in reversed([*runs, *later]):  # what a run needs comes before it
            wanted |= set(self.needs(run)) if run.stem in wanted else set()
        self.runs, self.later = ([run for run in found if run.stem in wanted] for found in (runs, later))

    def log(self, stem):
        return self.out / f"{stem}.jsonl"

    def records(self, stem, kind):
        try:
            found = [json.loads(line) for line in self.log(stem).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):  # not there yet, or torn: v10 itself says what is wrong with it
            return []
        return [record for record in found if isinstance(record, dict) and record.get("kind") == kind]

    def done(self, run):
        return bool(self.records(run.stem, "end")) and not self.unprobed(run)

    def needs(self, run):
        """The stems of the runs that must have ended before this one."""
        return ([f"{run.ranks_of}_s{run.seed}"] * bool(run.ranks_of) + [s.stem for s in self.search] * run.tuned
                + [f"{other.name}_s0" for other in RUNS if other.timed or other.name == "dense"] * run.at_equal_time)

    def unprobed(self, run):
        return run.probed and all(record["run"] != run.name or record["seed"] != run.seed
                                  for record in self.records("probes", "probe"))

    def command(self, run):
        """The command line of a run, as a user would type it."""
        flags = [*self.size * run.sized, *run.flags, *SHORT * self.args.short, "--seed", str(run.seed),
                 "--data-file", str(self.data(run))]
        if run.tuned:
            flags += min(self.search, key=lambda run: self.records(run.stem, "end")[0]["best_val_loss"]).flags
        if run.tested and self.args.test_file:
            flags += ["--test-file", self.args.test_file]
        if run.ranks_of:
            log = self.log(f"{run.ranks_of}_s{run.seed}")
            mean = round(self.records(log.stem, "epoch")[-1]["rank_avg"])
            flags += ["--fixed-rank", *(["--init-rank", str(mean)] if run.as_mean else ["--ranks-from", str(log)])]
        if run.name == "long":
            flags += ["--epochs", str(LONG * self.defaults.epochs)]
        if run.at_equal_time:
            ratio = self.records("speed", "speed")[0]["over_dense"]["tuned_adaptive"]
            flags += ["--epochs", str(round(ratio * self.defaults.epochs))]
        return [sys.executable, str(v10.HERE / SCRIPTS[run.script]), *flags, "--log-file", str(self.log(run.stem))]

    def data(self, run=None):
        """The text that a run trains on, or that most do."""
        if run and not run.sized:
            return run.data or self.args.data_file
        return self.args.data_file if self.args.size == "report" else self.out / "words.tokens"

    def prepare(self):
        """Make the small size's text, and count on it. Raises UserError where the folder has runs of another size or
        text, or where there is no text."""
        for name in (self.args.data_file, *[self.args.test_file] * bool(self.args.test_file)):
            if not any(path.exists() for path in (Path(name), v10.HERE / "data" / name)):
                raise v10.UserError(f"there is no {name}: `make data` fetches WikiText-2")
        for run in (run for run in [*self.runs, *self.later] if run.sized):
            for record in self.records(run.stem, "run"):
                for name in ("d_model", "n_layers", "d_ff", "block_size", "batch_size", "steps_per_epoch"):
                    if record.get(name) != getattr(self.defaults, name):
                        raise v10.UserError(f"{self.log(run.stem)} is of another size: choose another --out")
        path = self.out / "words.tokens"
        if self.args.size != "report":
            text = " ".join(v10.read_words(v10.find_data(self.args.data_file))[0][:WORDS])
            if not path.exists():
                path.write_text(text, encoding="utf-8")
            elif path.read_text(encoding="utf-8") not in (text, with_rare_words_as_unk(text)):
                raise v10.UserError(f"{path} was made of another text than {self.args.data_file}: choose another --out")
        try:
            train, val, vocabulary, *_ = v10.load_corpus(v10.find_data(str(self.data())), self.defaults.val_fraction,
                                                         self.defaults.block_size,
                                                         min_count=self.defaults.min_count)
        except v10.UserError:
            path.unlink(missing_ok=True)
            raise
        if not self.records("ngrams", "ngrams"):
            texts = {"val": val}
            if self.args.test_file:
                texts["test"] = v10.encode(v10.read_words(v10.find_data(self.args.test_file))[0], vocabulary)
            unk = vocabulary.index("<unk>") if "<unk>" in vocabulary else -1
            v10.write_record(self.log("ngrams"), "ngrams", **{
                name: ngram_losses(train, text) | {"unk": (text == unk).float().mean().item()}
                for name, text in texts.items()})

    def train(self, run):
        """Start or resume a run, wait for it, probe it, keep of it only the log."""
        if self.stopping.is_set() or self.done(run):
            return
        log = self.log(run.stem)
        for needed in self.needs(run):
            if not self.records(needed, "end"):
                self.failed.append(f"{run.stem}: it needs {needed}, which has not ended")
                return
        if not self.records(run.stem, "end"):
            command = self.command(run) + ["--resume"] * (log.exists() and log.stat().st_size > 0)
            threads = str(max(1, (os.cpu_count() or 1) // self.args.jobs))
            with open(log.with_suffix(".txt"), "a", encoding="utf-8") as output:
                output.write(shlex.join(command) + "\n")
                output.flush()
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                           env=os.environ | {"OMP_NUM_THREADS": threads})
            self.running[run.stem] = process
            if self.stopping.is_set():  # which may have been since the look above
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            del self.running[run.stem]
            if code and not self.stopping.is_set():
                said = log.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
                self.failed.append(f"{run.stem}: exit code {code}: {said[-1]}")
            if code:
                return
        if self.unprobed(run):
            probe(log, v10.find_data(str(self.data(run))), self.log("probes"), run)
        for kind in (".pt", ".prev.pt", ".best.pt", ".txt"):
            log.with_suffix(kind).unlink(missing_ok=True)

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
    args = next(json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    tokens = v10.load_corpus(data, args["val_fraction"], args["block_size"], min_count=args.get("min_count", 1))[1]
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
        record["val_loss_masked"] = losses.mean().item()  # the second time around with the mask
    v10.write_record(out, **record)


def ngram_losses(train, val):
    """The loss of counting, on val (N,) in nats per token: unigrams with one added to each count, and bigrams mixed
    with them after Witten and Bell (1991): a new word after w has the weight of the distinct words seen after w."""
    words = int(max(train.max(), val.max())) + 1
    train, val = train.tolist(), val.tolist()
    count, pairs = Counter(train), Counter(zip(train, train[1:], strict=False))
    after, kinds = Counter(train[:-1]), Counter(first for first, _ in pairs)
    unigram = torch.tensor([(count[word] + 1) / (len(train) + words) for word in val[1:]], dtype=torch.float64)
    bigram = torch.tensor([
        (pairs[first, second] + kinds[first] * p) / (after[first] + kinds[first]) if after[first] else p
        for first, second, p in zip(val, val[1:], unigram.tolist(), strict=False)], dtype=torch.float64)
    return {"unigram": -unigram.log().mean().item(), "bigram": -bigram.log().mean().item()}


# ---- The time of a step ----------------------------------------------------------------------------------------------

def measure_speed(study, rounds=9):
    """The step time of a run, on average over its epochs' ranks, over the dense model's: one step of each in turn."""
    settings = study.records("dense_s0", "run")[0]
    ranks = {}  # those that the epochs of each run were trained with, of all or of eight
    for run in RUNS:
        if run.script == "v10" and run.timed:
            (first,), epochs = (study.records(f"{run.name}_s0", kind) for kind in ("run", "epoch"))
            of_run = [first["initial_ranks"], *(epoch["ranks"] for epoch in epochs[:-1])]
            ranks[run.name] = [tuple(of_run[i * (len(of_run) - 1) // 7]) for i in range(8)]
    args = argparse.Namespace(**{"min_count": 1, **settings})
    device = v10.pick_device(args.device)
    train, *_, vocabulary, _, _ = v10.load_corpus(v10.find_data(str(study.data())), args.val_fraction, args.block_size,
                                                  min_count=args.min_count)
    train, generator = train.to(device), torch.Generator().manual_seed(0)

    def stepper(ranks):
        left = iter(ranks)
        make = (lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, next(left))) if ranks else v10.DenseLinear
        config = v10.GPTConfig(len(vocabulary), args.d_model, args.n_layers, args.n_heads, args.d_ff, args.block_size)
        model = v10.GPT(config, make).to(device)
        model.low_precision = args.dtype == "bfloat16"
        optimizer = v10.make_adamw(model.parameters(), args)

        def step():
            batch = v10.sample_batch(train, args.batch_size, args.block_size, generator)
            began = v10.now(device)
            v10.train_step(model, [optimizer], *batch, grad_accum=args.grad_accum)
            return v10.now(device) - began
        return step

    kinds = sorted({(), *(r for of_run in ranks.values() for r in of_run)})
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // study.args.jobs))
    steps = {kind: stepper(kind) for kind in kinds}
    taken = {kind: [] for kind in kinds}
    for number in tqdm(range(rounds + 1), desc="speed", unit="round", disable=None):  # the first one warms up
        for kind in kinds:
            seconds = steps[kind]()
            if number:
                taken[kind].append(seconds)
    times = {kind: median(values) for kind, values in taken.items()}
    v10.write_record(
        study.log("speed"), "speed", rounds=rounds, device=v10.device_name(device), torch=torch.__version__,
        over_dense={name: fmean(times[r] for r in of_run) / times[()] for name, of_run in ranks.items()},
        over_dense_at_the_end={name: times[of_run[-1]] / times[()] for name, of_run in ranks.items()})


# ---- Command line ----------------------------------------------------------------------------------------------------

def main(argv=None):
    number = v10.number
    parser = v10.Parser(prog="study.py", description="Runs the study.", allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=os.path.expanduser, default="logs/study", help="folder of the logs")
    parser.add_argument("--size", choices=SIZES, default="small", help="report: v10's defaults, for a GPU")
    parser.add_argument("--seeds", type=number(int, least=1, below=len(SEEDS) + 1), default=len(SEEDS), help="how many")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=sorted({run.name for run in RUNS + LATER}),
                        help="these runs, as --list names them, and those that they need")
    parser.add_argument("--jobs", type=number(int, least=1, below=1000), default=2, help="runs side by side")
    parser.add_argument("--data-file", type=os.path.expanduser, default=v10.DEFAULT_DATA,
                        help="text; a bare name is looked for in data/ too")
    parser.add_argument("--test-file", type=os.path.expanduser, default="wiki.valid.tokens",
                        help="one more held-out text; '' for none")
    parser.add_argument("--list", action="store_true", help="print the runs and which are done")
    parser.add_argument("--short", action="store_true", help="a minute for all: tiny models, to see that it works")
    with v10.screens():
        return run(parser, argv)


def run(parser, argv):
    """main() on a screen that may vanish."""
    try:
        study = Study(parser.parse_args(argv))
        everything = [*study.runs, *study.later]
        if study.args.list:
            for run in everything:
                print(f"{'done' if study.done(run) else '-':5} {run.stem}")
            return 0
        study.out.mkdir(parents=True, exist_ok=True)
        v10.handle_signals(v10.interrupt)
        study.prepare()
        complete = study.all(study.runs)
        if complete:
            if not study.records("speed", "speed") and any(run.at_equal_time for run in study.later):
                measure_speed(study)
            complete = study.all(study.later)
        for failure in study.failed:
            print(f"study.py: error: {failure}", file=sys.stderr)
        return 0 if complete else 1
    except v10.UserError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"study.py: error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    v10.leave(main())
