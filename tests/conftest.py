"""What the tests share: the scripts on the path, a small text, and a run of a few seconds."""
import functools
import hashlib
import json
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import forks  # noqa: E402
import plot_logs  # noqa: E402
import results  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # however the tests were started: under nohup, or with &,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # they would be ignored, here and in every process that a test starts

SMALL = ["--d-model", "16", "--n-layers", "2", "--n-heads", "2", "--d-ff", "32", "--block-size", "8",
         "--batch-size", "4", "--epochs", "4", "--steps-per-epoch", "5", "--lr", "0.01", "--val-fraction", "0.1",
         "--device", "cpu", "--dtype", "float32"]
RANKS = ["--init-rank", "12", "--min-rank", "2"]
TIMES = {"time_sec", "train_sec", "eval_sec", "rank_sec", "cut_sec", "total_sec", "tokens_per_sec", "peak_memory_mb"}


def records(path, kind=None):
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [record for record in found if kind in (None, record["kind"])]


@functools.cache
def reference():
    """The committed study, read once: it takes three seconds."""
    return results.Study(results.REFERENCE)


def unpainted(figure, path):
    """In the place of plot_logs.save: a file without a picture, since painting one takes half a second."""
    plot_logs.plt.close(figure)
    path.with_name(path.name + ".png").touch()


def untimed(path, kind="epoch"):
    """Records without what a clock says."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records(path, kind)]


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers each time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_process_stays():
    """A test that fails leaves none that would be waited for."""
    yield
    while forks.alive:
        forks.alive.pop().end()


@pytest.fixture
def text(tmp_path):
    """A text of 3,000 words, 50 of them distinct."""
    words = random.Random(0).choices([f"w{i}" for i in range(50)], weights=[1 / (i + 1) for i in range(50)], k=3000)
    path = tmp_path / "text.tokens"
    path.write_text(" ".join(words + [f"w{i}" for i in range(50)]))
    return path


def write_sidecar(text, **change):
    """The sidecar of a synthetic corpus, as data/synthetic.py writes it beside the text."""
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    sidecar = {"sha256": sha256, "val_fraction": 0.1, "entropy_floor": 3.125} | change
    text.with_suffix(".json").write_text(json.dumps(sidecar))


@pytest.fixture
def run(text, tmp_path):
    """run(*flags, name="v10", main=v10.main) trains a small model and returns the path of its log."""
    import v10_transformer_lowrank_scaled as v10

    def train(*flags, name="log", main=v10.main, ranks=RANKS, code=0):
        log = tmp_path / f"{name}.jsonl"
        assert main(["--data-file", str(text), "--log-file", str(log), *SMALL, *ranks, *map(str, flags)]) == code
        return log
    train.folder = tmp_path
    return train
