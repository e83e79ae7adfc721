"""A synthetic corpus whose entropy is known: the floor that no honest model can go below.

A few hidden topics switch rarely. Each topic is a Markov chain over word classes, and each class has its own words,
which follow Zipf's law. A word tells its class but not the topic, so a reader has to infer the topic from the words
before, and the best possible prediction is that of the forward algorithm. Its loss on the held-out tokens is computed
exactly and written beside the text, in nats per token, with what identifies the text: SHA-256 and val_fraction.

    python3 data/synthetic.py                                          the corpus that is committed
    python3 data/synthetic.py --tokens 2051910 --words 33277 --out big.tokens       WikiText-2's shape

The text begins with a list of all words in random order, so that the vocabulary has exactly --words words.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import sys
from bisect import bisect
from pathlib import Path
from typing import NamedTuple

import numpy as np

ZIPF = 1.0  # the exponent of Zipf's law within a class
SPARSITY = 0.15  # Dirichlet concentration of a class's successors: small means few of them
SYLLABLES = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]  # 80


class Generator(NamedTuple):
    """The true generator. Words are numbered so that the class of word w is w % classes."""

    switch: float  # chance that the topic is drawn anew, uniformly, before a token
    transitions: np.ndarray  # (topics, classes, classes): P(class | class before, topic)
    words: np.ndarray  # (W,): P(word | its class)


def make_generator(n_words, n_topics, n_classes, switch, rng):
    transitions = rng.dirichlet(np.full(n_classes, SPARSITY), size=(n_topics, n_classes))
    transitions = 0.99 * transitions + 0.01 / n_classes  # every class can follow every other
    words = 1.0 / (1 + np.arange(n_words) // n_classes) ** ZIPF
    for c in range(n_classes):
        words[c::n_classes] /= words[c::n_classes].sum()
    return Generator(switch, transitions, words)


def sample(generator, n_tokens, rng):
    """n_tokens words drawn from the generator -> (n_tokens,) word numbers. The class before the first is 0."""
    n_topics, n_classes, _ = generator.transitions.shape
    drawn_anew = rng.random(n_tokens) < generator.switch
    drawn_anew[0] = True
    topics = rng.integers(n_topics, size=n_tokens)[np.maximum.accumulate(np.where(drawn_anew, np.arange(n_tokens), 0))]
    steps = generator.transitions.cumsum(axis=2)[:, :, :-1].tolist()
    c, classes = 0, []
    for topic, u in zip(topics.tolist(), rng.random(n_tokens).tolist(), strict=True):
        c = bisect(steps[topic][c], u)
        classes.append(c)
    classes = np.array(classes)
    tokens, u = np.empty(n_tokens, dtype=np.int64), rng.random(n_tokens)
    for c in range(n_classes):
        here = classes == c
        steps_c = generator.words[c::n_classes].cumsum()[:-1]
        tokens[here] = c + n_classes * np.searchsorted(steps_c, u[here], side="right")
    return tokens


def token_losses(generator, tokens):
    """-log P(token | all tokens before it) under the true generator, by the forward algorithm -> (N,) nats."""
    n_topics, n_classes, _ = generator.transitions.shape
    classes = tokens % n_classes
    before = np.concatenate([[0], classes[:-1]])
    likelihoods = generator.transitions[:, before, classes].T.tolist()  # (N, topics): P(class | topic, class before)
    belief, stay, share, masses = [1 / n_topics] * n_topics, 1 - generator.switch, generator.switch / n_topics, []
    for row in likelihoods:
        joint = [(stay * b + share) * p for b, p in zip(belief, row, strict=True)]
        mass = sum(joint)
        belief = [j / mass for j in joint]
        masses.append(mass)
    return -np.log(masses) - np.log(generator.words[tokens])


def spell(n_words, rng):
    """n_words distinct words of two or more syllables, in random order."""
    length = next(n for n in itertools.count(2) if len(SYLLABLES) ** n >= 2 * n_words)
    numbers = rng.choice(len(SYLLABLES) ** length, size=n_words, replace=False).tolist()
    return ["".join(SYLLABLES[n // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(length)) for n in numbers]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Writes a synthetic corpus of known entropy.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="length, the list of all words included")
    parser.add_argument("--words", type=int, default=1_000, help="size of the vocabulary")
    parser.add_argument("--topics", type=int, default=4, help="hidden topics")
    parser.add_argument("--classes", type=int, default=20, help="word classes")
    parser.add_argument("--switch", type=float, default=0.01, help="chance of a new topic at a token")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="held-out share, for which the floor holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=lambda name: Path(name).expanduser(),
                        default=Path(__file__).with_name("synthetic.tokens"))
    args = parser.parse_args(argv)
    for wrong, message in ((max(args.tokens, args.words, args.topics, args.classes) > 10**9,
                            "--tokens, --words, --topics and --classes must be at most a billion"),
                           (not 1 <= args.classes <= args.words, "--classes must be at least 1 and at most --words"),
                           (args.topics < 1, "--topics must be at least 1"),
                           (not 0 <= args.switch <= 1, "--switch must be between 0 and 1"),
                           (not 0 < args.val_fraction < 1, "--val-fraction must be between 0 and 1"),
                           (args.seed < 0, "--seed must not be negative"),
                           ((1 - args.val_fraction) * args.tokens <= args.words or args.val_fraction * args.tokens < 2,
                            "--tokens must leave room for the list of all --words and two held-out tokens"),
                           (not args.out.name, "--out needs the name of a file"),
                           (args.out.suffix == ".json", "--out must not end in .json, which is the sidecar's name")):
        if wrong:
            parser.error(message)

    rng = np.random.default_rng(args.seed)
    try:
        generator = make_generator(args.words, args.topics, args.classes, args.switch, rng)
        text = sample(generator, args.tokens - args.words, rng)
    except MemoryError:
        parser.error("out of memory: lower --tokens, --words, --topics or --classes")
    held_out = args.tokens - int((1 - args.val_fraction) * args.tokens)
    floor = token_losses(generator, text)[-held_out:][1:].mean()  # v10 predicts every held-out token but the first
    names = np.array(spell(args.words, rng))
    words = names[np.concatenate([rng.permutation(args.words), text])].tolist()
    data = "".join(" ".join(words[i:i + 20]) + "\n" for i in range(0, len(words), 20)).encode()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    sidecar = {"sha256": hashlib.sha256(data).hexdigest(), "entropy_floor": float(floor), "unit": "nats per token",
               "perplexity_floor": float(np.exp(floor)), **settings}
    for path, content in ((args.out, data),
                          (args.out.with_suffix(".json"), json.dumps(sidecar, indent=1).encode() + b"\n")):
        part = path.with_name(path.name + ".part")  # under its own name a file is whole
        try:
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            parser.error(f"cannot write {path}: {error.strerror}")
    print(f"{args.out}: {args.tokens:,} tokens, {args.words:,} words, entropy floor {floor:.4f} nats per token "
          f"(perplexity {np.exp(floor):.1f}) on the last {held_out:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
