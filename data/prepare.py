"""Turns texts of any size into a folder of tokens, of which training reads only what it needs.

    python3 data/prepare.py my.txt --out data/mine                 words between spaces; then v10, v7 or v11 with
                                                                   --data-file data/mine
    python3 data/prepare.py a.txt b.txt --out data/mine --tokenize bytes
    python3 data/prepare.py my.txt --out data/mine --min-count 3 --max-vocab 50000
    python3 data/prepare.py --check data/mine                      are the tokens still those that were written?

The folder holds tokens.bin, the numbers of all tokens (little-endian, 2 bytes each, or 4 beyond 65,536 words), and
corpus.json: the vocabulary with its counts, how the text was read, and checksums. A text gives the same tokens as when
v10 reads it itself. The vocabulary is all that is held in memory.
"""
import argparse
import codecs
import contextlib
import hashlib
import json
import math
import shutil
import sys
from collections import defaultdict
from itertools import count
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plot_logs import Parser, screen  # noqa: E402

CHUNK = 2**22  # bytes of a text, or tokens, at a time
LONGEST = 2**24  # letters of a word


class PrepareError(ValueError):
    """Something that the user can put right; the message says what."""


def chunks(path, bar):
    """The bytes of a file, piece by piece. Raises PrepareError."""
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                yield data
                bar.update(len(data))
    except OSError as error:
        raise PrepareError(f"cannot read {path}: {error.strerror}") from None


def read_words(path, tokenize, digest, bar):
    """The words, characters or bytes of a text, as lists, its bytes hashed into `digest`. Raises PrepareError."""
    decoder, at, rest = codecs.getincrementaldecoder("latin-1" if tokenize == "bytes" else "utf-8")(), 0, ""
    begun = tokenize == "bytes"
    for data in chunks(path, bar):
        digest.update(data)
        if tokenize != "bytes" and b"\0" in data:
            raise PrepareError(f"{path} is not text: its byte {at + data.index(0)} is zero")
        pending = len(decoder.getstate()[0])  # bytes of a character that the last piece cut in two
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError as error:
            raise PrepareError(f"{path} is not UTF-8 text: its byte {at - pending + error.start} cannot be decoded"
                               ) from None
        at += len(data)
        if text and not begun:
            text, begun = text.removeprefix("\ufeff"), True  # a byte order mark
        if tokenize != "words":
            yield list(text)
            continue
        words = (rest + text).split()
        rest = words.pop() if words and not text[-1:].isspace() else ""  # perhaps not yet a whole word
        if len(rest) > LONGEST:
            raise PrepareError(f"{path} has a word of more than {LONGEST:,} letters: --tokenize chars fits a text "
                               "without spaces")
        yield words
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise PrepareError(f"{path} is not UTF-8 text: it ends within a character") from None
    yield [rest] if rest else []


def choose_vocabulary(counts, min_count, max_vocab):
    """{word: its count} -> the sorted vocabulary. Words that occur less than min_count times, and the rarest beyond
    max_vocab, become <unk>."""
    kept = {word for word, n in counts.items() if n >= min_count}
    if len(kept) < len(counts):
        kept.add("<unk>")
    if max_vocab and len(kept) > max_vocab:
        kept = {"<unk>", *sorted(kept - {"<unk>"}, key=lambda word: (-counts[word], word))[:max_vocab - 1]}
    return sorted(kept)


def floor_of(path, sha256):
    """What the sidecar of a synthetic text says of its entropy, if it is that text's."""
    try:
        sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        known = {name: float(sidecar[name]) for name in ("entropy_floor", "val_fraction")}
        return known if sidecar["sha256"] == sha256 and all(map(math.isfinite, known.values())) else {}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return {}  # no sidecar, or a file that is something else


