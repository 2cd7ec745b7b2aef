"""A stand-in for an Ollama server: real HTTP on loopback, no neural network.

It speaks the protocol of Ollama (shapes, error texts, status codes, streaming),
behaves like it under load (model loads, slots, prefix cache, time) and fails like
it on request. What its "VLM" says and its embedder returns comes from fake_vlm.py;
results obtained with it say nothing about any real model.

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
import copy
import hashlib
import json
import math
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fake_vlm import NoImageError, Sight, describe, embed, look

Json = dict[str, Any]
Era = Literal["llamaserver", "llamarunner", "ext"]
T = TypeVar("T")

IMAGE_TOKENS = 576
"""Places that one image takes in the context of a LLaVA-1.5-shaped model."""

# ---------------------------------------------------------------- settings ---


class Pace(NamedTuple):
    """Seconds and rates of one kind of machine; estimates, for relative results."""

    clip_s: float  # encoding one image; no slot produces a token meanwhile
    prompt_rate: float  # prompt tokens per second
    token_rate: float  # answer tokens per second with one busy slot
    gain: float  # n busy slots together give token_rate * n ** gain
    embed_s: float
    load_s: float
    restore_s: float  # bringing a saved prompt back from RAM

    def rate(self, answering: int) -> float:
        """Tokens per second of each of `answering` slots."""
        return float(self.token_rate * max(1, answering) ** (self.gain - 1))


PACES = {
    "gpu": Pace(0.02, 8000, 150, 0.7075, 0.004, 3.0, 0.03),
    "cpu": Pace(3.0, 60, 15, 0.3685, 0.05, 8.0, 0.6),
    # Costs are reported as on a GPU, but nobody sleeps.
    "instant": Pace(0.02, 8000, 150, 0.7075, 0.004, 0.0, 0.03),
}
DECODE_S_PER_BYTE = 5e-8
"""Decoding and hashing an image on the server, on every request, cached or not."""

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

    def hits(self, endpoint: str, body: Json) -> bool:
        if self.times == 0 or self.endpoint not in ("*", endpoint):
            return False
        self.seen += 1
        if callable(self.when):
            hit = self.when(body)
        elif isinstance(self.when, str):
            hit = self.when in json.dumps(body, ensure_ascii=False)
        else:
            hit = self.seen >= self.when
        self.times -= hit
        return hit


def as_rule(item: Any) -> Rule:
    if isinstance(item, Rule):
        return item
    return Rule(**item) if isinstance(item, dict) else Rule(*item)


def short_name(name: str) -> str:
    return name.removesuffix(":latest")


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
    text_first: bool = False  # in chats the image follows the text
    time_model: str = "instant"
    time_scale: float = 1.0
    load_s: float | None = None
    pull_s: float = 0.0
    mistakes: float = 0.08  # share of remarks that are made up
    faults: dict[str, float] = field(default_factory=dict)  # chance per inference
    fault_seed: int = 0
    fault_s: float = 0.5  # of the faults that take time, where a rule names none
    script: list[Rule] = field(default_factory=list)

    @property
    def pace(self) -> Pace:
        return PACES[self.time_model]

    @property
    def sleep_scale(self) -> float:
        return 0.0 if self.time_model == "instant" else self.time_scale

    def change(self, values: Json) -> None:
        """Take over new values: all of them or, with a ValueError, none."""
        if unknown := values.keys() - vars(self).keys():
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        new = replace(self, **values)
        new.script = [as_rule(item) for item in new.script]
        new.models = tuple(map(short_name, new.models))
        new.pullable = tuple(map(short_name, new.pullable))
        if new.era not in VERSIONS or new.time_model not in PACES:
            raise ValueError(f"unknown era or time model: {new.era}, {new.time_model}")
        for name in [*new.faults, *(rule.fault for rule in new.script)]:
            if name not in FAULTS:
                raise ValueError(f"unknown fault {name!r}; known: {sorted(FAULTS)}")
        vars(self).update(vars(new))


# ---------------------------------------------------------------- counters ---

TOTALS = (
    *("encodes", "full_prefills", "prompt_tokens", "cached_tokens", "ram_restores"),
    *("loads", "reloads", "loads_aborted", "unloads"),
    *("busy_503", "disconnects", "looks"),
)
KEYS = {"asked": ["model", "image", "prompt", "seed"], "embedded": ["model", "text"]}


class Counters:
    """What happened, for tests and benchmarks to assert on."""

    def __init__(self, in_flight: int = 0, slots_busy: int = 0) -> None:
        self.started = self.since = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        # By question or text: how often asked, and how often soundly answered.
        self.asked: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
        self.embedded: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
        self.in_flight = self.max_in_flight = in_flight
        self.slots_busy = self.max_slots_busy = slots_busy
        self.busy_s = self.slot_busy_s = self.model_s = 0.0

    def reset(self) -> None:
        """Start again, without forgetting what is under way."""
        vars(self).update(vars(Counters(self.in_flight, self.slots_busy)))

    def slots_changed(self, by: int) -> None:
        now = time.monotonic()
        self.busy_s += (now - self.since) * (self.slots_busy > 0)
        self.slot_busy_s += (now - self.since) * self.slots_busy
        self.since = now
        self.slots_busy += by
        self.max_slots_busy = max(self.max_slots_busy, self.slots_busy)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count a slot as busy for as long as it is."""
        self.slots_changed(+1)
        try:
            yield
        finally:
            self.slots_changed(-1)

    def inference(self, by: int) -> None:
        self.in_flight += by
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def as_json(self) -> Json:
        self.slots_changed(0)
        stats = vars(self) | {name: self.totals[name] for name in TOTALS}
        stats["uptime_s"] = time.monotonic() - stats.pop("started")
        for name, parts in KEYS.items():
            rows = getattr(self, name).items()
            stats[name] = [named(parts, key, counts) for key, counts in rows]
        del stats["since"], stats["totals"]
        return copy.deepcopy(stats)


