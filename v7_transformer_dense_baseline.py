"""The dense baseline, v7: v10 with an nn.Linear in the place of each factored layer, and nothing else changed.

Same data, batches, embeddings, norms, head, optimizer, evaluation and log. With one seed both start from the same
embeddings and head and see the same batches, bit for bit. The log's `ranks` are empty; its stable ranks are those of
the dense matrices, and its factor parameters are theirs.

    python3 v7_transformer_dense_baseline.py                 the report's configuration, causal
    python3 v7_transformer_dense_baseline.py --help          v10's flags but those that control ranks
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402


class DenseLinear(nn.Linear):
    """x (..., n) -> x W^T (..., m), without bias, PyTorch's own initialisation."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    @property
    def shape(self):
        """(m, n), the shape of W."""
        return tuple(self.weight.shape)

    def factors(self):
        """W as a product of two matrices of full rank, I W or W I, so that v10's spectra apply to it."""
        W = self.weight.detach().cpu()
        identity = torch.eye(min(W.shape))
        return (identity, W) if W.shape[0] <= W.shape[1] else (W, identity)


def main(argv=None):
    return v10.main(argv, prog="v7_transformer_dense_baseline.py", linear=DenseLinear, log_file="logs/v7.jsonl")


if __name__ == "__main__":
    v10.leave(main())
