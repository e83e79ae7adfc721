"""The synthetic corpus: its shape, its law, and the exactness of its floor."""
import hashlib
import itertools
import json
import math

import numpy as np
import pytest

import synthetic
from conftest import ROOT


def small(switch=0.3, topics=3, classes=4, words=10, seed=0, topic_zipf=0.0):
    return synthetic.make_generator(words, topics, classes, switch, np.random.default_rng(seed), topic_zipf)


def sampled(generator, n_tokens, seed=0):
    return np.concatenate([*synthetic.sample(generator, n_tokens, np.random.default_rng(seed))])


def losses_of(generator, *pieces):
    return np.concatenate([*synthetic.token_losses(generator, pieces)])


def make(tmp_path, *flags, name="corpus.tokens"):
    out = tmp_path / name
    assert synthetic.main(["--out", str(out), *map(str, flags)]) == 0
    return out.read_text().split(), json.loads(out.with_suffix(".json").read_text()), out


ZIPF = [1, 1 / 2**1.5, 1 / 3**1.5]  # of three topics
EVEN_AND_ZIPF = [(switch, zipf) for switch in (0.0, 0.3, 1.0) for zipf in (0.0, 1.5)]


def shares_of(zipf):
    return [share / sum(ZIPF) for share in ZIPF] if zipf else [1 / 3] * 3


@pytest.mark.parametrize(("switch", "zipf"), EVEN_AND_ZIPF)
def test_the_forward_algorithm_sums_over_all_topic_paths(switch, zipf):
    generator, tokens, drawn = small(switch, topic_zipf=zipf), np.array([3, 7, 0, 5, 6]), shares_of(zipf)
    classes, n_topics, losses = tokens % 4, 3, []
    for n in range(len(tokens) + 1):  # P(first n tokens), every path of topics written out
        total = 0.0
        for path in itertools.product(range(n_topics), repeat=n):
            p, before = 1.0, 0
            for t, topic in enumerate(path):
                p *= drawn[topic] if t == 0 else (1 - switch) * (topic == path[t - 1]) + switch * drawn[topic]
                p *= generator.transitions[topic, before, classes[t]] * generator.words[tokens[t]]
                before = classes[t]
            total += p
        losses.append(-math.log(total))
    assert losses_of(generator, tokens) == pytest.approx(np.diff(losses), rel=1e-10)


@pytest.mark.parametrize(("switch", "zipf"), EVEN_AND_ZIPF)
def test_a_block_is_predicted_from_its_first_class_and_what_follows_in_it(switch, zipf):
    generator, drawn = small(switch, topic_zipf=zipf), shares_of(zipf)
    tokens, context = np.array([3, 7, 0, 5, 6, 2, 1]), 4  # a block of 4 targets and one of 2
    chain = np.array([[((1 - switch) * (j == k) + switch * drawn[k]) * generator.transitions[k, c, d]
                       for k in range(3) for d in range(4)] for j in range(3) for c in range(4)])
    share = np.repeat(drawn, 4) / 4 @ np.linalg.matrix_power(chain, 2**20)  # far from the beginning
    share = (share / share.sum()).reshape(3, 4)
    losses = []
    for block in (tokens[:5], tokens[4:]):
        classes, known = block % 4, []
        for n in range(1, len(block) + 1):  # P(first n tokens of the block)
            total = 0.0
            for path in itertools.product(range(3), repeat=n):
                p = share[path[0], classes[0]]
                for t in range(1, n):
                    p *= (1 - switch) * (path[t] == path[t - 1]) + switch * drawn[path[t]]
                    p *= generator.transitions[path[t], classes[t - 1], classes[t]] * generator.words[block[t]]
                total += p
            known.append(-math.log(total))
        losses.extend(np.diff(known))
    assert synthetic.block_losses(generator, tokens, context) == pytest.approx(losses, rel=1e-9)


def test_the_floor_in_context_does_not_depend_on_how_many_blocks_are_read_at_a_time(tmp_path, monkeypatch):
    flags = ("--tokens", 20_000, "--words", 100, "--val-fraction", 0.3, "--context", 7)
    at_once = make(tmp_path, *flags)[1]["context_floor"]
    monkeypatch.setattr(synthetic, "READERS", 3)
    assert make(tmp_path, *flags, "--overwrite")[1]["context_floor"] == pytest.approx(at_once, rel=1e-12)


