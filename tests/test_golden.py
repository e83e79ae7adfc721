"""The golden run, and the files of older versions."""
import json
import random
import shutil

import pytest

import golden
import v10_transformer_lowrank_scaled as v10
from conftest import records


@pytest.mark.parametrize("name", golden.RUNS)
def test_losses_and_ranks_are_those_of_the_golden_run(name):
    expected, found = json.loads((golden.HERE / "golden" / f"{name}.json").read_text()), golden.trajectory(name)
    assert found["ranks"] == expected["ranks"]
    for key in ("train_loss", "val_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)


def test_checkpoints_of_the_version_before_are_resumed_and_loaded(tmp_path):
    """tests/golden/older: two epochs of v10 and of v7, as written when checkpoints had one optimizer."""
    text = " ".join(random.Random(0).choices([f"w{i}" for i in range(30)], k=1200))
    (tmp_path / "text.tokens").write_text(text)
    flags = ["--data-file", str(tmp_path / "text.tokens"), *"""--d-model 8 --n-layers 1 --n-heads 2 --d-ff 16
        --block-size 4 --batch-size 4 --steps-per-epoch 4 --lr 0.01 --warmup-steps 3 --val-fraction 0.1 --device cpu
        --dtype float32 --init-rank 6 --min-rank 2 --rank-interval 3 --optimizer-on-resize transport
        --epochs 6""".split(), "--log-file"]
    shutil.copytree(golden.HERE / "golden" / "older", tmp_path, dirs_exist_ok=True)
    assert v10.main([*flags, str(tmp_path / "straight.jsonl")]) == 0
    assert v10.main([*flags, str(tmp_path / "v10.jsonl"), "--resume"]) == 0
    for straight, resumed in zip(*(records(tmp_path / f"{name}.jsonl", "epoch") for name in ("straight", "v10")),
                                 strict=True):
        assert resumed["ranks"] == straight["ranks"]
        assert resumed["train_loss"] == pytest.approx(straight["train_loss"], rel=1e-5)
    model, vocabulary = v10.load_model(tmp_path / "v7.best.pt")
    assert model.ranks() == []
    assert v10.evaluate(model, v10.encode(text.split()[1080:], vocabulary), 4) == pytest.approx(
        min(records(tmp_path / "v7.jsonl", "epoch"), key=lambda r: r["val_loss"])["val_loss"], rel=1e-5)
