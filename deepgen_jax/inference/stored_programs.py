"""Programs that are compiled in the background and kept on disk, ready to run.

JAX's own compilation cache is asked only after a program has been traced and lowered, which for a small model takes
longer than everything after it. `stored_jit` keeps the executable under a key of what tracing would read instead: the
function, the shapes and static values of its arguments, the sources of this package, versions, device and settings.

Like JAX's cache the files hold machine code, and are as trustworthy as whoever can write to their folder.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import pickle
import platform
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import SingleDeviceSharding

from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import write_bytes
from deepgen_jax.inference.cache import cache_reads
from deepgen_jax.parallel.jit_options import device_jit
from deepgen_jax.user_warnings import warn_user

#: Folder of the stored programs inside that of the compilation cache, and their suffix.
FOLDER, SUFFIX = "programs", ".program"
#: Bytes of stored programs; the ones unused for longest are removed beyond it.
MAX_BYTES = 512 * 2**20

#: Settings of JAX that change programs and that a thread may change.
_THREAD_SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_debug_nans", "jax_debug_infs", "jax_enable_checks",
)  # fmt: skip
#: Parts of the names of settings that do not change programs.
_IRRELEVANT = ("cache", "log", "traceback", "transfer_guard", "thread_guard", "pprint")


class _Signature(NamedTuple):
    """Equal for calls that one program serves.

    Attributes:
      static: names and values of the static arguments, sorted.
      tree: structure of the others.
      shapes: shape, dtype and weak type of each array.
      device: of the arrays.
      settings: values of `_THREAD_SETTINGS`.
    """

    static: tuple[tuple[str, Hashable], ...]
    tree: Any
    shapes: tuple[tuple[Any, ...], ...]
    device: jax.Device
    settings: tuple[Any, ...]


class _Call(NamedTuple):
    """A call's arguments without the static ones, arrays or their shapes."""

    args: list[Any]
    kwargs: dict[str, Any]
    signature: _Signature


class _Program:
    """A program that exists or is being made: the executable, and the shapes of its outputs, which come earlier."""

    def __init__(self) -> None:
        self.executable: Future[Callable[..., Any]] = Future()
        self.outputs: Future[Any] = Future()

    def fail(self, error: BaseException) -> None:
        """Raises ``error`` where the program is waited for."""
        for future in (self.executable, self.outputs):
            if not future.done():
                future.set_exception(error)


