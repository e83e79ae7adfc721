"""The golden run: losses and ranks of tiny runs in float64 on one thread, which a refactoring must not move.

    python3 tests/golden.py --write    write tests/golden/ again, after a change that is meant to move numbers

Twenty epochs of two steps, with a rank update every three steps, for both treatments of the optimizer at a resize, and
for v7. --write refuses a run in which a rank is decided by a hair, which another machine may decide otherwise.
"""
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import v7_transformer_dense_baseline as v7  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402

FLAGS = """--d-model 16 --n-layers 2 --n-heads 2 --d-ff 32 --block-size 8 --batch-size 4 --epochs 20
    --steps-per-epoch 2 --lr 0.02 --lr-schedule cosine --warmup-steps 3 --grad-clip 1 --grad-accum 2
    --val-fraction 0.1 --device cpu --dtype float32""".split()  # which the default dtype makes float64
RANKS = "--init-rank 12 --min-rank 2 --rank-interval 3 --max-step 2 --safety-factor 2".split()
RUNS = {"v10_reinit": (v10.main, RANKS), "v10_transport": (v10.main, [*RANKS, "--optimizer-on-resize", "transport"]),
        "v7": (v7.main, [])}
HAIR = 1e-6  # in ranks


def trajectory(name):
    """Train one of RUNS -> {"train_loss", "val_loss": 20 numbers each, "ranks": those after each update, "ema"}."""
    main, flags = RUNS[name]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        text, log = Path(folder, "text"), Path(folder, "log.jsonl")
        text.write_text(" ".join(random.Random(0).choices([f"w{i}" for i in range(50)], range(50, 0, -1), k=3000)))
        try:
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(1)
            code = main([*FLAGS, *flags, "--data-file", str(text), "--log-file", str(log)])
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(threads)
        assert code == 0
        records = [json.loads(line) for line in log.read_text().splitlines()]
    epochs, updates = ([r for r in records if r["kind"] in kinds] for kinds in (("epoch",), ("epoch", "ranks")))
    return {**{key: [epoch[key] for epoch in epochs] for key in ("train_loss", "val_loss")},
            **{key: [update[key] for update in updates] for key in ("ranks", "ema")}}


def closest(found):
    """The least distance, in ranks, of a decision from one that would have been another."""
    gaps = [abs(ema - rank) for ranks, emas in zip(found["ranks"], found["ema"][1:], strict=False)
            for rank, ema in zip(ranks, emas, strict=False)]  # from each rank to the average that moves it
    return min((abs(gap - edge) for gap in gaps for edge in (2, 2.5)), default=math.inf)  # --change-threshold, round()


def main():
    if sys.argv[1:] != ["--write"]:
        sys.exit("golden.py: only --write writes the golden run again; tests/test_golden.py compares with it")
    for name in RUNS:
        found = trajectory(name)
        if closest(found) < HAIR:
            sys.exit(f"golden.py: {name}: a rank is decided by a hair: choose another seed")
        (HERE / "golden" / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
