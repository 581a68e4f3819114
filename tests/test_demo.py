"""The page of `marval demo`: what its server draws is what the models draw, and bad requests are refused."""

import base64
import http.client
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from marval import demo, shipped
from marval.__main__ import main
from marval.pipeline import Pipeline


def teacher() -> str:
    return str(tiny.teacher())


def student() -> str:
    return str(tiny.student())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server of two tiny models."""
    with demo.Page("127.0.0.1", 0) as page:
        page.demo = demo.Demo([teacher(), student()], "cpu")
        thread = threading.Thread(target=page.serve_forever)
        thread.start()
        yield page.server_port
        page.shutdown()
        thread.join()


def call(port: int, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    status, data = answer.status, answer.read()
    connection.close()
    return status, data


def draw(port: int, **request: Any) -> list[dict[str, Any]]:
    status, data = call(port, "POST", "/draw", json.dumps({"seed": 0, **request}))
    assert status == 200, data
    return [json.loads(line) for line in data.splitlines()]


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pictures(line: dict[str, Any], count: int) -> np.ndarray:
    """uint8 (count, H, W, 4) of an answer."""
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(line["png"]))))
    return strip.reshape(count, -1, strip.shape[1], 4)


def test_page(port: int):
    status, page = call(port, "GET", "/")
    assert status == 200
    ids = re.findall(r'\bid="([\w-]+)"', page.decode())
    assert len(ids) == len(set(ids))
    used = re.findall(r'\$\("([\w-]+)"\)', page.decode()) + re.findall(r"\bfor=\"([\w-]+)\"", page.decode())
    assert len(used) > 20
    assert set(used) <= set(ids)
    assert "http" not in page.decode()  # nothing from elsewhere
    described = json.loads(call(port, "GET", "/models")[1])
    assert [model["name"] for model in described] == [teacher(), student()]
    assert [model["teacher"] for model in described] == [True, False]
    assert call(port, "GET", "/../pyproject.toml")[0] == 404


@pytest.mark.parametrize("make", [teacher, student])
def test_draws_what_the_model_draws(port: int, make: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    name = make()
    monkeypatch.setattr(demo, "PAUSE", -1.0)  # every AR step is sent
    settings = {"ar_steps": 4, "order": "raster", "guidance": 1.5} | ({"head_steps": 3} if make is teacher else {})
    *steps, last = draw(port, model=name, classes=[3, None], **settings)
    model = Pipeline.load(name)
    images = model.sample([3, None], **settings)
    final = pictures(last, 2)
    assert np.array_equal(final[..., :3], images.repeat(3, axis=3))
    assert (final[..., 3] == 255).all()
    assert last["seconds"] > 0
    assert last["settings"] == {"ar_steps": 4, "guidance": 1.5, "guidance_schedule": "constant"}
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    shares = []
    for line in steps:
        some = pictures(line, 2)
        there = some[..., 3] == 255
        assert np.array_equal(some[there], final[there])  # a token stays as it was drawn
        shares.append(there.mean())
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1


def test_fast_models_are_not_kept_waiting(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PAUSE", 1e9)
    assert len(draw(port, model=student(), classes=[1])) == 1


def test_completes_pictures(port: int):
    grid = Pipeline.load(student()).network.config.grid
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2)
    keep = np.zeros((grid, grid), bool)
    keep[: grid // 2] = True
    for kept, rows in ((keep, slice(0, 4)), (np.ones_like(keep), slice(0, 8))):
        given = {"png": png(pixels), "keep": kept.flatten().tolist()}
        made = pictures(draw(port, model=student(), classes=[0, 1, 2], **given)[-1], 3)
        for image in made:
            assert np.array_equal(image[rows, :, :3], pixels[rows])
        assert (made[0] != made[1]).any() == (not kept.all())


def test_bad_requests(port: int):
    picture, keep = png(np.zeros((8, 8, 3), np.uint8)), [1] * 16
    for changes, message in (
        ({"model": "other"}, f"unknown model 'other': this page has {teacher()}"),
        ({"model": ["other"]}, "unhashable"),
        ({"classes": [10]}, "unknown class 10"),
        ({"classes": []}, "a list of 1 to 64"),
        ({"classes": [0] * 65}, "a list of 1 to 64"),
        ({"seed": -1}, "must not be negative"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"guidance": "high"}, "guidance must be a number"),
        ({"ar_steps": 1000}, "AR steps must be in"),
        ({"order": "spiral"}, "unknown order 'spiral'"),
        ({"batch_size": 1}, "a request has classes, model, seed"),
        ({"png": picture}, "png and keep go together"),
        ({"png": picture[:40], "keep": keep}, "the picture cannot be read as an image"),
        ({"png": png(np.zeros((9, 9, 3), np.uint8)), "keep": keep}, "images must be uint8 NHWC (1, 8, 8, 1)"),
        ({"png": picture, "keep": [1]}, "cannot reshape"),
        ({"png": picture, "keep": [0.5] * 16}, "keep must be True or False"),
    ):
        request = {"model": student(), "classes": [1], "seed": 0, **changes}
        status, data = call(port, "POST", "/draw", json.dumps(request))
        assert status == 400, changes
        assert message in json.loads(data)["error"]
    for path, body in (("/draw", "no JSON"), ("/draw", "[]"), ("/other", "{}")):
        status, data = call(port, "POST", path, body)
        assert status == 400
        assert json.loads(data)["error"]
    status, data = call(port, "POST", "/draw", "{}", **{"Content-Length": "-1"})
    assert status == 400


def test_other_sites_cannot_ask(port: int):
    request = json.dumps({"model": student(), "classes": [1], "seed": 0})
    for headers, expected in (
        ({}, 200),
        ({"Origin": f"http://127.0.0.1:{port}"}, 200),
        ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 400),
        ({"Origin": "null"}, 400),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 400),
    ):
        assert call(port, "POST", "/draw", request, **headers)[0] == expected, headers
    assert call(port, "GET", "/models", Host="evil.example")[0] == 403


def test_a_browser_that_leaves_stops_the_drawing(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "PAUSE", -1.0)
    strip, sent = demo._png, []
    monkeypatch.setattr(demo, "_png", lambda *args: sent.append(args) or strip(*args))
    body = json.dumps({"model": teacher(), "classes": [1], "seed": 0, "head_steps": 300, "ar_steps": 16})
    with socket.create_connection(("127.0.0.1", port), timeout=60) as browser:
        browser.sendall(f"POST /draw HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert browser.recv(100).startswith(b"HTTP/1.0 200")
    assert "seconds" in draw(port, model=student(), classes=[1], ar_steps=1)[-1]
    assert len(sent) < 16


def test_its_end_stops_the_drawing():
    page = demo.Demo([student()], "cpu")
    page.ends = True
    with pytest.raises(ConnectionAbortedError):
        page.draw({"model": student(), "classes": [1], "seed": 0}, print)


def test_a_port_that_is_taken(port: int, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["demo", student(), "--port", str(port)])
    assert stop.value.code == 2
    assert f"no page at 127.0.0.1, port {port}" in capsys.readouterr().err


def test_models_that_come_along_are_shown_teachers_first():
    names = shipped.names()
    assert names[:3] == ["digits/teacher", "digits/student", "digits/aligned"]
    assert len(names) == 9
