"""``deepgen serve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from deepgen_jax.cli.extras import require
from deepgen_jax.cli.stopping import Terminated
from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.acceleration import Acceleration, interval_of
from deepgen_jax.inference.defaults import check_acceleration
from deepgen_jax.stores.model_folder import locate, read_manifest


@dataclass(frozen=True)
class ServeCommand:
    """Serves a model over HTTP in the format of OpenAI's images API, until SIGTERM or Ctrl-C.

    POST /v1/images/generations and /v1/images/edits, GET /v1/models, /health, /ready and /metrics. Accepted requests
    are finished before the end.
    """

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Model folder, made by `deepgen convert`. Left out, or nano: the small model of the package."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, with --api-keys or behind a proxy that checks access."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: auto)")] = None
    """Split the work over devices: data=8 or fsdp=8 for many images, tensor=8 for each. auto takes all devices so, and
    one on CPUs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and computation; auto is float32 on CPU and bfloat16 elsewhere."""
    cache: Annotated[float | None, arg(metavar="THRESHOLD", help_behavior_hint="(default: off)")] = None
    """Skip the MMDiT's later layers in steps where its first layer changes by less than this share, such as 0.08;
    images are then computed one by one, as those of a batch would share decisions."""
    taylor: bool = False
    """With --cache: extrapolate skipped layers from the last two evaluations instead of repeating them."""
    guidance_interval: Annotated[str | None, arg(metavar="START,STOP", help_behavior_hint="(default: all)")] = None
    """Guide only in this part of the steps, such as 0,0.6 for the first three fifths."""
    max_batch: int = 8
    """Most images computed at once."""
    batch_window_ms: float = 5.0
    """How long the first image of a batch waits for others while the model is idle."""
    warm: bool = False
    """Compile the programs of the usual sizes before /ready answers 200."""
    max_queue: int = 64
    """Images that may wait, generation and edits each; more get status 429 with Retry-After."""
    deadline: float = 300.0
    """Seconds after which a request that has not begun is given up, with status 504."""
    max_body_mb: float = 64.0
    """Largest request."""
    max_pixels: Annotated[int | None, arg(help_behavior_hint="(default: 4 x the model's usual area)")] = None
    """Largest image to make, in pixels."""
    max_image_megapixels: float = 32.0
    """Larger pictures of requests are refused before they are decoded."""
    max_images: int = 8
    """Most reference pictures of a request."""
    max_steps: int = 200
    """Most sampler steps of a request."""
    api_keys: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Accepted bearer keys, one a line; without it every request is accepted."""
    model_name: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME", help_behavior_hint="(repeatable)")] = ()
    """Further names under which clients may ask for the model, such as gpt-image-1."""
    no_access_log: bool = False
    """Leave out the line of JSON for each request on stderr."""
    compilation_cache: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off; by default $DEEPGEN_CACHE_DIR or ~/.cache/deepgen-jax/xla."""

    def run(self) -> int:
        """Serves; returns the exit status."""
        require("serve", "deepgen serve")
        from deepgen_jax.cli.image_run import chosen_mesh
        from deepgen_jax.serving import server
        from deepgen_jax.serving.app import create_app
        from deepgen_jax.serving.engine import PipelineEngine
        from deepgen_jax.serving.loading import load_engine, model_name
        from deepgen_jax.serving.middleware import log_to_stderr
        from deepgen_jax.serving.settings import ServeConfig

        interval = None if self.guidance_interval is None else interval_of(self.guidance_interval)
        acceleration = Acceleration(self.cache, self.taylor, interval)
        folder = locate(self.model)
        check_acceleration(read_manifest(folder).config, acceleration)
        config = ServeConfig(
            max_batch=self.max_batch,
            batch_window=self.batch_window_ms / 1000,
            max_queue=self.max_queue,
            deadline=self.deadline,
            max_body=int(self.max_body_mb * 1e6),
            max_pixels=self.max_pixels,
            max_image_pixels=int(self.max_image_megapixels * 1e6),
            max_images=self.max_images,
            max_steps=self.max_steps,
            api_keys=self.api_keys,
            warm=self.warm,
        )
        failures: list[BaseException] = []

        def fail(error: BaseException) -> None:
            failures.append(error)
            running.stop()

        def load() -> PipelineEngine:
            mesh = chosen_mesh(self.mesh, folder, self.dtype, self.max_batch)
            return load_engine(folder, self.dtype, mesh, self.compilation_cache, acceleration)

        app = create_app(
            load,
            config,
            names=self.model_name,
            access_log=None if self.no_access_log else log_to_stderr,
            on_failure=fail,
        )
        server.log_to_stderr()
        with server.listen(self.host, self.port) as listener:
            running = server.Server(app)
            print(f"serving {model_name(folder)} on {server.address(listener)}", flush=True)
            signals = server.serve_until_signal(running, listener)
        if failures:
            raise failures[0]
        if signals > 1 or app.state.service.state == "loading":
            # The model's thread is still at work; the interpreter must not wait for it.
            raise Terminated
        if signals == 0:
            raise DeepGenError("the server stopped without a signal; its log has the reason")
        print("stopped; accepted requests were finished", flush=True)
        return 0
