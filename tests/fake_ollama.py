"""A stand-in for an Ollama server: real HTTP on loopback, no neural network.

It answers what the pipeline asks (version, tags, show, ps, pull, embed, chat without
streaming), behaves like Ollama under load (model loads, slots, image cache, time) and
fails like it on request. What its "VLM" says and its embedder returns comes from
fake_vlm.py; results obtained with it say nothing about any real model.

    python tests/fake_ollama.py --port 11500 'time_model="gpu"' num_parallel=4
    fake_ollama: a stand-in, not a VLM; http://127.0.0.1:11500 time_model="gpu" ...

In a test:

    with FakeOllama(num_parallel=2, faults={"busy": 0.1}) as server:
        client = ollama.Client(server.url)
        ...
        assert server.stats()["encodes"] == 1

Other processes read GET /__stats.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import hashlib
import json
import math
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fake_vlm
from fake_vlm import Sight

Json = dict[str, Any]
Vectors = list[list[float]]
T = TypeVar("T")

# --- Faults: what a call gets instead of its answer, or what becomes of it -----------


class HttpError(Exception):
    """Status and message of an error; bytes are a page of another kind of server."""


def nested(code: int, message: str, kind: str) -> tuple[int, str]:
    """An error of the inner server, forwarded as text inside the outer one."""
    inner = {"code": code, "message": message, "type": kind}
    return code, json.dumps({"error": inner})


CRASH = (
    "model runner has unexpectedly stopped, this may be due to resource limitations"
    " or an internal error, check ollama server logs for details"
)
NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
BAD_IMAGE = nested(400, "Failed to load image or audio file", "invalid_request_error")
ERRORS: dict[str, tuple[int, Any]] = {
    "busy": (503, "server busy, please try again.  maximum pending requests exceeded"),
    "crash": (500, CRASH),  # and the model must be loaded again
    "eof": (500, "an error was encountered while running the model: unexpected EOF"),
    "oom": (500, "llama-server reported out-of-memory"),  # and all models are unloaded
    "load_fail": (500, "timed out waiting for llama-server to start - progress 0.00 -"),
    "nested": BAD_IMAGE,
    "nested_500": nested(500, "failed to decode batch", "server_error"),
    "unauthorized": (401, "unauthorized"),
    "json_list": (500, []),
    "html_200": (200, b"<html><h1>Welcome</h1></html>"),
    "html_403": (403, b"<html><h1>403 Forbidden</h1></html>"),  # a proxy's
    "html_502": (502, b"<html><h1>502 Bad Gateway</h1></html>"),  # nginx'
    "redirect": (301, b"<html><h1>301 Moved Permanently</h1></html>"),
    "plain_404": (404, b"404 page not found"),  # of a server too old for the endpoint
    "embed_eof": (400, 'do embedding request: Post "http://127.0.0.1:4321/": EOF'),
    "embed_refused": (501, NO_EMBEDDINGS),
    "embed_nan": (400, "embedding contains NaN or Inf values"),
}
MOVED_TO = "http://127.0.0.1:9/ollama"
LINE = {
    "hang": "no answer (for `seconds`, if given)",
    "slow": "`seconds` later than it would be",
    "cut": "connection closed in mid-body",
    "reset": "connection reset in mid-body",
    "drop": "connection closed before any answer",
    "refuse": "connections refused for `seconds`, open ones dropped",
}
STATE = {
    "digest": "from now on the called model has another digest; the answer is normal",
    "pull_offline": "a pull ends as it does without internet",
}
EYES = {
    "blind": "an answer of no picture, yet fluent: it depends on prompt and seed",
    "blind_slot": "the same, in the server's first slot only",
    "former": "from the third question on: an answer of the picture before this one",
    "stuck": "from the third question on: an answer of the second question's picture",
    "merged": "of each two pictures, in order of being seen, the second is the first",
}
NO_IMAGE = (
    "I'm happy to help, but I don't see an image. You mentioned [img-0]: describe it?"
    " | Unfortunately I have no way to view images; please upload the radiograph."
    " | It looks like no image was attached to your message. Please share it."
)
DECLINES = (
    "I'm sorry, but I can't describe this X-ray image."
    " | I cannot assist with medical images."
    " | As an AI language model, I am unable to interpret radiographs."
)
TEXTS: dict[str, tuple[str, bool, str]] = {
    "zero": ("", False, ""),
    "truncated": ("{half}", False, ""),
    "empty": ("", True, "stop"),
    "whitespace": (" \n\n \t ", True, "stop"),
    "length": ("{half}", True, "length"),
    "loop": ("the image shows the " * 500, True, "stop"),  # num_predict cuts it
    "letters": ("G" * 9999, True, "stop"),
    "bangs": ("!" * 90, True, "stop"),
    "unknown": ("<unk>" * 30, True, "stop"),
    "no_image": (NO_IMAGE, True, "stop"),
    "declines": (DECLINES, True, "stop"),
    "thinks": ("", True, "length"),
}
"""What becomes of text, done and done_reason; chance takes one of several."""

VECTORS: dict[str, Callable[[Vectors], list[Any]]] = {
    "embed_nan_raw": lambda vectors: [[math.nan] * len(v) for v in vectors],
    "embed_null": lambda vectors: [None] * len(vectors),
    "embed_zero": lambda vectors: [[0.0] * len(v) for v in vectors],
    "embed_short": lambda vectors: [v[: len(v) // 2] for v in vectors],
    "embed_count": lambda vectors: vectors[:-1],
    "embed_shuffled": lambda vectors: [*vectors[1:], *vectors[:1]],
    "embed_drift": lambda vectors: [drifted(v, at) for at, v in enumerate(vectors)],
}
"""What becomes of a list of vectors."""

PATHS = dict.fromkeys([*TEXTS, *EYES, "eof"], "/api/chat")
PATHS |= dict.fromkeys([name for name in ERRORS if "embed" in name], "/api/embed")
PATHS |= dict.fromkeys(VECTORS, "/api/embed") | {"pull_offline": "/api/pull"}
FAULTS = {*ERRORS, *LINE, *STATE, *EYES, *TEXTS, *VECTORS}
"""All names; those in PATHS happen to calls of that path only."""


def drifted(vector: list[float], at: int) -> list[float]:
    """A vector the farther off, the later in its list."""
    turned = [*vector[1:], vector[0]]
    mixed = [x + 0.1 * at * y for x, y in zip(vector, turned, strict=True)]
    return [x / math.hypot(*mixed) for x in mixed]


@dataclass
class Rule:
    """A scripted fault: from the nth call on, at a text in the body, or a predicate."""

    endpoint: str
    when: int | str | Callable[[Json], bool]
    fault: str
    seconds: float = 0.0
    times: int = 1
    seen: int = 0

    def hits(self, path: str, body: Json) -> bool:
        if self.times == 0 or self.endpoint not in ("*", path):
            return False
        if path != PATHS.get(self.fault, path):
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


# --- Settings and counters ------------------------------------------------------------


class Pace(NamedTuple):
    """Seconds and rates of one kind of machine; estimates, for relative results."""

    clip_s: float  # encoding one image
    prompt_rate: float  # prompt tokens per second
    token_rate: float  # answer tokens per second with one busy slot
    gain: float  # n busy slots together give token_rate * n ** gain
    embed_s: float
    load_s: float

    def rate(self, answering: int) -> float:
        """Tokens per second of each of `answering` slots."""
        return float(self.token_rate * max(1, answering) ** (self.gain - 1))


PACES = {
    "gpu": Pace(0.02, 8000, 150, 0.7075, 0.004, 3.0),
    "cpu": Pace(3.0, 60, 15, 0.3685, 0.05, 8.0),
    # Costs are reported as on a GPU, but nobody sleeps.
    "instant": Pace(0.02, 8000, 150, 0.7075, 0.004, 0.0),
}
IMAGE_TOKENS, TEMPLATE_TOKENS = 576, 8
"""Places in the context of a LLaVA-1.5-shaped model, of one image and around it."""

VERSIONS = {"llamaserver": "0.33.0", "llamarunner": "0.24.0"}
"""Servers of today, and the last that embedded with chat models."""


@dataclass
class Settings:
    """What the stand-in can be told, at the start or while it runs."""

    era: str = "llamaserver"
    version: str = ""
    models: tuple[str, ...] = ("demo-vlm", "demo-embed")
    pullable: tuple[str, ...] = ("demo-vlm", "demo-embed")
    resident: tuple[str, ...] = ()  # models that other programs have loaded before
    digests: dict[str, str] = field(default_factory=dict)
    capabilities: dict[str, list[str]] = field(default_factory=dict)
    authorization: str = ""  # header that every call must bring
    other_engine: bool = False  # embeds otherwise with the same digests
    vram: float = 1.0  # share of each model on the GPU
    num_parallel: int = 1
    max_loaded: int = 3
    cache_ram_mib: float = 8192  # for prompts that no slot holds; 0 keeps none
    time_model: str = "instant"
    time_scale: float = 1.0
    load_s: float | None = None
    faults: dict[str, float] = field(default_factory=dict)  # chance per chat or embed
    fault_seed: int = 0
    fault_s: float = 0.5  # of the faults that take time, where a rule names none
    script: list[Any] = field(default_factory=list)  # of rules

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
        if "script" in values:
            script = new.script
            new.script = [
                Rule(**r) if isinstance(r, dict) else Rule(*r) for r in script
            ]
        for name in [*new.faults, *(rule.fault for rule in new.script)]:
            if name not in FAULTS:
                raise ValueError(f"unknown fault {name!r}; known: {sorted(FAULTS)}")
        vars(self).update(vars(new))


class Counters:
    """What happened, for tests and benchmarks to assert on; seconds since a reset."""

    def __init__(self, in_flight: int = 0, slots_busy: int = 0) -> None:
        self.started = self.since = time.monotonic()
        self.requests: Counter[str] = Counter()  # by path
        self.first_s: dict[str, float] = {}  # by path: when the first request came
        self.last_s: dict[str, float] = {}  # and when the last one ended
        self.questions_s: list[float] = []  # first question asked, last one answered
        self.faults: Counter[str] = Counter()
        # By question about an image: how often asked, and how often soundly answered.
        self.asked: dict[tuple[Any, ...], Json] = {}
        self.encodes = self.loads = self.reloads = 0
        self.in_flight = self.max_in_flight = in_flight
        self.slots_busy = self.max_slots_busy = slots_busy
        self.busy_s = self.slot_busy_s = 0.0

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

    def as_json(self) -> Json:
        self.slots_changed(0)
        return copy.deepcopy(vars(self) | {"asked": list(self.asked.values())})


# --- Models, and the runners that hold them -------------------------------------------


def digest_of(name: str) -> str:
    return hashlib.sha256(f"stand-in {name}".encode()).hexdigest()


class Model:
    """A model's name tells whether it embeds, only reads, or also sees."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self.old = name, settings.era == "llamarunner"
        self.embeds = any(word in name for word in ("embed", "minilm", "bge"))
        able = ["completion"] if "text" in name else ["completion", "vision"]
        able = settings.capabilities.get(name, ["embedding"] if self.embeds else able)
        family = "nomic-bert" if self.embeds else "llama"
        # Only old servers give a vision model its second family.
        families = [family, "clip"] if self.old and "vision" in able else [family]
        self.able = able
        self.digest = settings.digests.get(name) or digest_of(name)
        self.dims = 768 if "nomic" in name else 256 if self.embeds else 512
        self.details = {"format": "gguf", "family": family, "families": families}

    def listed(self) -> Json:
        """What /api/tags says."""
        name = self.name if ":" in self.name else f"{self.name}:latest"
        about = {"name": name, "model": name, "digest": self.digest}
        return about | {"size": 100, "details": self.details}

    def num_ctx(self, body: Json) -> int:
        """The context length; Ollama loads the model again when it changes."""
        asked = int((body.get("options") or {}).get("num_ctx") or 4096)
        asked = min(asked, 2048 if self.embeds else 4096)
        return max(asked, 2048 if "vision" in self.able else 1)


