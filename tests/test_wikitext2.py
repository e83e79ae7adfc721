"""The downloader against a local server."""
import functools
import hashlib
import http.server
import io
import threading
import zipfile

import pytest

import wikitext2

GOOD = {name: f" \n = {name} = \n the text of {name} \n".encode() * 500 for name in wikitext2.FILES}
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `files`, {path: bytes, a status, (bytes, claimed length), (all that it sends,), or the path that it
    redirects to}, in the place of the real addresses."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer = files.get(self.path, 404)
            if isinstance(answer, int):
                return self.send_error(answer)
            if isinstance(answer, str):
                self.send_response(302)
                self.send_header("Location", answer)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if isinstance(answer, tuple) and len(answer) == 1:
                return self.wfile.write(*answer)
            body, length = answer if isinstance(answer, tuple) else (answer, len(answer))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=functools.partial(httpd.serve_forever, 0.01), daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(wikitext2, "TEXTS", [address + "/pinned/{}.txt", address + "/main/{}.txt"])
        monkeypatch.setattr(wikitext2, "ZIP", address + "/v1.zip")
        monkeypatch.setattr(wikitext2, "FILES", {
            name: (len(data), hashlib.sha1(data).hexdigest()) for name, data in GOOD.items()})
        yield files, asked
        httpd.shutdown()


def texts(folder="pinned"):
    return {f"/{folder}/{name}.txt": data for name, data in GOOD.items()}


def zipped(monkeypatch, files=GOOD):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"wikitext-2/wiki.{name}.tokens", data)
    monkeypatch.setattr(wikitext2, "ZIP_SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


def fetched(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WHOLE = {f"wiki.{name}.tokens": data for name, data in GOOD.items()}


def test_good_files_are_written_under_their_names(server, tmp_path):
    server[0].update(texts())
    assert wikitext2.main(["--out", str(tmp_path / "new")]) == 0
    assert fetched(tmp_path / "new") == WHOLE


@pytest.mark.parametrize("bad", [404, 403, XML, GOOD["train"][:-1], (GOOD["train"][:-9], len(GOOD["train"])),
                                 GOOD["train"][:-1] + b"x", b"", "/pinned/train.txt", "/nowhere", "//", "ftp://x/y",
                                 (b"who are you?\r\n\r\n",),
                                 (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",)],
                         ids=["404", "403", "web page", "short", "dropped", "wrong checksum", "empty", "redirect loop",
                              "redirect to nothing", "redirect to no address", "redirect to another protocol",
                              "no HTTP", "cut off in a chunk"])
def test_a_bad_source_is_replaced_by_the_next_one(server, tmp_path, monkeypatch, bad):
    server[0].update(texts() | {"/pinned/train.txt": bad, "/main/train.txt": bad, "/v1.zip": zipped(monkeypatch)})
    assert wikitext2.main(["--out", str(tmp_path)]) == 0
    assert fetched(tmp_path) == WHOLE
    assert server[1][-1] == "/v1.zip"


def test_a_redirect_is_followed(server, tmp_path):
    server[0].update(texts("elsewhere") | {f"/pinned/{name}.txt": f"/elsewhere/{name}.txt" for name in GOOD})
    assert wikitext2.main(["--out", str(tmp_path)]) == 0
    assert fetched(tmp_path) == WHOLE
    assert server[1][-1] == "/elsewhere/test.txt"


def test_what_a_source_delivered_before_it_failed_is_not_fetched_again(server, tmp_path):
    server[0].update(texts() | {"/pinned/valid.txt": 404} | texts("main"))
    assert wikitext2.main(["--out", str(tmp_path)]) == 0
    assert fetched(tmp_path) == WHOLE
    assert server[1] == ["/pinned/train.txt", "/pinned/valid.txt", "/main/valid.txt", "/main/test.txt"]


@pytest.mark.parametrize("bad", [404, XML, (GOOD["train"][:-9], len(GOOD["train"]))])
def test_when_every_source_is_bad_it_says_why_and_leaves_no_file(server, tmp_path, monkeypatch, capsys, bad):
    server[0].update(texts() | {"/pinned/train.txt": bad, "/main/train.txt": bad,
                                "/v1.zip": zipped(monkeypatch, GOOD | {"train": b"other"})})
    assert wikitext2.main(["--out", str(tmp_path)]) == 1
    assert fetched(tmp_path) == {}
    said = capsys.readouterr().err
    assert all(f"{place}/train.txt: " in said for place in ("pinned", "main"))
    assert "v1.zip: 5 bytes that are something else" in said
    assert ("a web page" in said) == (bad == XML)


def test_a_zip_with_the_wrong_checksum_is_refused(server, tmp_path, capsys):
    server[0]["/v1.zip"] = b"PK"
    assert wikitext2.main(["--out", str(tmp_path)]) == 1
    assert "checksum" in capsys.readouterr().err


def test_files_that_are_right_are_left_alone_and_wrong_ones_are_replaced(server, tmp_path):
    server[0].update(texts())
    (tmp_path / "wiki.train.tokens").write_bytes(GOOD["train"])
    (tmp_path / "wiki.valid.tokens").write_bytes(b"half a fi")
    assert wikitext2.main(["--out", str(tmp_path)]) == 0
    assert fetched(tmp_path) == WHOLE
    assert server[1] == ["/pinned/valid.txt", "/pinned/test.txt"]
    assert wikitext2.main(["--out", str(tmp_path)]) == 0
    assert len(server[1]) == 2


def test_a_failed_write_leaves_no_half_file(server, tmp_path, monkeypatch, capsys):
    server[0].update(texts())

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(wikitext2.os, "fsync", full)
    assert wikitext2.main(["--out", str(tmp_path)]) == 2
    assert fetched(tmp_path) == {}
    assert "No space left" in capsys.readouterr().err


