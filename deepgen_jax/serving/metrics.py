"""Prometheus metrics of one service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of a service in a separate registry, so that one process can run several services.

    Attributes:
      queue_depth: images that wait, by kind ("generation", "edit"); scale replicas on it.
      running: images of the batch that runs.
      batch_size: images of a batch, by kind.
      phase_seconds: by phase: "queue" for an image; "condition", "denoise", "decode" for a batch; "read" and "encode"
        for a request.
      images: finished images, by kind.
      failures: requests without an answer of status 200, by error code.
      requests: by route and status.
      request_seconds: by route.
      ready: 1 while the service accepts work.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.queue_depth = Gauge("deepgen_queue_depth", "Images that wait", ["kind"], registry=registry)
        self.running = Gauge("deepgen_running_images", "Images of the batch that runs", registry=registry)
        self.ready = Gauge("deepgen_ready", "1 while the service accepts work", registry=registry)
        self.batch_size = Histogram(
            "deepgen_batch_size", "Images of a batch", ["kind"], buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
            registry=registry,
        )  # fmt: skip
        self.phase_seconds = Histogram(
            "deepgen_phase_seconds", "Seconds by phase", ["phase"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("deepgen_images", "Finished images", ["kind"], registry=registry)
        self.failures = Counter("deepgen_failures", "Requests without an image", ["code"], registry=registry)
        self.requests = Counter("deepgen_requests", "Requests", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "deepgen_request_seconds", "Seconds of a request", ["route"], buckets=_SECONDS, registry=registry
        )
        for kind in ("generation", "edit"):
            self.queue_depth.labels(kind).set(0)

    def observe_phase(self, phase: str, seconds: float) -> None:
        """Records how long a phase took."""
        self.phase_seconds.labels(phase).observe(seconds)

    def render(self) -> bytes:
        """The text that ``GET /metrics`` answers."""
        return generate_latest(self.registry)