def keeps(value: Any) -> bool:
    """Whether a `keep_alive` keeps the model loaded; text must be a Go duration."""
    text = str("5m" if value is None else value)
    if isinstance(value, str) and not re.fullmatch(
        r"0|-?([\d.]+(ns|us|ms|s|m|h))+", text
    ):
        raise HttpError(400, f'time: missing unit in duration "{text}"')
    return re.search("[1-9]", text) is not None


@dataclass
class Slot:
    number: int
    image: str = ""  # with which its prompt begins
    busy: bool = False
    used: int = 0


class Runner:
    """One loaded model: its context length, slots, caches and FIFO gate."""

    def __init__(self, model: Model, num_ctx: int, settings: Settings) -> None:
        self.model, self.num_ctx, self.settings = model, num_ctx, settings
        count = 1 if model.embeds else settings.num_parallel
        self.slots = [Slot(number) for number in range(count)]
        self.gate = asyncio.Semaphore(count)
        self.saved: set[str] = set()  # images of prompts kept in RAM
        self.tick = 0

    @contextmanager
    def slot_for(self, image: str) -> Iterator[Slot]:
        """The idle slot that holds the image, or the one that rested longest."""
        idle = [slot for slot in self.slots if not slot.busy]
        slot = min(idle, key=lambda slot: (slot.image != image, slot.used))
        slot.busy = True
        try:
            yield slot
        finally:
            # As in llama.cpp, a slot's rest begins when it is released.
            self.tick += 1
            slot.busy, slot.used = False, self.tick

    def fetch(self, slot: Slot, image: str) -> tuple[float, float]:
        """Put an image into a slot: seconds of encoding and of reading its tokens."""
        pace, held, slot.image = self.settings.pace, slot.image, image
        known = image == held or image in self.saved
        self.saved |= {held} if self.settings.cache_ram_mib else set()
        self.saved -= {image}
        return (0.0, 0.0) if known else (pace.clip_s, IMAGE_TOKENS / pace.prompt_rate)