def test_the_floor_in_context_lies_above_the_entropy_and_meets_it_where_topics_say_nothing(tmp_path):
    flags = ["--overwrite", "--tokens", 20_000, "--words", 100, "--val-fraction", 0.5]
    wide, narrow = (make(tmp_path, *flags, "--context", context)[1] for context in (64, 4))
    assert wide["entropy_floor"] < wide["context_floor"] < narrow["context_floor"]
    one_topic = make(tmp_path, "--overwrite", "--tokens", 20_000, "--words", 100, "--topics", 1, "--context", 4)[1]
    assert one_topic["context_floor"] == pytest.approx(one_topic["entropy_floor"], rel=1e-12)


def test_the_true_generator_predicts_its_own_text_better_than_any_other():
    text = sampled(small(0.02), 50_000, 1)
    own = losses_of(small(0.02), text).mean()
    for other in (small(0.2), small(0.02, seed=1), small(0.0)):
        assert losses_of(other, text).mean() > own + 0.001


def test_the_losses_average_to_the_entropy_of_a_memoryless_generator():
    generator = small(topics=1)._replace(transitions=np.full((1, 4, 4), 0.25))
    p = generator.words * 0.25
    text = sampled(generator, 100_000)
    assert p.sum() == pytest.approx(1)
    assert losses_of(generator, text).mean() == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)
    assert np.bincount(text, minlength=10) / len(text) == pytest.approx(p, abs=0.01)


def test_classes_follow_the_transitions_of_their_topic():
    generator = small(topics=1)
    classes = sampled(generator, 200_000) % 4
    counts = np.zeros((4, 4))
    np.add.at(counts, (classes[:-1], classes[1:]), 1)
    assert counts / counts.sum(1, keepdims=True) == pytest.approx(generator.transitions[0], abs=0.02)


