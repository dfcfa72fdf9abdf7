"""Configuration files: Python files whose ``get_config()`` returns a run's configuration, packaged ones by name."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
import types
from pathlib import Path

from deepgen_jax.errors import DeepGenError, did_you_mean
from deepgen_jax.registry import errors_of, load_file
from deepgen_jax.training.run_config import RunConfig

#: Package that holds one configuration file for each published stage.
CONFIGS = "deepgen_jax.configs"
# A file with several configurations, and its table of them by name.
_ROUNDS_FILE, ROUNDS = "rounds", "ROUNDS"


def load_config(path_or_name: str) -> RunConfig:
    """The result of ``get_config()`` in a Python file or in a packaged configuration such as "pretrain".

    Raises:
      DeepGenError: there is no such file, it fails (the message has the line), or it returns something else.
    """
    path = _config_file(path_or_name)
    try:
        code = path.read_bytes()
    except OSError as error:
        raise DeepGenError(f"{path} cannot be read: {error.strerror or error}") from error
    module = types.ModuleType(f"deepgen_config_{path.stem}")
    module.__file__ = str(path)
    # Dataclasses that the file defines look their annotations up in the module of their name.
    sys.modules[module.__name__] = module
    with errors_of(path):
        exec(compile(code, str(path), "exec"), module.__dict__)
    rounds = getattr(module, ROUNDS, None)
    named = rounds.get(path_or_name.rpartition("/")[2]) if path.stem == _ROUNDS_FILE and rounds else None
    get_config = named or getattr(module, "get_config", None)
    if not callable(get_config):
        raise DeepGenError(f"{path} has no function get_config(); define one that returns a RunConfig")
    with errors_of(path):
        config = get_config()
    if not isinstance(config, RunConfig):
        raise DeepGenError(f"{path}: get_config() returned a {type(config).__name__}; return a RunConfig")
    return config


def packaged_configs() -> dict[str, Path]:
    """Files of the packaged configurations by name; those in a folder go by its name, too: "nano/vae".

    The file ``rounds.py`` of a folder holds several, by name in its ``ROUNDS``: "nano/sft_words".
    """
    spec = importlib.util.find_spec(CONFIGS)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return dict(sorted(_configs_in(Path(folders[0])).items())) if folders else {}


def _configs_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    found: dict[str, Path] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        name = f"{prefix}{module.name}"
        if module.name == _ROUNDS_FILE:
            path = folder / f"{module.name}.py"
            rounds = getattr(load_file(path, "packaged configurations"), ROUNDS)
            found |= {f"{prefix}{name}": path for name in rounds}
            continue
        found |= _configs_in(folder / module.name, f"{name}/") if module.ispkg else {name: folder / f"{module.name}.py"}
    return found


def _config_file(path_or_name: str) -> Path:
    path, packaged = Path(path_or_name), packaged_configs()
    if path_or_name in packaged:
        return packaged[path_or_name]
    if path.suffix == ".py" and path.is_file():
        return path
    if path.exists():
        raise DeepGenError(f"{path} is no Python file; name one that ends with .py and defines get_config()")
    what = "no such file" if path.suffix == ".py" or os.sep in path_or_name else "no configuration of that name"
    raise DeepGenError(f"{path_or_name}: {what}{did_you_mean(path.stem, packaged)}")