class Memory:
    """The loaded models, the last used last: loads them, one at a time."""

    def __init__(self, settings: Settings, counters: Counters) -> None:
        self.settings, self.counters = settings, counters
        self.loading = asyncio.Lock()
        self.runners: dict[str, Runner] = {}

    @asynccontextmanager
    async def runner(self, model: Model, body: Json) -> AsyncIterator[Runner]:
        """A runner with the context length of this request, for as long as it takes."""
        kept, num_ctx = keeps(body.get("keep_alive")), model.num_ctx(body)
        async with self.loading:
            runner = self.runners.pop(model.name, None)
            if runner is None or runner.num_ctx != num_ctx:
                self.counters.reloads += runner is not None
                runner = await self._load(model, num_ctx)
            self.runners[model.name] = runner
        yield runner
        if not kept:
            self.runners.pop(model.name, None)

    async def _load(self, model: Model, num_ctx: int) -> Runner:
        while len(self.runners) >= self.settings.max_loaded:
            self.runners.pop(next(iter(self.runners)))
        own = self.settings.load_s
        load_s = self.settings.pace.load_s if own is None else own
        await asyncio.sleep(load_s * self.settings.time_scale)
        self.counters.loads += 1
        return Runner(model, num_ctx, self.settings)


# --- One call -------------------------------------------------------------------------


