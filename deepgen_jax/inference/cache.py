"""The persistent compilation cache: a program that was compiled once is loaded the next time."""

from __future__ import annotations

import os
from pathlib import Path

from deepgen_jax.files import refuse_url
from deepgen_jax.user_warnings import warn_user

#: Names the folder, or "off".
ENVIRONMENT = "DEEPGEN_CACHE_DIR"
DEFAULT = Path("~/.cache/deepgen-jax/xla")


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keeps compiled programs on disk for later runs of the same model, sizes and JAX version.

    A folder that cannot be written is no error: a notice says so and programs are compiled anew.

    Args:
      folder: where; "off" for nowhere. By default ``$DEEPGEN_CACHE_DIR``, then what JAX itself has been told
        (``$JAX_COMPILATION_CACHE_DIR``), then ``~/.cache/deepgen-jax/xla``.

    Returns:
      the folder in use, or None (for several processes on CPUs, too).
    """
    import jax

    choice = os.fspath(folder) if folder is not None else os.environ.get(ENVIRONMENT)
    if not choice:
        choice = jax.config.values["jax_compilation_cache_dir"] or str(DEFAULT)
    # A CPU program that is loaded, not compiled, no longer orders its collectives, and those of several processes then
    # meet the wrong ones.
    if choice == "off" or (jax.process_count() > 1 and jax.default_backend() == "cpu"):
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    refuse_url(choice, "the folder of compiled programs")
    path = Path(choice).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        warn_user(f"compiled programs are not kept: {path} cannot be used ({error.strerror or error})")
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's default of one second leaves out the many small programs, which together take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path
