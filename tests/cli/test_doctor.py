"""``deepgen doctor``: every check in its good and its bad case."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.services import wait_until

from deepgen_jax.cli import doctor, extras
from deepgen_jax.cli.doctor import TESTED, Finding
from deepgen_jax.cli.main import main
from deepgen_jax.serving.app import create_app
from deepgen_jax.serving.server import BackgroundServer

DEVICES = '{"backend": "cpu", "processes": 1, "devices": [{"kind": "cpu", "platform": "cpu", "memory_bytes": null}]}'


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    """No process is started for the devices."""
    done = subprocess.CompletedProcess([], 0, DEVICES, "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: done)


def report(capsys, *words) -> tuple[int, dict[str, Finding]]:
    status = main(["doctor", "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (status == 0)
    return status, {finding["check"]: Finding(**finding) for finding in told["findings"]}


def test_a_real_machine(capsys):
    status, findings = report(capsys)
    assert status == 0
    assert findings["devices"].data["devices"]
    assert findings["memory"].data["total_bytes"] > findings["memory"].data["available_bytes"] > 0
    assert set(TESTED) <= set(findings)
    assert {f"extra {name}" for name in extras.EXTRAS} <= set(findings)


def test_text_for_people(quick, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok    ", "note  ")) for line in lines)
    assert any("compilation cache" in line for line in lines)


def test_untested_versions_are_a_note(quick, capsys, monkeypatch):
    monkeypatch.setitem(TESTED, "jax", ("0.1.0",))
    _, findings = report(capsys)
    assert findings["jax"].status == "note"
    assert "tested with 0.1.0" in findings["jax"].detail


def test_a_missing_extra_names_command_and_fix(quick, capsys, monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "serve", ("starlette", "no_such_module"))
    status, findings = report(capsys)
    assert status == 0
    assert findings["extra serve"].data["missing"] == ["no_such_module"]
    assert "deepgen serve" in findings["extra serve"].detail
    assert "pip install 'deepgen-jax[serve]'" in findings["extra serve"].detail
    assert main(["serve"]) == 2
    assert "deepgen serve needs no_such_module; install" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for extra in extras.EXTRAS for name in extras.EXTRAS[extra]])
def test_extras_are_those_of_the_package(name):
    """Each module belongs to a package that setup.py lists."""
    text = (Path(__file__).parents[2] / "setup.py").read_text().lower().replace("-", "_")
    assert f'"{name.lower()}' in text


def test_jax_that_does_not_start(capsys, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no such platform")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: done)
    status, findings = report(capsys)
    assert status == 1
    assert "no such platform" in findings["devices"].detail

    def hang(*args, **options):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    status, findings = report(capsys)
    assert status == 1
    assert "another process may hold the devices" in findings["devices"].detail


def test_cache(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPGEN_CACHE_DIR", str(tmp_path))
    (tmp_path / "jit_f-0-cache").write_bytes(b"x" * 5000)
    _, findings = report(capsys)
    assert findings["compilation cache"].data["programs"] == 1
    assert findings["compilation cache"].data["bytes"] >= 5000
    monkeypatch.setenv("DEEPGEN_CACHE_DIR", "off")
    assert report(capsys)[1]["compilation cache"].status == "note"


def test_servers_and_storage(quick, capsys, tmp_path):
    app = create_app(FakeEngine)
    with BackgroundServer(app) as server:
        wait_until(lambda: app.state.service.state == "ready")
        status, findings = report(capsys, "--server", server.url, "--judge", f"{server.url}/v1")
        assert (status, findings["server"].status, findings["judge"].status) == (0, "ok", "ok")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    status, findings = report(capsys, "--server", f"http://127.0.0.1:{port}", "--storage", "memory://")
    assert (status, findings["server"].status, findings["storage"].status) == (1, "failed", "ok")
    status, findings = report(capsys, "--storage", f"file://{tmp_path}/absent")
    assert (status, findings["storage"].status) == (1, "failed")


@pytest.mark.parametrize("words", [["--server", "localhost"], ["--judge", "ftp://x"], ["--storage", "/tmp"]])
def test_addresses_that_are_none(quick, capsys, words):
    assert main(["doctor", *words]) == 2
    assert capsys.readouterr().err.startswith("deepgen: error: ")
