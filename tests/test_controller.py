"""The rank controller against a table written by hand."""
import pytest

import v10_transformer_lowrank_scaled as v10

CONTROLLER = v10.RankController(max_rank=512)  # the report's settings


# target = 1.5 * stable rank, new ema = 0.8 * ema + 0.2 * target, d = new ema - rank
@pytest.mark.parametrize(("rank", "ema", "stable_rank", "new_rank", "new_ema", "target", "reason"), [
    (64, 64.0, 32.0, 61, 60.8, 48.0, "step"),  # d = -3.2
    (64, 64.0, 30.0, 60, 60.2, 45.0, "step"),  # d = -3.8: a step of 4 is allowed
    (64, 64.0, 20.0, 60, 57.2, 30.0, "slew"),  # d = -6.8, cut to -4
    (30, 32.0, 22.0, 32, 32.2, 33.0, "step"),  # it grows, too
    (30, 40.0, 30.0, 34, 41.0, 45.0, "slew"),
    (32, 32.0, 18.0, 32, 31.0, 27.0, "keep"),  # d = -1 is within the threshold, but the EMA remembers it
    (32, 30.0, 20.0, 30, 30.0, 30.0, "step"),  # |d| = 2 is not below the threshold
    (10, 8.0, 1.0, 8, 8.0, 8.0, "min"),  # the target is clipped at the minimum
    (8, 8.0, 1.0, 8, 8.0, 8.0, "keep"),
    (508, 512.0, 900.0, 512, 512.0, 512.0, "max"),
])
def test_the_decision_follows_the_table(rank, ema, stable_rank, new_rank, new_ema, target, reason):
    decision = CONTROLLER.propose(rank, ema, stable_rank)
    assert (decision[0], decision[3]) == (new_rank, reason)
    assert decision[1:3] == pytest.approx((new_ema, target))


def test_a_constant_stable_rank_is_approached_in_steps_of_at_most_four_and_then_kept():
    rank, ema, ranks = 64, 64.0, []
    for _ in range(40):
        rank, ema, _, reason = CONTROLLER.propose(rank, ema, 12.0)
        ranks.append(rank)
    assert max(a - b for a, b in zip([64] + ranks, ranks, strict=False)) == 4
    assert reason == "keep"
    assert abs(rank - 18) <= 2, "hysteresis stops it within the threshold of the target"


@pytest.mark.parametrize(("settings", "rank"), [
    ({"safety_factor": 2.0}, 61), ({"ema_decay": 0.0}, 60), ({"change_threshold": 6.0}, 64), ({"max_step": 1}, 63),
    ({"min_rank": 62, "ema_decay": 0.0}, 62)])
def test_every_setting_matters(settings, rank):
    assert v10.RankController(**{"max_rank": 512} | settings).propose(64, 64.0, 24.0)[0] == rank
