"""The golden run."""
import json

import pytest

import golden


@pytest.mark.parametrize("name", golden.RUNS)
def test_losses_and_ranks_are_those_of_the_golden_run(name):
    expected, found = json.loads((golden.HERE / "golden" / f"{name}.json").read_text()), golden.trajectory(name)
    assert found["ranks"] == expected["ranks"]
    for key in ("train_loss", "val_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)
