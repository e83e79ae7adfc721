"""The tables of scale.md: memory, and what processes exchange. Computed, not measured.

    python3 docs/scale.py        into scale.md, beside this file

What autograd keeps for the backward pass is counted: one block of each size, as wide as it is, runs a sequence with
PyTorch's fused attention in bfloat16, and the bytes that it saves are added up. Its tensors are fake ones, which have
shapes and no numbers.
"""
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import counts  # noqa: E402
import results  # noqa: E402
import v10_transformer_lowrank_scaled as v10  # noqa: E402
from plot_logs import Cell, Table  # noqa: E402

REPORT = {"d_model": 512, "n_layers": 6, "n_heads": 8, "vocab_size": 33_277, "block_size": 256}
SMALL, LARGE = ({"d_model": C, "n_layers": n, "n_heads": C // 64, "vocab_size": 32_000, "block_size": 2048}
                for C, n in ((768, 12), (1536, 24)))
MODELS = {  # (sizes, rank of the linear layers, is the head tied, the optimizer)
    "the report's, dense, AdamW (v7)": (REPORT, None, False, "adamw"),
    "the report's, rank 64, AdamW (v10)": (REPORT, 64, False, "adamw"),
    "the report's, rank 256, Spectron (v11 at its start)": (REPORT, 256, True, "spectron"),
    "Spectron's S, dense, Muon": (SMALL, None, False, "muon"),
    "Spectron's S, rank d/4": (SMALL, 192, False, "spectron"),
    "Spectron's L, dense, Muon": (LARGE, None, False, "muon"),
    "Spectron's L, rank d/4": (LARGE, 384, False, "spectron")}
GPU = {"memory": 80e9, "rate": 1e14, "network": 1.25e9}  # bytes, operations a second, bytes a second: 10 Gbit/s
CPU = {"rate": 5e11, "network": 1.25e8}  # two cores with bfloat16, 1 Gbit/s


def fused(q, k, v, causal, dropout):
    """Without its dropout, for which a GPU keeps the state of its generator alone."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def saved_bytes(run):
    """The bytes of all tensors that autograd saves while `run()` runs, each storage once."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor  # kept, so that its place is not taken again
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def linear_of(rank):
    return v10.DenseLinear if rank is None else lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, rank)


def of_a_sequence(sizes, rank, dropout=0.1):
    """(bytes that autograd keeps of a sequence in all blocks, bytes of the weights in bfloat16 that it keeps once)"""
    config = v10.GPTConfig(**sizes, d_ff=4 * sizes["d_model"], dropout=dropout)
    with FakeTensorMode(), mock.patch.object(v10, "attention", fused), torch.autocast("cpu", torch.bfloat16):
        block = v10.Block(config, linear_of(rank))
        sequences = [torch.zeros(n, config.block_size, config.d_model, requires_grad=True) for n in (1, 2)]
        one, two = (saved_bytes(lambda x=x: block(x)) for x in sequences)
    return config.n_layers * (two - one), config.n_layers * (2 * one - two)


def of_model(sizes, rank, tied, optimizer):
    """What a model takes: parameters and bytes, by part."""
    sizes_only = {name: value for name, value in sizes.items() if name != "n_heads"}
    settings = counts.settings_of(**sizes_only, batch_size=1, optimizer=optimizer)
    ranks = None if rank is None else [rank] * len(settings["layers"])
    per_token = counts.token_multiplications(settings, ranks)
    with torch.device("meta"):
        parameters = v10.count_parameters(v10.GPT(v10.GPTConfig(
            **sizes, d_ff=4 * sizes["d_model"], tie_embeddings=tied), linear_of(rank)))
    on_factors = per_token["linear"] if optimizer in ("muon", "spectron") else 0  # they have one moment, the others two
    sequence, weights = of_a_sequence(sizes, rank)
    return {"parameters": parameters, "linear": per_token["linear"], "state": 8 * parameters,
            "moments": 8 * parameters - 4 * on_factors, "sequence": sequence, "weights": weights,
            "logits": 4 * sizes["block_size"] * sizes["vocab_size"], "exchange": 8 * parameters,
            "operations": 6 * sum(per_token.values())}  # a token's, forward and backward, two for each multiplication


def two_digits(number):
    """Rounded down."""
    unit = 10 ** max(len(f"{number:.0f}") - 2, 0)
    return number // unit * unit


def memory(models):
    rows = []
    for label, found in models.items():
        fixed = found["state"] + found["moments"] + found["weights"] + v10.LOGITS_BYTES
        rows.append([label, Cell(found["parameters"] / 1e6, ",.1f"), Cell(found["linear"] / 1e6, ",.1f"),
                     *(Cell(found[part] / 1e9, ".2f")
                       for part in ("state", "moments", "weights", "sequence", "logits")),
                     Cell(two_digits((GPU["memory"] - fixed) / found["sequence"]), ",.0f")])
    return Table("memory", "", [
        "GB, computed", "M parameters", "in the linear layers", "parameters and gradients", "moments",
        "weights in bfloat16", "activations of a sequence", "its logits, were they whole",
        "sequences in 80 GB, at most"], rows)


def exchange(models):
    rows = []
    for label, found in models.items():
        rows.append([label, Cell(found["exchange"] / 1e9, ".2f"),
                     *(Cell(found["exchange"] / machine["network"] * machine["rate"] / found["operations"], ",.0f")
                       for machine in (GPU, CPU))])
    return Table("exchange", "", ["computed", "GB that a process sends, and receives, in a step",
                                  "tokens a step, GPU and 10 Gbit/s", "two CPU cores and 1 Gbit/s"], rows)


def filled(page):
    models = {label: of_model(*model) for label, model in MODELS.items()}
    return results.filled(page, {"memory": memory(models), "exchange": exchange(models)})


if __name__ == "__main__":
    path = HERE / "scale.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
