"""`marval demo`: a page in the browser on which models draw side by side, token by token, and complete what is erased.

Python's own server and one page, assets/demo.html: nothing to install, and no network but the browser's way to it.
"""

import base64
import contextlib
import io
import json
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval.devices import device_named
from marval.floor import synchronise
from marval.images import decode_image
from marval.pipeline import Pipeline
from marval.tokenizers import NO_IMAGES
from marval.update import is_bf16

PAGE = Path(__file__).parent / "assets" / "demo.html"
MOST_IMAGES = 64
MOST_BYTES = 1 << 24
PATIENCE = 60
"""Seconds to wait for a browser that neither reads nor leaves."""
PAUSE = 0.05
"""Seconds of drawing between two looks at it."""
SETTINGS = {"ar_steps", "head_steps", "guidance", "order"}

Send = Callable[[dict[str, Any]], None]


class Demo:
    """Models by name, of which one at a time draws.

    Args:
        names: folders, or names of models that come with marval.

    Raises:
        ValueError: one cannot be loaded, or draws latents that it cannot decode.
    """

    def __init__(self, names: Sequence[str], device: str = "auto"):
        place = device_named(device)
        dtype = "bf16" if is_bf16("auto", place) else "float32"
        self.models = {name: Pipeline.load(name, place, dtype=dtype).accelerate() for name in names}
        for name, model in self.models.items():
            if not model.tokenizer.has_images:
                raise ValueError(f"{name}: {NO_IMAGES}")
        self.ends = False
        self.worker = ThreadPoolExecutor(1, "marval-demo")  # OpenMP starts anew in every thread
        self.warm: set[str] = set()

    def describe(self) -> list[dict[str, Any]]:
        """What the page knows of each model."""
        return [
            {
                "name": name, "classes": model.class_names, "grid": model.network.config.grid,
                "size": model.tokenizer.image_size, "teacher": model.student is None,
                "ar_steps": model.sampling.ar_steps, "order": model.sampling.order,
                "head_steps": model.sampling.head_steps, "guidance": model.sampling.guidance,
                "guidance_range": (0, 10) if model.student is None else model.student.guidance_range,
            }
            for name, model in self.models.items()
        ]  # fmt: skip

    def draw(self, request: Any, send: Send) -> None:
        """Draw, and send the images after AR steps, but not too often, then all of them with the time that one took.

        Args:
            request: ``model``, ``classes`` (indices, None for no class) and ``seed``; any of `SETTINGS`, else they are
                the model's; to complete a picture its ``png`` (base64) and ``keep``, True or False for each token.
            send: called with ``step`` (AR steps done), or ``seconds`` (of an image; what is sent does not count) and
                the ``settings``; and ``png``: base64 of the images below each other, tokens that are not drawn yet
                transparent.

        Raises:
            ValueError: the request cannot be served; before anything is sent.
        """
        needs = {"model", "classes", "seed"}
        both = {"png", "keep"}
        if not isinstance(request, dict) or not needs <= set(request) <= needs | SETTINGS | both:
            raise ValueError(f"a request has {', '.join(sorted(needs))}, and may have {', '.join(sorted(SETTINGS))}")
        if 0 < len(both & set(request)) < 2:
            raise ValueError("png and keep go together")
        model, classes = self.models.get(request["model"]), request["classes"]
        if model is None:
            raise ValueError(f"unknown model {request['model']!r}: this page has {', '.join(self.models)}")
        if not isinstance(classes, list) or not 1 <= len(classes) <= MOST_IMAGES:
            raise ValueError(f"classes must be a list of 1 to {MOST_IMAGES}")
        settings: dict[str, Any] = {name: value for name, value in request.items() if name in SETTINGS}
        config, grid, images, keep = model.settings(**settings), model.network.config.grid, None, None
        if "png" in request:
            picture = decode_image(base64.b64decode(request["png"]), "the picture").convert("RGB")
            images = np.stack([np.asarray(picture)[..., : model.tokenizer.image_channels]] * len(classes))
            keep = np.array(request["keep"]).reshape(grid, grid)
        seconds, steps, mark = 0.0, 0, 0.0

        def clock() -> None:
            nonlocal seconds, mark
            synchronise(model.device)
            now = time.perf_counter()
            seconds, mark = seconds + now - mark, now

        def show(_: list[int], tokens: Tensor, drawn: Tensor) -> None:
            nonlocal steps, mark
            if self.ends:
                raise ConnectionAbortedError
            steps += 1
            if time.perf_counter() - mark < PAUSE:
                return
            clock()
            there = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, drawn.cpu(), True)
            send({"step": steps, "png": _png(model.to_images(tokens).cpu().numpy(), there.numpy())})
            mark = time.perf_counter()

        def work() -> np.ndarray:
            nonlocal mark
            if request["model"] not in self.warm:  # the first images pack weights: not on the clock
                self.warm.add(request["model"])
                model.sample(classes, batch_size=len(classes), ar_steps=1, head_steps=None if model.student else 1)
            mark = time.perf_counter()
            drawn = model.sample(
                classes, seed=request["seed"], batch_size=len(classes), images=images, keep=keep, each_ar_step=show,
                **settings,
            )  # fmt: skip
            clock()
            return drawn

        drawn = self.worker.submit(work).result()
        everywhere = np.ones((len(classes), grid * grid), bool)
        used = {name: getattr(config, name) for name in ("ar_steps", "guidance", "guidance_schedule")}
        send({"seconds": seconds / len(classes), "settings": used, "png": _png(drawn, everywhere)})


