"""Whole runs of reinforcement learning: killed and resumed, on meshes and in processes, with what can go wrong."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from support import runs
from support.judge_server import JudgeServer, Reply

# The runs share their reference and compiled programs.
pytestmark = pytest.mark.xdist_group("grpo_runs")

STEPS, MANY_STEPS = 4, 40
#: Where a process dies: of what, and before which of its calls.
PHASES = {
    "rollout": ("deepgen_jax.rl.experience", "rollout", 2),  # calls a step
    "reward": ("deepgen_jax.rewards.mixture", "RewardMixture.collect", 1),
    "update": ("deepgen_jax.rl.grpo", "GRPOStage._check_ratio", 1),  # between a rollout's two updates
}
DIE = """
import functools, importlib, itertools, os, signal, sys
from deepgen_jax.cli.main import main
*path, name = {name!r}.split(".")
owner = functools.reduce(getattr, path, importlib.import_module({module!r}))
whole, calls = getattr(owner, name), itertools.count()
def last(*args, **options):
    if next(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args, **options)
setattr(owner, name, last)
sys.exit(main())
"""
DISAGREE = """
import sys
from deepgen_jax.cli.main import main
from deepgen_jax.rl import experience
rollout = experience.rollout
def other(*args):
    images, trajectory = rollout(*args)
    return images, trajectory._replace(log_probs=trajectory.log_probs + 1e-4)
experience.rollout = other
sys.exit(main())
"""
FAIL_ON_ONE_HOST = """
import sys
import jax
from deepgen_jax.cli.main import main
from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.mixture import RewardMixture
collect = RewardMixture.collect
def failing(self, futures):
    if jax.process_index() == 1:
        raise DeepGenError("too few rewards")
    return collect(self, futures)