def named(parts: list[str], key: tuple[Any, ...], counts: list[int]) -> Json:
    return dict(zip([*parts, "asked", "answered"], [*key, *counts], strict=True))


# ------------------------------------------------------------------ models ---


def digest_of(name: str) -> str:
    return hashlib.sha256(f"stand-in {name}".encode()).hexdigest()


class Model(NamedTuple):
    name: str
    digest: str
    capabilities: list[str]
    dims: int
    train_ctx: int

    @property
    def pooling(self) -> bool:
        return self.capabilities == ["embedding"]

    @property
    def vision(self) -> bool:
        return "vision" in self.capabilities

    def listed(self) -> Json:
        """What /api/tags says."""
        family = "nomic-bert" if self.pooling else "llama"
        name = self.name if ":" in self.name else f"{self.name}:latest"
        details = {
            **{"parent_model": "", "format": "gguf", "family": family},
            "families": [family, "clip"] if self.vision else [family],
            **{"parameter_size": "0B", "quantization_level": "F16"},
        }
        facts = {"name": name, "model": name, "digest": self.digest, "size": 1_000_000}
        return {**facts, "modified_at": "2026-01-01T00:00:00Z", "details": details}

    def shown(self) -> Json:
        """What /api/show says."""
        listed = self.listed()
        family = listed["details"]["family"]
        info = {
            "general.architecture": family,
            f"{family}.context_length": self.train_ctx,
            f"{family}.embedding_length": self.dims,
        }
        shown = {
            "license": "none: a stand-in, not a model",
            "modelfile": f"FROM {self.name}",
            "parameters": 'stop "<|end|>"',
            "template": "{{ .Prompt }}",
            "details": listed["details"],
            "model_info": info,
            "modified_at": listed["modified_at"],
        }
        clip = {"projector_info": {"clip.vision.image_size": 336}}
        return shown | clip if self.vision else shown


def model_called(name: str, digest: str) -> Model:
    """A model's name tells whether it embeds, only reads, or also sees."""
    if any(word in name for word in ("embed", "minilm", "bge")):
        return Model(name, digest, ["embedding"], 768 if "nomic" in name else 256, 2048)
    able = ["completion"] if "text" in name else ["completion", "vision"]
    return Model(name, digest, able, 512, 4096)


# ------------------------------------------------------------------ faults ---


class HttpError(Exception):
    """Status and message of an error; the message may itself be JSON, as in Ollama."""


class CutOffError(Exception):
    """The connection must end now, with the answer unfinished."""


def nested(
    code: int, message: str, kind: str = "invalid_request_error", **more: int
) -> tuple[int, str]:
    """An error of the inner server, forwarded verbatim inside the outer one."""
    inner = {"code": code, "message": message, "type": kind, **more}
    return code, json.dumps({"error": inner})


