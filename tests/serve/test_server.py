"""A real process over a real socket: batching, limits, signals."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support import REPOSITORY, run_tldist
from tests.support_serve import (
    CLASSES,
    Reply,
    Server,
    as_png,
    image_of,
    logits,
    multipart,
    read_reply,
    write_colour_package,
)

RANDOM = np.random.default_rng(0)
PREDICT = "tldist_requests_total{code=%d,path=/predict}"


@contextlib.contextmanager
def busy(server: Server, cost: int = 13) -> Iterator[Future[Reply]]:
    """While the model works on one image for about ``cost`` / 50 seconds."""
    with ThreadPoolExecutor(1) as pool:
        before = server.metrics()["tldist_images_in_flight"]
        reply = pool.submit(server.predict, as_png(image_of(RANDOM, cost)))
        server.wait_for("tldist_images_in_flight", before + 1)
        yield reply


def test_start__says_where(server: Server) -> None:
    assert server.host == "127.0.0.1"
    assert server.line.startswith("serving ")
    assert server.ask("GET", "/healthz").status == 200
    assert server.ask("GET", "/readyz").status == 200


def test_start__is_reached_from_this_machine_alone(server: Server) -> None:
    with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine too, but not the address
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_batching__nothing_is_lost_or_mixed_up(server: Server) -> None:
    """8 clients at once, each on its own connection: each answer is that of its own image."""
    before = server.metrics()

    def client(seed: int) -> int:
        random, connection = np.random.default_rng(seed), server.connect()
        for _ in range(40):
            picture = image_of(random)
            headers = {"Content-Type": "image/png"}
            connection.request("POST", "/predict?outputs=logits", as_png(picture), headers)
            reply = read_reply(connection)
            assert reply.status == 200, reply.body
            [found] = reply.json["predictions"]
            np.testing.assert_allclose(found["logits"], logits(picture[None])[0], atol=1e-5)
        connection.close()
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == list(range(8))
    after = server.metrics()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert gained(PREDICT % 200) == gained("tldist_images_total{outcome=ok}") == 320
    assert gained("tldist_batch_size_sum") == 320
    assert gained("tldist_batch_size_count") < 320
    assert after["tldist_images_in_flight"] == after["tldist_queue_length"] == 0


def test_batching__who_waits_shares_a_batch_and_the_bad_fail_alone(server: Server) -> None:
    pictures = [image_of(RANDOM) for _ in range(6)]
    files = [as_png(picture) for picture in pictures]
    files[1], files[4] = b"rubbish", files[4][:-30]
    before = server.metrics()
    with ThreadPoolExecutor(6) as pool, busy(server, 60) as blocker:
        replies = list(pool.map(lambda data: server.predict(data, "?outputs=logits"), files))
        assert blocker.result().status == 200
    assert [reply.status for reply in replies] == [200, 422, 200, 200, 422, 200]
    for place in (0, 2, 3, 5):
        [found] = replies[place].json["predictions"]
        np.testing.assert_allclose(found["logits"], logits(pictures[place][None])[0], atol=1e-5)
    after = server.metrics()
    assert after["tldist_batch_size_sum"] - before["tldist_batch_size_sum"] == 5
    assert after["tldist_batch_size_count"] - before["tldist_batch_size_count"] == 2, "one, then four at once"


def test_batching__of_at_most_max_batch(server: Server) -> None:
    before = server.metrics()
    body, kind = multipart({f"{number}.png": as_png(image_of(RANDOM)) for number in range(20)})
    assert len(server.predict(body, kind=kind).json["predictions"]) == 20
    after = server.metrics()
    assert after["tldist_batch_size_count"] - before["tldist_batch_size_count"] >= 3
    assert after["tldist_batch_size_bucket{le=8.0}"] == after["tldist_batch_size_count"]


def test_limits__a_declared_body_is_not_read(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=30) as wire:
        wire.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert wire.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_limits__a_body_of_unknown_length_is_cut_off(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 50_000
            yield bytes(50_000)

    sent = 0
    connection = server.connect()
    with contextlib.suppress(ConnectionError):
        connection.request("POST", "/predict", endless(), {"Content-Type": "image/png"}, encode_chunked=True)
    assert sent < 20_000_000
    connection.close()
    assert server.metrics()[PREDICT % 413] >= 0.7


def test_limits__who_sends_a_little_too_much_reads_why(server: Server) -> None:
    for body in (bytes(1_000_001), bytes(1_800_000)):
        reply = server.predict(body)
        assert reply.status == 413
        assert "1,000,000" in reply.json["error"]
    form, kind = multipart({"a.png": bytes(1_100_000)})
    assert server.predict(form, kind=kind).status == 413
    assert server.predict(bytes(999_999)).status == 422


def test_limits__slow_body(strict: Server) -> None:
    with socket.create_connection((strict.host, strict.port), timeout=30) as wire:
        wire.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\n"
        )
        for _ in range(3):
            wire.sendall(b"x")
            time.sleep(0.1)
        assert wire.recv(1000).startswith(b"HTTP/1.1 408 ")
    strict.wait_for("tldist_images_in_flight", 0)


def test_limits__slow_model(strict: Server) -> None:
    start = time.monotonic()
    reply = strict.predict(as_png(image_of(RANDOM, 80)))
    assert reply.status == 504
    assert "0.7 s" in reply.json["error"]
    assert time.monotonic() - start >= 0.7
    strict.wait_for("tldist_images_in_flight", 0)
    until = time.monotonic() + 30
    while strict.predict(as_png(image_of(RANDOM))).status != 200:  # the model is still at the slow one
        assert time.monotonic() < until


def test_limits__full_queue(strict: Server) -> None:
    with ThreadPoolExecutor(1) as pool, busy(strict, 80):
        body, kind = multipart({f"{number}.png": as_png(image_of(RANDOM)) for number in range(3)})
        waiting = pool.submit(strict.predict, body, "", kind)
        strict.wait_for("tldist_images_in_flight", 4)
        reply = strict.predict(as_png(image_of(RANDOM)))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert strict.ask("GET", "/healthz").status == 200
        waiting.result()
    strict.wait_for("tldist_images_in_flight", 0)
    until = time.monotonic() + 30
    while strict.predict(as_png(image_of(RANDOM))).status != 200:
        assert time.monotonic() < until


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(range(256)) * 4,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc",
        b"",
    ],
)
def test_hostile__bytes_and_clients_that_leave(server: Server, garbage: bytes) -> None:
    with contextlib.suppress(ConnectionError), socket.create_connection((server.host, server.port)) as wire:
        wire.sendall(garbage)
        wire.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            answer = wire.recv(1000)
            assert answer == b"" or answer.split()[1] in (b"400", b"404", b"505"), answer
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave with a reset
    server.wait_for("tldist_images_in_flight", 0)
    assert server.predict(as_png(image_of(RANDOM))).status == 200


def test_client__prints_a_label_or_the_reason(server: Server, tmp_path: Path) -> None:
    pictures = {f"{number}.png": image_of(RANDOM) for number in range(5)}
    for name, picture in pictures.items():
        (tmp_path / name).write_bytes(as_png(picture))
    (tmp_path / "bad.png").write_bytes(b"rubbish")
    names = [*pictures, "bad.png"]
    done = subprocess.run(
        [sys.executable, REPOSITORY / "export/client.py", f"http://{server.host}:{server.port}", *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    *lines, last = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == list(pictures)
    for line, picture in zip(lines, pictures.values()):
        powers = np.exp(logits(picture[None])[0])
        assert line[1] == CLASSES[int(powers.argmax())]
        assert float(line[2]) == pytest.approx(powers.max() / powers.sum(), abs=1e-4)
    assert last[:2] == ["bad.png", "error 422"]


def test_metrics__count_what_happened(server: Server) -> None:
    before = server.metrics()
    server.predict(as_png(image_of(RANDOM)))
    server.predict(b"rubbish")
    server.ask("GET", "/nonsense")
    after = server.metrics()
    changes = {name: after[name] - before.get(name, 0) for name in after}
    assert changes[PREDICT % 200] == changes[PREDICT % 422] == 1
    assert changes["tldist_requests_total{code=404,path=other}"] == 1
    assert changes["tldist_images_total{outcome=ok}"] == changes["tldist_images_total{outcome=bad}"] == 1
    assert changes["tldist_request_seconds_count"] == 2
    assert changes["tldist_model_seconds_count"] == changes["tldist_batch_size_count"] == 1
    assert changes["tldist_model_seconds_sum"] > 0
    assert after["tldist_ready"] == 1


def test_stop__finishes_what_was_begun(package: Path) -> None:
    server = Server(package, "max_batch=2")
    files = [as_png(image_of(RANDOM, 10)) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool:
        replies = [pool.submit(server.predict, data) for data in files]
        server.wait_for("tldist_images_in_flight", 5)
        code, out, err = server.stop()
        assert [reply.result().status for reply in replies] == [200] * 5
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("stopped")
    with pytest.raises(ConnectionRefusedError):
        server.ask("GET", "/healthz")


def test_ready__only_once_the_model_is_loaded_and_warm(tmp_path: Path) -> None:
    package = write_colour_package(tmp_path / "package", free=110)  # the warm-up itself takes a second or two
    server = Server(package, wait=False)
    assert server.ask("GET", "/healthz").status == 200
    assert server.ask("GET", "/readyz").status == 503
    reply = server.predict(as_png(image_of(RANDOM)))
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert server.metrics()["tldist_ready"] == 0
    server.wait_until_ready()
    assert server.predict(as_png(image_of(RANDOM))).status == 200
    assert server.stop()[0] == 0


def test_pictures__of_different_sizes_do_not_share_a_batch(tmp_path: Path) -> None:
    server = Server(write_colour_package(tmp_path / "package", any_size=True), "max_delay_ms=1000")
    pictures = [image_of(RANDOM, size=(30 + number % 3, 40)) for number in range(12)]
    body, kind = multipart({f"{number}.png": as_png(picture) for number, picture in enumerate(pictures)})
    reply = server.predict(body, "?outputs=logits", kind)
    for found, picture in zip(reply.json["predictions"], pictures, strict=True):
        np.testing.assert_allclose(found["logits"], logits(picture[None])[0], atol=1e-5)
    found = server.metrics()
    assert (found["tldist_batch_size_sum"], found["tldist_batch_size_count"]) == (12, 3)
    body, kind = multipart({"good.png": as_png(pictures[0]), "bad.png": b"rubbish"})
    assert server.predict(body, kind=kind).status == 422
    spent = server.metrics()["tldist_request_seconds_sum"] - found["tldist_request_seconds_sum"]
    assert spent < 0.9, "waited for an image that could not come"
    assert server.stop()[0] == 0


def test_start__fails_with_the_reason(package: Path, server: Server, tmp_path: Path) -> None:
    taken = run_tldist("serve", package, f"port={server.port}")
    assert taken.returncode == 2
    assert f"port {server.port}" in taken.stderr
    shutil.copytree(package, tmp_path / "damaged")
    with (tmp_path / "damaged" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    damaged = run_tldist("serve", tmp_path / "damaged", "port=0")
    assert damaged.returncode == 2
    assert "model.onnx" in damaged.stderr
    broken = run_tldist("serve", write_colour_package(tmp_path / "nan", nan=True), "port=0")
    assert broken.returncode in (1, 2)
    assert "'logits'" in broken.stderr
    for done in (taken, damaged, broken):
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