class Eyes:
    """Measures each picture once; with a fault it describes another one, or none."""

    def __init__(self) -> None:
        self.sights: dict[str, asyncio.Future[Sight]] = {}
        self.count = 0
        self.last = self.former = self.second = ""

    async def look(self, data: bytes) -> str:
        """Measure a picture, off the event loop; its name. HttpError if it is none."""
        name = hashlib.sha256(data).hexdigest() if data else ""
        if name not in self.sights:
            loop, data = asyncio.get_running_loop(), data or fake_vlm.blank()
            self.sights[name] = loop.run_in_executor(None, fake_vlm.look, data)
        try:
            await asyncio.shield(self.sights[name])
        except (OSError, SyntaxError, ValueError) as problem:  # no picture
            raise HttpError(*BAD_IMAGE) from problem
        return name

    def described(self, asked: str, fault: str, slot: int) -> str:
        """The picture that an answer describes, by name; "" is none."""
        self.count += 1
        if asked != self.last:
            self.last, self.former = asked, self.last or asked
        if self.count <= 2:
            self.second = asked
        seen = [name for name in self.sights if name]
        others = {"blind": "", "blind_slot": asked if slot else ""}
        others["merged"] = seen[seen.index(asked) // 2 * 2]
        if self.count > 2:
            others |= {"former": self.former, "stuck": self.second}
        return others.get(fault, asked)


TOKEN = r"[^\W\d_]{1,6}|\d|[^\w\s]|_"


def count_tokens(text: str) -> int:
    return len(re.findall(TOKEN, text))


@dataclass
class Call:
    """One request, and what is known of its answer."""

    path: str
    head: str
    payload: bytes
    body: Json = field(default_factory=dict)
    fault: str = ""
    fault_s: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)  # seconds, by reported name
    row: Json = field(default_factory=dict)  # of Counters.asked
    began: float = field(default_factory=time.monotonic)

    @property
    def message(self) -> Json:
        messages: list[Json] = self.body.get("messages") or [{}]
        return messages[-1]

    @property
    def prompt(self) -> str:
        return (self.message.get("content") or "").strip()

    @property
    def options(self) -> Json:
        defaults = {"seed": -1, "temperature": 0.8, "num_predict": -1}
        return defaults | (self.body.get("options") or {})

    def times(self) -> dict[str, int]:
        """Nanoseconds, by reported name."""
        return {name: int(s * 1e9) for name, s in self.costs.items()}

    def said(self, text: str, **more: Any) -> Json:
        """The answer of a chat; `more` adds fields."""
        message = {"role": "assistant", "content": text}
        name = "" if self.fault == "zero" else self.body["model"]
        return {"model": name, "message": message, "done": True} | more


