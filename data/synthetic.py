"""A synthetic corpus whose entropy is known: the floor that no honest model can go below.

Hidden topics switch rarely. Each topic is a Markov chain over word classes, and each class has its own words, which
follow Zipf's law, as the topics may, too. A word tells its class but not the topic, so a reader has to infer the topic
from the words before, and the best possible prediction is that of the forward algorithm. Its loss on the held-out
tokens is computed exactly and written beside the text, in nats per token, with what identifies the text: SHA-256 and
val_fraction.

    python3 data/synthetic.py --overwrite                              the corpus that is committed
    python3 data/synthetic.py --tokens 2051910 --words 33277 --out big.tokens       WikiText-2's shape

The text begins with a list of all words in random order, so that the vocabulary has exactly --words words. It is made
piece by piece: any number of tokens takes the same memory.
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plot_logs import Parser, screen  # noqa: E402

BLOCK = 2**20  # tokens at a time
READERS = 2**12  # blocks of --context at a time
ZIPF = 1.0  # the exponent of Zipf's law within a class
SPARSITY = 0.15  # Dirichlet concentration of a class's successors: small means few of them
SYLLABLES = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]  # 80


class Generator(NamedTuple):
    """The true generator. Words are numbered so that the class of word w is w % classes."""

    switch: float  # chance that the topic is drawn anew before a token
    topics: np.ndarray  # (topics,): P(topic), where it is drawn
    transitions: np.ndarray  # (topics, classes, classes): P(class | class before, topic)
    words: np.ndarray  # (W,): P(word | its class)


def make_generator(n_words, n_topics, n_classes, switch, rng, topic_zipf=0.0):
    transitions = rng.dirichlet(np.full(n_classes, SPARSITY), size=(n_topics, n_classes))
    transitions = 0.99 * transitions + 0.01 / n_classes  # every class can follow every other
    words = 1.0 / (1 + np.arange(n_words) // n_classes) ** ZIPF
    for c in range(n_classes):
        words[c::n_classes] /= words[c::n_classes].sum()
    topics = 1.0 / (1 + np.arange(n_topics)) ** topic_zipf
    return Generator(switch, topics / topics.sum(), transitions, words)


def sample(generator, n_tokens, rng):
    """n_tokens words drawn from the generator -> their numbers, in pieces (N,). The class before the first is 0."""
    n_topics, n_classes, _ = generator.transitions.shape
    steps = generator.transitions.cumsum(axis=2)[:, :, :-1].tolist()
    even = len(set(generator.topics)) == 1  # then drawn by integers(), as in the committed corpus
    topic = c = 0
    for start in range(0, n_tokens, BLOCK):
        n = min(BLOCK, n_tokens - start)
        drawn_anew = rng.random(n) < generator.switch
        drawn_anew[0] |= start == 0
        last = np.maximum.accumulate(np.where(drawn_anew, np.arange(n), -1))  # where the topic was drawn; -1: before
        drawn = rng.integers(n_topics, size=n) if even else rng.choice(n_topics, size=n, p=generator.topics)
        topics = np.where(last < 0, topic, drawn[last])
        topic, classes = topics[-1], []
        for of_token, u in zip(topics.tolist(), rng.random(n).tolist(), strict=True):
            c = bisect(steps[of_token][c], u)
            classes.append(c)
        classes = np.array(classes)
        tokens, u = np.empty(n, dtype=np.int64), rng.random(n)
        for k in range(n_classes):
            here = classes == k
            tokens[here] = k + n_classes * np.searchsorted(generator.words[k::n_classes].cumsum()[:-1], u[here],
                                                           side="right")
        yield tokens


def memory(generator):
    """The number of tokens after which it makes no difference in float64 what was believed of the topic before them: in
    Hilbert's metric each brings any two beliefs closer by a factor of tanh(D / 4), D the diameter that one step leaves
    (Birkhoff's theorem)."""
    least = generator.switch * np.sort(generator.topics)[:2]
    if len(least) < 2 or generator.switch == 1:
        return 0
    if not least[0]:
        return np.inf
    D = np.log((1 - generator.switch + least) / least).sum()
    rate = 2 * np.arctanh(np.exp(-D / 2))  # -log(tanh(D / 4)), also where the tangent rounds to 1
    return np.log(D / 1e-17) / rate if rate else np.inf


def token_losses(generator, pieces, first=0):
    """-log P(token | all tokens before it) under the true generator, by the forward algorithm -> nats, in pieces as the
    tokens are (N,), those before token `first` empty if it makes no difference to what follows."""
    n_classes = generator.transitions.shape[1]
    belief, shares = generator.topics.tolist(), (generator.switch * generator.topics).tolist()
    stay = 1 - generator.switch
    needed = first - memory(generator)  # what comes before this token is forgotten
    last = at = 0  # the class before, and how many tokens there were
    for tokens in pieces:
        classes, masses = tokens % n_classes, []
        at += len(tokens)
        if at <= needed:
            last = classes[-1]
            yield np.empty(0)
            continue
        before = np.concatenate([[last], classes[:-1]])
        last = classes[-1]
        likelihoods = generator.transitions[:, before, classes].T.tolist()  # (N, topics): P(class | before, topic)
        for row in likelihoods:
            joint = [(stay * b + share) * p for b, share, p in zip(belief, shares, row, strict=True)]
            mass = sum(joint)
            belief = [j / mass for j in joint]
            masses.append(mass)
        yield -np.log(masses) - np.log(generator.words[tokens])


def stationary(generator):
    """The joint distribution of a token's topic and class far from the beginning -> (topics, classes)."""
    n_classes = generator.transitions.shape[1]
    share, change = np.repeat(generator.topics[:, None], n_classes, axis=1) / n_classes, 1.0
    while change > 1e-13:
        drawn = generator.topics[:, None] * share.sum(0)  # the topic is drawn, then the class
        before = (1 - generator.switch) * share + generator.switch * drawn
        after = np.einsum("kc,kcd->kd", before, generator.transitions)
        share, change = after, np.abs(after - share).sum()
    return share


def block_losses(generator, tokens, context):
    """-log P(token | the tokens before it in its block) under the true generator: the lowest loss possible for a reader
    whose context is a block of so many inputs. tokens (N,), cut as v10's evaluation cuts them -> nats (N - 1,)."""
    n_classes = generator.transitions.shape[1]
    context = min(context, len(tokens) - 1)
    whole = (len(tokens) - 1) // context * context
    classes = np.lib.stride_tricks.sliding_window_view(tokens[:whole + 1] % n_classes, context + 1)[::context]
    belief = stationary(generator).T[classes[:, 0]]  # (blocks, topics)
    belief /= belief.sum(1, keepdims=True)
    masses = np.empty((len(classes), context))
    for i in range(context):
        prior = (1 - generator.switch) * belief + generator.switch * generator.topics
        joint = prior * generator.transitions[:, classes[:, i], classes[:, i + 1]].T
        masses[:, i] = joint.sum(1)
        belief = joint / masses[:, i, None]
    losses = -np.log(masses).ravel() - np.log(generator.words[tokens[1:whole + 1]])
    rest = tokens[whole:]
    return losses if len(rest) < 2 else np.concatenate([losses, block_losses(generator, rest, context)])


def spell(n_words, rng):
    """n_words distinct words of two or more syllables, in random order."""
    length = next(n for n in itertools.count(2) if len(SYLLABLES) ** n >= 2 * n_words)
    numbers = rng.choice(len(SYLLABLES) ** length, size=n_words, replace=False).tolist()
    return ["".join(SYLLABLES[n // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(length)) for n in numbers]


def write(args):
    """Write the text and its sidecar, each under its name once it is whole -> the entropy floor."""
    rng = np.random.default_rng(args.seed)
    generator = make_generator(args.words, args.topics, args.classes, args.switch, rng, args.topic_zipf)
    first = int((1 - args.val_fraction) * args.tokens) + 1 - args.words  # the first held-out token that v10 predicts
    parts = [args.out.with_name(args.out.name + end) for end in (".numbers.part", ".part", ".json.part")]
    numbers, text, sidecar = parts
    try:
        numbers.touch(exist_ok=False)
    except FileExistsError:
        raise FileExistsError(None, f"{numbers} exists: it is another run's, or left by one that was cut off; remove "
                              "it") from None
    try:
        with numbers.open("wb") as file, tqdm(total=args.tokens - args.words, unit="token", unit_scale=True,
                                              disable=None) as bar:
            kept, losses = itertools.tee(sample(generator, args.tokens - args.words, rng))
            total = at = 0
            for tokens, of_tokens in zip(kept, token_losses(generator, losses, first), strict=True):
                file.write(tokens.astype("<u4"))
                total += of_tokens[max(0, first - at):].sum()
                at += len(tokens)
                bar.update(len(tokens))
        floor = total / (at - first)
        names, digest, rest = np.array(spell(args.words, rng)), hashlib.sha256(), []
        drawn = np.memmap(numbers, "<u4", "r")
        with text.open("wb") as file:
            for piece in (rng.permutation(args.words), *(drawn[i:i + BLOCK] for i in range(0, at, BLOCK)), None):
                words = rest + ([] if piece is None else names[piece].tolist())
                whole = len(words) if piece is None else len(words) // 20 * 20  # lines of 20 words
                data = "".join(" ".join(words[i:min(i + 20, whole)]) + "\n" for i in range(0, whole, 20)).encode()
                rest = words[whole:]
                digest.update(data)
                file.write(data)
        settings = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite", "context")}
        if args.context:
            step = args.context * READERS
            total = sum(block_losses(generator, drawn[i:i + step + 1].astype(np.int64), args.context).sum()
                        for i in range(first - 1, at - 1, step))
            settings |= {"context": args.context, "context_floor": float(total / (at - first))}
        del drawn  # Windows keeps a file that is mapped
        sidecar.write_text(json.dumps({
            "sha256": digest.hexdigest(), "entropy_floor": float(floor), "unit": "nats per token",
            "perplexity_floor": float(np.exp(floor)), **settings}, indent=1) + "\n", encoding="utf-8")
        text.replace(args.out)
        sidecar.replace(args.out.with_suffix(".json"))
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()
    return floor


def main(argv=None):
    parser = Parser(description="Writes a synthetic corpus of known entropy.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="length, the list of all words included")
    parser.add_argument("--words", type=int, default=1_000, help="size of the vocabulary")
    parser.add_argument("--topics", type=int, default=4, help="hidden topics")
    parser.add_argument("--topic-zipf", type=float, default=0.0,
                        help="exponent of Zipf's law for the topics; 0: all are equally frequent")
    parser.add_argument("--classes", type=int, default=20, help="word classes")
    parser.add_argument("--switch", type=float, default=0.01, help="chance of a new topic at a token")
    parser.add_argument("--val-fraction", type=float, default=0.01, help="held-out share, for which the floor holds")
    parser.add_argument("--context", type=int,
                        help="also compute the floor of a model that sees only blocks of this many tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=lambda name: Path(name).expanduser(),
                        default=Path(__file__).with_name("synthetic.tokens"))
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out and its .json")
    args = parser.parse_args(argv)
    for wrong, message in ((max(args.tokens, args.words, args.topics, args.classes) > 10**9,
                            "--tokens, --words, --topics and --classes must be at most a billion"),
                           (not 1 <= args.classes <= args.words, "--classes must be at least 1 and at most --words"),
                           (args.topics < 1, "--topics must be at least 1"),
                           (not 0 <= args.topic_zipf <= 10, "--topic-zipf must be between 0 and 10"),
                           (not 0 <= args.switch <= 1, "--switch must be between 0 and 1"),
                           (not 0 < args.val_fraction < 1, "--val-fraction must be between 0 and 1"),
                           (args.seed < 0, "--seed must not be negative"),
                           (args.context is not None and not 1 <= args.context <= 10**6,
                            "--context must be at least 1 and at most a million"),
                           ((1 - args.val_fraction) * args.tokens <= args.words or args.val_fraction * args.tokens < 2,
                            "--tokens must leave room for the list of all --words and two held-out tokens"),
                           (not args.out.name, "--out needs the name of a file"),
                           (args.out.suffix == ".json", "--out must not end in .json, which is the sidecar's name")):
        if wrong:
            parser.error(message)
    for path in (args.out, args.out.with_suffix(".json")):
        if path.exists() and not path.is_file():
            parser.error(f"{path} is not a plain file: --out needs the name of one")
        if path.is_file() and not args.overwrite:
            parser.error(f"{path} exists: --overwrite replaces it, --out NAME writes elsewhere")

    try:
        floor = write(args)
    except MemoryError:
        parser.error("out of memory: lower --words, --topics or --classes")
    except OSError as error:
        parser.error(f"cannot write {args.out}: {error.strerror}")
    held_out = args.tokens - int((1 - args.val_fraction) * args.tokens)
    screen(f"{args.out}: {args.tokens:,} tokens, {args.words:,} words, entropy floor {floor:.4f} nats per token "
           f"(perplexity {np.exp(floor):.1f}) on the last {held_out:,}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # what was begun is gone, and nobody wants a traceback
        sys.exit(main())
    sys.exit(130)
