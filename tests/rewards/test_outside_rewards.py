"""A reward from outside the package: registered, installed as a wheel, or named as a class on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.plugins import install_wheel

from deepgen_jax import settings
from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards import RewardConfig, RewardSample, make, register
from deepgen_jax.rl.rl_config import GRPOConfig
from deepgen_jax.training import config_files

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
#: The example of docs/rewards.md.
REWARD = DOCS.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
SAMPLES = [RewardSample(np.full((8, 8, 3), level, np.uint8), "a wall") for level in (0, 51, 255)]


def scores(config):
    return asyncio.run(make(config).score(SAMPLES)).values


def test_a_file(tmp_path):
    (tmp_path / "my_reward.py").write_text(REWARD)
    config = RewardConfig("bright", f"{tmp_path}/my_reward.py:Brightness", {"factor": 2})
    np.testing.assert_allclose(scores(config), [0, 0.4, 2])
    with pytest.raises(DeepGenError, match="reward bright: unknown option 'facter'; did you mean factor"):
        make(RewardConfig("bright", config.kind, {"facter": 2}))
    with pytest.raises(DeepGenError, match=r"my_reward.py has no Brightnes; did you mean Brightness"):
        make(RewardConfig("bright", config.kind[:-1]))


def test_a_registered_class(tmp_path, monkeypatch):
    (tmp_path / "registered_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    register("brightness", "registered_reward:Brightness")
    np.testing.assert_allclose(scores(RewardConfig("brightness")), [0, 0.2, 1])
    with pytest.raises(DeepGenError, match="registered already"):
        register("brightness", "another:Brightness")


def test_an_installed_wheel(tmp_path):
    point = {"deepgen_jax.rewards": "brightness = bright_reward:Brightness"}
    site = install_wheel(tmp_path, "bright_reward", REWARD, point)
    code = (
        "import asyncio, numpy as np\n"
        "from deepgen_jax.rewards import RewardConfig, RewardSample, make\n"
        "sample = RewardSample(np.full((8, 8, 3), 51, np.uint8), 'a wall')\n"
        "for kind in ('', 'brightness', 'bright_reward:Brightness'):\n"
        "    print(asyncio.run(make(RewardConfig('brightness', kind)).score([sample])).values)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)}
    )
    assert run.stdout == "[0.2]\n" * 3, run.stderr


def test_the_command_line_adds_and_replaces_rewards():
    config = config_files.load_config("tiny_grpo")
    words = [
        "rewards.bright.kind=my_reward.py:Brightness",
        "rewards.bright.options.factor=2",
        "rewards.bright.options.mode=a,b",
    ]
    changed = settings.apply(config, [*words, 'prompts.rewards={"bright": 1}'])
    assert isinstance(changed, GRPOConfig)
    assert changed.rewards[-1] == RewardConfig("bright", "my_reward.py:Brightness", {"factor": 2, "mode": "a,b"})
    assert changed.rewards[:-1] == config.rewards
    deeper = settings.apply(config, ["rewards.red.options.client.cache=a.jsonl", "rewards.red.options.client.tries=2"])
    assert deeper.rewards[0].options["client"] == {"cache": "a.jsonl", "tries": 2}
    replaced = settings.apply(config, ["rewards.red.kind=my_reward.py:Brightness"])
    assert [reward.name for reward in replaced.rewards] == [reward.name for reward in config.rewards]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rewards.rde.options.target=1", "rewards has no item 'rde'; did you mean red"),
        ("rewards.rde=1", "rewards has no item 'rde'"),
        ("data.sources.mine.kind=json", r"data.sources.mine is new and needs data.sources.mine.path=... as well"),
    ],
)
def test_items_are_added_by_their_kind_alone(word, message):
    with pytest.raises(DeepGenError, match=message):
        settings.apply(config_files.load_config("tiny_grpo"), [word])


def test_field_of_a_new_item_is_checked():
    words = ["rewards.bright.kind=jpeg", "rewards.bright.option=1"]
    with pytest.raises(DeepGenError, match=r"rewards.bright has no field 'option'; did you mean options"):
        settings.apply(config_files.load_config("tiny_grpo"), words)


def test_the_reward_server_serves_a_file(tmp_path):
    (tmp_path / "my_reward.py").write_text(REWARD)
    options = {"bright": {"kind": f"{tmp_path}/my_reward.py:Brightness", "factor": "wrong"}}
    command = [sys.executable, "-m", "deepgen_jax.cli.main", "reward-server", "--rewards", "bright"]
    # Ends after the reward is made, because the port is none.
    run = subprocess.run(
        [*command, "--options", json.dumps(options), "--port", "70000"], capture_output=True, text=True
    )
    assert (run.returncode, "cannot listen" in run.stderr) == (2, True), run.stderr
