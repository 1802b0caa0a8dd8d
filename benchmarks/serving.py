"""What ``tldist serve`` costs beside the model itself: requests a second against `Package.run`, and latency.

    python benchmarks/serving.py PACKAGE [IMAGE ...]

Without images, JPEGs of noise (256x256, about 20 kB) are sent. The bare session runs batches of ``max_batch``
prepared images; next to it, decoding and the session in one thread (what a loop of `predict` does). Then the
server runs as its own process, and clients in threads send one image a request over kept connections. Run it
on a quiet machine: client, server and decoder share its cores.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from tldist.process import core_count
from tldist.runtime.package import Package
from tldist.runtime.preprocess import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=1, help="of the model, in both")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8, help="for each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    options = parser.parse_args()
    files = [file.read_bytes() for file in options.images] or noise_jpegs(64)
    print(f"{core_count()} cores, {platform.machine()}, {len(files)} images, model threads {options.threads}")

    package = Package.open(options.package, threads=options.threads)
    bare = bare_rate(package, files, options.max_batch, options.seconds)
    alone = predict_rate(package, files, options.max_batch, options.seconds)
    print(f"session alone, batches of {options.max_batch}: {bare:.1f} images/s")
    print(f"decode + session, one thread: {alone:.1f} images/s")
    print("clients  requests/s  of session  of decode+session  p50 ms  p99 ms  mean batch")
    process, host, port = start_server(options.package, options.threads, options.max_batch)
    try:
        for clients in options.clients:
            load(host, port, files, clients, min(2.0, options.seconds))  # warm
            before = batch_counts(host, port)
            rate, latencies = load(host, port, files, clients, options.seconds)
            images, batches = (now - then for now, then in zip(batch_counts(host, port), before))
            p50, p99 = np.percentile(latencies, [50, 99]) * 1000
            print(
                f"{clients:7d}  {rate:10.1f}  {rate / bare:10.2f}  {rate / alone:17.2f}  {p50:6.1f}  "
                f"{p99:6.1f}  {images / max(batches, 1):10.1f}"
            )
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"the server ended with {process.wait(60)}")


def noise_jpegs(count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC)).astype(np.float32)
        picture = np.clip(picture + random.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def bare_rate(package: Package, files: list[bytes], batch: int, seconds: float) -> float:
    images = np.stack([prepare(files[at % len(files)], package.config.preprocessing) for at in range(batch)])
    package.run(images)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        package.run(images)
        done += batch
    return done / (time.perf_counter() - start)


def predict_rate(package: Package, files: list[bytes], batch: int, seconds: float) -> float:
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        chunk = [files[at % len(files)] for at in range(done, done + batch)]
        package.run(np.stack([prepare(data, package.config.preprocessing) for data in chunk]))
        done += batch
    return done / (time.perf_counter() - start)


def start_server(package: Path, threads: int, max_batch: int) -> tuple[subprocess.Popen[str], str, int]:
    command = ["serve", str(package), "port=0", f"threads={threads}", f"max_batch={max_batch}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tldist", *command], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
    assert found, "the server did not start"
    host, port = found[1], int(found[2])
    while ask(http.client.HTTPConnection(host, port), "GET", "/readyz")[0] != 200:
        time.sleep(0.05)
    return process, host, port


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    connection.request(method, path, body, {"Content-Type": "image/jpeg"} if body else {})
    response = connection.getresponse()
    return response.status, response.read()


def batch_counts(host: str, port: int) -> tuple[float, float]:
    """Images and batches so far."""
    text = ask(http.client.HTTPConnection(host, port), "GET", "/metrics")[1].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(values["tldist_batch_size_sum"]), float(values["tldist_batch_size_count"])


def load(host: str, port: int, files: list[bytes], clients: int, seconds: float) -> tuple[float, list[float]]:
    """Requests a second of so many clients, and the seconds of each request."""

    def client(number: int) -> list[float]:
        connection, latencies, at = http.client.HTTPConnection(host, port), [], number
        while time.perf_counter() < until:
            start = time.perf_counter()
            status, body = ask(connection, "POST", "/predict?top=1", files[at % len(files)])
            assert status == 200, body
            latencies.append(time.perf_counter() - start)
            at += 1
        return latencies

    begin = time.perf_counter()
    until = begin + seconds
    with ThreadPoolExecutor(clients) as pool:
        found = [latency for latencies in pool.map(client, range(clients)) for latency in latencies]
    return len(found) / (time.perf_counter() - begin), found


if __name__ == "__main__":
    main()
