"""A variant of v10, as test_variant.py needs one: a factored layer with a bias, SGD with momentum on the factors and
AdamW on the rest, ranks that move by one at most, and a flag of its own."""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import v10_transformer_lowrank_scaled as v10  # noqa: E402


class BiasedLowRank(nn.Module):
    """x (..., n) -> x V^T U^T + b (..., m)."""

    def __init__(self, n, m, rank):
        super().__init__()
        self.U, self.V = nn.Parameter(torch.randn(m, rank) / m**0.5), nn.Parameter(torch.randn(rank, n) / n**0.5)
        self.b = nn.Parameter(torch.zeros(m))

    rank = property(lambda self: len(self.V))
    shape = property(lambda self: (self.U.shape[0], self.V.shape[1]))

    def forward(self, x):
        return F.linear(F.linear(x, self.V), self.U, self.b)

    def factors(self):
        return self.U.detach().cpu(), self.V.detach().cpu()

    def set_factors(self, U, V):
        self.U.data, self.V.data = U.contiguous().to(self.U.device), V.contiguous().to(self.V.device)
        self.U.grad = self.V.grad = None


class Biased(v10.Variant):
    name, log_file, description = "variant.py", "logs/variant.jsonl", "Trains low-rank layers that have a bias."

    def add_flags(self, parser):
        super().add_flags(parser)
        parser.add_argument("--factor-lr", type=v10.number(float, above=0), default=0.05, help="SGD's, for the factors")

    def linear(self, n, m, rank):
        return BiasedLowRank(n, m, rank)

    def controllers(self, layers, args):
        return [v10.RankController(max_step=1, min_rank=args.min_rank, max_rank=min(layer.shape)) for layer in layers]

    def make_optimizers(self, model, args):
        factors = {factor for layer in model.linears().values() for factor in (layer.U, layer.V)}
        sgd = torch.optim.SGD([p for p in model.parameters() if p in factors], lr=args.factor_lr, momentum=0.9)
        sgd.moments = {"momentum_buffer": 1}
        return [sgd, v10.make_adamw([p for p in model.parameters() if p not in factors], args)]


if __name__ == "__main__":
    v10.leave(v10.main(variant=Biased()))