def prepare(texts, out, tokenize="words", min_count=1, max_vocab=None):
    """Write the folder `out`, from .part -> what its corpus.json says. Raises PrepareError; there is no `out` then."""
    part = out.with_name(out.name + ".part")
    try:
        sizes = [text.stat().st_size for text in texts]
        if out.exists():
            raise PrepareError(f"{out} exists: remove it, or choose another --out")
        part.mkdir(parents=True)
    except FileExistsError:
        raise PrepareError(f"{part} exists: it is another run's, or left by one that was cut off; remove it") from None
    except OSError as error:
        raise PrepareError(f"cannot use {error.filename or out}: {error.strerror}") from None
    try:
        numbers, n, sources = defaultdict(count().__next__), 0, []  # words get numbers as they come
        raw, tokens = part / "tokens.part", part / "tokens.bin"
        with raw.open("wb") as file, tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="reading",
                                          disable=None) as bar:
            for text in texts:
                digest = hashlib.sha256()
                for words in read_words(text, tokenize, digest, bar):
                    file.write(np.fromiter(map(numbers.__getitem__, words), "<u4", len(words)))
                    n += len(words)
                sources.append({"name": text.name, "sha256": digest.hexdigest()})
        if len(numbers) < 2:
            raise PrepareError(f"{', '.join(map(str, texts))}: {n:,} tokens, {len(numbers)} of them distinct: a "
                               "corpus needs two words or more")
        first = np.memmap(raw, "<u4", "r")
        pieces = [first[i:i + CHUNK] for i in range(0, n, CHUNK)]
        counts = sum(np.bincount(piece, minlength=len(numbers)) for piece in pieces)
        counts = dict(zip(numbers, counts.tolist(), strict=True))
        vocabulary = choose_vocabulary(counts, min_count, max_vocab)
        if len(vocabulary) < 2:
            raise PrepareError(f"only {vocabulary[0]!r} is left of {len(counts):,} words: lower --min-count")
        place = {word: i for i, word in enumerate(vocabulary)}
        new = np.array([place.get(word, place.get("<unk>", 0)) for word in numbers],
                       "<u2" if len(vocabulary) <= 2**16 else "<u4")  # for each word as it came
        digest, totals = hashlib.sha256(), np.zeros(len(vocabulary), np.int64)
        with tokens.open("wb") as file:
            for piece in tqdm(pieces, unit_scale=CHUNK, unit="token", desc="writing", disable=None):
                piece = new[piece]
                digest.update(piece)
                totals += np.bincount(piece, minlength=len(vocabulary))
                file.write(piece)
        index = {"format": 1, "tokens": n, "bytes_per_token": new.itemsize, "sha256": digest.hexdigest(),
                 "tokenize": tokenize, "min_count": min_count, "max_vocab": max_vocab, "texts": sources,
                 **(floor_of(texts[0], sources[0]["sha256"]) if len(texts) == 1 and tokenize == "words"
                    and vocabulary == sorted(counts) else {}),
                 "vocabulary": vocabulary, "counts": totals.tolist()}
        (part / "corpus.json").write_text(json.dumps(index), encoding="utf-8")
        del first, pieces
        raw.unlink()
        part.rename(out)
    except OSError as error:
        raise PrepareError(f"cannot use {error.filename or out}: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return index


def check(folder):
    """-> what corpus.json says. Raises PrepareError if tokens.bin is not what was written."""
    try:
        index = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        wanted, digest, tokens = index["sha256"], hashlib.sha256(), folder / "tokens.bin"
        index["tokens"], len(index["vocabulary"])
        with tqdm(total=tokens.stat().st_size, unit="B", unit_scale=True, desc="checking", disable=None) as bar:
            for data in chunks(tokens, bar):
                digest.update(data)
    except OSError as error:
        raise PrepareError(f"cannot read {error.filename}: {error.strerror}") from None
    except PrepareError:
        raise
    except (ValueError, LookupError, TypeError, RecursionError):
        raise PrepareError(f"{folder / 'corpus.json'} is damaged: prepare the texts again") from None
    if digest.hexdigest() != wanted:
        raise PrepareError(f"{tokens} is damaged: its checksum differs from the one in corpus.json; prepare the texts "
                           "again")
    return index


def main(argv=None):
    parser = Parser(description="Turns texts of any size into a folder of tokens for --data-file.", allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def path(name):
        return Path(name).expanduser()

    def whole(name):
        if not name.isdecimal() or not 1 <= int(name) <= 10**9:
            raise argparse.ArgumentTypeError(f"{name!r} is not a whole number between 1 and a billion")
        return int(name)
    parser.add_argument("texts", type=path, nargs="*", metavar="TEXT", help="texts, read one after the other")
    parser.add_argument("--out", type=path, help="the folder to write")
    parser.add_argument("--tokenize", choices=("words", "chars", "bytes"), default="words",
                        help="what a token is: a word between spaces, a character, or a byte")
    parser.add_argument("--min-count", type=whole, default=1, help="words that occur less often become <unk>")
    parser.add_argument("--max-vocab", type=whole, help="largest vocabulary; the rarest words beyond it become <unk>")
    parser.add_argument("--check", type=path, metavar="DIR", help="compare a folder with its checksum, write nothing")
    args = parser.parse_args(argv)
    for wrong, message in ((bool(args.check) == bool(args.texts), "needs either texts or --check DIR"),
                           (args.texts and not args.out, "needs --out DIR, the folder to write"),
                           (args.max_vocab == 1, "--max-vocab must be at least 2"),
                           (args.out and not args.out.name, "--out needs the name of a folder")):
        if wrong:
            parser.error(message)
    try:
        index = check(args.check) if args.check else prepare(args.texts, args.out, args.tokenize, args.min_count,
                                                             args.max_vocab)
    except PrepareError as error:
        parser.error(str(error))
    except MemoryError:
        parser.error("out of memory: the vocabulary is too large; --tokenize bytes has 256 words at most")
    known = isinstance(index.get("entropy_floor"), float)
    floor = f", entropy floor {index['entropy_floor']:.4f} nats per token" if known else ""
    screen(f"{args.check or args.out}: {index['tokens']:,} tokens, {len(index['vocabulary']):,} words{floor}"
           + ("; the checksum is right" if args.check else ""))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
