"""``deepgen train``: runs a training stage that a configuration file describes."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from deepgen_jax.cli.processes import ProcessOptions
from deepgen_jax.errors import DeepGenError
from deepgen_jax.local_paths import LocalPath


@dataclass(frozen=True)
class TrainCommand:
    """Trains, continuing from the newest checkpoint in the run's folder if there is one.

    On SIGTERM or Ctrl-C the current step is finished and saved; the same command continues from there.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """A .py file with `get_config()`, or the name of a packaged one: pretrain, sft, grpo or distill."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="KEY=VALUE")] = field(default=())
    """Changes to it, such as steps=1000 optimizer.learning_rate=2e-5 data.sources.pairs.path=/data/pairs.json."""
    resume_from: Annotated[str, arg(metavar="STEP")] = ""
    """Continue from the checkpoint of this step, or from the one before the newest (previous); later ones are put
    aside."""
    show: bool = False
    """Print the whole configuration as JSON and exit."""
    compilation_cache: LocalPath | None = None
    """Folder that keeps compiled programs, or "off". Default: $DEEPGEN_CACHE_DIR, else ~/.cache/deepgen-jax/xla."""
    stopped_status: Annotated[int, arg(metavar="STATUS")] = 0
    """Exit status after SIGTERM, 0 to 255; not 0 where a scheduler restarts only what failed."""
    processes: Annotated[ProcessOptions, OmitArgPrefixes] = field(default_factory=ProcessOptions)

    def run(self) -> int:
        """Trains; returns the exit status."""
        from deepgen_jax import settings
        from deepgen_jax.training import config_files

        config = settings.apply(config_files.load_config(self.config), self.overrides)
        if not 0 <= self.stopped_status <= 255:
            raise DeepGenError(f"--stopped-status is {self.stopped_status}; give one from 0 to 255")
        if self.show:
            print(json.dumps(settings.to_json(config), indent=2))
            return 0
        for name in ("model", "out"):
            if not getattr(config, name):
                raise DeepGenError(f"{name} is not set; give {name}=FOLDER")

        import jax

        from deepgen_jax.cli.stopping import Stop
        from deepgen_jax.inference.cache import enable_compilation_cache
        from deepgen_jax.parallel.mesh import make_mesh
        from deepgen_jax.stores.run_folder import recorded_choice
        from deepgen_jax.training.auto_settings import Devices
        from deepgen_jax.training.loop import train
        from deepgen_jax.training.stage import settings_for

        # Several CPU devices share one pool of threads: programs in flight at once, each waiting for all devices in a
        # collective, would deadlock.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        first = self.processes.join()
        enable_compilation_cache(self.compilation_cache)
        choice = settings_for(config, Devices.of(jax.devices()), recorded_choice(Path(config.out)))
        if not self.processes.same(choice):
            raise DeepGenError(
                "processes chose different mesh, remat or gather_frozen; let all see the run's folder, or set the three"
            )
        mesh = make_mesh(choice.mesh)

        def say(text: str) -> None:
            if first:
                print(f"deepgen: {text}", file=sys.stderr, flush=True)

        evaluator = None
        if config.eval.every:
            from deepgen_jax.evaluation.in_training import InTraining

            evaluator = InTraining(config.eval, Path(config.out), average=config.ema_decay is not None)
        say(f"{choice.devices}, {choice}")
        with self.processes.peer_watch(), Stop(graceful=True, unit="step") as stop:
            outcome = train(config, mesh, stop, say, self.resume_from, evaluator, choice)
        if outcome.skipped:
            say(f"{outcome.skipped} steps were skipped: their loss or gradient was not finite")
        if not outcome.finished:
            say(f"stopped by {stop.name} after step {outcome.step}, which is saved; the same command continues from it")
            return self.stopped_status if stop.signum == signal.SIGTERM else 128 + signal.SIGINT
        say(f"done: {outcome.step} steps in {config.out}")
        return 0
