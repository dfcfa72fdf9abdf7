"""``deepgen doctor``: what this machine has, and what is missing for which command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from deepgen_jax import __version__
from deepgen_jax.cli.extras import EXTRAS, USES, missing
from deepgen_jax.errors import DeepGenError
from deepgen_jax.files import disk_usage, size

#: Versions that the test suite runs with, on Python 3.11 and on 3.12.
TESTED: dict[str, tuple[str, ...]] = {
    "python": ("3.11", "3.12"),
    "jax": ("0.10.2", "0.12.0"),
    "jaxlib": ("0.10.2", "0.12.0"),
    "flax": ("0.12.8", "0.12.12"),
    "optax": ("0.2.8",),
    "orbax-checkpoint": ("0.12.8",),
    "numpy": ("2.4.6", "2.5.5"),
    "transformers": ("5.24.0",),
    "pillow": ("13.0.0",),
    "tyro": ("1.0.17",),
}
#: Longest wait for JAX to start, and for a server to answer, in seconds.
_JAX_SECONDS, _HTTP_SECONDS = 120.0, 5.0

_DEVICES = """
import json, jax
devices = [{"kind": d.device_kind, "platform": d.platform,
            "memory_bytes": (d.memory_stats() or {}).get("bytes_limit")} for d in jax.local_devices()]