def test_sizes_are_exact_and_the_sidecar_identifies_the_text(tmp_path):
    words, sidecar, out = make(tmp_path, "--tokens", 9000, "--words", 700, "--val-fraction", 0.1)
    assert (len(words), len(set(words)), len(set(words[:700]))) == (9000, 700, 700)
    assert sidecar["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert sidecar["val_fraction"] == 0.1
    assert 0 < sidecar["entropy_floor"] < math.log(700)


@pytest.mark.parametrize("block", [100, 1701, 10**6])
def test_the_floor_is_the_mean_over_the_held_out_tokens_but_the_first(tmp_path, monkeypatch, block):
    token_losses, seen = synthetic.token_losses, []
    monkeypatch.setattr(synthetic, "token_losses", lambda *args: (seen.append(losses) or losses
                                                                  for losses in token_losses(*args)))
    monkeypatch.setattr(synthetic, "BLOCK", block)
    _, sidecar, _ = make(tmp_path, "--tokens", 2000, "--words", 100, "--val-fraction", 0.1)
    losses = np.concatenate(seen)
    assert len(losses) == 1900
    assert sidecar["entropy_floor"] == pytest.approx(losses[-199:].mean())


@pytest.mark.parametrize("zipf", [0.0, 1.5])
def test_what_is_long_forgotten_need_not_be_read(zipf):
    generator = small(0.02, topic_zipf=zipf)
    needed = synthetic.memory(generator)
    assert 100 < needed < 50_000
    pieces = np.split(sampled(generator, 60_000), range(1000, 60_000, 1000))
    every, last = ([*synthetic.token_losses(generator, pieces, first)] for first in (0, 59_000))
    skipped = sum(len(losses) == 0 for losses in last)
    assert skipped == int((59_000 - needed) // 1000)
    assert last[-1] == pytest.approx(every[-1], rel=1e-14)
    assert last[skipped] != pytest.approx(every[skipped], rel=1e-6), "it began with another belief"
    assert synthetic.memory(small(0.0)) == np.inf
    assert synthetic.memory(small(1e-17)) > 1e17, "not nothing, where a step brings beliefs no closer in float64"
    assert synthetic.memory(small(1.0)) == synthetic.memory(small(0.3, topics=1)) == 0


def test_topics_are_as_frequent_as_asked_for():
    """Where each topic stays in a class of its own, the share of the classes is that of the topics."""
    generator = small(1.0, classes=3, topic_zipf=1.5)
    own = np.repeat(np.eye(3)[:, None], 3, axis=1)  # (topics, classes, classes)
    classes = sampled(generator._replace(transitions=own), 100_000) % 3
    assert np.bincount(classes) / 100_000 == pytest.approx(shares_of(1.5), abs=0.01)


def test_a_rare_topic_does_not_make_the_floor_zero(tmp_path):
    _, rare, _ = make(tmp_path, "--tokens", 3000, "--words", 100, "--topics", 64, "--topic-zipf", 9)
    assert 1 < rare["entropy_floor"] < np.log(100)


def test_nothing_is_replaced_unasked_and_two_at_once_do_not_mix(tmp_path, capsys):
    flags = ["--tokens", 3000, "--words", 200]
    before, _, out = make(tmp_path, *flags)
    (tmp_path / "notes.json").write_text("mine")
    for name, said in (("corpus.tokens", "corpus.tokens exists: --overwrite"), ("notes.txt", "notes.json exists")):
        with pytest.raises(SystemExit, match="2"):
            make(tmp_path, *flags, "--seed", 1, name=name)
        assert said in capsys.readouterr().err
    other = tmp_path / "corpus.tokens.numbers.part"
    other.write_text("another run's")
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path, *flags, "--seed", 1, "--overwrite")
    assert "exists: it is another run's" in capsys.readouterr().err
    assert (out.read_text().split(), other.read_text()) == (before, "another run's")
    other.unlink()
    (tmp_path / "folder.json").mkdir()
    for name in (".", "folder.tokens", "/dev/null"):
        with pytest.raises(SystemExit, match="2"):
            make(tmp_path, *flags, "--overwrite", name=name)
        assert "is not a plain file: --out needs the name of one" in capsys.readouterr().err
    assert make(tmp_path, *flags, "--seed", 1, "--overwrite")[0] != before


def test_the_seed_sets_the_text(tmp_path):
    flags = ["--tokens", 3000, "--words", 200]
    texts = [make(tmp_path, *flags, "--seed", seed, name=f"{i}.tokens")[0] for i, seed in enumerate((0, 0, 1))]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("switch", [0.0, 0.3])
def test_pieces_follow_each_other_as_one_text(monkeypatch, switch):
    """Losses do not depend on where the text is cut, and a topic and a class last beyond a piece's end."""
    generator = small(switch)
    monkeypatch.setattr(synthetic, "BLOCK", 3)
    text = sampled(generator, 30_000)
    assert losses_of(generator, *np.split(text, [1, 7, 5000])) == pytest.approx(losses_of(generator, text), rel=1e-12)
    others = [small(0.9 - switch), small(switch, seed=1)]
    assert all(losses_of(other, text).mean() > losses_of(generator, text).mean() + 0.001 for other in others)


def test_a_topic_lasts_beyond_a_piece(monkeypatch):
    """Without switches the second half of a text is as likely as the first."""
    monkeypatch.setattr(synthetic, "BLOCK", 5000)
    for seed in range(6):
        generator = small(switch=0.0)
        losses = losses_of(generator, sampled(generator, 10_000, seed))
        assert losses[5000:].mean() == pytest.approx(losses[:5000].mean(), abs=0.1)


def test_a_text_of_many_pieces_has_every_token_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "BLOCK", 37)
    words, sidecar, out = make(tmp_path, "--tokens", 2003, "--words", 50)
    assert len(words) == 2003
    assert {len(line.split()) for line in out.read_text().splitlines()[:-1]} == {20}
    assert sidecar["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["corpus.json", "corpus.tokens"]


def test_the_committed_corpus_is_what_the_script_makes(tmp_path):
    *_, out = make(tmp_path, name="synthetic.tokens")
    for name in ("synthetic.tokens", "synthetic.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()
    assert len(out.read_text().split()) == 200_000