async def read_call(reader: asyncio.StreamReader) -> Call:
    """The next request of a connection; IncompleteReadError if there is none."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    path = head.split(" ", 2)[1].partition("?")[0]
    size = re.search(r"\r\ncontent-length:\s*(\d+)", head, re.IGNORECASE)
    payload = await reader.readexactly(int(size[1]) if size else 0)
    return Call(path, head, payload)


async def send(
    writer: asyncio.StreamWriter, fault: str, status: int, answer: Any
) -> None:
    """Write an answer, or half of it where that is the fault."""
    data, kind = answer, "application/json; charset=utf-8"
    if isinstance(answer, bytes):
        kind = "text/html" if answer.startswith(b"<") else "text/plain"
    else:
        data = json.dumps(answer).encode()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nLocation: {MOVED_TO}\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
    broken = fault in ("cut", "reset")
    writer.write(data[: len(data) // 2] if broken else data)
    await writer.drain()
    if broken:
        await asyncio.sleep(0.01)  # or a reset overtakes the half body
        if fault == "reset":
            linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise ConnectionError


# --- The server -----------------------------------------------------------------------


class Server:
    """The endpoints: each takes a call and returns its answer, or raises HttpError."""

    def __init__(self, port: int, settings: Settings) -> None:
        self.port, self.settings = port, settings
        self.counters = Counters()
        self.memory = Memory(settings, self.counters)
        self.eyes = Eyes()
        self.bodies: list[tuple[str, Json]] = []
        self.writers: set[asyncio.StreamWriter] = set()
        self.listener: asyncio.Server | None = None
        self.fault_calls = 0

    # -- connections

    async def listen(self) -> None:
        await self.eyes.look(b"")
        for model in (Model(name, self.settings) for name in self.settings.resident):
            runner = Runner(model, model.num_ctx({}), self.settings)
            self.memory.runners[model.name] = runner
        if not (self.listener and self.listener.is_serving()):
            self.listener = await asyncio.start_server(
                self._connection, "127.0.0.1", self.port, backlog=1024
            )
            self.port = self.listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self.refuse(math.inf)
        while self.writers:
            await asyncio.sleep(0.005)

    def refuse(self, seconds: float) -> None:
        """Look dead for a while: nothing listens, open connections break."""
        if self.listener:
            self.listener.close()
        for writer in self.writers:
            writer.transport.abort()
        loop = asyncio.get_running_loop()
        if seconds < math.inf:
            loop.call_later(seconds, lambda: loop.create_task(self.listen()))

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer call after call, giving up the one whose client leaves."""
        self.writers.add(writer)
        gone = (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError)
        with suppress(*gone):
            while True:
                call = await read_call(reader)
                work = asyncio.create_task(self._answer(call))
                while not work.done():
                    await asyncio.wait({work}, timeout=0.02)
                    if reader.at_eof():
                        work.cancel()
                await send(writer, call.fault, *await work)
                call.row["answered"] = call.row.get("answered", 0) + 1
        writer.transport.abort()
        self.writers.remove(writer)

    async def _answer(self, call: Call) -> tuple[int, Any]:
        count, waits = self.counters, call.path in ("/api/chat", "/api/embed")
        count.requests[call.path] += 1
        count.first_s.setdefault(call.path, call.began - count.started)
        count.in_flight += waits
        count.max_in_flight = max(count.max_in_flight, count.in_flight)
        try:
            return 200, await self._routed(call)
        except HttpError as problem:
            status, answer = problem.args
            return status, {"error": answer} if isinstance(answer, str) else answer
        except (AttributeError, LookupError, TypeError, ValueError) as problem:
            # A mistake of the stand-in must not look like one of its faults.
            return 400, {"error": f"fake_ollama: {problem!r}"}
        finally:
            count.in_flight -= waits
            count.last_s[call.path] = time.monotonic() - count.started

    async def _routed(self, call: Call) -> Any:
        if call.path == "/__stats":
            return self.counters.as_json()
        endpoint = getattr(self, call.path.strip("/").replace("/", "_"), None)
        if endpoint is None:
            raise HttpError(*ERRORS["plain_404"])
        call.body = json.loads(call.payload or b"{}")
        if f"{self.settings.authorization}\r\n".lower() not in call.head.lower():
            raise HttpError(*ERRORS["unauthorized"])
        self.bodies.append((call.path, without_images(call.body)))
        self._draw_fault(call)
        if call.fault:
            self.counters.faults[call.fault] += 1
            await self._act_out(call)
        return await endpoint(call)

    # -- faults

    def _draw_fault(self, call: Call) -> None:
        """Which fault, if any, this call gets: scripted first, then by chance."""
        for rule in self.settings.script:
            if rule.hits(call.path, call.body):
                call.fault, call.fault_s = rule.fault, rule.seconds
                return
        if call.path in ("/api/chat", "/api/embed"):
            self.fault_calls += 1
            dice = random.Random(f"{self.settings.fault_seed}/{self.fault_calls}")
            for name, chance in self.settings.faults.items():
                here = PATHS.get(name, call.path) == call.path
                if not call.fault and here and dice.random() < chance:
                    call.fault = name

    async def _act_out(self, call: Call) -> None:
        """The faults that need no model; HttpError if the call ends with it."""
        fault, name = call.fault, str(call.body.get("model"))
        if fault == "oom":
            self.memory.runners.clear()
        elif fault in ("crash", "eof"):
            self.memory.runners.pop(name, None)
        elif fault == "digest":
            self.settings.digests[name] = digest_of(f"{name}/{time.monotonic_ns()}")
        if fault in ERRORS:
            raise HttpError(*ERRORS[fault])
        usual = self.settings.fault_s
        if fault == "refuse":
            self.refuse(call.fault_s or usual)
        if fault in ("hang", "slow"):
            await asyncio.sleep(
                call.fault_s or (math.inf if fault == "hang" else usual)
            )
        if fault in ("hang", "drop", "refuse"):
            raise ConnectionError

    # -- models

    def model(self, call: Call) -> Model:
        name = str(call.body.get("model")).removesuffix(":latest")
        if name in self.settings.models:
            return Model(name, self.settings)
        if call.path == "/api/embed":
            raise HttpError(404, f'model "{name}" not found, try pulling it first')
        tag = ":latest" * (call.path == "/api/show" and ":" not in name)
        raise HttpError(404, f"model '{name}{tag}' not found")

    async def api_version(self, _: Call) -> Json:
        usual = f"{VERSIONS[self.settings.era]}-fake"
        return {"version": self.settings.version or usual}

    async def api_tags(self, _: Call) -> Json:
        names = self.settings.models
        return {"models": [Model(name, self.settings).listed() for name in names]}

    async def api_ps(self, _: Call) -> Json:
        running = []
        for runner in self.memory.runners.values():
            facts = runner.model.listed()
            in_vram = {"size_vram": int(100 * self.settings.vram)}
            running.append({**facts, **in_vram})
        return {"models": running}

    async def api_show(self, call: Call) -> Json:
        model = self.model(call)
        return {"details": model.details, "model_info": {}, "capabilities": model.able}

    async def api_pull(self, call: Call) -> bytes:
        """All steps at once, one a line; an error is a line, too."""
        name, layer = str(call.body.get("model")), {"status": "pulling", "total": 10**6}
        steps: list[Json] = [{"status": "pulling manifest"}]
        if call.fault == "pull_offline":
            where = "lookup registry.ollama.ai: no such host"
            steps.append({"error": f'pull model manifest: Get "https://…": {where}'})
        elif name not in (*self.settings.models, *self.settings.pullable):
            steps.append({"error": "pull model manifest: file does not exist"})
        else:
            steps += [layer | {"completed": 10**6 * part // 5} for part in range(6)]
            steps += [{"status": "writing manifest"}, {"status": "success"}]
            self.settings.models = tuple({*self.settings.models, name})
        return b"".join(json.dumps(step).encode() + b"\n" for step in steps)

    async def stats(self) -> Json:
        return self.counters.as_json()

    async def set_up(self, values: Json) -> None:
        """Change settings; `reset_stats` forgets the counters."""
        if values.pop("reset_stats", False):
            new = Counters(self.counters.in_flight, self.counters.slots_busy)
            vars(self.counters).update(vars(new))
        self.settings.change(values)

    # -- chat

    async def api_chat(self, call: Call) -> Json:
        model, count, scale = self.model(call), self.counters, self.settings.sleep_scale
        if model.embeds:
            raise HttpError(400, f'"{model.name}" does not support chat')
        data = b"".join(map(base64.b64decode, call.message.get("images") or []))
        image, seed = await self.eyes.look(data), call.options["seed"]
        row = {"model": model.name, "image": image, "prompt": call.prompt, "seed": seed}
        if image:
            key = tuple(row.values())
            row = count.asked.setdefault(key, {**row, "asked": 0, "answered": 0})
            row["asked"] += 1
            count.questions_s = count.questions_s or [call.began - count.started]
        async with self.memory.runner(model, call.body) as runner:
            if not call.prompt:
                kept = keeps(call.body.get("keep_alive"))
                return call.said("", done_reason="load" if kept else "unload")
            async with runner.gate:
                with count.slot(), runner.slot_for(image) as slot:
                    tokens = self._read(call, runner, slot, image)
                    answer = self._say(call, runner, slot, image, tokens)
                    await asyncio.sleep(sum(call.costs.values()) * scale)
        if image:
            count.questions_s[1:] = [time.monotonic() - count.started]
            call.row = {} if call.fault in TEXTS else row
        return answer | call.times() if answer["done"] else answer

    def _read(self, call: Call, runner: Runner, slot: Slot, image: str) -> int:
        """Count what of the prompt the slot doesn't hold yet; the tokens of it all."""
        tokens, clip_s = TEMPLATE_TOKENS + count_tokens(call.prompt), 0.0
        read_s = tokens / self.settings.pace.prompt_rate
        if image:
            clip_s, image_s = runner.fetch(slot, image)
            self.counters.encodes += clip_s > 0
            tokens, read_s = tokens + IMAGE_TOKENS, read_s + image_s
        call.costs["prompt_eval_duration"] = read_s + clip_s
        return tokens

    def _say(
        self, call: Call, runner: Runner, slot: Slot, image: str, tokens: int
    ) -> Json:
        if "thinking" in runner.model.able and call.body.get("think") is not False:
            call.fault = "thinks"
        limit, wanted = runner.num_ctx - tokens, call.options["num_predict"]
        limit = limit if wanted < 0 else min(limit, wanted)
        seen = self.eyes.described(image, call.fault, slot.number) if image else ""
        sight = self.eyes.sights[seen].result()
        text, done, reason = spoken(call, seen, sight, limit)
        count = min(limit, count_tokens(text) + 1)
        rate = self.settings.pace.rate(self.counters.slots_busy)
        call.costs["eval_duration"] = count / rate
        if not done:  # and no counters either
            return call.said(text, done=False)
        read = 38 if call.fault == "no_image" else tokens
        counts = {"prompt_eval_count": read, "eval_count": count}
        return call.said(text, done_reason=reason, **counts)

    # -- embeddings

    async def api_embed(self, call: Call) -> Json:
        model, given = self.model(call), call.body.get("input") or []
        texts = [given] if isinstance(given, str) else given
        async with self.memory.runner(model, call.body) as runner:
            if texts and not model.embeds and not model.old:
                raise HttpError(*ERRORS["embed_refused"])
            counts = [await self._take_in(runner, text) for text in texts]
        cased = self.settings.other_engine
        vectors = [fake_vlm.embed(text, model.dims, cased) for text in texts]
        vectors = VECTORS.get(call.fault, list)(vectors)
        answer = {"model": call.body["model"], "embeddings": vectors}
        return answer | {"prompt_eval_count": sum(counts)}

    async def _take_in(self, runner: Runner, text: str) -> int:
        """Take the time for one text; how many tokens of it were read."""
        async with runner.gate:
            with self.counters.slot():
                seconds = self.settings.pace.embed_s * self.settings.sleep_scale
                await asyncio.sleep(seconds)
        return min(count_tokens(text) + 2, runner.num_ctx)


def without_images(body: Json) -> Json:
    """A body to keep: of its messages only the texts."""
    texts = [message.get("content") for message in body.get("messages") or []]
    return {**body, "messages": texts} if texts else body


def spoken(call: Call, seen: str, sight: Sight, limit: int) -> tuple[str, bool, str]:
    """What is said, cut to so many tokens; whether it ends properly, and why.

    Chance depends on the question alone; when cold, not on the seed.
    """
    seed, temperature = call.options["seed"], float(call.options["temperature"])
    varied = f"{seed}/{temperature}" if temperature > 0 else "cold"
    dice = random.Random(f"{seen}/{call.prompt}/{varied}")
    text = fake_vlm.describe(sight, call.prompt, dice)
    words = text.split(" ")
    half = " ".join(words[: max(1, len(words) // 2)])
    form, done, reason = TEXTS.get(call.fault, ("{text}", True, "stop"))
    form = dice.choice(form.split(" | "))
    text = form.format(text=text, half=half)
    if count_tokens(text) > limit:
        pieces = re.findall(rf"\s*(?:{TOKEN})", text)
        text, reason = "".join(pieces[:limit]), "length"
    return text, done, reason


# --- Running it -----------------------------------------------------------------------


class FakeOllama:
    """The server in a thread of its own, for the length of a `with` block."""

    def __init__(self, port: int = 0, **settings: Any) -> None:
        self._server = Server(port, Settings())
        self._server.settings.change(settings)
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
        return f"http://127.0.0.1:{self._server.port}"

    def stats(self) -> Json:
        return self._call(self._server.stats())

    def control(self, **settings: Any) -> None:
        self._call(self._server.set_up(settings))

    def bodies(self, path: str) -> list[Json]:
        """What was sent to a path, call by call; of messages only the texts."""
        return [body for of, body in list(self._server.bodies) if of == path]

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


def phase_flags(url: str) -> list[str]:
    """Flags that point a phase at the stand-in."""
    return ["--host", url, "--vlm", "demo-vlm", "--embed-model", "demo-embed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=11500)
    parser.add_argument("--ready-file", type=Path, help="gets the URL once listening")
    parser.add_argument("settings", nargs="*", help="name=value, a value as JSON")
    args = parser.parse_args()
    pairs = (setting.split("=", 1) for setting in args.settings)
    settings = {name: json.loads(value) for name, value in pairs}
    with FakeOllama(args.port, **settings) as server, suppress(KeyboardInterrupt):
        told = f"{server.url} {' '.join(args.settings)}"
        print(f"fake_ollama: a stand-in, not a VLM; {told}", flush=True)
        if args.ready_file:
            args.ready_file.write_text(server.url)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main()
