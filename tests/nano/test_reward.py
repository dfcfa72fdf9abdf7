"""The exact reward of the procedural world, with words really read."""

from __future__ import annotations

import asyncio
import json
import random

import numpy as np
import pytest

from deepgen_jax.cli.main import main
from deepgen_jax.nano.samples import make_sample, render
from deepgen_jax.nano.world import wrong
from deepgen_jax.nano.world.score import score
from deepgen_jax.rewards import RewardConfig, RewardSample, make
from deepgen_jax.rl.prompt_files import read_prompt_list

pytest.importorskip("rapidocr")


def scores(reward, samples):
    async def run():
        found = await reward.score(samples)
        await reward.close()
        return found

    return asyncio.run(run())


def drawn(sample, scene=None):
    return np.asarray(render(scene or sample.scene, 96))


def test_prompts_carry_their_truth_to_the_reward(tmp_path, capsys):
    path = tmp_path / "lists" / "prompts.jsonl"
    assert main(["data", "world", "--out", str(path), "--prompts", "12"]) == 0
    assert main(["data", "world", "--out", str(path)]) == 2
    assert "exists" in capsys.readouterr().err
    prompts = read_prompt_list(path)
    samples = [make_sample("train", "t2i", seed=1, index=index) for index in range(12)]
    assert [prompt.text for prompt in prompts] == [sample.text for sample in samples]
    quick = [i for i, sample in enumerate(samples) if sample.truth.word is None]
    right = [RewardSample(drawn(samples[i]), prompts[i].text, metadata=prompts[i].metadata) for i in quick]
    empty = np.full((96, 96, 3), 250, np.uint8)
    bad = [RewardSample(empty, prompts[i].text, metadata=prompts[i].metadata) for i in quick]
    found = scores(make(RewardConfig("world", options={"workers": 1})), [*right, *bad, RewardSample(empty, "other")])
    assert (found.values[: len(quick)] == 1).all()
    assert (found.values[len(quick) : -1] < 1).all()
    assert np.isnan(found.values[-1])
    assert found.missing[2 * len(quick)].permanent
    exact = scores(make(RewardConfig("world", options={"workers": 1, "exact": True})), [*right, *bad])
    assert exact.values.tolist() == [1] * len(quick) + [0] * len(quick)


def test_only_skills_that_were_asked_for(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    assert main(["data", "world", "--out", str(path), "--prompts", "5", "--skills", "text"]) == 0
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["truth"]["skill"] for record in records] == ["text"] * 5
    assert main(["data", "world", "--out", str(path), "--skills", "move"]) == 2
    assert "'move'" in capsys.readouterr().err


def check_words(count: int, allowed: int) -> None:
    """Reads words in correct images, and different ones in wrong images, up to a share of misreadings."""
    reward = make(RewardConfig("world", options={"workers": 1}))
    misread = mistaken = 0
    for index in range(count):
        for skill in ("text", "replace_word"):
            sample = make_sample("held_out", skill, seed=4, index=index)
            result = score(drawn(sample), sample.truth, reward.read)
            misread += not (result.done and result.kept)
            other = wrong.undone(random.Random(index), sample)
            mistaken += score(drawn(sample, other), sample.truth, reward.read).done
    assert (misread <= allowed, mistaken) == (True, 0), (misread, mistaken)


def test_words_are_read():
    check_words(3, 0)


@pytest.mark.slow
def test_a_hundred_words_of_each_skill_are_read():
    check_words(100, 2)
