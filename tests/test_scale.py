"""docs/scale.md: its numbers are those of its script, and the script counts what models have."""
import importlib.util

import pytest
import torch

import v10_transformer_lowrank_scaled as v10
from conftest import ROOT

spec = importlib.util.spec_from_file_location("scale", ROOT / "docs" / "scale.py")
scale = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scale)


def test_what_autograd_saves_is_counted_once_per_storage_and_without_parameters():
    x, weight = torch.ones(10, requires_grad=True), torch.nn.Parameter(torch.ones(10))
    saved = scale.saved_bytes(lambda: (x * weight) * (x * 2))  # x, and both factors of the outer product
    assert saved == 3 * 40


@pytest.mark.parametrize("label", list(scale.MODELS)[:3])
def test_the_parameters_are_those_of_the_model_itself(label):
    sizes, rank, tied, _ = scale.MODELS[label]
    with torch.device("meta"):
        model = v10.GPT(v10.GPTConfig(**sizes, d_ff=4 * sizes["d_model"], tie_embeddings=tied), scale.linear_of(rank))
    found = scale.of_model(*scale.MODELS[label])
    assert found["parameters"] == v10.count_parameters(model)
    assert found["linear"] == v10.count_parameters(*model.linears().values())


@pytest.mark.parametrize("rank", [None, 16])
def test_a_block_counts_for_all_of_a_models_blocks(rank):
    sizes = {"d_model": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 50, "block_size": 32}
    model = v10.GPT(v10.GPTConfig(**sizes, d_ff=256, dropout=0.1), scale.linear_of(rank))

    def kept(sequences):
        x = torch.zeros(sequences, 32, 64, requires_grad=True)
        return scale.saved_bytes(lambda: torch.nn.Sequential(*model.blocks)(x))
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(v10, "attention", scale.fused)
        added = kept(2) - kept(1)
    assert added == pytest.approx(scale.of_a_sequence(sizes, rank)[0], rel=0.03)  # outputs are the next block's inputs


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="other versions may save other tensors")
def test_the_page_shows_what_the_script_computes():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert scale.filled(page) == page
