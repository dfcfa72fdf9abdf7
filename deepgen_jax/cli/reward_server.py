"""``deepgen reward-server``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.cli.stopping import Terminated
from deepgen_jax.errors import DeepGenError, did_you_mean


@dataclass(frozen=True)
class RewardServerCommand:
    """Serves rewards over HTTP until Ctrl-C or SIGTERM: POST /score and GET /health, JSON in and out.

    There is no access control: listen on an address that only your own machines reach.
    """

    rewards: str
    """Names of the rewards, separated by commas."""
    options: str = "{}"
    """Options by reward, a JSON object or a file with one, such as '{"clip": {"folder": "clip-vit-large-patch14"}}'.
    The option "kind" sets a reward's kind if its name differs, as module:Class or file.py:Class for custom ones."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8100
    """Port to listen on; 0 takes a free one."""
    max_body_mb: int = 128
    """Largest request, in MB."""
    max_megapixels: float = 64.0
    """Most pixels of all images of a request, in millions."""
    max_connections: int = 64
    """Most connections at once."""

    def run(self) -> int:
        """Serves; returns the exit status."""
        from deepgen_jax.rewards.registry import RewardConfig, make
        from deepgen_jax.rewards.server import RewardServer
        from deepgen_jax.rewards.server_limits import ServerLimits

        names = list(dict.fromkeys(filter(None, (name.strip() for name in self.rewards.split(",")))))
        if not names:
            raise DeepGenError("--rewards is empty; name at least one")
        options = _options(self.options)
        for name in options:
            if name not in names:
                raise DeepGenError(f"--options are for {name!r}, which is not served{did_you_mean(name, names)}")
        rewards = {}
        for name in names:
            given = dict(options.get(name, {}))
            rewards[name] = make(RewardConfig(name, str(given.pop("kind", "")), given))
        limits = ServerLimits(
            body_bytes=self.max_body_mb * 10**6,
            pixels=int(self.max_megapixels * 10**6),
            connections=self.max_connections,
        )
        with RewardServer(rewards, self.host, self.port, limits) as server:
            print(f"serving {', '.join(names)} on http://{server.address[0]}:{server.address[1]}", flush=True)
            try:
                server.serve()
            except (KeyboardInterrupt, Terminated):
                print("stopping after the answers in progress", flush=True)
        return 0


def _options(text: str) -> Mapping[str, Mapping[str, Any]]:
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        options = json.loads(text)
    except OSError as error:
        raise DeepGenError(f"--options {text}: {error.strerror}; give JSON or a file with it") from error
    except (ValueError, RecursionError) as error:
        raise DeepGenError(f"--options is no JSON ({error})") from error
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise DeepGenError("--options must be a JSON object of objects, one a reward")
    return options
