"""Kills small trainings with SIGKILL, resumes them, and compares what they wrote with a run that nobody touched.

    python3 tests/soak.py                    15 kills at random times, 3 at each chosen point; some minutes
    python3 tests/soak.py --show logs/reference/soak.jsonl

At a chosen point the run kills itself: half-way through the n-th write of its log or of a checkpoint, at its n-th
fsync, os.replace or evaluation, or with half of its layers resized. Ranks change every 3 steps, epochs have 10, and a
checkpoint is written about every tenth of a second. One run drops the optimizer's state at a resize and trains in
float32, one carries it and trains in bfloat16, and one is of v11, whose ranks are cut 20 times, and reads its tokens
from a folder of data/prepare.py's. Each kill is a line of the log; the last line is the verdict. Exit code 1 where
anything was lost or differs.

Then 20 runs of two processes under torchrun are stopped as a batch system does it, with SIGTERM to the launcher and to
the processes at once, so that each process gets it twice; each has to save, and the next one goes on from there.
"""
import argparse
import builtins
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402

FLAGS = """--data-file text --test-file test --d-model 16 --n-layers 2 --n-heads 2 --d-ff 32 --block-size 8
    --batch-size 4 --epochs 20 --steps-per-epoch 10 --lr 0.01 --val-fraction 0.1 --device cpu --init-rank 12
    --min-rank 2 --rank-interval 3 --dropout 0.1 --checkpoint-minutes 0.0015 --log-file log.jsonl""".split()
V10 = "v10_transformer_lowrank_scaled"
CONFIGURATIONS = {  # name: (script, flags)
    "reinit": (V10, ["--optimizer-on-resize", "reinit", "--dtype", "float32"]),
    "transport": (V10, ["--optimizer-on-resize", "transport", "--dtype", "bfloat16"]),
    "v11": ("v11_transformer_lowrank_spectron",
            "--data-file tokens --cuts 20 --cut-from 0.1 --cut-to 0.9 --rank-budget 0.3 --telemetry --dtype bfloat16"
            .split())}
RANDOM = "at a random time"
CHOSEN = {  # moment: the largest n at which it may be chosen
    "half-way through a log record": 60, "half-way through a checkpoint": 2000, "at an fsync": 60,
    "at an os.replace": 60, "at an evaluation": 12, "half-way through a rank update": 40}
CLOCK = {"time_sec", "train_sec", "eval_sec", "rank_sec", "cut_sec", "total_sec", "tokens_per_sec", "peak_memory_mb"}


