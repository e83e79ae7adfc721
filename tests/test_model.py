"""The model: its size, its mask, and what v7 shares with it."""
import pytest
import torch
import torch.nn as nn

import v10_transformer_lowrank_scaled as v10


def low_rank(n, m):
    return v10.LowRankLinearAdaptiveSpectral(n, m, 6)


def small(attention="causal", linear=low_rank, **settings):
    torch.manual_seed(0)
    return v10.GPT(v10.GPTConfig(**{"vocab_size": 31, "d_model": 24, "n_layers": 2, "n_heads": 3, "d_ff": 40,
                                    "block_size": 16, "attention": attention} | settings), linear)


@pytest.mark.parametrize(("linear", "parameters"), [
    (lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 64), 37_792_253), (v10.DenseLinear, 53_127_677)])
def test_the_reports_configuration_has_the_reports_size(linear, parameters):
    with torch.device("meta"):
        model = v10.GPT(v10.GPTConfig(vocab_size=33_277), linear)
    assert v10.count_parameters(model) == parameters
    assert len(model.linears()) == 36


def test_the_factors_start_with_the_reports_variances():
    torch.manual_seed(0)
    layer = v10.LowRankLinearAdaptiveSpectral(300, 500, 100)
    assert layer.U.var().item() == pytest.approx(1 / 500, rel=0.03)
    assert layer.V.var().item() == pytest.approx(1 / 300, rel=0.03)


def test_the_layer_computes_its_dense_product_and_derives_its_rank():
    layer, x = v10.LowRankLinearAdaptiveSpectral(7, 9, 4).double(), torch.randn(2, 3, 7, dtype=torch.float64)
    assert torch.allclose(layer(x), x @ (layer.U @ layer.V).T, atol=1e-14)
    layer.set_factors(layer.U.data[:, :2], layer.V.data[:2])
    assert layer.rank == 2
    assert list(layer.state_dict()) == ["U", "V"]


@pytest.mark.parametrize("linear", [low_rank, v10.DenseLinear])
def test_a_later_token_changes_no_earlier_logit_of_a_causal_model(linear):
    model, tokens = small(linear=linear).eval(), torch.randint(31, (1, 16))
    for t in range(15):
        changed = tokens.clone()
        changed[0, t + 1:] = (changed[0, t + 1:] + 1) % 31
        assert torch.equal(model(changed)[0, :t + 1], model(tokens)[0, :t + 1])
        assert not torch.equal(model(changed)[0, t + 1:], model(tokens)[0, t + 1:])


def test_every_earlier_token_changes_the_last_logits():
    model, tokens = small().eval(), torch.randint(31, (1, 16))
    for t in range(16):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 31
        assert not torch.equal(model(changed)[0, -1], model(tokens)[0, -1])


@pytest.mark.parametrize(("attention", "leaks"), [("causal", False), ("bidirectional", True)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_leak_check_finds_the_leak_and_only_it(attention, leaks, bfloat16):
    model = small(attention, dropout=0.5)
    model.low_precision = bfloat16
    before = torch.get_rng_state()
    found = v10.leak_check(model)
    assert found["leaks"] is leaks
    assert (found["max_change"] == 0) is not leaks  # the same kernels on the same numbers, so nothing is rounded anew
    assert torch.equal(before, torch.get_rng_state()), "it draws from the global generator"
    assert model.training


def test_attention_is_softmax_attention_written_out():
    model = small().double().eval()
    block, x = model.blocks[0], torch.randn(2, 16, 24, dtype=torch.float64)
    q, k, v = (layer(x).view(2, 16, 3, 8).transpose(1, 2) for layer in (block.q, block.k, block.v))
    scores = q @ k.transpose(2, 3) / 8**0.5
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    expected = block.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 24))
    assert torch.allclose(block.attend(x), expected, atol=1e-12)


@pytest.mark.parametrize(("built_with", "set_to"), [(0.3, 0.0), (0.0, 0.3)])
def test_dropout_that_is_set_on_the_modules_reaches_attention_too(built_with, set_to):
    block, x = small(dropout=built_with).blocks[0].train(), torch.randn(2, 16, 24)
    block.drop.p = set_to
    assert torch.equal(block.attend(x), block.attend(x)) == (set_to == 0)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, x, y = small().double(), torch.randint(31, (3, 16)), torch.randint(31, (3, 16))
    log_p = model(x).double().log_softmax(-1)
    assert model(x, y).item() == pytest.approx(-log_p.gather(2, y[..., None]).mean().item(), rel=1e-6)


@pytest.mark.parametrize("n", [2, 9, 16, 17, 18, 49, 100])
def test_evaluation_predicts_every_token_but_the_first_once_without_padding(n):
    model, tokens = small("bidirectional", dropout=0.3), torch.randint(31, (n,))
    total = 0.0
    for start in range(0, n - 1, 16):
        x, y = tokens[start:start + 16][:n - 1 - start], tokens[start + 1:start + 17]
        total += model.eval()(x[None], y[None]).item() * len(y)
    model.train()
    for batch_size in (1, 2, 7):
        assert v10.evaluate(model, tokens, batch_size) == pytest.approx(total / (n - 1), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_the_leak_check_leave_the_models_mode_as_they_find_it(training):
    model = small(dropout=0.3).train(training)
    losses = [v10.evaluate(model, torch.arange(31), 2) for _ in range(2)]
    assert losses[0] == losses[1], "something is dropped"
    v10.leak_check(model)
    assert {module.training for module in model.modules()} == {training}


def test_v7_and_v10_of_one_seed_share_all_but_the_linear_layers_bit_for_bit():
    ours, theirs = small().state_dict(), small(linear=v10.DenseLinear).state_dict()
    shared = [name for name in ours if name in theirs]
    assert len(shared) == 2 + 2 + 2 + 2 * 4  # embeddings, head, final norm, two norms a block
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)])
def test_the_dense_layers_stable_rank_is_that_of_its_weight(shape):
    layer = v10.DenseLinear(*shape)
    W = layer.weight.detach()
    exact = (W.norm()**2 / torch.linalg.matrix_norm(W, 2)**2).item()
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert v10.stable_rank(*layer.factors()) == pytest.approx(exact, rel=1e-4)
    assert v10.stable_rank(*layer.factors(), 300, torch.Generator().manual_seed(0)) == pytest.approx(exact, rel=1e-2)


