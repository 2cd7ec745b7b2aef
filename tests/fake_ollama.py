"""A stand-in for an Ollama server: real HTTP on loopback, no neural network.

It speaks the protocol of Ollama (shapes, error texts, status codes, streaming),
behaves like it under load (model loads, slots, prefix cache, time) and fails like
it on request. Its "VLM" is no VLM: it measures the image it is sent (brightness,
straight edges, circles, bars, spots, grain) and phrases what it measured, with
omissions and mistakes. Its embedder hashes words. Results obtained with it say
nothing about any real model.

    python tests/fake_ollama.py --port 11500 --time-model gpu --num-parallel 4
    fake_ollama: a stand-in, not a VLM; http://127.0.0.1:11500 era=llamaserver ...

In a test:

    with FakeOllama(num_parallel=2, faults={"busy": 0.1}) as server:
        client = ollama.Client(server.url)
        ...
        assert server.stats()["encodes"] == 1

Other processes read GET /__stats and change settings with POST /__control.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hashlib
import io
import json
import math
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Json = dict[str, Any]
Floats = NDArray[np.float32]
Era = Literal["llamaserver", "llamarunner", "ext"]
T = TypeVar("T")

IMAGE_TOKENS = 576
"""Places that one image takes in the context of a LLaVA-1.5-shaped model."""

# ---------------------------------------------------------------- settings ---


@dataclass(frozen=True)
class Pace:
    """Seconds and rates of one kind of machine; estimates, for relative results."""

    clip_s: float
    """Encoding one image; no slot produces a token meanwhile."""
    prompt_rate: float
    """Prompt tokens per second."""
    token_rate: float
    """Answer tokens per second with one busy slot."""
    gain: float
    """Total answer rate with n busy slots is token_rate * n ** gain."""
    embed_s: float
    load_s: float
    restore_s: float
    """Bringing a saved prompt back from RAM."""


PACES = {
    "gpu": Pace(0.02, 8000, 150, 0.7075, 0.004, 3.0, 0.03),
    "cpu": Pace(3.0, 60, 15, 0.3685, 0.05, 8.0, 0.6),
    # Costs are reported as on a GPU, but nobody sleeps.
    "instant": Pace(0.02, 8000, 150, 0.7075, 0.004, 0.0, 0.03),
}
PNG_S_PER_PIXEL = 5e-8
"""Decoding and hashing on the server, paid on every request, cached or not."""

VERSIONS = {"llamaserver": "0.33.0", "llamarunner": "0.24.0", "ext": "0.3.14"}


@dataclass
class Rule:
    """One scripted fault: the nth call (from 1), a text in the body, or a predicate."""

    endpoint: str
    when: int | str | Callable[[Json], bool]
    fault: str
    seconds: float = 0.0
    times: int = 1
    seen: int = 0

    @classmethod
    def of(cls, item: Any) -> Rule:
        if isinstance(item, Rule):
            return item
        return cls(**item) if isinstance(item, dict) else cls(*item)

    def hits(self, endpoint: str, body: Json) -> bool:
        if self.times == 0 or self.endpoint not in ("*", endpoint):
            return False
        self.seen += 1
        hit = self._matches(body)
        self.times -= hit
        return hit

    def _matches(self, body: Json) -> bool:
        if callable(self.when):
            return self.when(body)
        if isinstance(self.when, str):
            return self.when in json.dumps(body, ensure_ascii=False)
        return self.seen >= self.when


@dataclass
class Settings:
    """What the stand-in can be told, at the start or while it runs."""

    era: Era = "llamaserver"
    version: str = ""
    models: tuple[str, ...] = ("demo-vlm", "demo-embed")
    pullable: tuple[str, ...] = ("demo-vlm", "demo-embed")
    digests: dict[str, str] = field(default_factory=dict)
    num_parallel: int = 1
    max_queue: int = 512
    max_loaded: int = 3
    cache_ram_mib: float = 8192
    text_first: bool = False
    """Chat puts the text before the image, as models without a Go template do."""
    time_model: str = "instant"
    time_scale: float = 1.0
    load_s: float | None = None
    pull_s: float = 0.0
    mistakes: float = 0.08
    """Share of observations that are made up."""
    faults: dict[str, float] = field(default_factory=dict)
    """Probability of each fault per inference call."""
    fault_seed: int = 0
    fault_s: float = 0.5
    """Seconds of the faults that take time, where a rule names none."""
    script: list[Rule] = field(default_factory=list)

    @property
    def pace(self) -> Pace:
        return PACES[self.time_model]

    @property
    def sleep_scale(self) -> float:
        return 0.0 if self.time_model == "instant" else self.time_scale

    def changed(self, values: Json) -> Settings:
        """A copy with other values; ValueError if one makes no sense."""
        if unknown := set(values) - {f.name for f in fields(self)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        new = replace(self, **values)
        new.script = [Rule.of(item) for item in new.script]
        new.models = tuple(map(short_name, new.models))
        new.pullable = tuple(map(short_name, new.pullable))
        if new.era not in VERSIONS or new.time_model not in PACES:
            raise ValueError(f"unknown era or time model: {new.era}, {new.time_model}")
        for name in [*new.faults, *(rule.fault for rule in new.script)]:
            if name not in FAULTS:
                raise ValueError(f"unknown fault {name!r}; known: {sorted(FAULTS)}")
        return new

    def change(self, values: Json) -> None:
        """Change in place, all or nothing: runners and slots hold this object."""
        vars(self).update(vars(self.changed(values)))


# ---------------------------------------------------------------- counters ---


class Counters:
    """What happened, for tests and benchmarks to assert on."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.asked: Counter[tuple[str, str, str, int]] = Counter()
        self.answered: Counter[tuple[str, str, str, int]] = Counter()
        self.embed_asked: Counter[tuple[str, str]] = Counter()
        self.embed_answered: Counter[tuple[str, str]] = Counter()
        self.totals: Counter[str] = Counter()
        self.in_flight = 0
        self.max_in_flight = 0
        self.slots_busy = 0
        self.max_slots_busy = 0
        self.busy_s = 0.0
        self.slot_busy_s = 0.0
        self.model_s = 0.0
        self._since = self.started

    def restarted(self) -> Counters:
        """New counters that know what is still under way."""
        new = Counters()
        new.inference(self.in_flight)
        new.slots_changed(self.slots_busy)
        return new

    def slots_changed(self, by: int) -> None:
        now = time.monotonic()
        self.busy_s += (now - self._since) * (self.slots_busy > 0)
        self.slot_busy_s += (now - self._since) * self.slots_busy
        self._since = now
        self.slots_busy += by
        self.max_slots_busy = max(self.max_slots_busy, self.slots_busy)

    def inference(self, by: int) -> None:
        self.in_flight += by
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def as_json(self) -> Json:
        self.slots_changed(0)
        names = "encodes full_prefills prompt_tokens cached_tokens ram_restores loads"
        names += " reloads loads_aborted unloads busy_503 disconnects looks"
        plain = "in_flight max_in_flight slots_busy max_slots_busy busy_s slot_busy_s"
        return {
            "uptime_s": time.monotonic() - self.started,
            "requests": dict(self.requests),
            "statuses": dict(self.statuses),
            "faults": dict(self.faults),
            **{name: self.totals[name] for name in names.split()},
            **{name: getattr(self, name) for name in plain.split()},
            "model_s": self.model_s,
            "asked": [
                {
                    **dict(zip(("model", "image", "prompt", "seed"), key, strict=True)),
                    "asked": count,
                    "answered": self.answered[key],
                }
                for key, count in self.asked.items()
            ],
            "embedded": [
                {
                    "model": key[0],
                    "text": key[1],
                    "asked": count,
                    "answered": self.embed_answered[key],
                }
                for key, count in self.embed_asked.items()
            ],
        }


# ------------------------------------------------------------------ models ---


def short_name(name: str) -> str:
    return name.removesuffix(":latest")


@dataclass(frozen=True)
class Model:
    """What `show` says of a model; its kind follows from its name."""

    name: str
    digest: str

    @property
    def pooling(self) -> bool:
        return any(word in self.name for word in ("embed", "minilm", "bge"))

    @property
    def vision(self) -> bool:
        return not self.pooling and "text" not in self.name

    @property
    def dims(self) -> int:
        if self.pooling:
            return 768 if "nomic" in self.name else 256
        return 512

    @property
    def train_ctx(self) -> int:
        return 2048 if self.pooling else 4096

    @property
    def capabilities(self) -> list[str]:
        if self.pooling:
            return ["embedding"]
        return ["completion", "vision"] if self.vision else ["completion"]

    @property
    def details(self) -> Json:
        families = ["llama", "clip"] if self.vision else ["llama"]
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "nomic-bert" if self.pooling else "llama",
            "families": ["nomic-bert"] if self.pooling else families,
            "parameter_size": "0B",
            "quantization_level": "F16",
        }

    def listed(self) -> Json:
        return {
            "name": with_tag(self.name),
            "model": with_tag(self.name),
            "modified_at": "2026-01-01T00:00:00Z",
            "size": 1_000_000,
            "digest": self.digest,
            "details": self.details,
        }

    def shown(self) -> Json:
        arch = self.details["family"]
        info = {
            "general.architecture": arch,
            f"{arch}.context_length": self.train_ctx,
            f"{arch}.embedding_length": self.dims,
        }
        shown: Json = {
            "license": "none: a stand-in, not a model",
            "modelfile": f"FROM {self.name}",
            "parameters": 'stop "<|end|>"',
            "template": "{{ .Prompt }}",
            "details": self.details,
            "model_info": info,
            "modified_at": "2026-01-01T00:00:00Z",
        }
        if self.vision:
            shown["projector_info"] = {"clip.vision.image_size": 336}
        return shown


