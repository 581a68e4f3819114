"""`marval demo`: a page in the browser on which models draw side by side, token by token, and complete what is erased.

Python's own server and one page, assets/demo.html: nothing to install, and no network but the browser's way to it.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from marval.devices import device_named
from marval.floor import synchronise
from marval.pipeline import Pipeline
from marval.update import is_bf16

PAGE = Path(__file__).parent / "assets" / "demo.html"
MOST_IMAGES = 64
MOST_BYTES = 1 << 24
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
        self.ends = False
        self.worker = ThreadPoolExecutor(1, "marval-demo")  # OpenMP starts anew in every thread
        for model in self.models.values():  # the first image packs weights
            self.worker.submit(model.sample, ar_steps=1, head_steps=None if model.student else 1).result()

    def describe(self) -> list[dict[str, Any]]:
        """What the page knows of each model."""
        return [
            {
                "name": name, "classes": model.class_names, "grid": model.network.config.grid,
                "size": model.tokenizer.image_size, "channels": model.tokenizer.image_channels,
                "teacher": model.student is None, "ar_steps": model.sampling.ar_steps, "order": model.sampling.order,
                "head_steps": model.sampling.head_steps, "guidance": model.sampling.guidance,
                "guidance_range": (0, 10) if model.student is None else model.student.guidance_range,
            }
            for name, model in self.models.items()
        ]  # fmt: skip

    def draw(self, request: Any, send: Send) -> None:
        """Draw, and send the images after AR steps, but not too often, then all of them with the time that one took.

        Args:
            request: ``model``, ``classes`` (indices, None for no class) and ``seed``; any of `SETTINGS`; to complete
                a picture its ``pixels`` (base64 of uint8 HW4, of which the first C channels count) and ``keep``,
                True or False for each token.
            send: called with ``step`` (AR steps done) or ``seconds`` (of an image; what is sent does not count), and
                ``png``: base64 of the images below each other, tokens that are not drawn yet transparent.

        Raises:
            ValueError: the request cannot be served; before anything is sent.
        """
        needs = {"model", "classes", "seed"}
        both = {"pixels", "keep"}
        if not isinstance(request, dict) or not needs <= set(request) <= needs | SETTINGS | both:
            raise ValueError(f"a request has {', '.join(sorted(needs))}, and may have {', '.join(sorted(SETTINGS))}")
        if 0 < len(both & set(request)) < 2:
            raise ValueError("pixels and keep go together")
        model, classes = self.models.get(request["model"]), request["classes"]
        if model is None:
            raise ValueError(f"unknown model {request['model']!r}: this page has {', '.join(self.models)}")
        if not isinstance(classes, list) or not 1 <= len(classes) <= MOST_IMAGES:
            raise ValueError(f"classes must be a list of 1 to {MOST_IMAGES}")
        settings = {name: value for name, value in request.items() if name in SETTINGS}
        grid, images, keep = model.network.config.grid, None, None
        if "pixels" in request:
            side, channels = model.tokenizer.image_size, model.tokenizer.image_channels
            pixels = np.frombuffer(base64.b64decode(request["pixels"]), np.uint8).reshape(side, side, 4)
            images = np.stack([pixels[..., :channels]] * len(classes))
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
            mark = time.perf_counter()
            drawn = model.sample(
                classes, seed=request["seed"], batch_size=len(classes), images=images, keep=keep, each_ar_step=show,
                **settings,
            )  # fmt: skip
            clock()
            return drawn

        drawn = self.worker.submit(work).result()
        everywhere = np.ones((len(classes), grid * grid), bool)
        send({"seconds": seconds / len(classes), "png": _png(drawn, everywhere)})


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


def server(demo: Demo, host: str, port: int) -> ThreadingHTTPServer:
    """The page at ``/``, `Demo.describe` at ``/models``; ``/draw`` answers a request (POST, JSON) with lines of JSON.

    Raises:
        ValueError: host and port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif self.path == "/models":
                self.answer_json(200, demo.describe())
            else:
                self.answer_json(404, {"error": f"there is no {self.path}"})

        def do_POST(self) -> None:
            begun = False

            def send(line: dict[str, Any]) -> None:
                nonlocal begun
                if not begun:
                    self.answer(200, "application/x-ndjson", None)
                    begun = True
                self.wfile.write(json.dumps(line).encode() + b"\n")
                self.wfile.flush()

            try:
                length = int(self.headers.get("Content-Length", 0))
                if self.path != "/draw" or length > MOST_BYTES:
                    raise ValueError(f"{self.path} takes no {length} bytes")
                demo.draw(json.loads(self.rfile.read(length)), send)
            except ConnectionError:
                pass  # the browser has left, or asks for something else now
            except (ValueError, TypeError, FloatingPointError) as error:
                if begun:
                    send({"error": str(error)})
                else:
                    self.answer_json(400, {"error": str(error)})

        def answer_json(self, status: int, value: Any) -> None:
            self.answer(status, "application/json", json.dumps(value).encode())

        def answer(self, status: int, kind: str, body: bytes | None) -> None:
            """Head, and body if there is one; else it follows."""
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"no page at {host}, port {port} ({error}): choose another --port or --host") from None


def serve(names: Sequence[str], host: str, port: int, device: str) -> None:
    """Run `marval demo` until it is interrupted."""
    demo = Demo(names, device)
    with server(demo, host, port) as page:
        print(f"{len(names)} models at http://{host}:{page.server_port} (Ctrl-C ends)", flush=True)
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            demo.ends = True
            print()