def test_generating_continues_the_text_and_is_set_by_the_seed():
    model, vocabulary = small().eval(), ["<unk>"] + [f"w{i}" for i in range(30)]
    one = v10.generate(model, vocabulary, "w1 never-seen w2", n_tokens=30, seed=1)
    assert one.split()[:3] == ["w1", "<unk>", "w2"]
    assert len(one.split()) == 33
    assert one == v10.generate(model, vocabulary, "w1 never-seen w2", n_tokens=30, seed=1)
    assert one != v10.generate(model, vocabulary, "w1 never-seen w2", n_tokens=30, seed=2)
    with pytest.raises(v10.UserError, match="at least one token"):
        v10.generate(model, vocabulary, " ")


def test_generating_coldly_takes_the_likeliest_word():
    model, vocabulary = small().eval(), [f"w{i}" for i in range(31)]
    words = v10.generate(model, vocabulary, "w5 w9", n_tokens=1, temperature=0).split()
    assert words[2] == vocabulary[model(torch.tensor([[5, 9]]))[0, -1].argmax()]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [7, 256, 1030])
def test_attention_in_bfloat16_is_attention_up_to_rounding(causal, T):
    torch.manual_seed(0)
    inputs = [torch.randn(1, T, 2, 16, dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]  # q, k, v, gradient
    (*low, d_low), (*exact, d_exact) = ([t.to(dtype).requires_grad_() for t in inputs]
                                        for dtype in (torch.bfloat16, torch.float64))
    state = torch.get_rng_state()
    mine = v10.attention(*low, causal, 0.0)
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"
    theirs = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal)
    assert mine.dtype == torch.bfloat16
    for one, other in zip((mine, *torch.autograd.grad(mine, low, d_low)),
                          (theirs, *torch.autograd.grad(theirs, exact, d_exact)), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_attention_in_bfloat16_drops_as_much_as_it_is_told():
    q, k, v = torch.zeros(3, 1, 2, 64, 16, dtype=torch.bfloat16).unbind()
    v = torch.eye(64, 16, dtype=torch.bfloat16).expand(1, 2, 64, 16)
    y = v10.attention(q, k, v, False, 0.25) * 64  # of 64 equal probabilities a quarter is dropped, the others grow
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert y.float().mean() == pytest.approx(1, abs=0.03)


def test_top_k_leaves_only_the_likeliest_words():
    torch.manual_seed(0)
    model = v10.GPT(
        v10.GPTConfig(30, 8, 1, 2, 16, 6), lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 3))
    vocabulary = [f"w{i}" for i in range(30)]
    greedy = v10.generate(model, vocabulary, "w1 w2", n_tokens=20, temperature=0)
    assert v10.generate(model, vocabulary, "w1 w2", n_tokens=20, temperature=5, top_k=1, seed=3) == greedy
    likeliest = {vocabulary[i] for i in model(torch.tensor([[1, 2]]))[0, -1].topk(3).indices}
    drawn = {v10.generate(model, vocabulary, "w1 w2", n_tokens=1, temperature=5, top_k=3, seed=seed).split()[-1]
             for seed in range(60)}
    assert drawn == likeliest


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_leak_check_never_holds_more_logits_than_a_tile(monkeypatch, attention):
    torch.manual_seed(0)
    model = v10.GPT(v10.GPTConfig(50, 8, 1, 2, 16, 12, attention),
                    lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 3))
    whole = v10.leak_check(model)
    assert whole["leaks"] == (attention == "bidirectional")
    logits, seen = v10.GPT.logits, []
    monkeypatch.setattr(v10.GPT, "logits", lambda *args: seen.append(logits(*args)) or seen[-1])
    monkeypatch.setattr(v10, "LOGITS_BYTES", 5 * 32 * 50)
    assert v10.leak_check(model)["max_change"] == pytest.approx(whole["max_change"], abs=1e-7)
    assert [tuple(y.shape) for y in seen] == 8 * [(2, 5, 50)] + 4 * [(2, 2, 50)]  # four texts, each of them twice


def test_dense_weights_are_those_that_the_layers_compute_with():
    for linear in (lambda n, m: v10.LowRankLinearAdaptiveSpectral(n, m, 3), v10.DenseLinear):
        model = v10.GPT(v10.GPTConfig(30, 8, 2, 2, 16, 6), linear)
        weights = v10.dense_weights(model)
        assert list(weights) == list(model.linears())
        for name, layer in model.linears().items():
            x = torch.randn(5, layer.shape[1])
            assert torch.allclose(layer(x), x @ weights[name].T, atol=1e-6)
