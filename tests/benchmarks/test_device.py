"""The device script: parts are isolated, results kept as they come, and the page marks what was not measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flax.traverse_util import flatten_dict

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


device, tables = script("device"), script("device_table")


def python(code):
    return [sys.executable, "-c", f"import json, sys, time\ndef say(**x): print(json.dumps(x), flush=True)\n{code}"]


def run(code, limit=30.0, **settings):
    found = []
    device.run_part("part", python(code), limit, found.append, **settings)
    return found


def test_results_are_passed_on_as_they_come():
    seen = []
    start = time.monotonic()
    code = 'say(name="a", seconds=1)\ntime.sleep(1)\nsay(name="b", seconds=2)'
    device.run_part("part", python(code), 30.0, lambda result: seen.append((result, time.monotonic() - start)))
    (first, at), (second, later) = seen
    assert first == {"part": "part", "status": "ok", "name": "a", "seconds": 1}
    assert second["name"] == "b"
    assert later - at > 0.9


def test_output_of_libraries_is_no_result():
    assert run('print("warning: {")\nprint("[1]")\nprint(3)\nsay(name="a")') == [
        {"part": "part", "status": "ok", "name": "a"}
    ]


def test_what_a_part_measured_before_it_failed_is_kept(tmp_path):
    log = tmp_path / "log"
    one, failure = run('say(name="a")\nraise ValueError("out of memory")', log=log)
    assert one["status"] == "ok"
    assert failure == {"part": "part", "name": "", "status": "failed", "reason": "exit status 1"}
    assert "out of memory" in log.read_text(encoding="utf-8")


def test_a_part_that_hangs_is_stopped_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    code = f'import subprocess\nsubprocess.Popen([sys.executable, "-c", {child!r}])\nsay(name="a")\ntime.sleep(60)'
    start = time.monotonic()
    one, failure = run(code, limit=2.0)
    assert time.monotonic() - start < 30
    assert (one["name"], failure["status"], failure["reason"]) == ("a", "failed", "stopped after 2 s")
    time.sleep(max(6 - (time.monotonic() - start), 0))
    assert not marker.exists()


def test_a_part_may_report_its_own_failure():
    (found,) = run('say(name="a", status="failed", reason="no torch")')
    assert (found["status"], found["reason"]) == ("failed", "no torch")


def test_parts_go_on_after_a_failure_and_stop_when_time_is_out(tmp_path):
    report = device.Report(tmp_path / "out.json", "tiny")
    commands = {"bad": python("sys.exit(3)"), "good": python('say(environment={"device": 1})\nsay(name="a")')}
    device.run_all(report, commands, minutes=5, log=tmp_path / "log")
    device.run_all(report, {"late": python('say(name="never")')}, minutes=0.1, log=tmp_path / "log")
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert content["environment"] == {"device": 1}
    assert [(each["part"], each["status"], each.get("reason")) for each in content["results"]] == [
        ("bad", "failed", "exit status 3"), ("good", "ok", None), ("late", "skipped", "no time left")
    ]  # fmt: skip
    assert not list(tmp_path.glob("*.part"))


def test_the_page_shows_its_data():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page_with(page, tables.read()) == page, "run python benchmarks/device_table.py"
    assert len(page.encode()) <= 10_240


def test_rows_without_a_result_are_not_measured():
    text = tables.tables({})
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    heads = 3
    assert sum("not measured" in row for row in rows) == len(rows) - heads
    failed = {"results": [{"part": "few", "name": "sampler, batch 1", "status": "failed", "reason": "x"}]}
    assert tables.tables(failed) == text


def test_rehearsals_are_not_kept(tmp_path, capsys):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({"size": "tiny", "environment": {}, "results": []}), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        tables.main(["--add", str(file)])
    assert exit_.value.code == 2
    assert "a rehearsal; only --print it" in capsys.readouterr().err


def test_results_become_rows():
    memory = {"host_bytes": 2**31, "device_bytes": 2**34}
    seconds = {"end_to_end": {"median": 0.5}}
    ours = {"seconds": seconds, "peak_memory": memory}
    peer = {"seconds": {"end_to_end": {"median": 0.8}}, "peer_seconds_over_ours": {"end_to_end": {"median": 1.6}}}
    content = {
        "size": "full",
        "environment": {"device": {"kind": "H100"}, "versions": {"jax": "0.10.2"}, "date": "2026-01-02T03"},
        "results": [
            {"part": part, "name": name, "status": "ok", **values}
            for part, name, values in (
                ("generate", "ours, batch 8", ours),
                ("generate", "PyTorch eager, batch 8", {**ours, "peer": peer}),
                ("generate", "cache 0.08, batch 1", {"seconds": 0.25, "evaluated": 0.5}),
                ("update", "update", {"seconds": 2.0, "mfu": 0.4, "peak_memory": memory, "batch": 32,
                                      "unit": "images"}),
                ("attention", "joint", {"xla_seconds": 2e-3, "fused_seconds": 1e-3, "xla_max_error": 1e-2,
                                        "fused_max_error": 2e-2}),
            )
        ],
    }  # fmt: skip
    text = tables.tables(content)
    for row in (
        "H100, 2026-01-02, jax 0.10.2.",
        "| 50 guided steps | 8 | 0.500 |  |  | 100% | 16.0 |",
        "| against PyTorch, eager | 8 | 0.500 | 0.800 | 1.60 |  |  |",
        "| block cache 0.08 | 1 | 0.250 |  |  | 50% |  |",
        "| RL update | 32 images | 2.000 | 0.40 | 16.0 |",
        "| joint | 1.000 | 2.000 | 2.0e-02 | 1.0e-02 |",
    ):
        assert row in text.splitlines()


def test_every_row_of_the_tables_has_a_part():
    assert {part for _, part, _ in (*tables._PROGRAMS, *tables._TRAINING)} <= device.PARTS.keys()
    assert {"attention", "generate"} <= device.PARTS.keys()


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return script("device_parts")


def test_parts_of_the_runner_exist(parts):
    assert parts.PARTS.keys() == device.PARTS.keys()


def test_random_arguments_have_the_shapes_of_the_program(parts):
    import jax
    import jax.numpy as jnp

    from deepgen_jax.config import QuantizationConfig

    size = parts.SIZES["tiny"]
    config = parts.replace(parts.PRESETS["tiny"], quantization=QuantizationConfig("int8", products=True))
    program = parts._images(size, 2, config, few=True).denoising()
    arrays = parts.random_arrays(program.arguments)
    assert jax.tree.structure(arrays) == jax.tree.structure(program.arguments)
    for one, wanted in zip(jax.tree.leaves(arrays), jax.tree.leaves(program.arguments), strict=True):
        assert (one.shape, one.dtype) == (wanted.shape, wanted.dtype)
    weights = flatten_dict(arrays[0], sep="/")
    kernel = weights["mmdit/blocks_0/attn/to_q/kernel"]
    assert kernel.dtype == jnp.int8
    assert 20 < float(jnp.std(kernel.astype(jnp.float32))) < 40
    assert float(weights["mmdit/blocks_0/attn/norm_q/scale"].min()) == 1


@pytest.mark.slow
def test_the_script_is_rehearsed_to_the_end(tmp_path):
    """Every part gives all of its results on a CPU, with the tiny model, but cuDNN and the speed of a GPU."""
    out = tmp_path / "device.json"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    limits = ["--minutes", "60", "--patience", "20"]
    command = [str(BENCHMARKS / "device.sh"), "--size", "tiny", "--out", str(out), *limits]
    subprocess.run(command, check=True, timeout=3600, env=environment)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [each for each in content["results"] if each["status"] != "ok"] == []
    assert {each["part"] for each in content["results"]} == device.PARTS.keys()
    assert "not measured" not in tables.tables(content)
    for name in ("eager", "compiled"):
        for batch in (1, 2):
            peer = tables.results_of(content)["generate", f"PyTorch {name}, batch {batch}"]["peer"]
            assert peer["latents"]["max_abs_difference"] < 1e-3 * peer["latents"]["max_abs"]
