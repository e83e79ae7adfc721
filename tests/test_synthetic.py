"""The synthetic corpus: its shape, its law, and the exactness of its floor."""
import hashlib
import itertools
import json
import math

import numpy as np
import pytest

import synthetic
from conftest import ROOT


def small(switch=0.3, topics=3, classes=4, words=10, seed=0):
    return synthetic.make_generator(words, topics, classes, switch, np.random.default_rng(seed))


def make(tmp_path, *flags, name="corpus.tokens"):
    out = tmp_path / name
    assert synthetic.main(["--out", str(out), *map(str, flags)]) == 0
    return out.read_text().split(), json.loads(out.with_suffix(".json").read_text()), out


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_the_forward_algorithm_sums_over_all_topic_paths(switch):
    generator, tokens = small(switch), np.array([3, 7, 0, 5, 6])
    classes, n_topics, losses = tokens % 4, 3, []
    for n in range(len(tokens) + 1):  # P(first n tokens), every path of topics written out
        total = 0.0
        for path in itertools.product(range(n_topics), repeat=n):
            p, before = 1.0, 0
            for t, topic in enumerate(path):
                p *= 1 / n_topics if t == 0 else (1 - switch) * (topic == path[t - 1]) + switch / n_topics
                p *= generator.transitions[topic, before, classes[t]] * generator.words[tokens[t]]
                before = classes[t]
            total += p
        losses.append(-math.log(total))
    assert synthetic.token_losses(generator, tokens) == pytest.approx(np.diff(losses), rel=1e-10)


def test_the_true_generator_predicts_its_own_text_better_than_any_other():
    text = synthetic.sample(small(0.02), 50_000, np.random.default_rng(1))
    own = synthetic.token_losses(small(0.02), text).mean()
    for other in (small(0.2), small(0.02, seed=1), small(0.0)):
        assert synthetic.token_losses(other, text).mean() > own + 0.001


def test_the_losses_average_to_the_entropy_of_a_memoryless_generator():
    generator = small(topics=1)._replace(transitions=np.full((1, 4, 4), 0.25))
    p = generator.words * 0.25
    text = synthetic.sample(generator, 100_000, np.random.default_rng(0))
    assert p.sum() == pytest.approx(1)
    assert synthetic.token_losses(generator, text).mean() == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)
    assert np.bincount(text, minlength=10) / len(text) == pytest.approx(p, abs=0.01)


def test_classes_follow_the_transitions_of_their_topic():
    generator = small(topics=1)
    classes = synthetic.sample(generator, 200_000, np.random.default_rng(0)) % 4
    counts = np.zeros((4, 4))
    np.add.at(counts, (classes[:-1], classes[1:]), 1)
    assert counts / counts.sum(1, keepdims=True) == pytest.approx(generator.transitions[0], abs=0.02)


def test_sizes_are_exact_and_the_sidecar_identifies_the_text(tmp_path):
    words, sidecar, out = make(tmp_path, "--tokens", 9000, "--words", 700, "--val-fraction", 0.1)
    assert (len(words), len(set(words)), len(set(words[:700]))) == (9000, 700, 700)
    assert sidecar["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert sidecar["val_fraction"] == 0.1
    assert 0 < sidecar["entropy_floor"] < math.log(700)


def test_the_floor_is_the_mean_over_the_held_out_tokens_but_the_first(tmp_path, monkeypatch):
    token_losses, seen = synthetic.token_losses, []
    monkeypatch.setattr(synthetic, "token_losses", lambda *args: seen.append(token_losses(*args)) or seen[-1])
    _, sidecar, _ = make(tmp_path, "--tokens", 2000, "--words", 100, "--val-fraction", 0.1)
    assert len(seen[0]) == 1900
    assert sidecar["entropy_floor"] == pytest.approx(seen[0][-199:].mean())


def test_the_seed_sets_the_text(tmp_path):
    flags = ["--tokens", 3000, "--words", 200]
    texts = [make(tmp_path, *flags, "--seed", seed, name=f"{i}.tokens")[0] for i, seed in enumerate((0, 0, 1))]
    assert texts[0] == texts[1] != texts[2]


def test_the_committed_corpus_is_what_the_script_makes(tmp_path):
    *_, out = make(tmp_path, name="synthetic.tokens")
    for name in ("synthetic.tokens", "synthetic.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
    assert len(out.read_text().split()) == 200_000