class stored_jit:
    """``jax.jit`` for programs of inference: compiled once whichever threads ask, and kept on disk.

    That holds for arrays on one device. Calls with traced arrays or arrays on several devices, and calls while
    ``jax_disable_jit`` is set, go to ``jax.jit``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        static_argnames: tuple[str, ...] = (),
        large: bool = False,
        keep: Callable[[Mapping[str, Any]], bool] = lambda static: True,
    ) -> None:
        """Wraps a function.

        Args:
          function: to compile.
          static_argnames: as for ``jax.jit``; their `repr` must describe them.
          large: compile with the device's options, see `device_jit`.
          keep: whether a program with these static arguments may be kept on disk.
        """
        functools.update_wrapper(self, function)
        self._function, self._static, self._large = function, frozenset(static_argnames), large
        self._keep = keep
        self._names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        self._programs: dict[Hashable, _Program] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program."""
        call = self._split(args, kwargs)
        if call is None:
            return self._jitted(*args, **kwargs)
        program = self._programs.get(call.signature) or self._find(call, args, kwargs, background=False)
        return program.executable.result()(*call.args, **call.kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Begins to load or compile the program in the background.

        Args:
          args, kwargs: of a later call, with ``jax.ShapeDtypeStruct`` in place of arrays.

        Returns:
          the shapes of its outputs; None if the later call will not use a program of this class.
        """
        call = self._split(args, kwargs)
        if call is None:
            return None
        place = SingleDeviceSharding(call.signature.device)
        outputs = self._find(call, args, kwargs, background=True).outputs.result()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), outputs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The lowered program for arguments or their shapes."""
        return self._jitted.lower(*args, **kwargs)

    @functools.cached_property
    def _jitted(self) -> Any:
        jit: Callable[..., Any] = device_jit if self._large else jax.jit
        return jit(self._function, static_argnames=tuple(self._static))

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The call, None if it is one for ``jax.jit``."""
        if jax.config.values["jax_disable_jit"]:
            return None
        static: dict[str, Any] = {}
        arrays: list[Any] = []
        keywords: dict[str, Any] = {}
        for place, value in enumerate(args):
            name = self._names[place] if place < len(self._names) else ""
            if name in self._static:
                static[name] = value
            else:
                arrays.append(value)
        for name, value in kwargs.items():
            (static if name in self._static else keywords)[name] = value
        leaves, tree = jax.tree.flatten((arrays, keywords))
        shapes: list[tuple[Any, ...]] = []
        devices: set[jax.Device] | None = None
        for leaf in leaves:
            if isinstance(leaf, jax.core.Tracer):
                return None
            if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                if leaf.sharding is not None:
                    there = leaf.sharding.device_set
                    if len(there) != 1 or there != (devices or there):
                        return None
                    devices = there
                shapes.append((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)))
            elif isinstance(leaf, np.ndarray | np.generic):
                shapes.append((leaf.shape, leaf.dtype, False))
            else:
                return None
        if devices is None:
            default = jax.config.values["jax_default_device"]
            devices = {default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]}
        settings = tuple(map(jax.config.values.get, _THREAD_SETTINGS))
        signature = _Signature(tuple(sorted(static.items())), tree, tuple(shapes), next(iter(devices)), settings)
        return _Call(arrays, keywords, signature)

    def _find(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any], background: bool) -> _Program:
        with self._lock:
            program = self._programs.get(call.signature)
            if program is not None:
                return program
            program = self._programs[call.signature] = _Program()

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                # Whatever it is, nobody may wait for this program, and the next call tries anew.
                with self._lock:
                    del self._programs[call.signature]
                program.fail(error)
                if not background:
                    raise

        guarded(lambda: self._make(program, call, args, kwargs, guarded if background else None))
        return program

    def _make(
        self,
        program: _Program,
        call: _Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        guarded: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        """Loads or compiles; with ``guarded``, what takes long outside of Python is left to other threads."""
        path = _path(self._function, call.signature) if self._keep(dict(call.signature.static)) else None
        stored = None if path is None else _read(path)

        def compiled(lowered: jax.stages.Lowered) -> None:
            # On CPUs an executable from JAX's cache cannot be stored; on other devices that is not known.
            cache_reads.skip, cache_reads.hit = path is not None and call.signature.device.platform == "cpu", False
            try:
                executable = lowered.compile()
            finally:
                cache_reads.skip = False
            program.executable.set_result(executable)
            if path is not None and not cache_reads.hit:
                _write(path, executable)

        def loaded() -> None:
            assert stored is not None
            executable = _load(stored, call.signature.device)
            if executable is not None:
                program.executable.set_result(executable)
                return
            if path is not None:
                path.unlink(missing_ok=True)
            compiled(self._jitted.lower(*args, **kwargs))

        if stored is not None:
            program.outputs.set_result(stored.outputs)
            work = loaded
        else:
            traced = self._jitted.trace(*args, **kwargs)
            program.outputs.set_result(traced.out_info)
            work = functools.partial(compiled, traced.lower())
        if guarded is None:
            work()
        else:
            _background().submit(guarded, work)


class _Stored(NamedTuple):
    """Content of a file: the executable with the structures of its arguments and results, and their shapes."""

    payload: bytes
    arguments: Any
    results: Any
    outputs: Any


_folder: Path | None = None


def keep_programs(folder: Path | None) -> None:
    """Keeps programs in the folder ``programs`` of that of the compilation cache; None keeps none."""
    global _folder
    _folder = folder and folder / FOLDER


def _read(path: Path) -> _Stored | None:
    """A stored program; None if there is none, or it cannot be read, and is then removed."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    try:
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            raise ValueError("incomplete")
        return _Stored(*pickle.loads(body))
    except Exception:  # of pickle, of many types
        path.unlink(missing_ok=True)
        return None


def _load(stored: _Stored, device: jax.Device) -> Callable[..., Any] | None:
    """The executable on a device; None where it does not load."""
    try:
        return serialize_executable.deserialize_and_load(
            stored.payload, stored.arguments, stored.results, device.client, [device]
        )
    except Exception:  # of XLA and pickle, of many types, such as for another processor
        return None


def _write(path: Path, executable: Any) -> None:
    """Stores a program, unless it is of a kind that cannot be."""
    try:
        payload, arguments, results = serialize_executable.serialize(executable)
        outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), executable.out_info)
        body = pickle.dumps(tuple(_Stored(payload, arguments, results, outputs)))
    except Exception:  # of XLA and pickle, of many types: some backends cannot, nor some types of arrays
        return
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, hashlib.sha256(body).digest() + body)
        _remove_oldest(path.parent, MAX_BYTES)
    except (OSError, DeepGenError) as error:
        warn_user(f"a compiled program is not kept: {error}")


def _remove_oldest(folder: Path, most: int) -> None:
    """Removes the programs unused for longest until the rest takes at most ``most`` bytes."""
    files = sorted(((path.stat(), path) for path in folder.glob(f"*{SUFFIX}")), key=lambda entry: -entry[0].st_mtime)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > most:
            path.unlink(missing_ok=True)


def _path(function: Callable[..., Any], signature: _Signature) -> Path | None:
    """The file of a program; None if programs are not kept, or one cannot be told from others by its text."""
    if _folder is None or jax.process_count() > 1:
        return None
    where, name = function.__module__, function.__qualname__
    text = repr((where, name, signature.static, str(signature.tree), signature.shapes, _environment(signature.device)))
    if " object at 0x" in text:
        return None
    return _folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}{SUFFIX}"


def _environment(device: jax.Device) -> tuple[Any, ...]:
    """Everything else that a program depends on."""
    settings = sorted(
        (name, repr(value))
        for name, value in jax.config.values.items()
        if not any(part in name for part in _IRRELEVANT)
    )
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    place = (device.platform, device.device_kind, device.id, device.client.platform_version, jax.local_device_count())
    return _fixed_environment(), place, flags, settings


@functools.cache
def _fixed_environment() -> tuple[str, ...]:
    """Versions, this package's sources, and the processor."""
    sources, root = hashlib.sha256(), Path(__file__).parents[1]
    # What programs of inference are made of; the rest may change without making them anew.
    for part in ("*.py", "flow/**/*.py", "inference/**/*.py", "models/**/*.py", "parallel/**/*.py"):
        for path in sorted(root.glob(part)):
            sources.update(path.read_bytes())
    versions = [version(name) for name in ("jax", "jaxlib", "flax")]
    return (*versions, sources.hexdigest(), platform.machine(), _processor())


def _processor() -> str:
    """The processor's instruction sets, where the system lists them."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()


def in_background(work: Callable[[], None]) -> Future[None]:
    """Runs something in the threads that compile programs, such as calls of `stored_jit.prepare`."""
    return _background().submit(work)


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "compile")