def _png(images: np.ndarray, drawn: np.ndarray) -> str:
    """Images (B, H, W, C) below each other; transparent where tokens (B, L) are not drawn."""
    count, height, width, channels = images.shape
    grid = round(drawn.shape[1] ** 0.5)
    alpha = drawn.reshape(count, grid, grid).repeat(height // grid, axis=1).repeat(width // grid, axis=2)
    alpha = np.where(alpha[..., None], 255, 0).astype(np.uint8)
    pixels = np.concatenate([images.repeat(3 // channels, axis=3), alpha], axis=3)
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(count * height, width, 4)).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


class Page(ThreadingHTTPServer):
    """The page at ``/``, `Demo.describe` at ``/models``; ``/draw`` answers a request (POST, JSON) with lines of JSON.

    Raises:
        ValueError: host and port cannot be had.
    """

    demo: Demo

    def __init__(self, host: str, port: int):
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"no page at {host}, port {port} ({error}): choose another --port or --host") from None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Page  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = PATIENCE

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.is_foreign():
            self.answer_json(403, {"error": "this page is for browsers that opened it"})
        elif path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/models":
            self.answer_json(200, self.server.demo.describe())
        else:
            self.answer_json(404, {"error": f"there is no {path}"})

    def do_POST(self) -> None:
        begun = False

        def send(line: dict[str, Any]) -> None:
            nonlocal begun
            if not begun:
                self.answer(200, "application/x-ndjson", b"")
                begun = True
            self.wfile.write(json.dumps(line).encode() + b"\n")
            self.wfile.flush()

        try:
            try:
                length = int(self.headers.get("Content-Length", 0))
                if self.is_foreign() or self.path != "/draw" or not 0 <= length <= MOST_BYTES:
                    raise ValueError(f"{self.path} does not take this")
                self.server.demo.draw(json.loads(self.rfile.read(length)), send)
            except OSError:
                raise
            except Exception as error:
                if not isinstance(error, ValueError | TypeError | FloatingPointError):  # out of memory, or our mistake
                    traceback.print_exc()
                if begun:
                    send({"error": str(error)})
                else:
                    self.answer_json(400, {"error": str(error)})
        except OSError:
            pass  # the browser has left, or asks for something else now

    def is_foreign(self) -> bool:
        """Whether another site's page asks, or a name that was made to point to this machine."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        local = ("localhost", "127.0.0.1", "::1")
        if self.server.server_address[0] in local and urlsplit(f"//{host}").hostname not in local:
            return True
        return origin is not None and urlsplit(origin).netloc != host

    def answer_json(self, status: int, value: Any) -> None:
        self.answer(status, "application/json", json.dumps(value).encode())

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def serve(names: Sequence[str], host: str, port: int, device: str) -> None:
    """Run `marval demo` until it is interrupted."""
    names = list(dict.fromkeys(names))
    with Page(host, port) as page, contextlib.suppress(KeyboardInterrupt):
        print(f"loading {', '.join(names)}", flush=True)
        page.demo = Demo(names, device)
        print(f"open http://{host}:{page.server_port} (Ctrl-C ends)", flush=True)
        try:
            page.serve_forever()
        finally:
            page.demo.ends = True
            print()
