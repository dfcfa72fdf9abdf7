"""``deepgen demo``."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from deepgen_jax.cli.extras import require
from deepgen_jax.cli.stopping import Terminated
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.model_folder import locate, read_manifest


@dataclass(frozen=True)
class DemoCommand:
    """Opens a web page that generates and edits images, until Ctrl-C or SIGTERM.

    The page has no access control: with another --host than localhost, everyone who reaches it can use it.
    """

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]", help_behavior_hint="")] = None
    """Model folder, made by `deepgen convert`. Left out, or nano: the small model of the package."""
    server: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """Use the model of a running `deepgen serve` instead, http://HOST:PORT."""
    api_key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """File whose first line is the bearer key for --server."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    history: Path = Path("~/.cache/deepgen-jax/demo")
    """Folder where made images are kept; each browser sees its own."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: auto)")] = None
    """Split the work over devices: data=8 or fsdp=8 for many images, tensor=8 for each."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights and computation; auto is float32 on CPU and bfloat16 elsewhere."""
    compilation_cache: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where compiled programs are kept, or off; by default $DEEPGEN_CACHE_DIR or ~/.cache/deepgen-jax/xla."""

    def run(self) -> int:
        """Serves the page; returns the exit status."""
        if self.model is not None and self.server is not None:
            raise DeepGenError("a model and --server are both given; keep one of them")
        if self.api_key_file is not None and self.server is None:
            raise DeepGenError("--api-key-file is for --server; leave it out")
        require("demo", "deepgen demo")
        # Read when Gradio is imported: nothing is sent home.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from deepgen_jax.serving.client import ServiceClient
        from deepgen_jax.serving.demo.history import History
        from deepgen_jax.serving.demo.page import Demo, css, theme
        from deepgen_jax.serving.server import address, listen

        history = History(self.history.expanduser())
        with self._service() as (url, model):
            key = None if self.api_key_file is None else _first_line(self.api_key_file)
            page = Demo(ServiceClient(url, key), history, model).build()
            # Gradio takes a port, not a socket; a socket reports a port in use and finds a free one.
            with listen(self.host, self.port) as listener:
                where = address(listener)
                port = listener.getsockname()[1]
            try:
                page.queue(default_concurrency_limit=8).launch(
                    server_name=self.host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                    allowed_paths=[str(history.folder)], theme=theme(), css=css(), footer_links=[], ssr_mode=False,
                    max_file_size="32mb", strict_cors=True,
                )  # fmt: skip
                print(f"open {where}", flush=True)
                while True:
                    time.sleep(3600)
            except (KeyboardInterrupt, Terminated):
                print("stopped", flush=True)
            finally:
                page.close(verbose=False)
        return 0

    @contextlib.contextmanager
    def _service(self) -> Iterator[tuple[str, str | None]]:
        """(address of the service, model folder for commands to copy): the one named, or one in this process."""
        if self.server is not None:
            yield self.server, None
            return
        from deepgen_jax.cli.image_run import chosen_mesh
        from deepgen_jax.serving.app import create_app
        from deepgen_jax.serving.loading import load_engine
        from deepgen_jax.serving.server import BackgroundServer
        from deepgen_jax.serving.settings import ServeConfig

        folder = locate(self.model)
        read_manifest(folder)
        failures: list[BaseException] = []
        app = create_app(
            lambda: load_engine(
                folder, self.dtype, chosen_mesh(self.mesh, folder, self.dtype, images=1), self.compilation_cache
            ),
            ServeConfig(max_batch=4),
            on_failure=failures.append,
        )
        print(f"loading {self.model or 'nano'}", flush=True)
        with BackgroundServer(app) as service:
            while app.state.service.state == "loading":
                time.sleep(0.05)
            if failures:
                raise failures[0]
            yield service.url, self.model or "nano"


def _first_line(path: Path) -> str:
    try:
        line = path.read_text(encoding="utf-8").strip().splitlines()[0].strip()
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise DeepGenError(f"key file {path} cannot be read, or is empty; write the key into its first line") from error
    return line
