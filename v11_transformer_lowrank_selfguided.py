"""Self-guided training, Spectron's rival: v11 whose layers begin beside a dense guide that fades out.

A layer computes alpha G x + (1 - alpha) U V x. alpha falls from 1 to 0 along half a cosine over the first half of the
steps; at the next rank update the guide G goes, and what is left is a model of low rank (Wei et al., 2024, arXiv
2406.16450). As in Spectron's comparison with it, every linear layer has a guide, G starts as a dense layer does, and
U V as its best approximation. A step uses a layer's guide only with probability alpha, else U V x as it is; evaluation
always mixes. An unused guide has a gradient of zero, so AdamW's momentum and decay still move it.

Checkpoints of the first half hold guides: load_model(path, SelfGuidedLinear) reads them.

    python3 v11_transformer_lowrank_selfguided.py                  v11's flags; AdamW on all parameters by default
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402
import v11_transformer_lowrank_spectron as v11  # noqa: E402


class SelfGuidedLinear(v10.LowRankLinearAdaptiveSpectral):
    """x (..., n) -> alpha x G^T + (1 - alpha) x V^T U^T (..., m); without a guide x V^T U^T. The guide is a plain
    nn.Linear, which v10 does not take for a layer of its own."""

    uses_guide = True  # in the next step

    def __init__(self, in_features, out_features, rank):
        super().__init__(in_features, out_features, rank)
        self.guide = nn.Linear(in_features, out_features, bias=False)
        v11.set_spectral(self, self.guide.weight)
        self.guide.register_buffer("alpha", torch.ones(()))

    def forward(self, x):
        y = super().forward(x)
        if self.guide is None:
            return y
        if self.training and not self.uses_guide:
            return y + 0 * self.guide.weight[0, 0]  # its gradient is zero: several processes wait for each one's
        return self.guide.alpha * self.guide(x) + (1 - self.guide.alpha) * y

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}guide.weight" not in state_dict:  # a checkpoint from after its end
            self.guide = None
        super()._load_from_state_dict(state_dict, prefix, *args)


def guide_share(step, total_steps):
    """alpha in step 1, 2, 3, ...: half a cosine from 1 to 0 over the first half; what is left below 0.001 is 0."""
    done = min(1, (step - 1) / (total_steps / 2))
    alpha = 0.5 * (1 + math.cos(math.pi * done))
    return alpha if alpha >= 1e-3 else 0.0


class SelfGuided(v11.LowRankSpectron):
    name = "v11_transformer_lowrank_selfguided.py"
    log_file = "logs/v11_selfguided.jsonl"
    description = "Trains a GPT of low rank beside a dense guide that fades out."
    defaults = v11.LowRankSpectron.defaults | {"optimizer": "adamw", "cuts": 0, "init_rank": 64}

    def complete(self, args):
        super().complete(args)
        steps, interval = args.epochs * args.steps_per_epoch, args.rank_interval or args.steps_per_epoch
        if guide_share(max(1, steps // interval * interval), steps):
            raise v10.UserError(f"the guides go at a rank update in the second half, and of {steps} steps with one "
                                f"each {interval} there is none: lower --rank-interval, or take more steps")
        if args.compile or args.cuts or args.init_from:
            raise v10.UserError("layers with guides take neither --compile nor --cuts, and no --init-from")

    def linear(self, n, m, rank):
        return SelfGuidedLinear(n, m, rank)

    def make_optimizers(self, model, args):
        """The guides have an optimizer of their own, the last one, which goes with them."""
        guides = [layer.guide.weight for layer in model.linears().values() if layer.guide is not None]
        optimizers = v11.make_optimizers(model, args, without=set(guides))
        return [*optimizers, v10.make_adamw(guides, v11.with_decays(args))] if guides else optimizers

    def before_step(self, run, step):
        """alpha, and which layers use their guide: the same in every process, and after a resume."""
        alpha = guide_share(step, run.total_steps)
        draws = torch.rand(len(run.layers), generator=v11.seeded(run.args.seed, step))
        for layer, draw in zip(run.layers, draws.tolist(), strict=True):
            layer.uses_guide = draw < alpha
            if layer.guide is not None:
                layer.guide.alpha.fill_(alpha)

    def update_ranks(self, run, step):
        """As v10's; the first one in the second half of the run removes the guides."""
        if run.layers[0].guide is not None and run.layers[0].guide.alpha == 0:
            for layer in run.layers:
                layer.guide = None
            run.optimizers.pop()
        return super().update_ranks(run, step)

    def left_undone(self, run):
        return "the layers still have their guides" if run.layers[0].guide is not None else super().left_undone(run)


def main(argv=None):
    return v10.main(argv, SelfGuided())


if __name__ == "__main__":
    v10.leave(main())
