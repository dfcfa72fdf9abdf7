"""Services in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.services import Running, wait_until

from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.server import BackgroundServer
from deepgen_jax.serving.settings import ServeConfig


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """``start(engine, **config)`` -> a service that is ready."""
    with ExitStack() as stack:

        def run(engine: Any, names: tuple[str, ...] = (), **config: Any) -> Running:
            log: list[dict[str, Any]] = []
            app = create_app(lambda: engine, ServeConfig(**config), names=names, access_log=log.append)
            if isinstance(engine, FakeEngine):
                stack.callback(engine.gate.set)
            server = stack.enter_context(BackgroundServer(app))
            if isinstance(engine, FakeEngine):
                stack.callback(engine.gate.set)
            wait_until(lambda: app.state.service.state == "ready")
            return Running(server.url, app, log)

        yield run
