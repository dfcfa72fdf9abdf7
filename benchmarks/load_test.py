"""Load test of ``deepgen serve``: many clients with good, malformed, oversized and disconnecting requests.

    python benchmarks/load_test.py                       # nano on this machine, 300 requests from 16 clients
    python benchmarks/load_test.py --model MODEL --steps 20 --max-batch 4

Starts the server twice, with batching and with ``--max-batch 1``. With batching it sends the mixed requests, checks
that each good one is answered with the pipeline's own image of its seed and each bad one with a 4xx in OpenAI's
envelope, and watches the server's memory. Then both servers get the same good requests, in turns, for the throughput;
the gain is the median over the rounds. Prints JSON; the exit status is 1 where a check fails. Needs the extras
``serve`` and ``test``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
from PIL import Image

PROMPTS = (
    "a large blue square in the top left corner on a black background",
    "a small red circle",
    "two green stars",
    'a sign with the word "OPEN" on it',
)
EDITS = ("make the blue square yellow", "remove the square", "add a small red circle")
#: Largest body that the servers accept, so that an oversized request is cheap to send.
MAX_BODY_MB = 1


@dataclass(frozen=True)
class Ask:
    """One planned request and its kind."""

    kind: str
    prompt: str
    seed: int


def plan(count: int, share: float, seed: int) -> list[Ask]:
    """``count`` requests; ``share`` of them malformed, oversized and disconnecting each; half of the rest are edits."""
    draw = random.Random(seed)
    bad = round(count * share)
    kinds = ["malformed"] * bad + ["oversized"] * bad + ["disconnect"] * bad
    kinds += ["edit" if k % 2 else "generate" for k in range(count - len(kinds))]
    draw.shuffle(kinds)
    return [Ask(kind, draw.choice(EDITS if kind == "edit" else PROMPTS), seed=k) for k, kind in enumerate(kinds)]


@contextlib.contextmanager
def server(model: str, max_batch: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server that is ready."""
    words = [sys.executable, "-m", "deepgen_jax.cli.main", "serve", model, "--port", "0", "--warm"]
    options = ["--max-batch", str(max_batch), "--max-body-mb", str(MAX_BODY_MB)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*words, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()}")
            while httpx.get(f"{found[0]}/ready", timeout=60).status_code != 200:
                if process.poll() is not None:
                    raise SystemExit("the server ended while it loaded the model")
                time.sleep(0.2)
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait(120)


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(
    servers: dict[str, tuple[str, int]], asks: list[Ask], clients: int, steps: int | None, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Images a second of each server, CPU seconds an image and cores in use, round by round, the servers in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for place in range(rounds):
        for name in sorted(servers, reverse=bool(place % 2)):
            url, pid = servers[name]
            before, load = cpu_seconds(pid), Load(url, steps)
            seconds = asyncio.run(load.run(asks, clients))
            if load.wrong:
                raise SystemExit(f"requests for the throughput failed: {load.wrong[:3]}")
            used = cpu_seconds(pid) - before
            rate, each, cores = len(asks) / seconds, used / len(asks), used / seconds
            found[name].append(
                {"images_per_second": round(rate, 2), "cpu_seconds_per_image": round(each, 4), "cores": round(cores, 2)}
            )
    return found


def picture() -> Image.Image:
    """Source image of edits."""
    image = Image.new("RGB", (96, 96), (20, 20, 20))
    image.paste((40, 80, 220), (8, 8, 42, 42))
    return image


def png(image: Image.Image) -> bytes:
    """Encodes an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Load:
    """Sends requests and records the responses."""

    def __init__(self, url: str, steps: int | None) -> None:
        self.url = url
        self.extra = {} if steps is None else {"num_inference_steps": steps}
        self.outcomes: Counter[str] = Counter()
        self.images: dict[Ask, np.ndarray] = {}
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self._picture = png(picture())

    async def run(self, asks: list[Ask], clients: int, after: Callable[[int], None] = lambda done: None) -> float:
        """Sends all requests from ``clients`` sequential clients; returns the elapsed seconds."""
        waiting, done = list(reversed(asks)), 0
        # One of each for all clients, made before the time starts: each reads the system's certificates, for as long as
        # an image of a small model takes.
        async with (
            openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600) as api,
            httpx.AsyncClient(base_url=self.url, timeout=600) as raw,
        ):

            async def client() -> None:
                nonlocal done
                while waiting:
                    ask = waiting.pop()
                    await self._send(ask, api, raw)
                    done += 1
                    after(done)

            start = time.monotonic()
            await asyncio.gather(*(client() for _ in range(clients)))
            return time.monotonic() - start

    async def _send(self, ask: Ask, api: openai.AsyncOpenAI, raw: httpx.AsyncClient) -> None:
        try:
            if ask.kind == "malformed":
                await self._refused(ask, malformed(ask.seed, raw))
            elif ask.kind == "oversized":
                await self._refused(ask, oversized(ask.seed, raw))
            elif ask.kind == "disconnect":
                await self._leave(ask)
            else:
                await self._good(ask, api)
        except (openai.APIError, httpx.HTTPError, OSError) as error:
            self.wrong.append(f"{ask.kind} {ask.seed}: {type(error).__name__}: {error}")

    async def _good(self, ask: Ask, api: openai.AsyncOpenAI) -> None:
        start, extra = time.monotonic(), {"seed": ask.seed, **self.extra}
        if ask.kind == "edit":
            image = ("picture.png", self._picture, "image/png")
            answer = await api.images.edit(image=image, prompt=ask.prompt, extra_body=extra)
        else:
            answer = await api.images.generate(prompt=ask.prompt, extra_body=extra)
        self.seconds.append(time.monotonic() - start)
        assert answer.data is not None
        made = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
        self.images[ask] = np.asarray(made.convert("RGB"))
        self.outcomes[f"{ask.kind} answered"] += 1

    async def _refused(self, ask: Ask, sent: Awaitable[httpx.Response]) -> None:
        response = await sent
        error = response.json().get("error", {}) if "json" in response.headers.get("content-type", "") else {}
        if 400 <= response.status_code < 500 and set(error) == {"message", "type", "param", "code"}:
            self.outcomes[f"{ask.kind} refused with {response.status_code}"] += 1
        else:
            self.wrong.append(f"{ask.kind} {ask.seed}: status {response.status_code}, {response.text[:200]}")

    async def _leave(self, ask: Ask) -> None:
        """Sends a request, or half of one, and closes the connection."""
        parts = urlsplit(self.url)
        body = json.dumps({"prompt": ask.prompt, "seed": ask.seed, "n": 2, **self.extra}).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        draw = random.Random(ask.seed)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(data[: len(data) if draw.random() < 0.7 else draw.randrange(1, len(data))])
        await writer.drain()
        await asyncio.sleep(draw.random() * 0.1)
        writer.close()
        self.outcomes["disconnected"] += 1


def malformed(seed: int, raw: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    """A malformed request of one of several kinds."""
    generate, edit, json_type = "/v1/images/generations", "/v1/images/edits", {"content-type": "application/json"}
    kinds: list[dict[str, Any]] = [
        {"url": generate, "content": b'{"prompt": ', "headers": json_type},
        {"url": generate, "content": b"\xff\xfe\x00", "headers": json_type},
        {"url": generate, "json": {"prompt": "a red circle", "n": "many"}},
        {"url": generate, "json": {"prompt": "", "seed": 1}},
        {"url": generate, "json": {"prompt": "a red circle", "stepz": 3}},
        {"url": edit, "data": {"prompt": "x"}, "files": {"image": ("a.png", b"not a picture")}},
        {"url": edit, "data": {"prompt": "x"}, "files": {"image": ("a.png", png(picture())[:90])}},
        {"url": edit, "json": {"prompt": "x", "images": [{"image_url": "http://127.0.0.1:1/a.png"}]}},
        {"url": edit, "content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ]
    return raw.post(**kinds[seed % len(kinds)])


def oversized(seed: int, raw: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    """A request that exceeds a limit."""

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(3 * MAX_BODY_MB * 16):
            yield b"x" * 2**16

    huge, form = png(Image.new("1", (9000, 9000))), {"content-type": "multipart/form-data; boundary=b"}
    kinds: list[dict[str, Any]] = [
        {"url": "/v1/images/generations", "json": {"prompt": "a red circle", "size": "8192x8192"}},
        {"url": "/v1/images/generations", "json": {"prompt": "a red circle", "n": 1000}},
        {"url": "/v1/images/generations", "json": {"prompt": "x" * (2 * MAX_BODY_MB * 10**6)}},
        {"url": "/v1/images/edits", "content": endless(), "headers": form},
        {"url": "/v1/images/edits", "data": {"prompt": "x"}, "files": {"image": ("a.png", huge)}},
    ]
    return raw.post(**kinds[seed % len(kinds)])


def expected(model: str, asks: list[Ask], steps: int | None) -> dict[Ask, np.ndarray]:
    """Reference images of good requests, generated one by one in this process."""
    from deepgen_jax import DeepGenPipeline
    from deepgen_jax.inference.cache import enable_compilation_cache

    enable_compilation_cache()
    pipe = DeepGenPipeline.from_pretrained(model)
    made = {}
    for ask in asks:
        image = picture() if ask.kind == "edit" else None
        out = pipe(ask.prompt, image, seed=[ask.seed], num_inference_steps=steps, output_type="np")
        assert isinstance(out.images, np.ndarray)
        made[ask] = out.images[0]
    return made


def main() -> int:
    """Runs the test; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="model folder")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--bad", type=float, default=0.05, help="share of malformed, oversized, disconnecting, each")
    parser.add_argument("--steps", type=int, default=None, help="sampler steps; the model's default otherwise")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--throughput-requests", type=int, default=96, help="good requests for each server; 0 for none")
    parser.add_argument("--rounds", type=int, default=5, help="times that each server gets them")
    options = parser.parse_args()

    asks = plan(options.requests, options.bad, seed=0)
    good = [ask for ask in asks if ask.kind in ("generate", "edit")]
    sizes: list[int] = []
    more = [Ask("generate", PROMPTS[k % len(PROMPTS)], 10_000 + k) for k in range(options.throughput_requests)]
    report: dict[str, Any] = {
        "model": options.model,
        "clients": options.clients,
        "load_average": round(os.getloadavg()[0], 1),
    }
    rounds: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as running:
        url, pid = running.enter_context(server(options.model, options.max_batch))
        load = Load(url, options.steps)
        seconds = asyncio.run(load.run(asks, options.clients, lambda done: sizes.append(resident(pid))))
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        if more:
            servers = {"batched": (url, pid), "one_at_a_time": running.enter_context(server(options.model, 1))}
            rounds = throughput(servers, more, options.clients, options.steps, options.rounds)
    wanted = expected(options.model, good, options.steps)
    different = [ask for ask in good if ask in load.images and not np.array_equal(load.images[ask], wanted[ask])]
    settled = sizes[min(49, len(sizes) - 1)]
    growth = max(sizes[min(49, len(sizes) - 1) :]) / settled - 1
    checks = {
        "no request failed": not load.wrong,
        "every good request is answered": len(load.images) == len(good),
        "every image is the pipeline's own": not different,
        "memory grows by at most 5% after the first 50": growth <= 0.05,
    }
    ordered = sorted(load.seconds)
    report |= {
        "requests": dict(load.outcomes), "wrong": load.wrong[:10], "different_images": len(different),
        "seconds": round(seconds, 2), "images_per_second": round(len(load.images) / seconds, 2),
        "latency_seconds": {f"p{q}": round(ordered[len(ordered) * q // 100], 3) for q in (50, 95)},
        "mean_batch": mean_batch(metrics), "memory_mb": round(settled / 1e6), "memory_growth": round(growth, 4),
        "throughput": rounds, "batching_gain": gain(rounds), "checks": checks,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0 if all(checks.values()) else 1


def gain(rounds: dict[str, list[dict[str, float]]]) -> float | None:
    """Median over the rounds of batched to one-at-a-time throughput."""
    if not rounds:
        return None
    rate = "images_per_second"
    pairs = zip(rounds["batched"], rounds["one_at_a_time"], strict=True)
    return round(statistics.median(batched[rate] / single[rate] for batched, single in pairs), 2)


def mean_batch(metrics: str) -> float:
    """Mean images per batch, from the text of ``/metrics``."""
    found = {
        name: sum(float(value) for value in re.findall(rf"^deepgen_batch_size_{name}{{.*}} (\S+)$", metrics, re.M))
        for name in ("sum", "count")
    }
    return round(found["sum"] / max(found["count"], 1), 2)


if __name__ == "__main__":
    sys.exit(main())
