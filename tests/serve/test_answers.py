"""What a client is told: right answers to every way of asking, and reasons where there are none."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support_serve import CLASSES, Server, as_png, colours, image_of, logits, multipart
from tldist.runtime.package import Package
from tldist.runtime.predict import predict

RANDOM = np.random.default_rng(0)


def test_predict__equals_the_runtime(server: Server, package: Path) -> None:
    pictures = [
        RANDOM.integers(0, 120, (*size, 3), dtype=np.uint8) for size in ((24, 24), (31, 60), (80, 33))
    ]
    files = [as_png(picture) for picture in pictures]
    expected = predict(Package.open(package, threads=1), files, top=3)
    for data, mine in zip(files, expected):
        [found] = server.predict(data, "?top=3").json["predictions"]
        assert found["label"] == mine.label
        assert [entry["label"] for entry in found["top"]] == [name for name, _ in mine.top]
        np.testing.assert_allclose(
            [entry["probability"] for entry in found["top"]], [value for _, value in mine.top], rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "application/octet-stream", ""])
def test_predict__in_closed_form(server: Server, kind: str) -> None:
    picture = image_of(RANDOM)
    headers = {"Content_Type": kind} if kind else {}
    reply = server.ask("POST", "/predict?outputs=logits,features,probabilities", as_png(picture), **headers)
    assert reply.status == 200
    [found] = reply.json["predictions"]
    np.testing.assert_allclose(found["logits"], logits(picture[None])[0], atol=1e-5)
    np.testing.assert_allclose(found["features"], colours(picture[None])[0], atol=1e-5)
    powers = np.exp(logits(picture[None])[0])
    np.testing.assert_allclose(found["probabilities"], powers / powers.sum(), atol=1e-5)
    assert found["label"] == CLASSES[int(powers.argmax())]
    assert "name" not in found


def test_predict__several_files_in_their_order(server: Server) -> None:
    pictures = {f"{number} ü.png": image_of(RANDOM) for number in range(5)}
    body, kind = multipart({name: as_png(picture) for name, picture in pictures.items()})
    reply = server.predict(body, "?outputs=logits&top=1", kind)
    assert reply.status == 200
    assert reply.json["package"] == server.ask("GET", "/info").json["package"]
    for found, (name, picture) in zip(reply.json["predictions"], pictures.items(), strict=True):
        assert found["name"] == name
        assert len(found["top"]) == 1
        np.testing.assert_allclose(found["logits"], logits(picture[None])[0], atol=1e-5)


def test_predict__a_bad_file_among_good_ones_is_named(server: Server) -> None:
    good = image_of(RANDOM)
    body, kind = multipart({"a.png": as_png(good), "b.png": b"no image", "c.png": as_png(good)[:60]})
    reply = server.predict(body, "?outputs=logits", kind)
    assert reply.status == 422
    first, *bad = reply.json["predictions"]
    np.testing.assert_allclose(first["logits"], logits(good[None])[0], atol=1e-5)
    assert [found["name"] for found in bad] == ["b.png", "c.png"]
    assert all(found["error"] and "label" not in found for found in bad)
    assert "image 1: " in reply.json["error"]
    assert "image 2: " in reply.json["error"]


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "EPS")
    return buffer.getvalue()


BAD = {
    "rubbish": (b"hello" * 100, "identified"),
    "truncated": (as_png(image_of(RANDOM))[:-40], "decoded"),
    "a format that is not served": (eps(), "format EPS"),
    "half a header": (b"\x89PNG\r\n\x1a\n\0\0", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_predict__bad_image(server: Server, case: str) -> None:
    data, words = BAD[case]
    reply = server.predict(data)
    assert reply.status == 422
    assert words in reply.json["error"]
    assert "object at" not in reply.json["error"]


def test_predict__too_many_pixels_are_refused_by_the_header(strict: Server) -> None:
    reply = strict.predict(as_png(np.zeros((101, 100, 3), np.uint8)))
    assert reply.status == 422
    assert "100x101 pixels: larger than 10,000" in reply.json["error"]
    assert strict.predict(as_png(np.zeros((100, 100, 3), np.uint8))).status == 200


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?top=0", "top"),
        ("?top=-1", "top"),
        ("?top=many", "top"),
        ("?outputs=logits,nonsense", "logits, features, probabilities"),
        ("?outputs=", "logits, features, probabilities"),
        ("?Top=3", "unknown parameter 'Top'"),
    ],
)
def test_predict__wrong_query(server: Server, query: str, words: str) -> None:
    reply = server.predict(as_png(image_of(RANDOM)), query)
    assert reply.status == 400
    assert words in reply.json["error"]


def test_predict__wrong_bodies(server: Server, strict: Server) -> None:
    png = as_png(image_of(RANDOM))
    body, kind = multipart({"a.png": png})
    assert server.predict(b"").status == 400
    assert server.predict(b"{}", kind="application/json").status == 415
    assert server.predict(png, kind="application/x-www-form-urlencoded").status == 415
    reply = server.ask("POST", "/predict", png, Content_Type="image/png", Content_Encoding="gzip")
    assert reply.status == 415
    assert server.predict(body, kind="multipart/form-data").status == 400
    assert server.predict(body, kind="multipart/form-data; boundary=other").status == 400
    assert server.predict(body[:-10], kind=kind).status == 400
    assert server.predict(body[: len(body) // 2], kind=kind).status == 400
    field = body.replace(b'; filename="a.png"', b"")
    assert "no file" in server.predict(field, kind=kind).json["error"]
    two, _ = multipart({"a.png": png, "b.png": png})
    assert "closing boundary" in server.predict(two[:-20], kind=kind).json["error"]
    four, kind = multipart({f"{number}.png": png for number in range(4)})
    assert strict.predict(four, kind=kind).status == 400
    three, kind = multipart({f"{number}.png": png for number in range(3)})
    assert strict.predict(three, kind=kind).status == 200


def test_paths__unknown_ones_and_wrong_methods(server: Server) -> None:
    for path in ("/", "/predict/", "/nonsense", "/../../etc/passwd", "/docs"):
        reply = server.ask("GET", path)
        assert reply.status == 404
        assert reply.json == {"error": "Not Found"}
    assert server.ask("GET", "/predict").status == 405
    assert server.ask("POST", "/info", b"").status == 405


def test_info__says_what_is_served_and_not_where(server: Server, package: Path) -> None:
    about = server.ask("GET", "/info").json
    config = Package.open(package, threads=1).config
    assert about["classes"] == list(CLASSES)
    assert about["package"] == config.identity
    assert about["preprocessing"] == config.preprocessing.to_dict()
    assert about["files"] == config.files
    assert about["outputs"] == {"logits": 4, "features": 3}
    assert about["profile"]["name"] == "test"
    assert str(package) not in json.dumps(about)


def test_answers__hold_no_paths_and_allow_no_other_origin(server: Server, package: Path) -> None:
    replies = [server.predict(data) for data, _ in BAD.values()]
    replies += [server.ask("GET", "/nonsense"), server.ask("GET", "/metrics"), server.ask("GET", "/healthz")]
    for reply in replies:
        text = reply.body.decode()
        assert not any(word in text for word in ("Traceback", str(package.parent), "site-packages", ".py"))
        assert not any(name.startswith("access-control") for name in reply.headers)
        assert "server" not in reply.headers