BAD_IMAGE = "Failed to load image or audio file"
NO_VISION = "Multimodal data provided, but model does not support multimodal requests."
DIED = "an error was encountered while running the model: unexpected EOF"
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model;"
    " shorten the prompt or raise num_ctx"
)
CRASH = (
    "model runner has unexpectedly stopped, this may be due to resource limitations"
    " or an internal error, check ollama server logs for details"
)
OOM = "llama-server reported out-of-memory during startup: cudaMalloc failed"
ERRORS = {
    "busy": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "crash": (500, CRASH),  # and the model must be loaded again
    "oom": (500, OOM),  # and all models are unloaded
    "load_fail": (500, "timed out waiting for llama-server to start - progress 0.00 -"),
    "nested": nested(400, BAD_IMAGE),
    "nested_500": nested(500, "failed to decode batch", "server_error"),
}
NOT_FOUND = (404, b"404 page not found", "text/plain")
HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
PLAIN_FAULTS = {
    "html_200": (200, HTML, "text/html"),
    "html_502": (502, HTML, "text/html"),
    "plain_404": NOT_FOUND,  # as of a server that is too old for the endpoint
    "json_list": (500, b"[]", "application/json"),
}
LINE_FAULTS = {
    "hang": "no answer (for `seconds`, if given)",
    "slow": "`seconds` later than it would be",
    "cut": "connection closed in mid-body",
    "reset": "connection reset in mid-body",
    "drop": "connection closed before any answer",
    "refuse": "connections refused for `seconds`, open ones dropped",
    "digest": "the model's digest changes, the answer is normal",
}
TEXT_FAULTS = {
    "zero": "200 with a zero-value reply, done false",
    "truncated": "200 with half the text, done false",
    "empty": "200, done, no text",
    "whitespace": "200, done, only white space",
    "loop": "200, a phrase repeated up to num_predict, done_reason length",
    "length": "200, text cut short, done_reason length",
    "eof": "the runner dies in mid-answer: 500, or a last line in a stream",
}
EMBED_ERRORS = {
    "embed_eof": (400, 'do embedding request: Post "http://127.0.0.1:4321/": EOF'),
    "embed_refused": (
        501,
        "This server does not support embeddings. Start it with `--embeddings`",
    ),
    "embed_nan": (400, "embedding contains NaN or Inf values"),
}
OLD_NAN = "failed to encode response: json: unsupported value: NaN"
Vectors = list[list[float]]
BROKEN_VECTORS: dict[str, Callable[[Vectors], list[Any]]] = {
    "embed_nan_raw": lambda vectors: [[math.nan] * len(v) for v in vectors],
    "embed_null": lambda vectors: [None] * len(vectors),
    "embed_zero": lambda vectors: [[0.0] * len(v) for v in vectors],
    "embed_short": lambda vectors: [v[: len(v) // 2] for v in vectors],
    "embed_count": lambda vectors: vectors[:-1],
}
EMBED_FAULTS = {*EMBED_ERRORS, *BROKEN_VECTORS}
FAULTS = {*ERRORS, *PLAIN_FAULTS, *LINE_FAULTS, *TEXT_FAULTS, *EMBED_FAULTS}


def embed_error(fault: str, era: Era, legacy: bool) -> HttpError:
    """Only the newer endpoint of the newest servers tells errors apart by status."""
    status, text = EMBED_ERRORS[fault]
    old = era != "llamaserver"
    if fault == "embed_nan" and old:
        text = OLD_NAN
    return HttpError(500 if old or legacy else status, text)


def applies(fault: str, path: str) -> bool:
    if fault in TEXT_FAULTS:
        return path in ("/api/chat", "/api/generate")
    return fault not in EMBED_FAULTS or path in ("/api/embed", "/api/embeddings")


def broken_text(fault: str, text: str, limit: int) -> tuple[str, bool, str]:
    """Text, done and done_reason after a text fault."""
    words = text.split(" ")
    half = " ".join(words[: max(1, len(words) // 2)])
    broken = {
        "empty": ("", True, "stop"),
        "whitespace": (" \n\n \t ", True, "stop"),
        "loop": ("the image shows the " * (limit // 4 + 1), True, "length"),
        "length": (half, True, "length"),
        "truncated": (half, False, ""),
    }
    return broken.get(fault, (text, True, "stop"))


# ---------------------------------------------------- slots and their cache ---


TOKEN = r"[^\W\d_]{1,6}|\d|[^\w\s]|_"


def tokenize(text: str) -> list[str]:
    return re.findall(TOKEN, text)


def shared(old: list[str], new: list[str]) -> int:
    """Length of the longest common prefix."""
    for count, (mine, other) in enumerate(zip(old, new, strict=False)):
        if mine != other:
            return count
    return min(len(old), len(new))


class PromptCache:
    """Prompts of reused slots kept in RAM, oldest thrown out first."""

    def __init__(self, ram_mib: float) -> None:
        # 0.375 MiB per token is what a model of LLaVA-Phi-3's shape needs.
        self.room = ram_mib / 0.375
        self.saved: list[list[str]] = []

    def swap(self, held: list[str], new: list[str]) -> list[str] | None:
        """Save what a slot holds; the prompt that serves `new` better, if any."""
        if not held or self.room <= 0:
            return None
        if not any(shared(old, held) == len(held) for old in self.saved):
            others = [old for old in self.saved if shared(old, held) < len(old)]
            self.saved = [*others, held]
        best, common, kept = None, shared(held, new), shared(held, new) / len(held)
        for old in self.saved:
            match = shared(old, new)
            if match > common and match / len(old) > max(kept, 0.25):
                best, common, kept = old, match, match / len(old)
        if best:
            self.saved.remove(best)
        while len(self.saved) > 1 and sum(map(len, self.saved)) > self.room:
            self.saved.pop(0)
        return best


# --------------------------------------------------------- time and runners ---


@dataclass
class Slot:
    tokens: list[str] = field(default_factory=list)
    busy: bool = False
    used: int = 0
    restored: bool = False  # its prompt has just come back from RAM


class Runner:
    """One loaded model: its options, slots, caches, FIFO gate and pace."""

    def __init__(self, model: Model, options: Json, settings: Settings) -> None:
        alone = model.pooling or settings.era == "ext"
        parallel = 1 if alone else settings.num_parallel
        self.model = model
        self.options = options
        self.settings = settings
        self.gate = asyncio.Semaphore(parallel)
        self.prompting = asyncio.Lock()
        self.slots = [Slot() for _ in range(parallel)]
        self.ram = PromptCache(settings.cache_ram_mib)
        self.encoded: list[str] = []
        self.answering = 0
        self.users = 0
        self.leaving = False
        self.free = asyncio.Event()
        self.free.set()
        self.expires = math.inf
        self.tick = 0

    def best_slot(self, new: list[str]) -> Slot:
        idle = [slot for slot in self.slots if not slot.busy]
        return max(idle, key=lambda slot: shared(slot.tokens, new))

    @contextmanager
    def slot_for(self, new: list[str]) -> Iterator[Slot]:
        """The idle slot that holds most of a prompt, or the one that rested longest."""
        slot = self.best_slot(new)
        if shared(slot.tokens, new) <= 0.1 * len(new):
            idle = (slot for slot in self.slots if not slot.busy)
            slot = min(idle, key=lambda slot: slot.used)
        saved = None
        forgets = shared(slot.tokens, new) < 0.5 * len(slot.tokens)
        if forgets and self.settings.era == "llamaserver":
            saved = self.ram.swap(slot.tokens, new)
        slot.tokens, slot.restored = saved or slot.tokens, saved is not None
        slot.busy = True
        try:
            yield slot
        finally:
            # As in llama.cpp, a slot's rest begins when it is released.
            self.tick += 1
            slot.busy, slot.used = False, self.tick

    def must_encode(self, image: str, in_prefix: bool) -> bool:
        """Whether the image goes through the encoder, by what this era remembers."""
        if self.settings.era == "ext":
            return True
        if self.settings.era == "llamaserver" or in_prefix:
            return not in_prefix
        known = image in self.encoded
        self.encoded = [image, *(old for old in self.encoded if old != image)][:4]
        return not known

    async def prompt(self, seconds: float) -> None:
        """Take the time of a prompt, or of an embedding; answers stall meanwhile."""
        async with self.prompting:
            await asyncio.sleep(seconds * self.settings.sleep_scale)

    async def answer(self, tokens: int) -> None:
        """Take the time of so many tokens, after any prompt that is being read."""
        if self.prompting.locked():
            async with self.prompting:
                pass
        rate = self.settings.pace.rate(self.answering)
        await asyncio.sleep(tokens / rate * self.settings.sleep_scale)


class Scheduler:
    """Loads models on demand, one at a time, and unloads them."""

    def __init__(self, settings: Settings, counters: Counters) -> None:
        self.settings = settings
        self.counters = counters
        self.runners: dict[str, Runner] = {}
        self.lock = asyncio.Lock()
        self.pending = 0

    @asynccontextmanager
    async def runner(self, model: Model, body: Json) -> AsyncIterator[Runner]:
        """A runner with the options of this request, for as long as it takes."""
        options = runner_options(model, body)
        keep_s = keep_seconds(body.get("keep_alive"))
        self.drop_all(expired=True)
        runner = self._ready(model, options) or await self._queue(model, options)
        runner.users += 1
        runner.free.clear()
        runner.expires = math.inf
        try:
            yield runner
        finally:
            runner.users -= 1
            if not runner.users:
                runner.expires = time.monotonic() + keep_s
                runner.free.set()
                if keep_s == 0:
                    self.drop(runner)

    def _ready(self, model: Model, options: Json) -> Runner | None:
        runner = self.runners.get(model.name)
        fits = runner and not runner.leaving and runner.options == options
        return runner if fits else None

    async def _queue(self, model: Model, options: Json) -> Runner:
        if self.pending >= self.settings.max_queue:
            self.counters.totals["busy_503"] += 1
            raise HttpError(*ERRORS["busy"])
        self.pending += 1
        try:
            async with self.lock:
                return self._ready(model, options) or await self._load(model, options)
        finally:
            self.pending -= 1

    async def _load(self, model: Model, options: Json) -> Runner:
        if old := self.runners.get(model.name):
            self.counters.totals["reloads"] += 1
            await self._drain(old)
        while len(self.runners) >= self.settings.max_loaded:
            await self._drain(min(self.runners.values(), key=lambda r: r.expires))
        own = self.settings.load_s
        seconds = self.settings.pace.load_s if own is None else own
        try:
            await asyncio.sleep(seconds * self.settings.time_scale)
        except asyncio.CancelledError:
            self.counters.totals["loads_aborted"] += 1
            raise
        self.counters.totals["loads"] += 1
        runner = self.runners[model.name] = Runner(model, options, self.settings)
        return runner

    async def _drain(self, runner: Runner) -> None:
        runner.leaving = True
        await runner.free.wait()
        self.drop(runner)

    def drop(self, runner: Runner | None) -> None:
        if runner and self.runners.get(runner.model.name) is runner:
            del self.runners[runner.model.name]
            self.counters.totals["unloads"] += 1

    def drop_all(self, expired: bool = False) -> None:
        for runner in list(self.runners.values()):
            if not expired or runner.expires < time.monotonic():
                self.drop(runner)


RUNNER_OPTIONS = ("num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
FLOATS = ("temperature", "top_p", "min_p")
INTEGERS = ("seed", "num_ctx", "num_predict", "top_k")


def checked_options(body: Json) -> Json:
    options: Json = body.get("options") or {}
    for name in (*FLOATS, *INTEGERS):
        value = options.get(name, 0)
        types = (int, float) if name in FLOATS else (int,)
        if isinstance(value, bool) or not isinstance(value or 0, types):
            wanted = "float32" if name in FLOATS else "integer"
            raise HttpError(500, f'option "{name}" must be of type {wanted}')
    return options


def runner_options(model: Model, body: Json) -> Json:
    """The options whose change makes Ollama load the model again."""
    options = checked_options(body)
    num_ctx = min(options.get("num_ctx") or 4096, model.train_ctx)
    picked = {name: options.get(name) for name in RUNNER_OPTIONS}
    least = 2048 if model.vision else 4
    return {**picked, "num_ctx": max(num_ctx, least), "shift": body.get("shift", True)}


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_seconds(value: Any) -> float:
    """Seconds of a `keep_alive`: a number, or a Go duration; negative is for ever."""
    if value is None:
        return 300.0
    if isinstance(value, str):
        parts = re.findall(r"([\d.]+)(ns|us|ms|h|m|s)", value)
        total = sum(float(number) * UNITS[unit] for number, unit in parts)
        value = -total if value.startswith("-") else total
    return math.inf if value < 0 else float(value)


# ---------------------------------------------------------------- protocol ---

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Busy"}


@dataclass
class Call:
    """One request, and the way to answer it."""

    writer: asyncio.StreamWriter
    method: str
    path: str
    payload: bytes
    body: Json = field(default_factory=dict)
    fault: str = ""
    fault_s: float = 0.0
    records: list[Json] = field(default_factory=list)
    status: int = 0  # of the answer, once it is complete
    costs: dict[str, float] = field(default_factory=dict)  # seconds, by reported name
    began: float = field(default_factory=time.monotonic)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream", True))

    @property
    def legacy(self) -> bool:
        return self.path == "/api/embeddings"

    def _head(self, status: int, kind: str, size: str) -> None:
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\n"
        self.writer.write(f"{head}Content-Type: {kind}\r\n{size}\r\n\r\n".encode())

    async def send(self, status: int, data: bytes, kind: str) -> None:
        """A whole answer, or half of it where that is the fault."""
        self._head(status, kind, f"Content-Length: {len(data)}")
        if self.fault in ("cut", "reset"):
            self.writer.write(data[: len(data) // 2])
            await self._cut_off()
        self.writer.write(b"" if self.method == "HEAD" else data)
        await self.writer.drain()
        self.status = status

    async def send_json(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        await self.send(status, data, "application/json; charset=utf-8")

    async def emit(self, record: Json) -> None:
        """One record of the answer, sent at once only if the client streams."""
        self.records.append(record)
        if not self.streams:
            return
        if len(self.records) == 1:
            self._head(200, "application/x-ndjson", "Transfer-Encoding: chunked")
        await self._chunk(json.dumps(record).encode() + b"\n")
        if self.fault in ("cut", "reset") and len(self.records) == 2:
            await self._cut_off()

    async def finish(self) -> None:
        """End the stream, or send the records in one."""
        if self.streams:
            await self._chunk(b"")
            self.status = 200
        else:
            await self.send_json(joined(self.records))

    async def fail(self, status: int, message: str) -> None:
        record = {"error": message}
        if self.records and self.streams:
            await self._chunk(json.dumps(record).encode() + b"\n")
            await self._chunk(b"")
            self.status = status
        else:
            await self.send_json(record, status)

    def report(self, scale: float) -> dict[str, int]:
        """Nanoseconds of a machine that needs `scale` times as long as it would."""
        elapsed = (time.monotonic() - self.began) / scale
        total = max(elapsed, sum(self.costs.values()))
        times = {"total_duration": total, **self.costs}
        return {name: int(s * 1e9) for name, s in times.items() if s >= 1e-9}

    async def _chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self.writer.drain()

    async def _cut_off(self) -> None:
        await self.writer.drain()
        await asyncio.sleep(0.01)  # or a reset overtakes the half body
        if self.fault == "reset":
            linger = struct.pack("ii", 1, 0)
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise CutOffError


def joined(records: list[Json]) -> Json:
    """What `stream: false` gives: all the text in the last record."""
    last = records[-1]
    if "message" in last:
        text = "".join(record["message"]["content"] for record in records)
        return last | {"message": last["message"] | {"content": text}}
    if "response" in last:
        return last | {"response": "".join(record["response"] for record in records)}
    return last


def parsed(payload: bytes) -> Json:
    if not payload:
        raise HttpError(400, "missing request body")
    try:
        return dict(json.loads(payload))
    except (TypeError, ValueError) as error:
        raise HttpError(400, f"invalid JSON: {error}") from error


def decoded(item: Any) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except (TypeError, binascii.Error) as error:
        bad = re.search(r"[^A-Za-z0-9+/=]", str(item))
        at = bad.start() if bad else len(str(item))
        raise HttpError(400, f"illegal base64 data at input byte {at}") from error


def embed_input(call: Call) -> list[str]:
    value = call.body.get("prompt" if call.legacy else "input")
    texts = [value] if isinstance(value, str) and value else value or []
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise HttpError(400, "invalid input type")
    return texts


def unit(vector: list[float]) -> list[float]:
    norm = math.hypot(*vector) or 1.0
    return [x / norm for x in vector]


def as_utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


@dataclass
class Question:
    """One chat or generate call, understood."""

    model: Model
    prompt: str
    images: list[bytes]
    image_id: str
    tokens: list[str]
    options: Json

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model.name, self.image_id, self.prompt, self.options["seed"]

    def dice(self) -> random.Random:
        """Chance that depends on the question alone; when cold, not on the seed."""
        seed, temperature = self.options["seed"], float(self.options["temperature"])
        varied = f"{seed}/{temperature}" if temperature > 0 else "cold"
        return random.Random(f"{self.image_id}/{self.prompt}/{varied}")


DEFAULTS = {"seed": -1, "temperature": 0.8, "num_predict": -1}


def understood(call: Call, model: Model, text_first: bool) -> Question:
    name, chat = call.body["model"], call.path == "/api/chat"
    if call.body.get("think"):
        raise HttpError(400, f'"{name}" does not support thinking')
    if model.pooling:
        verb = call.path.removeprefix("/api/")
        raise HttpError(400, f'"{name}" does not support {verb}')
    generate = [{"content": call.body.get("system")}]
    generate += [
        {"content": call.body.get("prompt"), "images": call.body.get("images")}
    ]
    *before, last = (call.body.get("messages") if chat else generate) or [{}]
    text = last.get("content") or ""
    images = [decoded(item) for item in last.get("images") or []]
    if images and "[img]" not in text:
        text = f"{text}[img]" if text_first and chat else f"[img]{text}"
    image_id = "+".join(hashlib.sha256(data).hexdigest() for data in images)
    image = [f"image {image_id}"] * IMAGE_TOKENS * len(images)
    system = " ".join(message.get("content") or "" for message in before)
    return Question(
        model=model,
        prompt=text.replace("[img]", "").strip(),
        images=images,
        image_id=image_id,
        tokens=rendered(system, text, image),
        options=DEFAULTS | checked_options(call.body),
    )


def rendered(system: str, text: str, image: list[str]) -> list[str]:
    """The prompt in the model's template, the image where `[img]` stands."""
    head = ["<|system|>", *tokenize(system), "<|end|>"] if system else []
    first, mark, second = text.partition("[img]")
    middle = [*tokenize(first), *image, *mark[:1], *tokenize(second)]
    tail = ["<|end|>", "<|assistant|>", "\n"]
    return ["<s>", *head, "<|user|>", "\n ", " ", *middle, *tail]


def check_room(count: int, num_ctx: int, image: bool) -> None:
    if count < num_ctx:
        return
    if not image:
        raise HttpError(400, TOO_LONG)
    message = f"request ({count} tokens) exceeds the available context size"
    message += f" ({num_ctx} tokens), try increasing it"
    sizes = {"n_prompt_tokens": count, "n_ctx": num_ctx}
    raise HttpError(*nested(400, message, "exceed_context_size_error", **sizes))


# ------------------------------------------------------------------ server ---

INFERENCE = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")

ZERO: Json = {
    "model": "",
    "created_at": "0001-01-01T00:00:00Z",
    "message": {"role": "", "content": ""},
    "done": False,
}


class Server:
    """The endpoints."""

    def __init__(self, port: int, settings: Settings) -> None:
        self.port = port
        self.settings = settings
        self.counters = Counters()
        self.scheduler = Scheduler(settings, self.counters)
        self.sights: dict[str, asyncio.Future[Sight]] = {}
        self.connections: dict[asyncio.StreamWriter, asyncio.Task[Any] | None] = {}
        self.listener: asyncio.Server | None = None
        self.fault_calls = 0
        self.gets: dict[str, Callable[[], Any]] = {
            "/api/version": lambda: {"version": self.version},
            "/api/tags": lambda: {"models": self.listed()},
            "/api/ps": lambda: {"models": self.running()},
            "/__stats": self.counters.as_json,
        }
        self.posts: dict[str, Callable[[Call], Awaitable[None]]] = {
            "/api/show": self.show,
            "/api/pull": self.pull,
            "/api/chat": self.chat,
            "/api/generate": self.chat,
            "/api/embed": self.embeddings,
            "/api/embeddings": self.embeddings,
            "/__control": self.control,
        }

    # -- connections

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def listen(self) -> None:
        if self.listener and self.listener.is_serving():
            return
        self.listener = await asyncio.start_server(
            self._connection, "127.0.0.1", self.port, backlog=1024
        )
        self.port = self.listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self.listener:
            self.listener.close()
        tasks = [task for task in self.connections.values() if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def refuse(self, seconds: float) -> None:
        """Look dead for a while: nothing listens, open connections break."""
        if self.listener:
            self.listener.close()
        for writer in self.connections:
            writer.transport.abort()
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: loop.create_task(self.listen()))

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections[writer] = asyncio.current_task()
        early: bytes | None = b""
        try:
            while early is not None:
                call = await read_call(reader, writer, early)
                early = await self._while_connected(reader, call)
        except CutOffError:
            writer.transport.abort()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            del self.connections[writer]
            writer.close()

    async def _while_connected(
        self, reader: asyncio.StreamReader, call: Call
    ) -> bytes | None:
        """Answer, unless the client leaves first; what it has sent meanwhile."""
        work = asyncio.create_task(self._answer(call))
        early = asyncio.create_task(next_byte(reader))
        try:
            await asyncio.wait({work, early}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not early.result():
                self.counters.totals["disconnects"] += 1
                return None
            await work
        finally:
            work.cancel()
            early.cancel()
            await asyncio.gather(work, early, return_exceptions=True)
        return b"" if early.cancelled() else early.result()

    async def _answer(self, call: Call) -> None:
        self.counters.requests[call.path] += 1
        inference = call.path in INFERENCE
        self.counters.inference(+inference)
        try:
            await self._route(call)
        except HttpError as error:
            await call.fail(*error.args)
        except (CutOffError, ConnectionError):
            raise
        except Exception as error:
            # A mistake of the stand-in must not look like one of its faults.
            await call.fail(500, f"fake_ollama broke: {error!r}")
            raise
        finally:
            self.counters.inference(-inference)
            if call.status:
                self.counters.statuses[str(call.status)] += 1

    async def _route(self, call: Call) -> None:
        path = call.path
        get = call.method in ("GET", "HEAD")
        if path == "/" and get:
            return await call.send(200, b"Ollama is running", "text/plain")
        if path not in self.gets and path not in self.posts:
            return await call.send(*NOT_FOUND)
        if path not in (self.gets if get else self.posts):
            return await call.send(405, b"405 method not allowed", "text/plain")
        call.body = {} if get else parsed(call.payload)
        if not path.startswith("/__") and self._draw_fault(call):
            self.counters.faults[call.fault] += 1
            if await self._fail_at_once(call):
                return None
        if get:
            return await call.send_json(self.gets[path]())
        return await self.posts[path](call)

    # -- faults

    def _draw_fault(self, call: Call) -> str:
        """Which fault, if any, this call gets: scripted first, then by chance."""
        for rule in self.settings.script:
            if applies(rule.fault, call.path) and rule.hits(call.path, call.body):
                call.fault, call.fault_s = rule.fault, rule.seconds
                return call.fault
        if call.path in INFERENCE:
            self.fault_calls += 1
            dice = random.Random(f"{self.settings.fault_seed}/{self.fault_calls}")
            chances = self.settings.faults.items()
            drawn = (
                n for n, p in chances if applies(n, call.path) and dice.random() < p
            )
            call.fault = next(drawn, "")
        return call.fault

    async def _fail_at_once(self, call: Call) -> bool:
        """Act out a fault that needs no model; whether the call ends with it."""
        fault = call.fault
        name = short_name(str(call.body.get("model")))
        if fault == "crash":
            self.scheduler.drop(self.scheduler.runners.get(name))
        elif fault == "oom":
            self.scheduler.drop_all()
        self.counters.totals["busy_503"] += fault == "busy"
        if fault in ERRORS:
            raise HttpError(*ERRORS[fault])
        if fault in EMBED_ERRORS:
            raise embed_error(fault, self.settings.era, call.legacy)
        if fault in PLAIN_FAULTS:
            await call.send(*PLAIN_FAULTS[fault])
        elif fault == "digest":
            self.settings.digests[name] = digest_of(f"{name}/{time.monotonic_ns()}")
        else:
            await self._misbehave(call)
        return fault in PLAIN_FAULTS or fault in ("hang", "refuse")

    async def _misbehave(self, call: Call) -> None:
        """The faults of the line."""
        seconds = call.fault_s or self.settings.fault_s
        if call.fault == "hang":
            await asyncio.sleep(call.fault_s or math.inf)
        elif call.fault == "slow":
            await asyncio.sleep(seconds)
        elif call.fault == "refuse":
            self.refuse(seconds)
        elif call.fault == "drop":
            raise CutOffError

    # -- models

    @property
    def version(self) -> str:
        return self.settings.version or f"{VERSIONS[self.settings.era]}-fake"

    def models(self) -> list[Model]:
        own = self.settings.digests
        names = self.settings.models
        return [model_called(name, own.get(name) or digest_of(name)) for name in names]

    def model(self, call: Call) -> Model:
        name = str(call.body.get("model") or call.body.get("name") or "")
        if not name:
            chat = call.path == "/api/chat"
            raise HttpError(400, "model is required" if chat else "invalid model name")
        for model in self.models():
            if model.name == short_name(name):
                return model
        if call.path in ("/api/embed", "/api/embeddings"):
            raise HttpError(404, f'model "{name}" not found, try pulling it first')
        raise HttpError(404, f"model '{name}' not found")

    def listed(self) -> list[Json]:
        if self.settings.era != "llamaserver":
            return [m.listed() for m in self.models()]
        return [m.listed() | {"capabilities": m.capabilities} for m in self.models()]

    def running(self) -> list[Json]:
        self.scheduler.drop_all(expired=True)
        return [as_running(runner) for runner in self.scheduler.runners.values()]

    async def show(self, call: Call) -> None:
        model = self.model(call)
        able = {"capabilities": model.capabilities}
        silent = self.settings.era == "ext"
        await call.send_json(model.shown() | ({} if silent else able))

    async def pull(self, call: Call) -> None:
        name = short_name(str(call.body.get("model") or call.body.get("name") or ""))
        await call.emit({"status": "pulling manifest"})
        if name not in (*self.settings.models, *self.settings.pullable):
            raise HttpError(500, "pull model manifest: file does not exist")
        digest, total = digest_of(name), 1_000_000
        layer = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}"}
        for completed in range(0, total + 1, total // 5):
            await asyncio.sleep(self.settings.pull_s / 5)
            await call.emit(layer | {"total": total, "completed": completed})
        if name not in self.settings.models:
            self.settings.models += (name,)
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            await call.emit({"status": status})
        await call.finish()

    async def control(self, call: Call) -> None:
        await self.set_up(call.body)
        await call.send_json({"ok": True})

    async def stats(self) -> Json:
        return self.counters.as_json()

    async def set_up(self, values: Json) -> None:
        """Change settings; `reset_stats`, `refuse_s` and `unload` act at once."""
        values = dict(values)
        if values.pop("reset_stats", False):
            self.counters.reset()
        if seconds := values.pop("refuse_s", 0):
            # Not before this call has been answered.
            asyncio.get_running_loop().call_later(0.02, self.refuse, float(seconds))
        if values.pop("unload", False):
            self.scheduler.drop_all()
        try:
            self.settings.change(values)
        except (TypeError, ValueError) as error:
            raise HttpError(400, str(error)) from error

    # -- chat and generate

    async def chat(self, call: Call) -> None:
        question = understood(call, self.model(call), self.settings.text_first)
        self.counters.asked[question.key][0] += bool(question.images)
        async with self.scheduler.runner(question.model, call.body) as runner:
            call.costs["load_duration"] = time.monotonic() - call.began
            if question.prompt or question.images:
                async with runner.gate:
                    with self.counters.slot():
                        await self._in_slot(call, question, runner)
            else:
                keep = keep_seconds(call.body.get("keep_alive"))
                reason = "load" if keep else "unload"
                await call.emit(said(call, "", done=True, done_reason=reason))
        await call.finish()
        sound = bool(question.images) and call.fault not in TEXT_FAULTS
        self.counters.asked[question.key][1] += sound

    async def _in_slot(self, call: Call, question: Question, runner: Runner) -> None:
        sights = [await self.sight(data) for data in question.images]
        if sights and not question.model.vision:
            raise HttpError(*nested(400, NO_VISION))
        check_room(len(question.tokens), runner.options["num_ctx"], bool(sights))
        with runner.slot_for(question.tokens) as slot:
            await self._prefill(call, question, runner, slot)
            text = await self._speak(call, question, runner, sights)
            slot.tokens = question.tokens + tokenize(text)

    async def _prefill(
        self, call: Call, question: Question, runner: Runner, slot: Slot
    ) -> None:
        """Put the prompt into the slot, as far as it isn't there yet."""
        tokens, pace = question.tokens, self.settings.pace
        images = len(question.images)
        cached = min(shared(slot.tokens, tokens), len(tokens) - 1)
        if images and self.settings.era == "ext":
            cached = 0
        seen = cached > IMAGE_TOKENS
        encode = images > 0 and runner.must_encode(question.image_id, seen)
        seconds = (len(tokens) - cached) / pace.prompt_rate
        seconds += encode * pace.clip_s * images + slot.restored * pace.restore_s
        self.counters.model_s += seconds
        self.counters.totals.update(
            encodes=encode,
            full_prefills=images > 0 and not seen,
            ram_restores=slot.restored,
            prompt_tokens=len(tokens),
            cached_tokens=cached,
        )
        call.costs["prompt_eval_duration"] = seconds
        slot.tokens = tokens
        await runner.prompt(seconds)

    async def _speak(
        self, call: Call, question: Question, runner: Runner, sights: list[Sight]
    ) -> str:
        """Send the answer and the closing record; the text."""
        prompt_tokens = len(question.tokens)
        limit, asked = runner.options["num_ctx"] - prompt_tokens, question.options
        if asked["num_predict"] >= 0:
            limit = min(limit, asked["num_predict"])
        text, done, reason = self._text(call.fault, question, sights, limit)
        if call.fault == "zero":
            await call.emit(ZERO)
            return ""
        await self._utter(call, runner, text)
        tokens = min(limit, len(tokenize(text)) + 1)
        rate, scale = self.settings.pace.rate, self.settings.sleep_scale
        self.counters.model_s += tokens / rate(1)
        if not done:
            return text
        call.costs["eval_duration"] = tokens / rate(runner.answering + 1)
        last = said(call, "", done=True, done_reason=reason) | call.report(scale or 1)
        if call.path == "/api/generate":
            last["context"] = list(range(prompt_tokens % 50 + 3))
        counts = {"prompt_eval_count": prompt_tokens, "eval_count": tokens}
        await call.emit(last | counts)
        return text

    def _text(
        self, fault: str, question: Question, sights: list[Sight], limit: int
    ) -> tuple[str, bool, str]:
        """The answer, cut to so many tokens; whether it ends properly, and why."""
        dice, mistakes = question.dice(), self.settings.mistakes
        remarks = [describe(s, question.prompt, dice, mistakes) for s in sights]
        text = " ".join(remarks) or "There is no picture to describe."
        text, done, reason = broken_text(fault, text, limit)
        if len(tokenize(text)) > limit:
            pieces = re.findall(rf"\s*(?:{TOKEN})", text)
            text, reason = "".join(pieces[:limit]), "length"
        return text, done, reason

    async def _utter(self, call: Call, runner: Runner, text: str) -> None:
        """Send a text word by word, at the pace of the machine."""
        words = re.findall(r"\s*\S+|\s+$", text)
        runner.answering += 1
        try:
            for index, word in enumerate(words):
                await runner.answer(len(tokenize(word)))
                if call.fault == "eof" and index == min(3, len(words) - 1):
                    self.scheduler.drop(runner)
                    raise HttpError(500, DIED)
                await call.emit(said(call, word, done=False))
        finally:
            runner.answering -= 1

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
            raise HttpError(*nested(400, BAD_IMAGE)) from error
        seconds = len(data) * DECODE_S_PER_BYTE
        await asyncio.sleep(seconds * self.settings.sleep_scale)
        return sight

    # -- embeddings

    async def embeddings(self, call: Call) -> None:
        model, texts = self.model(call), embed_input(call)
        keys = [(model.name, text) for text in texts]
        for key in keys:
            self.counters.embedded[key][0] += 1
        async with self.scheduler.runner(model, call.body) as runner:
            call.costs["load_duration"] = time.monotonic() - call.began
            if texts and self.settings.era == "llamaserver" and not model.pooling:
                raise embed_error("embed_refused", self.settings.era, call.legacy)
            count = sum([await self._read(call, runner, text) for text in texts])
        dims = call.body.get("dimensions") or model.dims
        vectors = [unit(embed(text, model.dims)[:dims]) for text in texts]
        vectors = BROKEN_VECTORS.get(call.fault, list)(vectors)
        answer = {"model": call.body["model"], "embeddings": vectors}
        answer |= {"prompt_eval_count": count, **call.report(1)}
        if call.legacy:
            # As the old endpoint gives them: not normalised.
            answer = {"embedding": [x * 8 for x in (vectors or [[]])[0] or []]}
        await call.send_json(answer)
        for key in keys:
            self.counters.embedded[key][1] += call.fault not in EMBED_FAULTS

    async def _read(self, call: Call, runner: Runner, text: str) -> int:
        """Take the time for one text; how many tokens of it were read."""
        tokens, room = ["<s>", *tokenize(text)], int(runner.options["num_ctx"])
        if len(tokens) > room and not call.body.get("truncate", True):
            raise HttpError(400, "the input length exceeds the context length")
        seconds = self.settings.pace.embed_s
        async with runner.gate:
            if not runner.model.pooling:
                # In the shared runner of old versions this evicts a prompt.
                runner.best_slot(tokens).tokens = []
            self.counters.model_s += seconds
            with self.counters.slot():
                await runner.prompt(seconds)
        return min(len(tokens), room)


async def read_call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, early: bytes
) -> Call:
    """The next request of a connection; IncompleteReadError if there is none."""
    head = early + await reader.readuntil(b"\r\n\r\n")
    method, path = head.decode("latin-1").split(" ", 2)[:2]
    size = re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE)
    payload = await reader.readexactly(int(size[1]) if size else 0)
    return Call(writer, method, path.partition("?")[0], payload)


async def next_byte(reader: asyncio.StreamReader) -> bytes:
    """Empty once the client has gone."""
    try:
        return await reader.read(1)
    except ConnectionError:
        return b""


def said(call: Call, text: str, **rest: Any) -> Json:
    """One record of an answer, in the shape of its endpoint."""
    head = {"model": call.body["model"], "created_at": as_utc(time.time())}
    if call.path == "/api/chat":
        return head | {"message": {"role": "assistant", "content": text}} | rest
    return head | {"response": text} | rest


def as_running(runner: Runner) -> Json:
    """What /api/ps says of a loaded model."""
    listed = runner.model.listed()
    left = min(runner.expires - time.monotonic(), 1e8)
    del listed["modified_at"]
    return listed | {
        "expires_at": as_utc(time.time() + left),
        "size_vram": listed["size"],
        "context_length": runner.options["num_ctx"],
    }


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

    def __exit__(self, *_: object) -> None:
        self._call(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return self._server.url

    def stats(self) -> Json:
        return self._call(self._server.stats())

    def control(self, **settings: Any) -> None:
        self._call(self._server.set_up(settings))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def arguments() -> argparse.ArgumentParser:
    """One flag per setting: lists with commas, faults and scripts as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=11500)
    parser.add_argument("--ready-file", type=Path, help="gets the URL once listening")
    parser.add_argument("--text-first", action="store_true")
    kinds: dict[type, Any] = {tuple: names, dict: json.loads, list: json.loads}
    for name, value in vars(Settings()).items():
        flag = {"version": "version-string"}.get(name, name).replace("_", "-")
        kind = float if value is None else kinds.get(type(value), type(value))
        if name != "text_first":
            parser.add_argument(f"--{flag}", dest=name, type=kind, default=value)
    return parser


def main() -> int:
    parser = arguments()
    values = vars(parser.parse_args())
    port, ready_file = values.pop("port"), values.pop("ready_file")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = FakeOllama(port, **values)
    except ValueError as error:
        parser.error(str(error))
    with server:
        about = "era", "num_parallel", "time_model", "models"
        told = " ".join(f"{name}={getattr(server.settings, name)}" for name in about)
        print(f"fake_ollama: a stand-in, not a VLM; {server.url} {told}", flush=True)
        if ready_file:
            ready_file.write_text(server.url)
        stop.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
