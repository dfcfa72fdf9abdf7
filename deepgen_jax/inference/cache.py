"""The persistent compilation cache: a program that was compiled once is loaded the next time."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from deepgen_jax.local_paths import refuse_url
from deepgen_jax.user_warnings import warn_user

#: Names the folder, or "off".
ENVIRONMENT = "DEEPGEN_CACHE_DIR"
DEFAULT = Path("~/.cache/deepgen-jax/xla")


def enable_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keeps compiled programs on disk for later runs of the same model, sizes and JAX version.

    A folder that cannot be written is no error: a notice says so and programs are compiled anew.

    Args:
      folder: where; "off" for nowhere. By default ``$DEEPGEN_CACHE_DIR``, then JAX's own setting
        (``$JAX_COMPILATION_CACHE_DIR``), then ``~/.cache/deepgen-jax/xla``.

    Returns:
      the folder in use, or None (for several processes on CPUs, too).
    """
    import jax

    from deepgen_jax.inference.stored_programs import keep_programs

    choice = os.fspath(folder) if folder is not None else os.environ.get(ENVIRONMENT)
    if not choice:
        choice = jax.config.values["jax_compilation_cache_dir"] or str(DEFAULT)
    # A CPU program that is loaded, not compiled, no longer orders its collectives, and those of several processes then
    # meet the wrong ones.
    if choice == "off" or (jax.process_count() > 1 and jax.default_backend() == "cpu"):
        jax.config.update("jax_enable_compilation_cache", False)
        keep_programs(None)
        return None
    refuse_url(choice, "the folder of compiled programs")
    path = Path(choice).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        warn_user(f"compiled programs are not kept: {path} cannot be used ({error.strerror or error})")
        keep_programs(None)
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's default of one second leaves out the many small programs, which together take as long as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    _wrap_cache_reads()
    keep_programs(path)
    return path


class CacheReads(threading.local):
    """How the current thread reads JAX's cache.

    Attributes:
      skip: compile even what the cache holds.
      hit: whether the last program came from the cache.
    """

    skip = False
    hit = False


#: An executable that came from the cache cannot be stored again on CPUs: it would lack its machine code.
cache_reads = CacheReads()


def _wrap_cache_reads() -> None:
    """Makes JAX follow `cache_reads`, and remove entries that it cannot read, so that they are written again.

    A process that is killed while it writes leaves half an entry. JAX would warn of it at every start, compile the
    program, and keep the damaged entry, as there is one of that key.
    """
    import jax

    # There is no public hook. A test fails where a new release has another name or signature.
    from jax._src import compilation_cache

    read = getattr(compilation_cache, "get_executable_and_time", None)
    if read is None or hasattr(read, "drops_unreadable_entries"):
        return

    def read_or_drop(key: str, *args: Any, **kwargs: Any) -> Any:
        cache_reads.hit = False
        if cache_reads.skip:
            return None, None
        try:
            executable, seconds = read(key, *args, **kwargs)
            cache_reads.hit = executable is not None
            return executable, seconds
        except Exception as error:  # of decompression or XLA, of many types
            folder = jax.config.values["jax_compilation_cache_dir"]
            with contextlib.suppress(OSError):
                Path(folder, f"{key}-cache").unlink()
            warn_user(f"a compiled program in {folder} could not be read ({type(error).__name__}); it is made again")
            return None, None

    read_or_drop.drops_unreadable_entries = True  # type: ignore[attr-defined]
    compilation_cache.get_executable_and_time = read_or_drop  # type: ignore[assignment]