RewardMixture.collect = failing
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    runs.write_data(folder)
    runs.write_grpo_config(folder, runs.write_model(folder), {"color_target": 0.7, "jpeg": 0.3})
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupts, on one device."""
    runs.finish(runs.start(folder, "mesh=data=1", f"out={folder}/whole"))
    return folder / "whole"


def steps_of(run):
    """Everything logged that a step computes, in order, each step once."""
    lines = runs.metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    measured = ("seconds/", "samples_per", "tokens_per", "device_memory", "mfu", "time", "reward_client/")
    return [{name: x for name, x in line.items() if not name.startswith(measured)} for line in lines]


def assert_same_run(run, whole):
    assert steps_of(run) == steps_of(whole)
    assert runs.sample_ids(run) == runs.sample_ids(whole)
    parameters, expected = runs.parameters(run), runs.parameters(whole)
    assert parameters.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(parameters[path], array, err_msg=path)


def die(folder, phase, step, *words):
    """Kills a run in a phase of its ``step``-th step, counted from 0 at the resume."""
    module, name, calls = PHASES[phase]
    program = DIE.format(module=module, name=name, at=step * calls + calls - 1)
    assert runs.finish(runs.start(folder, *words, program=program), status=-signal.SIGKILL) is not None


def test_first_ratios_are_one_and_everything_is_logged(whole):
    lines = runs.metrics(whole)
    assert len(lines) == STEPS
    for line in lines:
        assert line["rl/first_ratio_deviation"] <= 1e-6
        # The second update of a rollout is off its policy, the first is not.
        assert line["rl/ratio_min"] < 1 <= line["rl/ratio_max"] + 1e-6
        assert sum(line["rl/advantage_histogram"]) == 8
        assert all(np.isfinite(x).all() for x in line.values()), line
        assert {"rl/kl", "rl/clip_share", "loss/policy", "loss/sft", "reward/jpeg/mean"} <= line.keys()
        assert {"seconds/rollout", "seconds/reward", "seconds/update", "seconds/data"} <= line.keys()
    assert len(list((whole / "pictures").iterdir())) == 2


def test_killed_in_an_update(folder, whole):
    # A checkpoint is whole before the next one is begun.
    words = ("mesh=data=1", f"out={folder}/killed", "checkpoints.every=1")
    die(folder, "update", 3, *words)
    assert "continues from step" in runs.finish(runs.start(folder, *words))
    assert_same_run(folder / "killed", whole)


@pytest.mark.slow
def test_killed_ten_times(folder):
    words = ("mesh=data=1", f"steps={MANY_STEPS}", "checkpoints.keep_last=2")
    runs.finish(runs.start(folder, *words, f"out={folder}/many"))
    randomly, log = random.Random(0), folder / "killed-often" / "metrics.jsonl"
    words = (*words, f"out={folder}/killed-often")
    for kill in range(10):
        if kill % 4 < 3:  # once in each phase, then at any moment
            die(folder, list(PHASES)[kill % 4], randomly.randrange(2, 6), *words)
            continue
        process, size = runs.start(folder, *words), log.stat().st_size
        while log.stat().st_size == size:
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()[0]
        time.sleep(randomly.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    runs.finish(runs.start(folder, *words))
    assert len(steps_of(folder / "killed-often")) == MANY_STEPS
    assert_same_run(folder / "killed-often", folder / "many")


# Pixels are rounded to bytes: where a last bit decides, one differs, and with it the size of the JPEG file, by more
# than groups of so similar images vary. So meshes are compared by the smooth reward alone. Images of a group begin with
# noise of their own: else they are so alike that rewards differ in their last bits, by which advantages are divided.
SMOOTH = ("steps=2", 'prompts.rewards={"color_target": 1.0}', "rollout.share_noise=false")


@pytest.fixture(scope="module")
def smooth(folder, whole):
    runs.finish(runs.start(folder, "mesh=data=1", f"out={folder}/smooth", *SMOOTH))
    return folder / "smooth"


def assert_close(run, smooth):
    for got, expected in zip(steps_of(run), steps_of(smooth), strict=True):
        for name in ("loss", "loss/policy", "loss/sft", "rl/kl", "reward/color_target/mean"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
        assert got["rl/first_ratio_deviation"] <= 1e-6


@pytest.mark.slow
def test_first_steps_on_a_mesh(folder, smooth):
    out = folder / "mesh"
    runs.finish(runs.start(folder, "mesh=data=2,fsdp=2,tensor=2", f"out={out}", *SMOOTH, devices=8))
    assert_close(out, smooth)
    assert runs.sample_ids(out) == runs.sample_ids(smooth)


def processes(folder, out, count=2, **options):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    # With four processes each samples one image of a group of two.
    sizes = (f"mesh=data={count // 2},fsdp=2", "rollout.micro_batch=4")
    words = (*sizes, f"out={out}", *SMOOTH, "--coordinator", address, "--num-processes", str(count))
    return [runs.start(folder, *words, "--process-id", str(i), **options) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_first_steps_in_several_processes(folder, smooth, count):
    out = folder / f"processes-{count}"
    for process in processes(folder, out, count):
        runs.finish(process)
    assert_close(out, smooth)


@pytest.mark.slow
def test_rewards_that_fail_on_one_host_end_all(folder):
    """Otherwise the others would wait for it forever."""
    texts = [
        runs.finish(process, status=2) for process in processes(folder, folder / "failing", program=FAIL_ON_ONE_HOST)
    ]
    # Each ends with its error, or with the other's if that arrives first.
    assert all("too few rewards" in text or "the rewards of process 1 failed" in text for text in texts)


def test_ratio_that_is_not_one_stops_the_run(folder, whole):
    text = runs.finish(runs.start(folder, "mesh=data=1", f"out={folder}/ratio", program=DISAGREE), status=2)
    (line,) = [line for line in text.splitlines() if "error:" in line]
    assert line.startswith("deepgen: error: step 1: before any update the importance ratio is off by 1.0e-04")
    assert not list((folder / "ratio" / "checkpoints").iterdir())


@pytest.mark.slow
def test_ratio_that_is_not_one_can_be_allowed(folder, whole):
    words = ("mesh=data=1", f"out={folder}/allowed", "steps=1", "policy.check_ratio=false")
    runs.finish(runs.start(folder, *words, program=DISAGREE))
    assert runs.metrics(folder / "allowed")[0]["rl/first_ratio_deviation"] > 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("policy.algorithm=guard",), ("policy.algorithm=nft", "rollout.sampler=ode", "rollout.share_noise=false")],
    ids=["guard", "nft"],
)
def test_other_algorithms_without_auxiliary_data(words, folder):
    out = folder / words[0].rpartition("=")[2]
    runs.finish(runs.start(folder, "mesh=data=1", f"out={out}", "steps=2", "data=null", *words))
    lines = runs.metrics(out)
    assert len(lines) == 2
    for line in lines:
        assert "loss/sft" not in line
        assert line["grad_norm"] > 0
        assert line["skipped_steps"] == 0
        assert all(np.isfinite(x).all() for x in line.values()), line
    # The old policy of nft follows, and is what rolls out.
    assert ("rl/old_policy_drift" in lines[0]) == ("nft" in words[0])


class FaultyJudge:
    """In turn: garbage three times of ten, half of it no JSON; HTTP 500 once; never, once in twenty."""

    def __init__(self):
        self.injected = Counter()
        self.restart = threading.Event()

    def __call__(self, number, body):
        if number == 15:
            self.restart.set()
        kind, reply = "fine", Reply(f"<answer>Image {1 + number % 2} is better</answer>")
        if number % 10 in (1, 4, 7):
            kind, reply = ("no JSON", Reply("<html>", raw=True)) if number % 2 else ("no answer", Reply("both"))
        elif number % 10 == 9:
            kind, reply = "HTTP 500", Reply("oops", status=500)
        elif number % 20 == 5:
            kind, reply = "hang", Reply(hang=True)
        self.injected[kind] += 1
        return reply


def test_faulty_judge(folder, whole):
    judge = FaultyJudge()
    client = {"tries": 6, "read_seconds": 2, "backoff_seconds": 0.02, "max_backoff_seconds": 0.1}
    with JudgeServer(judge) as server:

        def restart():
            if judge.restart.wait(300):
                port = server.port
                server.stop()
                server.start(port)

        thread = threading.Thread(target=restart, daemon=True)
        thread.start()
        options = {"url": server.url, "both_orders": True, "client": client}
        rewards = f'RewardConfig("preference", options={options}), RewardConfig("jpeg")'
        weights = {"preference": 0.7, "jpeg": 0.3}
        runs.write_grpo_config(folder, folder / "model", weights, rewards, name="judged.py")
        words = ("mesh=data=1", f"out={folder}/judged", "required_reward_share=0.4")
        runs.finish(runs.start(folder, *words, config="judged.py"))
        judge.restart.set()
        thread.join()
    lines = runs.metrics(folder / "judged")
    assert len(lines) == STEPS
    counts, prefix = lines[-1], "reward_client/preference/"
    failed = {name.rpartition("failed: ")[2]: x for name, x in counts.items() if "try failed" in name}
    lost = failed["timeout"] + failed.get("connection error", 0) - judge.injected["hang"]
    assert 0 <= lost <= 4  # answers that the restart cut off, or that came late on a busy machine
    for kind, name in (("no JSON", "unreadable answer"), ("HTTP 500", "HTTP 500")):
        assert judge.injected[kind] - lost <= failed[name] <= judge.injected[kind]
    assert counts[prefix + "requests"] == STEPS * 4 * 2
    # Replies without a verdict are in the log, by reason.
    noted = sum(line.get("reward_notes/preference: no verdict in the reply", 0) for line in lines)
    assert judge.injected["no answer"] - lost <= noted <= judge.injected["no answer"]
    # Of two images one wins, or both half of it: a group's mean is 1/2, or its rewards are missing.
    for line in lines:
        assert line["reward/preference/missing_share"] <= 0.5
        assert line["reward/preference/mean"] == pytest.approx(0.5)
