"""Tiny data sets in the formats of the real ones, and a server that hands out files."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch


def cifar_records(n, limits, seed=0):
    """(bytes, images uint8 [n, 3, 32, 32], labels of each column int64 [n]) of a CIFAR file."""
    g = torch.Generator().manual_seed(seed)
    labels = [torch.randint(limit, (n,), generator=g) for limit in limits]
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    rows = [
        bytes(int(column[i]) for column in labels) + images[i].numpy().tobytes() for i in range(n)
    ]
    return b"".join(rows), images, labels


def idx(tensor):
    """The idx file of a uint8 tensor."""
    sizes = b"".join(n.to_bytes(4, "big") for n in tensor.shape)
    return bytes((0, 0, 8, tensor.dim())) + sizes + tensor.numpy().tobytes()


def tar_of(files):
    """A .tar.gz of {name: bytes}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files):
    """A .zip of {name: bytes}."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def png(width=8, height=8, seed=0, mode="RGB"):
    """The bytes of a PNG of random pixels."""
    from PIL import Image

    g = torch.Generator().manual_seed(seed)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=g)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG")
    return out.getvalue()


def write(folder, files):
    """Write {relative name: bytes or str} below a folder."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def tree(folder):
    """Every file below a folder, hidden ones too, as sorted relative names."""
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


@contextmanager
def served(files, short=0, wait=None):
    """A server on this machine: yields (its address with a slash, the list of what was asked for).

    short: so many bytes of every file are promised and never sent.
    wait: an event for which the rest of a file waits after its first half.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = files.get(self.path.lstrip("/"))
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            if wait is not None:
                wait.wait(10)
            self.wfile.write(data[half : len(data) - short])

        def log_message(self, *args):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def nobody_there():
    """An address of this machine where nobody answers."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    return f"http://127.0.0.1:{server.server_port}/"