def with_tag(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


# ---------------------------------------------------------------- protocol ---


class HttpError(Exception):
    """An answer that is an error; the message may itself be JSON, as in Ollama."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class CutOffError(Exception):
    """The connection must end now, with the answer unfinished."""

    def __init__(self, reset: bool) -> None:
        super().__init__("cut")
        self.reset = reset


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Plain:
    """An answer that is not JSON."""

    status: int
    body: bytes
    content_type: str = "text/plain"


REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Busy"}


class Wire:
    """One HTTP/1.1 connection, with its own buffer so that EOF can be watched for."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.started = False

    async def more(self) -> bool:
        data = await self.reader.read(1 << 18)
        self.buffer += data
        return bool(data)

    async def gone(self) -> None:
        """Return once the client has closed; keeps what it sends meanwhile."""
        with suppress(ConnectionError):
            while await self.more():
                pass

    async def request(self) -> Request | None:
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if not await self.more():
                return None
        head = self._take(end + 4).decode("latin-1")
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, path, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "100-continue" in headers.get("expect", ""):
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._body(headers)
        self.started = False
        return None if body is None else Request(method, path, headers, body)

    async def _body(self, headers: dict[str, str]) -> bytes | None:
        return await self._exactly(int(headers.get("content-length", 0)))

    async def _exactly(self, count: int) -> bytes | None:
        while len(self.buffer) < count:
            if not await self.more():
                return None
        return self._take(count)

    def _take(self, count: int) -> bytes:
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def head(self, status: int, content_type: str, length: int | None) -> None:
        size = "Transfer-Encoding: chunked"
        if length is not None:
            size = f"Content-Length: {length}"
        self.started = True
        self.writer.write(
            f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
            f"Content-Type: {content_type}\r\n{size}\r\n\r\n".encode()
        )

    async def send(self, answer: Plain, only_head: bool = False) -> None:
        self.head(answer.status, answer.content_type, len(answer.body))
        self.writer.write(b"" if only_head else answer.body)
        await self.writer.drain()

    async def line(self, record: Json) -> None:
        if not self.started:
            self.head(200, "application/x-ndjson", None)
        data = json.dumps(record).encode() + b"\n"
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    def abort(self, reset: bool) -> None:
        if reset and (sock := self.writer.get_extra_info("socket")):
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


def as_plain(record: Json, status: int = 200) -> Plain:
    return Plain(status, json.dumps(record).encode(), "application/json; charset=utf-8")


def nested(code: int, message: str, kind: str = "invalid_request_error") -> HttpError:
    """An error of the inner server, forwarded verbatim inside the outer one."""
    inner = {"error": {"code": code, "message": message, "type": kind}}
    return HttpError(code, json.dumps(inner))


# ------------------------------------------------------------------ faults ---

CRASH = (
    "model runner has unexpectedly stopped, this may be due to resource limitations"
    " or an internal error, check ollama server logs for details"
)
EOF_TEXT = "an error was encountered while running the model: unexpected EOF"
BUSY = "server busy, please try again.  maximum pending requests exceeded"
NO_EMBED = "This server does not support embeddings. Start it with `--embeddings`"
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"

TEXT_FAULTS = {
    "zero": "200 with a zero-value reply, done false",
    "truncated": "200 with half the text, done false",
    "empty": "200, done, no text",
    "whitespace": "200, done, only white space",
    "loop": "200, a phrase repeated up to num_predict, done_reason length",
    "length": "200, text cut short, done_reason length",
    "eof": "the runner dies in mid-answer: 500, or a last line in a stream",
}
EMBED_FAULTS = {
    "embed_eof": "400, the runner died while embedding",
    "embed_refused": "501 (embed) or 500 (embeddings): no embeddings here",
    "embed_nan": "the error that a NaN vector gives in this era",
    "embed_nan_raw": "200 with NaN in the JSON",
    "embed_null": "200 with null for the vectors",
    "embed_zero": "200 with zero vectors",
    "embed_short": "200 with vectors of half the length",
    "embed_count": "200 with one vector too few",
}
ANY_FAULTS = {
    "busy": "503, queue full",
    "crash": "500, the runner has stopped; the model loads again",
    "oom": "500, out of memory; all models are unloaded",
    "load_fail": "500, timed out waiting for the runner to start",
    "nested": "400, JSON inside the error string",
    "nested_500": "500, JSON inside the error string",
    "html_200": "200 with HTML instead of JSON",
    "html_502": "502 with HTML",
    "plain_404": "404 page not found, as of an old server",
    "json_list": "500 with a JSON list for a body",
    "hang": "no answer (for `seconds`, if given)",
    "slow": "`seconds` later than it would be",
    "cut": "connection closed in mid-body",
    "reset": "connection reset in mid-body",
    "drop": "connection closed before any answer",
    "refuse": "connections refused for `seconds`, open ones dropped",
    "digest": "the model's digest changes, the answer is normal",
}
FAULTS = TEXT_FAULTS | EMBED_FAULTS | ANY_FAULTS


@dataclass(frozen=True)
class Fault:
    name: str = ""
    seconds: float = 0.0


def applies(fault: str, endpoint: str) -> bool:
    if fault in TEXT_FAULTS:
        return endpoint in ("/api/chat", "/api/generate")
    if fault in EMBED_FAULTS:
        return endpoint in ("/api/embed", "/api/embeddings")
    return True


class FaultPlan:
    """Which fault, if any, this call gets: scripted first, then by chance."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.calls = 0

    def draw(self, endpoint: str, body: Json) -> Fault:
        for rule in self.settings.script:
            if applies(rule.fault, endpoint) and rule.hits(endpoint, body):
                return Fault(rule.fault, rule.seconds)
        if endpoint not in INFERENCE:
            return Fault()
        self.calls += 1
        dice = random.Random(f"{self.settings.fault_seed}/{self.calls}")
        for name, chance in self.settings.faults.items():
            if applies(name, endpoint) and dice.random() < chance:
                return Fault(name)
        return Fault()


def broken_text(fault: str, text: str, limit: int) -> tuple[str, bool, str]:
    """Text, done and done_reason after a text fault."""
    words = text.split(" ")
    if fault == "empty":
        return "", True, "stop"
    if fault == "whitespace":
        return " \n\n \t ", True, "stop"
    if fault == "loop":
        return "the image shows the " * (limit // 4 + 1), True, "length"
    if fault == "length":
        return " ".join(words[: max(1, len(words) // 2)]), True, "length"
    if fault == "truncated":
        return " ".join(words[: max(1, len(words) // 2)]), False, ""
    return text, True, "stop"


def broken_vectors(fault: str, vectors: list[list[float]]) -> list[Any]:
    damage: dict[str, Callable[[], list[Any]]] = {
        "embed_nan_raw": lambda: [[math.nan] * len(v) for v in vectors],
        "embed_null": lambda: [None] * len(vectors),
        "embed_zero": lambda: [[0.0] * len(v) for v in vectors],
        "embed_short": lambda: [v[: len(v) // 2] for v in vectors],
        "embed_count": lambda: vectors[:-1],
    }
    return damage[fault]() if fault in damage else vectors


# -------------------------------------------------------------------- eyes ---


@dataclass(frozen=True)
class Line:
    length: float
    """As a share of the longer side of the picture."""
    tilt: float
    """Degrees away from the nearest axis, 0 to 45."""
    axis: str


@dataclass(frozen=True)
class Sight:
    """What was measured in one picture; grey levels 0 to 255, sizes as shares."""

    mean: float
    spread: float
    noise: float
    unevenness: float
    two_tone: float
    dark_share: float
    brighter: str
    darker: str
    padding: float
    edges: float
    lines: tuple[Line, ...]
    circles: tuple[float, ...]
    circle_at: tuple[float, float]
    bars: float
    spots: int
    spots_on_ring: float
    spots_in_row: float
    detail: float
    detail_central: bool
    dark_corners: int

    @property
    def longest(self) -> Line:
        return self.lines[0] if self.lines else Line(0, 0, "vertical")


class NoImageError(ValueError):
    """These bytes are no picture that can be read."""


def decode(data: bytes) -> Floats:
    """Grey levels of a picture, at most 336 on the long side."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.convert("L")
    except (OSError, ValueError, SyntaxError) as error:
        raise NoImageError(str(error)) from error
    if max(grey.size) > 336:
        grey.thumbnail((336, 336), Image.Resampling.BOX)
    return np.asarray(grey, np.float32)


def without_padding(image: Floats) -> tuple[Floats, float]:
    """The picture inside its border of constant mid-grey, and the border's share."""

    def span(lines: Floats) -> slice:
        plain = np.ptp(lines, axis=1) < 2
        plain &= np.abs(lines.mean(axis=1) - 118) < 9
        inside = np.flatnonzero(~plain)
        return slice(inside[0], inside[-1] + 1) if inside.size else slice(None)

    rows = span(image)
    inner = image[rows, span(image[rows].T)]
    return inner, 1 - inner.size / image.size


def blur(image: Floats, radius: int) -> Floats:
    """Mean over a square window, edges repeated."""
    size = 2 * radius + 1
    for _ in range(2):
        padded = np.pad(image, ((radius + 1, radius), (0, 0)), "edge")
        sums = np.cumsum(padded, axis=0, dtype=np.float64)
        image = ((sums[size:] - sums[:-size]) / size).astype(np.float32).T
    return image


@dataclass(frozen=True)
class Edges:
    """Thin edge points about the picture's centre, and where each one points."""

    x: Floats
    y: Floats
    angle: Floats
    side: int

    def only(self, kept: NDArray[np.bool_]) -> Edges:
        return Edges(self.x[kept], self.y[kept], self.angle[kept], self.side)


def find_edges(image: Floats) -> Edges:
    """Points whose gradient stands out of the noise and of both its neighbours."""
    smooth = blur(blur(image, 1), 1)
    gy, gx = (np.asarray(slope, np.float32) for slope in np.gradient(smooth))
    size = np.hypot(gx, gy)
    floor = max(5.5 * float(np.median(size)), 2.5)
    middle = size[1:-1, 1:-1]
    across = (middle >= size[1:-1, :-2]) & (middle > size[1:-1, 2:])
    along = (middle >= size[:-2, 1:-1]) & (middle > size[2:, 1:-1])
    steep = np.abs(gx[1:-1, 1:-1]) > np.abs(gy[1:-1, 1:-1])
    thin = (middle > floor) & np.where(steep, across, along)
    y, x = np.nonzero(thin)
    y, x = y + 1, x + 1
    keep = slice(None, None, len(x) // 8000 + 1)
    angle = np.arctan2(gy[y, x], gx[y, x])[keep].astype(np.float32)
    centre_y, centre_x = image.shape[0] / 2, image.shape[1] / 2
    return Edges(
        (x - centre_x)[keep].astype(np.float32),
        (y - centre_y)[keep].astype(np.float32),
        angle,
        max(image.shape),
    )


FAN = np.arange(-7, 8)
"""A point votes for lines within these many steps of 2 degrees of its gradient."""


def find_lines(edges: Edges, at_most: int = 6) -> tuple[Line, ...]:
    """Straight edges, longest first (Hough transform over gradient directions)."""
    if edges.x.size < 20:
        return ()
    steps = np.round(edges.angle / np.radians(2)).astype(int)[:, None] + FAN
    turn = np.radians(2) * steps
    rho = edges.x[:, None] * np.cos(turn) + edges.y[:, None] * np.sin(turn)
    width = edges.side // 2 + 4
    bins = steps % 180 * width + (rho / 3 + width / 2).astype(int)
    lines: list[Line] = []
    while len(lines) < at_most and bins.size:
        votes = np.bincount(bins.ravel(), minlength=180 * width)
        best = int((votes[1:] + votes[:-1]).argmax())
        mine = ((bins == best) | (bins == best + 1)).any(axis=1)
        line = as_line(edges.x[mine], edges.y[mine], edges.side)
        if line.length < 0.12:
            break
        lines.append(line)
        beside = (bins >= best - 1) & (bins <= best + 2)
        kept = ~beside.any(axis=1)
        bins, edges = bins[kept], edges.only(kept)
    return tuple(lines)


def as_line(x: Floats, y: Floats, side: int) -> Line:
    """The line through the points: its direction is that of their largest spread."""
    points = np.stack([x - x.mean(), y - y.mean()])
    _, vectors = np.linalg.eigh(points @ points.T)
    turn = math.degrees(math.atan2(vectors[1, 1], vectors[0, 1])) % 180
    tilt = abs((turn + 45) % 90 - 45)
    axis = "vertical" if 45 < turn < 135 else "horizontal"
    return Line(min(1.0, x.size / side), tilt, "diagonal" if tilt > 20 else axis)


def find_circles(edges: Edges) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Radii of circles about their commonest centre, and that centre (shares)."""
    if edges.x.size < 30:
        return (), (0.0, 0.0)
    reach = np.arange(6, edges.side * 0.6, 4, dtype=np.float32)
    reach = np.concatenate([-reach, reach])
    ux, uy = np.cos(edges.angle), np.sin(edges.angle)
    cells = edges.side // 3 + 1
    cx = ((edges.x[:, None] + ux[:, None] * reach) / 3 + cells / 2).astype(np.int32)
    cy = ((edges.y[:, None] + uy[:, None] * reach) / 3 + cells / 2).astype(np.int32)
    inside = (cx >= 0) & (cx < cells) & (cy >= 0) & (cy < cells)
    votes = np.bincount((cy * cells + cx)[inside], minlength=cells * cells)
    smooth = blur(votes.reshape(cells, cells).astype(np.float32), 1)
    row, col = divmod(int(smooth.argmax()), cells)
    x0, y0 = (col + 0.5 - cells / 2) * 3, (row + 0.5 - cells / 2) * 3
    radii = rings_about(edges, x0, y0, ux, uy)
    return radii, (x0 / edges.side, y0 / edges.side)


SECTORS = 32


def rings_about(
    edges: Edges, x0: float, y0: float, ux: Floats, uy: Floats
) -> tuple[float, ...]:
    """Radii at which edge points face the centre from most directions."""
    dx, dy = edges.x - x0, edges.y - y0
    far = np.hypot(dx, dy) + 1e-6
    facing = np.abs(dx * ux + dy * uy) / far > 0.95
    sector = ((np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * SECTORS).astype(int) % SECTORS
    ring = (far / 3).astype(int)
    seen = np.zeros((edges.side // 3 + 2, SECTORS), bool)
    near = facing & (ring < len(seen))
    seen[ring[near], sector[near]] = True
    seen[1:] |= seen[:-1]
    cover = seen.mean(axis=1)
    radii: list[float] = []
    for index in np.argsort(-cover):
        radius = (index - 0.5) * 3 / edges.side
        if cover[index] < 0.55 or len(radii) == 4:
            break
        if radius > 0.06 and all(abs(radius - other) > 0.025 for other in radii):
            radii.append(float(radius))
    return tuple(radii)


def find_spots(image: Floats) -> NDArray[np.float64]:
    """Centres (n, 2) of compact spots, as shares of the longer side."""
    if min(image.shape) < 40:
        return np.zeros((0, 2))
    band = (blur(blur(image, 2), 1) - blur(image, 7))[::2, ::2]
    size = np.abs(band)
    floor = max(6 * float(np.median(size)), 2.0)
    shifts = range(-3, 4)
    peak = size
    for axis in (0, 1):
        peak = np.max([np.roll(peak, shift, axis) for shift in shifts], axis=0)
    inner = np.zeros_like(size, bool)
    inner[4:-4, 4:-4] = True
    y, x = np.nonzero((size >= peak) & (size > floor) & inner)
    keep = is_compact(band, y, x)
    centres = np.stack([y[keep], x[keep]], axis=1) * 2 / max(image.shape)
    return np.asarray(centres, np.float64)


def is_compact(
    band: Floats, y: NDArray[np.int_], x: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Whether the peaks fall off alike in all directions, unlike a line's."""
    middle = 2 * band[y, x]
    xx = band[y, x + 2] + band[y, x - 2] - middle
    yy = band[y + 2, x] + band[y - 2, x] - middle
    xy = band[y + 2, x + 2] + band[y - 2, x - 2]
    xy = (xy - band[y + 2, x - 2] - band[y - 2, x + 2]) / 4
    product = xx * yy - xy * xy
    return np.asarray(product > 0.14 * (xx + yy) ** 2)


def find_bars(image: Floats) -> float:
    """Share of the picture that parallel bars cover."""
    if min(image.shape) < 48:
        return 0.0
    high = image - blur(image, 8)
    windows = np.lib.stride_tricks.sliding_window_view(high, (32, 32))[::12, ::12]
    tiles = windows.reshape(-1, 32, 32)
    rich = tiles.std(axis=(1, 2)) > max(3 * grain(image), 6.0)
    return float((periodicity(tiles[rich]) > 0.3).sum()) / len(tiles)


def periodicity(tiles: Floats) -> Floats:
    """Share of each tile's power in its strongest wave of 3 or more periods."""
    if len(tiles) == 0:
        return np.zeros(0, np.float32)
    taper = np.hanning(32).astype(np.float32)
    power = np.abs(np.fft.rfft2(tiles * taper * taper[:, None])) ** 2
    power[:, :, 0] /= 2
    down, across = np.fft.fftfreq(32)[:, None] * 32, np.arange(17)
    waves = np.where(np.hypot(down, across) >= 3.2, power, 0).reshape(len(tiles), -1)
    best = waves.argmax(axis=1)[:, None, None]
    # Distance in frequency from the strongest wave, around the corner of the FFT.
    off = (best // 17 - np.arange(32)[:, None] + 16) % 32 - 16
    near = np.hypot(off, best % 17 - across) < 2
    share = (power * near).sum(axis=(1, 2)) / (power.sum(axis=(1, 2)) + 1e-9)
    return np.asarray(share, np.float32)


def grain(image: Floats) -> float:
    """Standard deviation of the pixel noise, robust against structure."""
    return 1.4826 * float(np.median(np.abs(image - blur(image, 1))))


def zone_means(image: Floats) -> Floats:
    """Mean grey level of three by three zones."""
    rows = np.array_split(image, 3, axis=0)
    parts = [[zone.mean() for zone in np.array_split(row, 3, axis=1)] for row in rows]
    return np.array(parts, np.float32)


ZONES = [
    ["the upper left", "the top", "the upper right"],
    ["the left side", "the centre", "the right side"],
    ["the lower left", "the bottom", "the lower right"],
]


def zone_name(index: int) -> str:
    return ZONES[index // 3][index % 3]


def two_tones(image: Floats) -> tuple[float, float]:
    """How well one threshold splits the grey levels (0 to 1), and the dark share."""
    counts, borders = np.histogram(image, 64, (0, 256))
    weight = np.cumsum(counts) / image.size
    levels = np.cumsum(counts * (borders[:-1] + 2)) / image.size
    between = (levels[-1] * weight - levels) ** 2 / (weight * (1 - weight) + 1e-9)
    best = int(between[:-1].argmax())
    return float(min(1, between[best] / (image.var() + 1e-3))), float(weight[best])


def fine_detail(image: Floats) -> tuple[float, bool]:
    """Share of small cells with far more detail than most; whether it is central."""
    fine = np.abs(image - blur(image, 1))
    cells = blur(fine, 5)[5::10, 5::10]
    rich = cells > max(3 * float(np.median(cells)), 2.0)
    if not rich.any():
        return 0.0, False
    y, x = (np.argwhere(rich).mean(axis=0) + 0.5) / np.array(cells.shape) - 0.5
    return float(rich.mean()), bool(math.hypot(y, x) < 0.2)


def arrangement(
    spots: NDArray[np.float64], centre: NDArray[np.float64]
) -> tuple[float, float]:
    """Share of the spots that lie on one ring about the centre; in one row."""
    if len(spots) < 4:
        return 0.0, 0.0
    far = np.hypot(*(spots - centre).T)
    ring = max(float((np.abs(far - radius) < 0.02).mean()) for radius in far)
    moved = spots - spots.mean(axis=0)
    spread = np.linalg.svd(moved, compute_uv=False)
    return ring, float(max(0.0, 1 - 4 * spread[1] / (spread[0] + 1e-6)))


def look(data: bytes) -> Sight:
    """Measure one picture; everything the stand-in will ever know about it."""
    image, padding = without_padding(decode(data))
    if min(image.shape) < 16:
        image = np.pad(image, 16, "edge")
    coarse = blur(image, 4)
    zones = zone_means(image)
    edges = find_edges(image)
    lines = find_lines(edges)
    circles, centre = find_circles(edges)
    bars = find_bars(image)
    spots = find_spots(image)
    middle = np.array(image.shape) / 2 / edges.side + np.array([centre[1], centre[0]])
    on_ring, in_row = arrangement(spots, middle)
    detail, central = fine_detail(image)
    two_tone, dark_share = two_tones(image)
    corners = [coarse[y, x] for y in (2, -3) for x in (2, -3)]
    return Sight(
        mean=float(image.mean()),
        spread=float(image.std()),
        noise=grain(image),
        unevenness=float(np.ptp(np.percentile(coarse, [5, 95]))),
        two_tone=two_tone,
        dark_share=dark_share,
        brighter=zone_name(int(zones.argmax())),
        darker=zone_name(int(zones.argmin())),
        padding=padding,
        edges=edges.x.size / image.size,
        lines=lines,
        circles=circles,
        circle_at=centre,
        bars=bars,
        spots=len(spots),
        spots_on_ring=on_ring,
        spots_in_row=in_row,
        detail=detail,
        detail_central=central,
        dark_corners=sum(bool(zones.mean() - level > 60) for level in corners),
    )


# ------------------------------------------------------------------- voice ---

ASPECTS = {
    "shape": "shape circ round ring disc geometr object form outline",
    "edge": "edge line straight boundar angle orient sharp tilt transition slope",
    "brightness": "bright dark grey gray intens contrast tone uniform homogen level",
    "texture": "textur noise nois grain smooth mottl detail fine surface",
    "count": "many count number how much several",
    "layout": "layout where centre center corner position arrang symmetr region part",
    "pattern": "bar stripe grid period repeat pattern regular",
}
"""Beginnings of the words by which a prompt asks for an aspect."""

WORDINGS = """
brightness even: an almost uniform field of grey | an even, homogeneous tone across\
 the whole frame | a plain surface with hardly any variation in brightness\
 | a featureless, uniform area
brightness slope: a soft gradient that is brighter towards {brighter} | a gradual\
 change of brightness, darker near {darker} | a smooth, gentle shading from one side\
 to the other
brightness halves: a dark half and a bright half | two large regions, one nearly black\
 and one nearly white | a strong contrast between a dark area and a bright area\
 | black and white zones that meet abruptly
brightness level: a {level} overall impression | grey levels that are mostly {level}
brightness tones: many different grey levels from dark to bright | areas of different\
 contrast | a wide range of tones
edge long: a long straight edge, roughly {axis} | a sharp {axis} boundary that runs\
 through the picture | one clear straight line that divides the picture | a sharp\
 linear transition between two regions
edge tilted: a slightly tilted edge, about {tilt} degrees off the {axis} | an edge that\
 is slanted by a few degrees | a boundary at a small angle to the frame
edge several: several straight borders and small squares | a number of straight\
 segments in different places | rectangles with straight sides
edge none: no distinct edges or lines | no sharp boundary anywhere | nothing with a\
 clear outline
shape plate: a single plate with a straight side | a large flat shape bounded by a\
 straight border | a rectangular block covering part of the field
shape round: a large circular object | a round disc seen from above | a circular\
 outline around the middle part | a round plate with a rim
shape rings: concentric rings | a thin bright ring inside a circular body | several\
 circles with one centre
layout clock: small discs arranged along a circle | dots placed around the centre like\
 the hours of a clock | a circular arrangement of round spots
layout row: a row of discs | spots lined up in a row
layout centred: an object in the centre with empty space around it | a symmetric\
 arrangement about the middle
layout uneven: the brightest part at {brighter} | the darkest part at {darker}
layout corners: dark rounded corners | corners that are darker than the rest
layout margins: a grey band at the border | plain grey margins around the picture
count spots: about {spots} small spots | roughly {spots} separate details of various\
 contrast | many small round details | a number of small discs, some of them faint
count nothing: no separate objects to count | hardly any individual details | a single\
 region rather than several objects
pattern bars: a pattern of parallel bars | groups of fine stripes | a grid of\
 alternating dark and bright lines | a block of closely spaced lines
pattern none: no repeating pattern | nothing periodic or striped
texture grain: a fine grainy texture all over | visible noise like film grain | a\
 speckled, mottled surface
texture smooth: a smooth surface with little noise | clean and smooth areas
texture detail: fine detail concentrated near the centre | small structures grouped in\
 the middle | intricate details inside the object
"""
FRAMES = (
    "The image shows {}.",
    "The picture contains {}.",
    "I can see {}.",
    "One notices {}.",
    "Clearly visible: {}.",
    "What stands out: {}.",
)


def wordings() -> dict[str, list[str]]:
    """What can be said, by `aspect kind`."""
    rows = (line.split(": ", 1) for line in WORDINGS.strip().splitlines())
    return {key: said.split(" | ") for key, said in rows}


SAYINGS = wordings()


def ramp(value: float, low: float, high: float) -> float:
    """0 at `low` and beyond, 1 at `high` and beyond, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def strengths(s: Sight) -> dict[str, float]:
    """How much each thing that can be said strikes the eye, 0 to 1."""
    return tone_strengths(s) | edge_strengths(s) | round_strengths(s)


def tone_strengths(s: Sight) -> dict[str, float]:
    quiet = ramp(s.edges, 0.006, 0.0005)
    halves = s.two_tone * ramp(min(s.dark_share, 1 - s.dark_share), 0.1, 0.3)
    halves *= ramp(s.spread, 20, 60)
    return {
        "brightness even": ramp(s.unevenness, 60, 15) * quiet,
        "brightness slope": ramp(s.unevenness, 8, 30) * quiet * 0.8,
        "brightness halves": halves,
        "brightness level": 0.3,
        "brightness tones": ramp(s.spread, 15, 50) * (1 - halves) * 0.6,
        "layout uneven": ramp(s.unevenness, 20, 80) * 0.5,
        "layout corners": ramp(s.dark_corners, 0, 3) * ramp(s.dark_share, 0.2, 0.05),
        "layout margins": ramp(s.padding, 0.03, 0.2) * 0.25,
        "texture grain": ramp(s.noise, 3, 8),
        "texture smooth": ramp(s.noise, 3, 0.5) * 0.6,
        "texture detail": ramp(s.detail, 0.08, 0.2) * (1 if s.detail_central else 0.5),
    }


def edge_strengths(s: Sight) -> dict[str, float]:
    strong = ramp(s.longest.length, 0.25, 0.6)
    return {
        "edge long": strong,
        "edge tilted": strong * ramp(s.longest.tilt, 0.8, 2.5),
        "edge several": ramp(len(s.lines), 2, 5) * 0.7,
        "edge none": ramp(s.edges, 0.004, 0.0003),
        "shape plate": strong * ramp(len(s.lines), 6, 2) * 0.7,
        "pattern bars": ramp(s.bars, 0.01, 0.08),
        "pattern none": ramp(s.bars, 0.01, 0.002) * 0.5,
    }


def round_strengths(s: Sight) -> dict[str, float]:
    largest = max(s.circles, default=0.0)
    rounded = ramp(len(s.circles), 0, 1.5) * ramp(largest, 0.05, 0.15)
    middle = ramp(math.hypot(*s.circle_at), 0.25, 0.05) * ramp(largest, 0, 0.1)
    return {
        "shape round": rounded,
        "shape rings": rounded * ramp(len(s.circles), 1, 3),
        "layout clock": rounded * ramp(s.spots * s.spots_on_ring, 4, 10),
        "layout row": ramp(s.spots_in_row, 0.5, 0.8) * ramp(s.spots, 3, 8),
        "layout centred": middle,
        "count spots": ramp(s.spots, 3, 15),
        "count nothing": ramp(s.spots, 4, 0) * 0.7,
    }


def details(s: Sight) -> dict[str, str]:
    """Words for the blanks in the wordings."""
    return {
        "brighter": s.brighter,
        "darker": s.darker,
        "level": ("dark", "medium grey", "bright")[(s.mean > 85) + (s.mean > 170)],
        "axis": s.longest.axis,
        "tilt": str(max(1, round(s.longest.tilt))),
        "spots": str(max(1, s.spots + s.spots % 3 - 1)),
    }


@lru_cache(maxsize=4096)
def asked_aspects(prompt: str) -> frozenset[str]:
    def asks(stems: str) -> bool:
        pattern = rf"\b({stems.replace(' ', '|')})"
        return re.search(pattern, prompt, re.IGNORECASE) is not None

    return frozenset(name for name, stems in ASPECTS.items() if asks(stems))


def describe(sight: Sight, prompt: str, dice: random.Random, mistakes: float) -> str:
    """A few sentences about the picture: partial, varied and sometimes wrong."""
    aspects = asked_aspects(prompt)

    def lot(strength: float, key: str) -> float:
        # Weighted draw: weak remarks win now and then, strong ones get lost.
        weight = strength * (2.5 if key.partition(" ")[0] in aspects else 1)
        return float(dice.random() ** (1 / (weight**2 + 1e-4)))

    lots = {key: lot(strength, key) for key, strength in strengths(sight).items()}
    ranked = sorted(lots, key=lambda key: -lots[key])
    chosen = ranked[: dice.randint(3, 5)]
    chosen = [dice.choice(ranked) if dice.random() < mistakes else k for k in chosen]
    said = (dice.choice(SAYINGS[key]) for key in dict.fromkeys(chosen))
    blanks = details(sight)
    return " ".join(dice.choice(FRAMES).format(x.format(**blanks)) for x in said)


def dice_for(image: str, prompt: str, seed: int, temperature: float) -> random.Random:
    """Chance that depends on the question alone; at temperature 0 not on the seed."""
    varied = f"{seed}/{temperature}" if temperature > 0 else "cold"
    return random.Random(f"{image}/{prompt}/{varied}")


# ---------------------------------------------------------------- embedder ---

DULL = frozenset(
    re.findall(
        r"\w+",
        "a an the is are of and or in on at to with it that this there what i can see"
        " out one image picture shows contains stands clearly visible notices",
    )
)
"""Words that carry little; they weigh a fifth."""


@lru_cache(maxsize=65536)
def term_place(term: str) -> tuple[int, float]:
    digest = hashlib.blake2b(term.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "big"), 1.0 if digest[7] & 1 else -1.0


def embed(text: str, dims: int) -> list[float]:
    """Unit vector of hashed words and word pairs, the same in every process."""
    words = re.findall(r"\w+", text.lower())
    vector = np.zeros(dims, np.float64)
    vector[0] = 0.1  # the vector of an empty text is not zero
    for word in words:
        place, sign = term_place(word)
        vector[place % dims] += sign * (0.2 if word in DULL else 1.0)
    for pair in pairwise(words):
        place, sign = term_place(" ".join(pair))
        vector[place % dims] += sign * 0.5
    vector /= float(np.linalg.norm(vector)) or 1.0
    return [float(x) for x in vector.astype(np.float32)]


# ---------------------------------------------------- slots and their cache ---

Token = tuple[str, int]
"""What stands in the context, and how many places it takes."""


def tokenize(text: str) -> list[Token]:
    return [(part, 1) for part in re.findall(r"[^\W\d_]{1,6}|\d|[^\w\s]|_", text)]


def places(tokens: list[Token]) -> int:
    return sum(count for _, count in tokens)


def shared(old: list[Token], new: list[Token]) -> int:
    """Places of the longest common prefix."""
    total = 0
    for mine, other in zip(old, new, strict=False):
        if mine != other:
            break
        total += mine[1]
    return total


@dataclass
class Slot:
    tokens: list[Token] = field(default_factory=list)
    busy: bool = False
    used: int = 0

    def similarity(self, new: list[Token]) -> float:
        return shared(self.tokens, new) / max(1, places(new))


class PromptCache:
    """Prompts of reused slots kept in RAM, oldest thrown out first."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.saved: list[list[Token]] = []

    def swap(self, slot: Slot, new: list[Token]) -> bool:
        """Save what the slot holds; take back the best match, if there is one."""
        if not slot.tokens or self.settings.cache_ram_mib <= 0:
            return False
        self._save(slot.tokens)
        best = self._best(slot, new)
        if best is not None:
            self.saved.remove(best)
            slot.tokens = best
        self._trim()
        return best is not None

    def _save(self, tokens: list[Token]) -> None:
        size = places(tokens)
        if any(shared(old, tokens) == size for old in self.saved):
            return
        kept = (old for old in self.saved if shared(old, tokens) < places(old))
        self.saved = [*kept, tokens]

    def _best(self, slot: Slot, new: list[Token]) -> list[Token] | None:
        best = None
        keep = shared(slot.tokens, new) / max(1, places(slot.tokens))
        match = shared(slot.tokens, new)
        for old in self.saved:
            common = shared(old, new)
            kept = common / places(old)
            if kept >= 0.25 and kept > keep and common > match:
                best, keep, match = old, kept, common
        return best

    def _trim(self) -> None:
        # 0.375 MiB per place is what a model of LLaVA-Phi-3's shape needs.
        room = self.settings.cache_ram_mib / 0.375
        while len(self.saved) > 1 and sum(map(places, self.saved)) > room:
            self.saved.pop(0)


# --------------------------------------------------------- time and runners ---


class Engine:
    """The time that one loaded model takes; prompts stall all answers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.prompt_lock = asyncio.Lock()
        self.stalled = False
        self.answering = 0
        self.changed = asyncio.Event()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def prompt(self, seconds: float) -> None:
        if not self.settings.sleep_scale:
            return
        async with self.prompt_lock:
            self.stalled = True
            self._notify()
            try:
                await asyncio.sleep(seconds * self.settings.sleep_scale)
            finally:
                self.stalled = False
                self._notify()

    def rate(self, answering: int) -> float:
        """Tokens per second of each of `answering` slots."""
        pace = self.settings.pace
        return float(pace.token_rate * max(1, answering) ** (pace.gain - 1))

    async def answer(self, tokens: float) -> None:
        """Wait while `tokens` are produced, at the rate of each moment."""
        scale = self.settings.sleep_scale
        if not scale:
            return
        self.answering += 1
        self._notify()
        try:
            while tokens > 1e-6:
                rate = 0 if self.stalled else self.rate(self.answering) / scale
                began = time.monotonic()
                await self._until_changed(tokens / rate if rate else None)
                tokens -= (time.monotonic() - began) * rate
        finally:
            self.answering -= 1
            self._notify()

    async def _until_changed(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()


class Runner:
    """One loaded model: its options, slots, caches and FIFO gate."""

    def __init__(self, model: Model, options: Json, settings: Settings) -> None:
        alone = model.pooling or settings.era == "ext"
        parallel = 1 if alone else settings.num_parallel
        self.model = model
        self.options = options
        self.settings = settings
        self.engine = Engine(settings)
        self.gate = asyncio.Semaphore(parallel)
        self.slots = [Slot() for _ in range(parallel)]
        self.ram = PromptCache(settings)
        self.encoded: OrderedDict[str, None] = OrderedDict()
        self.users = 0
        self.leaving = False
        self.free = asyncio.Event()
        self.free.set()
        self.expires = math.inf
        self.tick = 0

    def enter(self) -> None:
        self.users += 1
        self.free.clear()

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self.free.set()

    def take_slot(self, new: list[Token]) -> tuple[Slot, bool]:
        """The best idle slot, and whether its prompt came back from RAM."""
        idle = [slot for slot in self.slots if not slot.busy]
        best = max(idle, key=lambda slot: slot.similarity(new))
        restored = False
        self.tick += 1
        if self.settings.era == "llamaserver":
            if best.similarity(new) <= 0.1:
                best = min(idle, key=lambda slot: slot.used)
            kept = shared(best.tokens, new) / max(1, places(best.tokens))
            if kept < 0.5:
                restored = self.ram.swap(best, new)
        elif best.similarity(new) <= 0.1:
            best = min(idle, key=lambda slot: slot.used)
        best.busy = True
        best.used = self.tick
        return best, restored

    def must_encode(self, image: str, in_prefix: bool) -> bool:
        """Whether the image goes through the encoder, by what this era remembers."""
        if self.settings.era == "ext":
            return True
        if self.settings.era == "llamaserver" or in_prefix:
            return not in_prefix
        known = image in self.encoded
        self.encoded[image] = None
        self.encoded.move_to_end(image)
        while len(self.encoded) > 4:
            self.encoded.popitem(last=False)
        return not known


class Scheduler:
    """Loads models on demand, one at a time, and unloads them."""

    def __init__(self, settings: Settings, counters: Callable[[], Counters]) -> None:
        self.settings = settings
        self.counters = counters
        self.runners: dict[str, Runner] = {}
        self.lock = asyncio.Lock()
        self.pending = 0

    def ready(self, model: Model, options: Json) -> Runner | None:
        runner = self.runners.get(model.name)
        if runner and not runner.leaving and runner.options == options:
            return runner
        return None

    @asynccontextmanager
    async def runner(
        self, model: Model, options: Json, keep_s: float
    ) -> AsyncIterator[Runner]:
        self.expire()
        runner = self.ready(model, options) or await self._queue(model, options)
        runner.enter()
        runner.expires = math.inf
        try:
            yield runner
        finally:
            runner.leave()
            runner.expires = time.monotonic() + keep_s
            if keep_s == 0 and not runner.users:
                self.drop(runner)

    async def _queue(self, model: Model, options: Json) -> Runner:
        if self.pending >= self.settings.max_queue:
            self.counters().totals["busy_503"] += 1
            raise HttpError(503, BUSY)
        self.pending += 1
        try:
            async with self.lock:
                return self.ready(model, options) or await self._load(model, options)
        finally:
            self.pending -= 1

    async def _load(self, model: Model, options: Json) -> Runner:
        totals = self.counters().totals
        if old := self.runners.get(model.name):
            totals["reloads"] += 1
            await self._drain(old)
        while len(self.runners) >= self.settings.max_loaded:
            await self._drain(min(self.runners.values(), key=lambda r: r.expires))
        try:
            await asyncio.sleep(self._load_s())
        except asyncio.CancelledError:
            totals["loads_aborted"] += 1
            raise
        totals["loads"] += 1
        runner = self.runners[model.name] = Runner(model, options, self.settings)
        return runner

    def _load_s(self) -> float:
        own = self.settings.load_s
        return self.settings.time_scale * (
            self.settings.pace.load_s if own is None else own
        )

    async def _drain(self, runner: Runner) -> None:
        runner.leaving = True
        await runner.free.wait()
        self.drop(runner)

    def drop(self, runner: Runner) -> None:
        if self.runners.get(runner.model.name) is runner:
            del self.runners[runner.model.name]
            self.counters().totals["unloads"] += 1

    def drop_model(self, name: str) -> None:
        if runner := self.runners.get(name):
            self.drop(runner)

    def expire(self) -> None:
        now = time.monotonic()
        for runner in list(self.runners.values()):
            if runner.expires < now and not runner.users:
                self.drop(runner)


RUNNER_OPTIONS = ("num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
OPTION_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), ((int, float), "float32")),
    **dict.fromkeys(("seed", "num_ctx", "num_predict", "top_k"), ((int,), "integer")),
}


def checked_options(body: Json) -> Json:
    options: Json = body.get("options") or {}
    for name, (types, wanted) in OPTION_TYPES.items():
        value = options.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, types)
        ):
            raise HttpError(500, f'option "{name}" must be of type {wanted}')
    return options


def runner_options(model: Model, body: Json, options: Json) -> Json:
    """The options whose change makes Ollama load the model again."""
    num_ctx = min(options.get("num_ctx") or 4096, model.train_ctx)
    picked = {name: options.get(name) for name in RUNNER_OPTIONS}
    shift = body.get("shift", True)
    least = 2048 if model.vision else 4
    return {**picked, "num_ctx": max(num_ctx, least), "shift": shift}


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_seconds(value: Any) -> float:
    """Seconds of a `keep_alive`: a number, or a Go duration; negative is for ever."""
    if value is None:
        return 300.0
    if isinstance(value, str):
        parts = re.findall(r"([\d.]+)(ns|us|ms|h|m|s)", value)
        if not parts:
            raise HttpError(400, f'time: invalid duration "{value}"')
        total = sum(float(number) * UNITS[unit] for number, unit in parts)
        value = -total if value.startswith("-") else total
    return math.inf if value < 0 else float(value)


# ------------------------------------------------------------------ server ---

INFERENCE = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")


@dataclass
class Question:
    """One chat or generate call, understood."""

    endpoint: str
    model: Model
    body: Json
    options: Json
    prompt: str
    before: str
    images: list[bytes]
    image_first: bool
    fault: str

    @property
    def image_id(self) -> str:
        return "+".join(hashlib.sha256(data).hexdigest() for data in self.images)

    @property
    def seed(self) -> int:
        return int(self.options.get("seed", -1))

    @property
    def temperature(self) -> float:
        return float(self.options.get("temperature", 0.8))

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.model.name, self.image_id, self.prompt, self.seed

    def limit(self, num_ctx: int, used: int) -> int:
        asked = self.options.get("num_predict", -1)
        room = max(1, num_ctx - used)
        return room if asked < 0 else min(room, asked)

    def tokens(self) -> list[Token]:
        image = [(f"image {self.image_id}", IMAGE_TOKENS * len(self.images))]
        image = [*image, ("\n", 1)] if self.images else []
        text = tokenize(self.prompt)
        head: list[Token] = [("<s>", 1)]
        if self.before:
            head += [("<|system|>", 1), *tokenize(self.before), ("<|end|>", 1)]
        head += [("<|user|>", 1), ("\n ", 1), (" ", 1)]
        tail: list[Token] = [("<|end|>", 1), ("<|assistant|>", 1), ("\n", 1)]
        return head + (image + text if self.image_first else text + image) + tail


@dataclass
class Costs:
    """Seconds of one answer, as the reply reports them."""

    began: float
    load_s: float = 0.0
    wait_s: float = 0.0
    prompt_s: float = 0.0
    answer_s: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def as_json(self) -> Json:
        total = self.load_s + self.wait_s + self.prompt_s + self.answer_s
        report = {
            "total_duration": nanoseconds(total),
            "load_duration": nanoseconds(self.load_s),
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": nanoseconds(self.prompt_s),
            "eval_count": self.answer_tokens,
            "eval_duration": nanoseconds(self.answer_s),
        }
        return {name: value for name, value in report.items() if value}


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def utc_now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Server:
    """The HTTP side: routes, validation, replies."""

    def __init__(self, port: int, settings: Settings) -> None:
        self.port = port
        self.settings = settings
        self.counters = Counters()
        self.scheduler = Scheduler(settings, lambda: self.counters)
        self.faults = FaultPlan(settings)
        self.sights: dict[str, asyncio.Future[Sight]] = {}
        self.wires: set[Wire] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.listener: asyncio.Server | None = None
        self.routes: dict[tuple[str, str], Callable[[Json], Any]] = {
            ("GET", "/"): lambda _: Plain(200, b"Ollama is running"),
            ("GET", "/api/version"): lambda _: {"version": self.version},
            ("GET", "/api/tags"): lambda _: {"models": self.listed()},
            ("GET", "/api/ps"): lambda _: {"models": self.running()},
            ("GET", "/__stats"): lambda _: self.counters.as_json(),
            ("POST", "/__control"): self.control,
            ("POST", "/api/show"): self.show,
        }

    # -- connections

    async def listen(self) -> None:
        if self.listener and self.listener.is_serving():
            return
        self.listener = await asyncio.start_server(
            self._connection, "127.0.0.1", self.port, backlog=1024
        )
        self.port = self.listener.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        if self.listener:
            self.listener.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def refuse(self, seconds: float) -> None:
        """Look dead for a while: nothing listens, open connections break."""
        if self.listener:
            self.listener.close()
        for wire in self.wires:
            wire.abort(reset=False)
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: loop.create_task(self.listen()))

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        wire = Wire(reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.wires.add(wire)
        try:
            while (request := await wire.request()) is not None:
                if not await self._while_connected(wire, request):
                    break
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass
        finally:
            self.tasks.discard(task)
            self.wires.discard(wire)
            writer.close()

    async def _while_connected(self, wire: Wire, request: Request) -> bool:
        """Answer, unless the client leaves first; whether to go on listening."""
        work = asyncio.create_task(self._answer(wire, request))
        gone = asyncio.create_task(wire.gone())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            self.counters.totals["disconnects"] += not work.done()
        finally:
            answered = work.done()
            for task in (work, gone):
                task.cancel()
            results = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(results[0], CutOffError):
            wire.abort(results[0].reset)
        elif isinstance(results[0], Exception) and not isinstance(
            results[0], ConnectionError
        ):
            raise results[0]
        return answered and results[0] is None

    async def _answer(self, wire: Wire, request: Request) -> None:
        path = request.path.partition("?")[0]
        self.counters.requests[path] += 1
        inference = path in INFERENCE
        self.counters.inference(+inference)
        try:
            await self._route(wire, request, path)
        except HttpError as error:
            await self._fail(wire, error)
        except (CutOffError, ConnectionError):
            raise
        except Exception as error:
            # A mistake of the stand-in must not look like one of its faults.
            await self._fail(wire, HttpError(500, f"fake_ollama broke: {error!r}"))
            raise
        finally:
            self.counters.inference(-inference)

    async def _fail(self, wire: Wire, error: HttpError) -> None:
        self.counters.statuses[str(error.status)] += 1
        if wire.started:
            await wire.line({"error": error.message})
            await wire.end()
        else:
            await wire.send(as_plain({"error": error.message}, error.status))

    async def _send(self, wire: Wire, answer: Any, only_head: bool = False) -> None:
        plain = answer if isinstance(answer, Plain) else as_plain(answer)
        self.counters.statuses[str(plain.status)] += 1
        await wire.send(plain, only_head)

    async def _route(self, wire: Wire, request: Request, path: str) -> None:
        method = "GET" if request.method == "HEAD" else request.method
        posts = {*INFERENCE, "/api/pull"}
        known = {known for _, known in self.routes} | posts
        if path not in known:
            return await self._send(wire, Plain(404, b"404 page not found"))
        if (method, path) not in self.routes and (
            path not in posts or method != "POST"
        ):
            return await self._send(wire, Plain(405, b"405 method not allowed"))
        body = parsed(request) if method == "POST" else {}
        if path.startswith("/__"):
            return await self._send(wire, self.routes[method, path](body))
        fault = self.faults.draw(path, body)
        if fault.name:
            self.counters.faults[fault.name] += 1
            if await self._failed(wire, path, body, fault):
                return None
        if path in posts:
            return await self._post(wire, path, body, fault.name)
        return await self._send(
            wire, self.routes[method, path](body), request.method == "HEAD"
        )

    async def _post(self, wire: Wire, path: str, body: Json, fault: str) -> None:
        if path == "/api/pull":
            await self._stream(wire, body, self.pull(body), fault)
        elif path in ("/api/chat", "/api/generate"):
            question = self.question(path, body, fault)
            self.counters.asked[question.key] += bool(question.images)
            done = await self._stream(wire, body, self.infer(question), fault)
            answered = done and question.images and fault not in TEXT_FAULTS
            self.counters.answered[question.key] += bool(answered)
        else:
            await self._embeddings(wire, path, body, fault)

    async def _stream(
        self, wire: Wire, body: Json, records: AsyncGenerator[Json, None], fault: str
    ) -> bool:
        """Send the records one by one, or joined to one; whether all were sent."""
        if body.get("stream", True):
            count = 0
            async with aclosing(records):
                async for record in records:
                    await wire.line(record)
                    count += 1
                    if fault in ("cut", "reset") and count == 2:
                        raise CutOffError(fault == "reset")
            await wire.end()
            self.counters.statuses["200"] += 1
            return True
        joined = joined_record([record async for record in records])
        await self._maybe_cut(wire, joined, fault)
        await self._send(wire, joined)
        return True

    async def _maybe_cut(self, wire: Wire, answer: Json, fault: str) -> None:
        if fault in ("cut", "reset"):
            plain = as_plain(answer)
            wire.head(200, plain.content_type, len(plain.body))
            wire.writer.write(plain.body[: len(plain.body) // 2])
            await wire.writer.drain()
            await asyncio.sleep(0.01)  # or a reset overtakes the half body
            raise CutOffError(fault == "reset")

    # -- faults that need no answer

    async def _failed(self, wire: Wire, path: str, body: Json, fault: Fault) -> bool:
        """Act out a fault; whether the call ends with it."""
        seconds = fault.seconds or self.settings.fault_s
        name = short_name(str(body.get("model", "")))
        if error := self._error_of(fault.name, path, name):
            raise error
        plain = {
            "html_200": Plain(200, HTML, "text/html"),
            "html_502": Plain(502, HTML, "text/html"),
            "plain_404": Plain(404, b"404 page not found"),
            "json_list": Plain(500, b"[]", "application/json"),
        }
        if fault.name in plain:
            await self._send(wire, plain[fault.name])
        elif fault.name == "hang":
            await asyncio.sleep(fault.seconds or math.inf)
        elif fault.name == "slow":
            await asyncio.sleep(seconds)
        elif fault.name == "drop":
            raise CutOffError(reset=False)
        elif fault.name == "refuse":
            self.refuse(seconds)
        elif fault.name == "digest":
            self.settings.digests[name] = digest_of(f"{name}/{time.monotonic_ns()}")
        return fault.name in plain or fault.name in ("hang", "refuse")

    def _error_of(self, fault: str, path: str, name: str) -> HttpError | None:
        if fault == "crash":
            self.scheduler.drop_model(name)
        if fault == "oom":
            self.scheduler.runners.clear()
        if fault == "busy":
            self.counters.totals["busy_503"] += 1
        modern = self.settings.era == "llamaserver"
        legacy = path == "/api/embeddings"
        eof = 'do embedding request: Post "http://127.0.0.1:43210/v1/embeddings": EOF'
        nan = (400, "embedding contains NaN or Inf values")
        if not modern:
            nan = (500, "failed to encode response: json: unsupported value: NaN")
        oom = "llama-server reported out-of-memory during startup: cudaMalloc failed"
        late = "timed out waiting for llama-server to start - progress 0.00 - "
        table = {
            "busy": HttpError(503, BUSY),
            "crash": HttpError(500, CRASH),
            "oom": HttpError(500, oom),
            "load_fail": HttpError(500, late),
            "nested": nested(400, "Failed to load image or audio file"),
            "nested_500": nested(500, "failed to decode batch", "server_error"),
            "embed_eof": HttpError(500 if legacy or not modern else 400, eof),
            "embed_refused": HttpError(500 if legacy or not modern else 501, NO_EMBED),
            "embed_nan": HttpError(500 if legacy else nan[0], nan[1]),
        }
        return table.get(fault)

    # -- models

    @property
    def version(self) -> str:
        return self.settings.version or f"{VERSIONS[self.settings.era]}-fake"

    def models(self) -> list[Model]:
        own = self.settings.digests
        names = self.settings.models
        return [Model(name, own.get(name) or digest_of(name)) for name in names]

    def model(self, body: Json, path: str) -> Model:
        name = str(body.get("model") or body.get("name") or "")
        if not name:
            chat = path == "/api/chat"
            raise HttpError(400, "model is required" if chat else "invalid model name")
        for model in self.models():
            if model.name == short_name(name):
                return model
        if path in ("/api/embed", "/api/embeddings"):
            raise HttpError(404, f'model "{name}" not found, try pulling it first')
        raise HttpError(404, f"model '{name}' not found")

    def listed(self) -> list[Json]:
        modern = self.settings.era == "llamaserver"
        extra = {m.name: {"capabilities": m.capabilities} for m in self.models()}
        return [m.listed() | (extra[m.name] if modern else {}) for m in self.models()]

    def show(self, body: Json) -> Json:
        model = self.model(body, "/api/show")
        if self.settings.era == "ext":
            return model.shown()
        return model.shown() | {"capabilities": model.capabilities}

    def running(self) -> list[Json]:
        self.scheduler.expire()
        return [as_running(runner) for runner in self.scheduler.runners.values()]

    async def pull(self, body: Json) -> AsyncGenerator[Json, None]:
        name = short_name(str(body.get("model") or body.get("name") or ""))
        yield {"status": "pulling manifest"}
        known = name in self.settings.models
        if not known and name not in self.settings.pullable:
            raise HttpError(500, "pull model manifest: file does not exist")
        digest, total, parts = digest_of(name), 1_000_000, 5
        for part in range(0 if known else parts + 1):
            await asyncio.sleep(self.settings.pull_s / parts)
            yield {
                "status": f"pulling {digest[:12]}",
                "digest": f"sha256:{digest}",
                "total": total,
                "completed": total * part // parts,
            }
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            if status == "success" and not known:
                self.settings.models += (name,)
            yield {"status": status}

    def control(self, values: Json) -> Json:
        """Change settings; `reset_stats`, `refuse_s` and `unload` act at once."""
        values = dict(values)
        if values.pop("reset_stats", False):
            self.counters = self.counters.restarted()
        if seconds := values.pop("refuse_s", 0):
            asyncio.get_running_loop().call_later(0.02, self.refuse, float(seconds))
        if values.pop("unload", False):
            for name in list(self.scheduler.runners):
                self.scheduler.drop_model(name)
        try:
            self.settings.change(values)
        except (TypeError, ValueError) as error:
            raise HttpError(400, str(error)) from error
        return {"ok": True}

    # -- chat and generate

    def question(self, path: str, body: Json, fault: str) -> Question:
        model = self.model(body, path)
        if body.get("think"):
            raise HttpError(400, f'"{body["model"]}" does not support thinking')
        if model.pooling:
            verb = path.removeprefix("/api/")
            raise HttpError(400, f'"{body["model"]}" does not support {verb}')
        messages = body.get("messages") or []
        if path == "/api/generate":
            system = {"role": "system", "content": body.get("system") or ""}
            user = {"content": body.get("prompt"), "images": body.get("images")}
            messages = [system, {"role": "user", **user}] if body.get("prompt") else []
        before = " ".join(m.get("content") or "" for m in messages[:-1])
        last = messages[-1] if messages else {}
        text = last.get("content") or ""
        images = [decoded(item) for item in last.get("images") or []]
        first = not (self.settings.text_first and path == "/api/chat")
        if "[img]" in text:
            first = text.lstrip().startswith("[img]")
            text = text.replace("[img]", "").strip()
        options = checked_options(body)
        return Question(path, model, body, options, text, before, images, first, fault)

    async def infer(self, question: Question) -> AsyncGenerator[Json, None]:
        """Records of one answer: pieces of text, then the closing one."""
        keep = keep_seconds(question.body.get("keep_alive"))
        options = runner_options(question.model, question.body, question.options)
        costs = Costs(time.monotonic())
        async with self.scheduler.runner(question.model, options, keep) as runner:
            costs.load_s = time.monotonic() - costs.began
            if not question.prompt and not question.images:
                reason = "load" if keep else "unload"
                yield self._record(question, "", done=True, done_reason=reason)
                return
            queued = time.monotonic()
            async with runner.gate:
                costs.wait_s = self._model_seconds(time.monotonic() - queued)
                async with aclosing(self._in_slot(question, runner, costs)) as said:
                    async for record in said:
                        yield record

    def _model_seconds(self, seconds: float) -> float:
        scale = self.settings.sleep_scale
        return seconds / scale if scale else seconds

    async def _in_slot(
        self, question: Question, runner: Runner, costs: Costs
    ) -> AsyncGenerator[Json, None]:
        sights = [await self.sight(data) for data in question.images]
        if sights and not question.model.vision:
            raise nested(400, NO_VISION)
        tokens = question.tokens()
        check_room(places(tokens), runner.options["num_ctx"], bool(sights))
        slot, restored = runner.take_slot(tokens)
        self.counters.slots_changed(+1)
        try:
            await self._prefill(question, runner, slot, restored, costs)
            words = self._speak(question, runner, slot, sights, costs)
            async with aclosing(words):
                async for record in words:
                    yield record
        finally:
            slot.busy = False
            self.counters.slots_changed(-1)

    async def _prefill(
        self,
        question: Question,
        runner: Runner,
        slot: Slot,
        restored: bool,
        costs: Costs,
    ) -> None:
        tokens = question.tokens()
        total = places(tokens)
        cached = min(shared(slot.tokens, tokens), total - 1)
        if question.images and self.settings.era == "ext":
            cached = 0
        seen = bool(question.images) and cached > IMAGE_TOKENS
        encode = bool(question.images) and runner.must_encode(question.image_id, seen)
        pace = self.settings.pace
        costs.prompt_s = (total - cached) / pace.prompt_rate
        costs.prompt_s += encode * pace.clip_s * len(question.images)
        costs.prompt_s += restored * pace.restore_s
        costs.prompt_tokens = total
        tally = self.counters.totals
        tally["encodes"] += encode
        tally["full_prefills"] += bool(question.images) and not seen
        tally["ram_restores"] += restored
        tally["prompt_tokens"] += total
        tally["cached_tokens"] += cached
        self.counters.model_s += costs.prompt_s
        slot.tokens = tokens
        await runner.engine.prompt(costs.prompt_s)

    async def _speak(
        self,
        question: Question,
        runner: Runner,
        slot: Slot,
        sights: list[Sight],
        costs: Costs,
    ) -> AsyncGenerator[Json, None]:
        limit = question.limit(runner.options["num_ctx"], costs.prompt_tokens)
        text, done, reason = self._text(question, sights, limit)
        pieces = re.findall(r"\s*\S+|\s+$", text)
        began = time.monotonic()
        if question.fault == "zero":
            yield ZERO
            return
        for index, piece in enumerate(pieces):
            await runner.engine.answer(places(tokenize(piece)))
            if question.fault == "eof" and index == min(3, len(pieces) - 1):
                self.scheduler.drop(runner)
                raise HttpError(500, EOF_TEXT)
            yield self._record(question, piece, done=False)
        costs.answer_tokens = min(limit, places(tokenize(text)) + 1)
        spoken = [(f"{text[:40]} {question.key}", costs.answer_tokens)]
        slot.tokens = question.tokens() + spoken
        costs.answer_s = self._model_seconds(time.monotonic() - began)
        if not self.settings.sleep_scale:
            costs.answer_s = costs.answer_tokens / runner.engine.rate(1)
        self.counters.model_s += costs.answer_tokens / runner.engine.rate(1)
        if not done:
            return
        last = self._record(question, "", done=True, done_reason=reason)
        if question.endpoint == "/api/generate" and not question.body.get("raw"):
            last["context"] = list(range(costs.prompt_tokens % 50 + 3))
        yield last | costs.as_json()

    def _text(
        self, question: Question, sights: list[Sight], limit: int
    ) -> tuple[str, bool, str]:
        key = question.image_id, question.prompt, question.seed, question.temperature
        dice = dice_for(*key)
        mistakes = self.settings.mistakes
        said = [describe(s, question.prompt, dice, mistakes) for s in sights]
        text = " ".join(said) or "There is no picture to describe."
        text, done, reason = broken_text(question.fault, text, limit)
        if places(tokenize(text)) > limit:
            text, reason = cut_text(text, limit), "length"
        return text, done, reason

    def _record(self, question: Question, text: str, **rest: Any) -> Json:
        record: Json = {"model": question.body["model"], "created_at": utc_now()}
        if question.endpoint == "/api/chat":
            record["message"] = {"role": "assistant", "content": text}
        else:
            record["response"] = text
        return record | rest

    async def sight(self, data: bytes) -> Sight:
        """Measurements of a picture, made once, off the event loop."""
        key = hashlib.sha256(data).hexdigest()
        if key not in self.sights:
            self.counters.totals["looks"] += 1
            loop = asyncio.get_running_loop()
            self.sights[key] = loop.run_in_executor(None, look, data)
        try:
            sight = await asyncio.shield(self.sights[key])
        except NoImageError as error:
            raise nested(400, "Failed to load image or audio file") from error
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
        await asyncio.sleep(pixels * PNG_S_PER_PIXEL * self.settings.sleep_scale)
        return sight

    # -- embeddings

    async def _embeddings(self, wire: Wire, path: str, body: Json, fault: str) -> None:
        model = self.model(body, path)
        texts = embed_input(body, path)
        for text in texts:
            self.counters.embed_asked[model.name, text] += 1
        answer = await self.embed_all(model, texts, path, body, fault)
        await self._maybe_cut(wire, answer, fault)
        await self._send(wire, answer)
        if fault not in EMBED_FAULTS:
            for text in texts:
                self.counters.embed_answered[model.name, text] += 1

    async def embed_all(
        self, model: Model, texts: list[str], path: str, body: Json, fault: str
    ) -> Json:
        keep = keep_seconds(body.get("keep_alive"))
        options = runner_options(model, body, checked_options(body))
        began = time.monotonic()
        async with self.scheduler.runner(model, options, keep) as runner:
            loaded = time.monotonic()
            legacy = path == "/api/embeddings"
            if texts and self.settings.era == "llamaserver" and not model.pooling:
                raise HttpError(500 if legacy else 501, NO_EMBED)
            counts = [await self._embed_one(runner, text, body) for text in texts]
            vectors = [embed(text, model.dims) for text in texts]
        vectors = broken_vectors(fault, [resized(v, body) for v in vectors])
        if legacy:
            # Before normalisation, as the old endpoint gives them.
            raw = [x and x * 8 for x in vectors[0]] if vectors and vectors[0] else []
            return {"embedding": raw}
        return {
            "model": body["model"],
            "embeddings": vectors,
            "total_duration": nanoseconds(time.monotonic() - began),
            "load_duration": nanoseconds(loaded - began),
            "prompt_eval_count": sum(counts),
        }

    async def _embed_one(self, runner: Runner, text: str, body: Json) -> int:
        tokens = [("<s>", 1), *tokenize(text)]
        if places(tokens) > runner.options["num_ctx"] and not body.get(
            "truncate", True
        ):
            raise HttpError(400, "the input length exceeds the context length")
        async with runner.gate:
            if not runner.model.pooling:
                # In the shared runner of old versions this evicts a prompt.
                idle = [slot for slot in runner.slots if not slot.busy]
                max(idle, key=lambda slot: slot.similarity(tokens)).tokens = []
            self.counters.model_s += self.settings.pace.embed_s
            self.counters.slots_changed(+1)
            try:
                await runner.engine.prompt(self.settings.pace.embed_s)
            finally:
                self.counters.slots_changed(-1)
        return min(places(tokens), int(runner.options["num_ctx"]))


ZERO: Json = {
    "model": "",
    "created_at": "0001-01-01T00:00:00Z",
    "message": {"role": "", "content": ""},
    "done": False,
}
NO_VISION = "Multimodal data provided, but model does not support multimodal requests."


def parsed(request: Request) -> Json:
    if not request.body:
        raise HttpError(400, "missing request body")
    try:
        body = json.loads(request.body)
    except ValueError as error:
        raise HttpError(400, f"invalid JSON: {error}") from error
    if not isinstance(body, dict):
        raise HttpError(400, "json: cannot unmarshal the body")
    return body


def decoded(item: Any) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except (TypeError, binascii.Error) as error:
        bad = re.search(r"[^A-Za-z0-9+/=]", str(item))
        at = bad.start() if bad else len(str(item))
        raise HttpError(400, f"illegal base64 data at input byte {at}") from error


def digest_of(name: str) -> str:
    return hashlib.sha256(f"stand-in {name}".encode()).hexdigest()


def joined_record(records: list[Json]) -> Json:
    """What `stream: false` gives: all the text in the last record."""
    last = records[-1]
    if "message" in last:
        text = "".join(record["message"]["content"] for record in records)
        return last | {"message": last["message"] | {"content": text}}
    if "response" in last:
        return last | {"response": "".join(record["response"] for record in records)}
    return last


def cut_text(text: str, limit: int) -> str:
    pieces = re.findall(r"\s*(?:[^\W\d_]{1,6}|\d|[^\w\s]|_)", text)
    return "".join(pieces[:limit])


def check_room(count: int, num_ctx: int, image: bool) -> None:
    if count < num_ctx:
        return
    if not image:
        raise HttpError(
            400,
            "the prompt is longer than the context length currently available"
            " to the model; shorten the prompt or raise num_ctx",
        )
    message = (
        f"request ({count} tokens) exceeds the available context size"
        f" ({num_ctx} tokens), try increasing it"
    )
    inner = {"code": 400, "message": message, "type": "exceed_context_size_error"}
    sizes = {"n_prompt_tokens": count, "n_ctx": num_ctx}
    raise HttpError(400, json.dumps({"error": inner | sizes}))


def as_running(runner: Runner) -> Json:
    listed = runner.model.listed()
    kept = ("name", "model", "size", "digest", "details")
    left = min(runner.expires - time.monotonic(), 1e8) if runner.users == 0 else 300
    expires = datetime.fromtimestamp(time.time() + left, UTC).isoformat()
    return {
        **{name: listed[name] for name in kept},
        "expires_at": expires.replace("+00:00", "Z"),
        "size_vram": listed["size"],
        "context_length": runner.options["num_ctx"],
    }


def embed_input(body: Json, path: str) -> list[str]:
    value = body.get("prompt" if path == "/api/embeddings" else "input")
    if not value:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise HttpError(400, "invalid input type")
    return texts


def resized(vector: list[float], body: Json) -> list[float]:
    dims = body.get("dimensions") or len(vector)
    short = np.array(vector[:dims])
    return [float(x) for x in short / (np.linalg.norm(short) or 1.0)]


# ------------------------------------------------------- running the server ---


class FakeOllama:
    """The server in a thread of its own, for the length of a `with` block."""

    def __init__(self, port: int = 0, **settings: Any) -> None:
        self.settings = Settings()
        self.settings.change(settings)
        self._server = Server(port, self.settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeOllama:
        self._thread.start()
        self._call(self._server.listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return self._server.url

    def stats(self) -> Json:
        return self._call(self._within(self._server.counters.as_json))

    def control(self, **settings: Any) -> None:
        self._call(self._within(lambda: self._server.control(settings)))

    async def _within(self, action: Callable[[], T]) -> T:
        return action()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


async def serve(args: argparse.Namespace, settings: Settings) -> None:
    server = Server(args.port, settings)
    await server.listen()
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    print(
        f"fake_ollama: a stand-in, not a VLM; {server.url} era={settings.era}"
        f" num_parallel={settings.num_parallel} time={settings.time_model}"
        f" models={','.join(settings.models)}",
        flush=True,
    )
    if args.ready_file:
        args.ready_file.write_text(server.url)
    await stop.wait()
    await server.close()


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--port", type=int, default=11500)
    add("--ready-file", type=Path, help="write the URL here once listening")
    add("--era", choices=sorted(VERSIONS), default="llamaserver")
    add("--version-string", dest="version", default="")
    add("--models", type=names, default=Settings.models, help="comma-separated")
    add("--pullable", type=names, default=Settings.pullable)
    add("--num-parallel", type=int, default=1)
    add("--max-queue", type=int, default=512)
    add("--max-loaded", type=int, default=3)
    add("--cache-ram-mib", type=float, default=8192)
    add("--text-first", action="store_true")
    add("--time-model", choices=sorted(PACES), default="instant")
    add("--time-scale", type=float, default=1.0, help="factor on all waiting")
    add("--load-s", type=float, help="seconds that a model takes to load")
    add("--pull-s", type=float, default=0.0)
    add("--mistakes", type=float, default=Settings.mistakes)
    add("--faults", type=json.loads, default={}, help='e.g. {"busy": 0.05}')
    add("--fault-seed", type=int, default=0)
    add("--script", type=json.loads, default=[], help='e.g. [["/api/chat",3,"cut"]]')
    return parser


def main() -> int:
    args = arguments().parse_args()
    known = {f.name for f in fields(Settings)}
    settings = Settings().changed({k: v for k, v in vars(args).items() if k in known})
    asyncio.run(serve(args, settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
