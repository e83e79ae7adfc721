"""Fetches WikiText-2 (word level, Merity et al. 2016, licence CC BY-SA 3.0), verifies it, and writes
wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens beside this script.

    python3 data/wikitext2.py

Each file is checked by size and SHA-1 and appears under its name only when it is whole. Files that are there and right
are left alone. The first source is PyTorch's examples on GitHub, pinned to a commit, then as it is now; the last is
the original zip. Which one served does not matter: the checksums decide.
"""
import argparse
import contextlib
import hashlib
import http.client
import io
import os
import sys
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

FILES = {  # name: (size in bytes, SHA-1)
    "train": (10_797_148, "863f29c46ef9d167fff4940ec821195882fe29d1"),
    "valid": (1_121_681, "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422"),
    "test": (1_256_449, "c7b8ce0aa086fb34dab808c5c49224211eb2b172"),
}
TEXTS = ["https://raw.githubusercontent.com/pytorch/examples/77f55b91/word_language_model/data/wikitext-2/{}.txt",
         "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt"]
ZIP = "https://wikitext.smerity.com/wikitext-2-v1.zip"
ZIP_SHA256 = "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"


class FetchError(Exception):
    """A source that did not give the data; main() tries the next one."""


def fetch(url, timeout=30):
    """The bytes at an address, with a progress bar. Raises FetchError."""
    request = urllib.request.Request(url, headers={"User-Agent": "alrt/1.0"})  # the zip's host refuses Python's own
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            length, data = response.headers.get("Content-Length"), io.BytesIO()
            with tqdm(total=length and int(length), unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1],
                      disable=None) as bar:
                while chunk := response.read(1 << 16):
                    data.write(chunk)
                    bar.update(len(chunk))
        if length and data.tell() != int(length):
            raise FetchError(f"{url}: ended after {data.tell():,} of {int(length):,} bytes")
        return data.getvalue()
    except (OSError, http.client.HTTPException, ValueError) as error:  # no network, 404, a dropped connection, ...
        raise FetchError(f"{url}: {getattr(error, 'reason', None) or error}") from None


def is_right(name, data):
    return (len(data), hashlib.sha1(data).hexdigest()) == FILES[name]


def verify(name, data, source):
    """The data, if it is the file of that name. Raises FetchError with what came instead."""
    if not is_right(name, data):
        looks = "a web page" if data.lstrip()[:1] == b"<" else "something else"
        raise FetchError(f"{source}: {len(data):,} bytes that are {looks}, not the {FILES[name][0]:,} of {name}")
    return data


def fetch_files(source, names):
    """Yields (name, bytes) from the zip's address, or from that of the texts with {} for a name. Raises FetchError."""
    if source != ZIP:
        for name in names:
            yield name, verify(name, fetch(source.format(name)), source.format(name))
        return
    data = fetch(ZIP)
    if hashlib.sha256(data).hexdigest() != ZIP_SHA256:
        raise FetchError(f"{ZIP}: the checksum of what came is wrong")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in names:
            yield name, verify(name, archive.read(f"wikitext-2/wiki.{name}.tokens"), ZIP)


def write_whole(path, data):
    """Write a file that appears under its name only when it is complete."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fetches and verifies WikiText-2.", allow_abbrev=False)
    parser.add_argument("--out", type=lambda name: Path(name).expanduser(), default=Path(__file__).parent,
                        help="folder (default: that of this script)")
    out = parser.parse_args(argv).out
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = {name: out / f"wiki.{name}.tokens" for name in FILES}
        missing = [name for name, path in paths.items() if not (path.is_file() and is_right(name, path.read_bytes()))]
        fetched, failures = {}, []
        for source in (*TEXTS, ZIP):
            wanted = [name for name in missing if name not in fetched]
            try:
                fetched.update(fetch_files(source, wanted) if wanted else {})
            except FetchError as error:
                failures.append(str(error))
        if len(fetched) < len(missing):
            print("wikitext2.py: error: WikiText-2 could not be fetched:\n  " + "\n  ".join(failures)
                  + f"\nGet the files by other means and put them into {out} as "
                  + ", ".join(paths[name].name for name in missing), file=sys.stderr)
            return 1
        for name, data in fetched.items():
            write_whole(paths[name], data)
    except OSError as error:
        print(f"wikitext2.py: error: cannot write {error.filename or out}: {error.strerror}", file=sys.stderr)
        return 2
    for name, path in paths.items():
        print(f"{path}: {FILES[name][0]:,} bytes, verified{'' if name in missing else ' (it was there)'}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # whole files stay, and nobody wants a traceback
        sys.exit(main())
    sys.exit(130)
