"""The dense baseline, v7: v10 with an nn.Linear in the place of each factored layer, and nothing else changed.

Same data, batches, embeddings, norms, head, optimizer, evaluation and log. With one seed both start from the same
embeddings and head and see the same batches, bit for bit. The log's `ranks` are empty; its stable ranks are those of
the dense matrices, and its factor parameters are theirs. With `--optimizer muon` it is v11's control.

    python3 v7_transformer_dense_baseline.py                 the report's configuration, causal
    python3 v7_transformer_dense_baseline.py --help          v10's flags without those for ranks, and --optimizer's
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import v10_transformer_lowrank_scaled as v10  # noqa: E402
import v11_transformer_lowrank_spectron as v11  # noqa: E402


class Dense(v10.Variant):
    name = "v7_transformer_dense_baseline.py"
    log_file = "logs/v7.jsonl"
    description = "Trains a GPT whose linear layers are dense."
    defaults = {"fixed_rank": True, "rank_interval": None, "ranks_from": None}  # there are no ranks

    def add_flags(self, parser):
        v11.add_optimizer_flags(parser, ("adamw", "muon"), "adamw")

    def complete(self, args):
        v11.complete_eta(args)

    def linear(self, n, m, rank):
        return v10.DenseLinear(n, m)

    def make_optimizers(self, model, args):
        return v11.make_optimizers(model, args)


def main(argv=None):
    return v10.main(argv, Dense())


if __name__ == "__main__":
    v10.leave(main())