# ---- The run that kills itself ---------------------------------------------------------------------------------------

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, n, die=die):
    """Make v10 die at the n-th such moment -> v10."""
    import v10_transformer_lowrank_scaled as v10
    left = [n]

    def count():
        left[0] -= 1
        return left[0] == 0

    def dying(function):
        """function, with a kill before its n-th call or after it, by chance."""
        def wrapped(*args, **kwargs):
            now = count()
            if now and n % 2:
                die()
            result = function(*args, **kwargs)
            if now:
                die()
            return result
        return wrapped

    class File:
        """A file whose n-th write stops half-way."""
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if count():
                self.file.write(bytes(data)[:len(data) // 2])
                self.file.flush()
                die()
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(path, mode="r", **options):
        file, log = builtins.open(path, mode, **options), str(path).endswith(".jsonl")
        wanted = log if "log" in moment else not log and "+" in mode
        return File(file) if wanted and mode in ("ab", "w+b") else file

    if "rank update" in moment:
        update_ranks, set_factors = v10.update_ranks, v10.LowRankLinearAdaptiveSpectral.set_factors
        halfway = []

        def half_update(*args):
            if count():
                v10.LowRankLinearAdaptiveSpectral.set_factors = lambda *args: (
                    set_factors(*args), halfway.append(1), len(halfway) < 3 or die())
            result = update_ranks(*args)
            return die() if left[0] <= 0 else result
        v10.update_ranks = half_update
    elif "half-way" in moment:
        v10.open = opened
    elif "evaluation" in moment:
        v10.evaluate = dying(v10.evaluate)
    else:
        name = moment.split()[-1].removeprefix("os.")
        setattr(os, name, dying(getattr(os, name)))
    return v10


# ---- The soak --------------------------------------------------------------------------------------------------------

def launch(folder, script, flags, moment=None, when=None):
    """Start a run, or go on with the one in the folder, to its end or its death -> exit code, seconds till it spoke."""
    log = folder / "log.jsonl"
    command = [ROOT / f"{script}.py"]
    if moment in CHOSEN:
        command = [__file__, "--arm", moment, str(when), script]
    resume = ["--resume"] if log.exists() and log.stat().st_size else []
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *command, *FLAGS, *flags, *resume], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    if moment == RANDOM:
        time.sleep(when)
        process.kill()
    first = process.stdout.readline()
    seconds = time.monotonic() - began
    said = first + process.stdout.read()
    process.stdout.close()
    if process.wait() not in (0, -signal.SIGKILL):
        sys.exit(f"soak.py: a run ended with {process.returncode} after a kill {moment}, {when}:\n{said}")
    return process.returncode, seconds


def stopped(folder, rng):
    """Start two processes under torchrun, or go on with them, and send SIGTERM to all -> was the last step saved?"""
    import v10_transformer_lowrank_scaled as v10
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / f"{V10}.py", *FLAGS, "--epochs", "1000000",
               "--checkpoint-minutes", "1000", "--resume"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    said = ""
    while "\nepoch " not in said and process.poll() is None:
        said += process.stdout.readline()
    time.sleep(rng.uniform(0, 0.2))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (*map(int, workers), process.pid):
        os.kill(pid, signal.SIGTERM)
    said += process.stdout.read()
    process.wait()
    found = re.search(r"step ([\d,]+) of [\d,]+ is saved", said)
    return bool(found) and v10.load(folder / "log.pt")["state"]["step"] == int(found[1].replace(",", ""))


def records(path):
    """The records of a log, without marks of resuming and without what a clock says."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in CLOCK}
            for record in found if record["kind"] != "resume"]


def compare(folder, straight):
    """-> records of the straight run that are missing, that differ, how many were compared; other tensors."""
    import torch

    import v10_transformer_lowrank_scaled as v10
    ours, theirs = (records(place / "log.jsonl") for place in (folder, straight))
    tensors = 0
    for name in ("log.pt", "log.best.pt"):
        a, b = (v10.load(place / name)["model"] for place in (folder, straight))
        tensors += sum(name not in b or not torch.equal(a[name], b[name]) for name in a)
    return Counter(lost=max(len(theirs) - len(ours), 0), records=len(theirs), tensors=tensors,
                   differing=sum(a != b for a, b in zip(ours, theirs, strict=False)) + max(len(ours) - len(theirs), 0))


def fill(folder):
    """The texts of a run."""
    folder.mkdir()
    words = random.Random(0).choices([f"w{i}" for i in range(50)], k=3000)
    (folder / "text").write_text(" ".join(words))
    (folder / "test").write_text(" ".join(words[::7]))
    prepare.prepare([folder / "text"], folder / "tokens")


def soak(seed, random_kills, chosen_kills, stops, write):
    rng, result = random.Random(seed), Counter(stops=stops, unsaved=0)
    plan = [RANDOM] * random_kills + list(CHOSEN) * chosen_kills
    rng.shuffle(plan)
    with tempfile.TemporaryDirectory() as place:
        for i, (name, configuration) in enumerate(CONFIGURATIONS.items()):
            straight, mine = Path(place, f"{name}-straight"), plan[i::len(CONFIGURATIONS)]
            runs = [Path(place, f"{name}-{j}") for j in range(len(mine) + 1)]
            for folder in (straight, *runs):
                fill(folder)
            began = time.monotonic()
            _, ready = launch(straight, *configuration)
            whole = time.monotonic() - began
            folder = runs.pop(0)
            while mine:
                moment = mine[0]
                when = rng.uniform(0.8 * ready, whole) if moment == RANDOM else rng.randint(1, CHOSEN[moment])
                code, _ = launch(folder, *configuration, moment, when)
                if code:
                    write({"kind": "kill", "moment": moment, "when": round(when, 3), "run": name,
                           "records": (folder / "log.jsonl").read_bytes().count(b"\n")
                           if (folder / "log.jsonl").exists() else 0})
                    mine.pop(0)
                else:  # it came to its end first: another run
                    result += compare(folder, straight) + Counter(runs=1)
                    folder = runs.pop(0)
            launch(folder, *configuration)
            result += compare(folder, straight) + Counter(runs=1)
        fill(folder := Path(place, "stopped"))
        for _ in range(stops):
            saved = stopped(folder, rng)
            write({"kind": "stop", "saved": saved})
            result["unsaved"] += not saved
    write({"kind": "verdict", "seed": seed, **{name: result[name] for name in (
        "runs", "records", "lost", "differing", "tensors", "stops", "unsaved")}})


def table(found):
    """The log of a soak -> the table that the README shows."""
    kills, verdict = Counter(record["moment"] for record in found if record["kind"] == "kill"), found[-1]
    lines = ["| the run was killed | times |", "|---|--:|", *(f"| {moment} | {kills[moment]} |" for moment in
                                                             (RANDOM, *CHOSEN))]
    return "\n".join([*lines, "", f"{kills.total()} kills in {verdict['runs']} runs, each then resumed to its end. Of "
                      f"{verdict['records']} records of runs that nobody touched, lost: {verdict['lost']}, differing: "
                      f"{verdict['differing']}. Tensors that differ in the checkpoints: {verdict['tensors']}. Of "
                      f"{verdict['stops']} runs under torchrun whose processes got SIGTERM twice, not saved: "
                      f"{verdict['unsaved']}."])


def main():
    if sys.argv[1:2] == ["--arm"]:  # a run that is to kill itself
        arm(sys.argv[2], int(sys.argv[3]))
        return importlib.import_module(sys.argv[4]).main(sys.argv[5:])
    parser = argparse.ArgumentParser(description="Kills small trainings and resumes them.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=15, help="kills at random times")
    parser.add_argument("--chosen", type=int, default=3, help="kills at each chosen point")
    parser.add_argument("--stops", type=int, default=20, help="doubled SIGTERMs to two processes under torchrun")
    parser.add_argument("--log-file", type=Path, default=ROOT / "logs" / "soak.jsonl")
    parser.add_argument("--show", type=Path, help="print the table of an earlier soak")
    args = parser.parse_args()
    if not args.show:
        args.log_file.parent.mkdir(parents=True, exist_ok=True)
        with open(args.log_file, "w") as log:
            def write(record):
                print(json.dumps(record), file=log, flush=True)
                print(*(f"{name}: {value}" for name, value in record.items()), sep=", ", flush=True)
            soak(args.seed, args.random, args.chosen, args.stops, write)
        print()
    found = [json.loads(line) for line in (args.show or args.log_file).read_text().splitlines()]
    print(table(found))
    return int(any(found[-1][name] for name in ("lost", "differing", "tensors", "unsaved")))


if __name__ == "__main__":
    sys.exit(main())
