"""The data path of v10."""
import hashlib

import pytest
import torch

import v10_transformer_lowrank_scaled as v10
from conftest import write_sidecar


def test_the_vocabulary_is_sorted_and_tokens_index_it(tmp_path):
    path = tmp_path / "text"
    path.write_text("b a\n c  a\tb d a b c d")
    train, val, vocabulary, sha256, floor, _ = v10.load_corpus(path, 0.5, 2)
    assert vocabulary == ["a", "b", "c", "d"]
    assert train.tolist() == [1, 0, 2, 0, 1]
    assert val.tolist() == [3, 0, 1, 2, 3]
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert floor is None


@pytest.mark.parametrize(("n", "fraction", "train"), [(2_051_910, 0.01, 2_031_390), (1002, 0.1, 901), (999, 0.25, 749)])
def test_the_first_part_trains_and_the_rest_validates(tmp_path, n, fraction, train):
    path = tmp_path / "text"
    path.write_text("a b c " * (n // 3))
    parts = v10.load_corpus(path, fraction, 8)[:2]
    assert [len(part) for part in parts] == [train, n - train]


def test_windows_are_contiguous_and_targets_come_one_token_later():
    tokens = torch.arange(100)
    x, y = v10.sample_batch(tokens, 500, 7, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (500, 7)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(7))
    assert x.min() == 0, "the first window is never drawn"
    assert y.max() == 99, "the last window is never drawn"


def test_batches_draw_from_their_own_generator_only():
    before = torch.get_rng_state()
    v10.sample_batch(torch.arange(100), 4, 7, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_words_become_unk_and_are_an_error_without_it():
    assert v10.encode(["b", "x"], ["<unk>", "a", "b"]).tolist() == [2, 0]
    with pytest.raises(v10.UserError, match="'x' is not in the training vocabulary"):
        v10.encode(["a", "x"], ["a", "b"])


@pytest.mark.parametrize("change", [{}, {"sha256": "0"}, {"val_fraction": 0.2}, {"entropy_floor": None}])
def test_the_entropy_floor_is_taken_only_for_the_same_file_and_split(text, change):
    write_sidecar(text, **change)
    assert v10.load_corpus(text, 0.1, 8).entropy_floor == (None if change else 3.125)


def test_a_bare_name_is_looked_for_in_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert v10.find_data("synthetic.tokens") == v10.HERE / "data" / "synthetic.tokens"
    (tmp_path / "synthetic.tokens").write_text("here")
    assert v10.find_data("synthetic.tokens").read_text() == "here"


def test_without_wikitext_the_synthetic_corpus_stands_in_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(v10, "HERE", tmp_path)
    assert v10.find_data(v10.DEFAULT_DATA) == tmp_path / "data" / "synthetic.tokens"
    said = capsys.readouterr().out
    assert "SYNTHETIC CORPUS" in said
    assert "make data" in said
    assert not v10.find_data("other.tokens").exists(), "only the default text has a stand-in"
