"""Ray Serve: replicas of the service that scale by queue depth.

    serve run deepgen_jax.serving.ray_app:build model=deepgen max_replicas=8

Each replica is a whole service with its own queue and batches. Ray spreads requests over them, and adds replicas while
a replica has more than two batches of requests on average. Requests of a replica that dies end with an error or broken
connections; clients that retry, as OpenAI's do, get their images from another one.
"""

# Without `annotations` from __future__: Ray reads the type of `build`'s argument.

from pydantic import BaseModel, ConfigDict
from ray import serve
from starlette.applications import Starlette

from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.loading import load_engine
from deepgen_jax.serving.service import warm
from deepgen_jax.serving.settings import ServeConfig
from deepgen_jax.stores.model_folder import locate


class Arguments(BaseModel):
    """Arguments of the application, ``KEY=VALUE`` on Ray's command line.

    Attributes:
      model: model folder that every node reaches, or "nano".
      dtype, mesh: as of ``deepgen serve``; a replica uses the devices that Ray gives it.
      min_replicas, max_replicas: bounds of the autoscaler.
      max_batch, max_queue: of each replica.
      num_cpus, num_gpus, tpus: what a replica reserves.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "nano"
    dtype: str = "auto"
    mesh: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    max_batch: int = 8
    max_queue: int = 64
    num_cpus: float = 1
    num_gpus: float = 0
    tpus: float = 0


def asgi_app(arguments: Arguments) -> Starlette:
    """The service of one replica, its model loaded and its programs compiled: Ray sends requests once this returns."""
    engine = load_engine(locate(arguments.model), arguments.dtype, arguments.mesh)
    warm(engine, arguments.max_batch)
    return create_app(lambda: engine, ServeConfig(max_batch=arguments.max_batch, max_queue=arguments.max_queue))


def build(arguments: Arguments) -> serve.Application:
    """The Ray Serve application."""

    def builder() -> Starlette:
        return asgi_app(arguments)

    deployment = serve.deployment(
        name="deepgen",
        max_ongoing_requests=arguments.max_queue,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            # What exceeds the batch in hand waits.
            "target_ongoing_requests": 2 * arguments.max_batch,
        },
        ray_actor_options={
            "num_cpus": arguments.num_cpus,
            "num_gpus": arguments.num_gpus,
            "resources": {"TPU": arguments.tpus} if arguments.tpus else {},
        },
        graceful_shutdown_timeout_s=300,
    )
    return deployment(serve.ingress(builder)()).bind()
