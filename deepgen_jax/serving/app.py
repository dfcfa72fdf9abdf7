"""The ASGI application: OpenAI's image routes, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deepgen_jax.serving import bodies
from deepgen_jax.serving.answers import Answer, event_stream
from deepgen_jax.serving.batcher import Closing, QueueFull
from deepgen_jax.serving.errors import APIError
from deepgen_jax.serving.jobs import Engine, Kind
from deepgen_jax.serving.metrics import Metrics
from deepgen_jax.serving.middleware import AccessLog, Keys, Watch
from deepgen_jax.serving.parameters import max_pixels, parse
from deepgen_jax.serving.planning import plan
from deepgen_jax.serving.service import Service
from deepgen_jax.serving.settings import ServeConfig

#: Status that is logged when the client has gone before the answer; nobody receives it.
CLIENT_CLOSED = 499


def create_app(
    load: Callable[[], Engine],
    config: ServeConfig | None = None,
    *,
    names: tuple[str, ...] = (),
    access_log: AccessLog | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> Starlette:
    """An ASGI application that serves one model.

    The model is loaded in a thread when the application starts; ``/ready`` answers 200 from then on. On shutdown what
    was accepted is finished first.

    Args:
      load: makes the engine.
      config: limits and batching.
      names: further values of ``model`` that requests may give; the engine's name and "deepgen" are always accepted.
      access_log: gets a record of each request; None writes none.
      on_failure: called when the model cannot be loaded.

    Raises:
      DeepGenError: the file of keys cannot be used.
    """
    config = config or ServeConfig()
    service = Service(load, config, Metrics(), names, on_failure)
    keys = Keys.read(config.api_keys) if config.api_keys is not None else None

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = Starlette(
        routes=[
            Route("/v1/images/generations", _generations, methods=["POST"]),
            Route("/v1/images/edits", _edits, methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{model:path}", _model, methods=["GET"]),
            Route("/health", _health, methods=["GET"]),
            Route("/ready", _ready, methods=["GET"]),
            Route("/metrics", _metrics, methods=["GET"]),
        ],
        middleware=[Middleware(Watch, metrics=service.metrics, log=access_log, keys=keys)],
        exception_handlers={
            APIError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _server_error,
        },
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _generations(request: Request) -> Response:
    return await _images(request, "generation")


async def _edits(request: Request) -> Response:
    return await _images(request, "edit")


async def _images(request: Request, kind: Kind) -> Response:
    service: Service = request.app.state.service
    engine, batcher = service.engine_or_refuse()
    config, metrics = service.config, service.metrics
    start = time.monotonic()
    with service.upload():
        body = await _body(request, kind, config)
        parameters = parse(kind, body.fields, engine.info, config, service.names)
        jobs = await asyncio.to_thread(plan, engine, parameters, body if kind == "edit" else None, config)
    metrics.observe_phase("read", time.monotonic() - start)
    answer = Answer(parameters, jobs, metrics, asyncio.get_running_loop())
    try:
        answer.tickets = batcher.submit([(job, checked.bucket) for job, checked in jobs], answer.listen)
    except QueueFull as full:
        headers = {"Retry-After": f"{full.seconds:.0f}"}
        raise APIError(
            429, f"The queue is full; try again in {full.seconds:.0f} s", "queue_full", headers=headers
        ) from None
    except Closing:
        raise service.shutting_down() from None
    request.state.log = answer.log
    if parameters.stream:
        return event_stream(answer, batcher, config.deadline)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        return JSONResponse(await answer.collect(batcher, gone, config.deadline))
    finally:
        gone.cancel()


async def _body(request: Request, kind: Kind, config: ServeConfig) -> bodies.Body:
    try:
        async with asyncio.timeout(config.upload_seconds):
            if kind == "edit":
                return await bodies.read_edit(request, config.max_body, config.max_images)
            return bodies.Body(await bodies.read_json(request, config.max_body))
    except TimeoutError:
        message = f"The body did not arrive within {config.upload_seconds:g} s; send it at once"
        raise APIError(408, message, "upload_timeout", headers={"Connection": "close"}) from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(request.app.state.service)]})


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    described, name = _described(service), request.path_params["model"]
    if name not in service.names:
        raise APIError(404, f"The model '{name}' does not exist; this server has {described['id']}", "model_not_found")
    return JSONResponse(described)


def _described(service: Service) -> dict[str, Any]:
    engine, _ = service.engine_or_refuse()
    info = engine.info
    return {
        "id": info.name, "object": "model", "created": service.created, "owned_by": "deepgen",
        "deepgen": {
            "default_size": f"{info.side}x{info.side}", "size_multiple": info.multiple, "max_side": info.largest,
            "max_pixels": max_pixels(info, service.config), "default_steps": info.steps,
            "default_guidance": info.guidance, "samplers": list(info.samplers), "max_images": service.config.max_images,
        },
    }  # fmt: skip


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    service: Service = request.app.state.service
    state = service.state
    return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)


async def _metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    request.app.state.service.metrics.failures.labels(error.code).inc()
    return JSONResponse(error.envelope, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    message = f"Unknown route: {method} {path}; see POST /v1/images/generations, /v1/images/edits and GET /v1/models"
    if error.status_code == 405:
        message = f"{method} is not allowed for {path}"
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    refused = APIError(error.status_code, message, code, headers=error.headers)
    return await _api_error(request, refused)


async def _gone(request: Request, error: Exception) -> Response:
    # The client left while it was sending; the status only goes to the log.
    request.app.state.service.metrics.failures.labels("client_closed").inc()
    return Response(status_code=CLIENT_CLOSED)


async def _server_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, APIError(500, "The server failed; its log has the reason", "internal_error"))