print(json.dumps({"backend": jax.default_backend(), "processes": jax.process_count(), "devices": devices}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      check: what was looked at.
      status: "ok", "note" for what may be fine, or "failed".
      detail: what was found, and the fix where one is needed.
      data: the same for programs.
    """

    check: str
    status: str
    detail: str
    data: Any = None


@dataclass(frozen=True)
class DoctorCommand:
    """Reports devices, versions, compilation cache, memory and missing extras; asks servers and storage if named.

    The exit status is 1 where something failed.
    """

    json: bool = False
    """Print one JSON object instead."""
    judge: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """Judge to ask, http://HOST:PORT, as in rewards.NAME.url."""
    server: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """`deepgen serve` to ask, http://HOST:PORT."""
    storage: Annotated[str | None, arg(metavar="URL", help_behavior_hint="")] = None
    """Remote folder to list, such as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER."""

    def run(self) -> int:
        """Prints; returns the exit status."""
        findings = []
        for finding in self.findings():
            findings.append(finding)
            if not self.json:
                mark = {"ok": "ok    ", "note": "note  ", "failed": "FAILED"}[finding.status]
                print(f"{mark}  {finding.check:<18} {finding.detail}", flush=True)
        failed = any(finding.status == "failed" for finding in findings)
        if self.json:
            print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 1 if failed else 0

    def findings(self) -> Iterator[Finding]:
        """All checks in turn."""
        yield from versions()
        yield devices()
        yield memory()
        yield cache()
        for extra in EXTRAS:
            yield extra_finding(extra)
        if self.judge is not None:
            yield answers("judge", f"{_base(self.judge, '--judge')}/v1/models")
        if self.server is not None:
            yield answers("server", f"{_base(self.server, '--server')}/ready")
        if self.storage is not None:
            yield storage(self.storage)


def versions() -> Iterator[Finding]:
    """The package and what it depends on, against the versions that were tested."""
    found = {"python": platform.python_version()}
    for name in TESTED:
        if name != "python":
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                yield Finding(name, "failed", f"not installed; run pip install {name}", {"installed": None})
    yield Finding("deepgen-jax", "ok", f"{__version__} on {platform.platform()}", {"version": __version__})
    for name, version in found.items():
        tested = TESTED[name]
        data = {"installed": version, "tested": list(tested)}
        if any(version == known or version.startswith(f"{known}.") for known in tested):
            yield Finding(name, "ok", version, data)
        else:
            yield Finding(name, "note", f"{version}; tested with {' and '.join(tested)}", data)


def devices() -> Finding:
    """Devices of JAX; queried in a subprocess, because a device in use elsewhere can block forever."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=_JAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        fix = "another process may hold the devices; end it, or set JAX_PLATFORMS=cpu"
        return Finding("devices", "failed", f"JAX did not start within {_JAX_SECONDS:.0f} s; {fix}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        return Finding("devices", "failed", f"JAX does not start: {reason}; check the jax[cuda12] or jax[tpu] install")
    data = json.loads(done.stdout.strip().splitlines()[-1])
    kinds = [device["kind"] for device in data["devices"]]
    shown = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    limits = [device["memory_bytes"] for device in data["devices"] if device["memory_bytes"]]
    room = f", {size(min(limits))} each" if limits else ""
    unused = [] if data["backend"] != "cpu" else _idle_accelerators()
    if unused:
        detail = f"{shown}, although there is {' and '.join(unused)}; install deepgen-jax[cuda] or deepgen-jax[tpu]"
        return Finding("devices", "note", detail, data)
    return Finding("devices", "ok", f"{data['backend']}: {shown}{room}", data)


def _idle_accelerators() -> list[str]:
    """Accelerators that the system shows, for when JAX uses the CPU."""
    names = {"/dev/nvidia0": "an NVIDIA GPU", "/dev/accel0": "a TPU", "/dev/vfio/0": "a TPU"}
    return list(dict.fromkeys(name for path, name in names.items() if os.path.exists(path)))


def memory() -> Finding:
    """Host memory and disk space."""
    data: dict[str, int] = {"disk_free_bytes": shutil.disk_usage(Path.cwd()).free}
    text = f"{size(data['disk_free_bytes'])} free on the disk of this folder"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        data["total_bytes"] = page * os.sysconf("SC_PHYS_PAGES")
        data["available_bytes"] = page * os.sysconf("SC_AVPHYS_PAGES")
        text = f"{size(data['total_bytes'])}, {os.cpu_count()} cores; {text}"
    return Finding("memory", "ok", text, data)


def cache() -> Finding:
    """The folder of compiled programs."""
    from deepgen_jax.inference.cache import DEFAULT, ENVIRONMENT

    choice = os.environ.get(ENVIRONMENT) or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(DEFAULT)
    if choice == "off":
        return Finding("compilation cache", "note", f"off ({ENVIRONMENT}); every start compiles all programs")
    path = Path(choice).expanduser()
    if not path.is_dir():
        return Finding(
            "compilation cache",
            "ok",
            f"{path}, empty",
            {"folder": str(path), "bytes": 0, "programs": 0, "ready_programs": 0},
        )
    if not os.access(path, os.W_OK):
        fix = f"set {ENVIRONMENT} to another folder"
        return Finding("compilation cache", "failed", f"{path} cannot be written; {fix}", {"folder": str(path)})
    programs, ready, used = (
        len(list(path.glob("*-cache"))),
        len(list(path.glob("programs/*.program"))),
        disk_usage(path),
    )
    data = {"folder": str(path), "bytes": used, "programs": programs, "ready_programs": ready}
    text = f"{path}: {programs} programs, {ready} ready to run without tracing, {size(used)}"
    return Finding("compilation cache", "ok", text, data)


def extra_finding(extra: str) -> Finding:
    """Whether the packages of an extra are installed."""
    lacking, name = missing(extra), f"extra {extra}"
    data = {"missing": lacking, "needed_for": USES[extra]}
    if lacking:
        fix = f"pip install 'deepgen-jax[{extra}]'"
        return Finding(name, "note", f"{', '.join(lacking)} missing, for {USES[extra]}: {fix}", data)
    return Finding(name, "ok", f"for {USES[extra]}", data)


def answers(check: str, url: str) -> Finding:
    """Whether a server answers a GET request."""
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as response:
            return Finding(check, "ok", f"{url} answers", {"url": url, "status": response.status})
    except urllib.error.HTTPError as error:
        data = {"url": url, "status": error.code}
        if error.code in (401, 403):
            return Finding(check, "note", f"{url} answers with status {error.code}; it wants a key", data)
        return Finding(check, "failed", f"{url} answers with status {error.code}", data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(check, "failed", f"{url} does not answer ({reason}); check address and port", {"url": url})


def storage(url: str) -> Finding:
    """Whether a remote folder can be listed."""
    if "://" not in url:
        raise DeepGenError(f"--storage {url} is no URL; write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER")
    try:
        import fsspec
    except ImportError:
        return Finding("storage", "failed", "fsspec is missing; pip install 'deepgen-jax[data]'", {"url": url})
    try:
        files, path = fsspec.core.url_to_fs(url)
        count = len(files.ls(path))
    except Exception as error:
        # Each file system raises its own types, for missing packages, keys and networks alike.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Finding("storage", "failed", f"{url} cannot be listed ({reason})", {"url": url})
    return Finding("storage", "ok", f"{url}: {count} entries", {"url": url, "entries": count})


def _base(url: str, option: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise DeepGenError(f"{option} {url} is no address of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")
