"""Every configuration of nano goes by its name; rounds follow their stages."""

from __future__ import annotations

import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.training.config_files import load_config, packaged_configs

NAMES = [
    "bridge_trial", "grpo", "language", "open_pairs", "open_singles", "open_student", "open_teacher", "pretrain",
    "pretrain_counts", "pretrain_relations", "pretrain_relations_long", "sft", "sft_changes", "sft_colours",
    "sft_edits", "sft_long", "sft_names", "sft_noise", "sft_phrases", "sft_scenes", "sft_shapes", "sft_swaps",
    "sft_words", "vae", "vae_colours", "vae_long", "vae_signs", "vae_small",
]  # fmt: skip


def test_names_and_folders():
    assert sorted(name for name in packaged_configs() if name.startswith("nano/")) == [f"nano/{name}" for name in NAMES]
    for name in NAMES:
        expected = "out/nano/bridge_trial/run" if name == "bridge_trial" else f"out/nano/{name}"
        assert load_config(f"nano/{name}").out == expected


def test_rounds_differ_only_in_their_changes():
    words, swaps = load_config("nano/sft_words"), load_config("nano/sft_swaps")
    assert (words.start, words.steps, words.data.seed, words.noise_shift) == ("out/nano/sft_long", 1800, 0, 3.0)
    assert (swaps.start, swaps.steps, swaps.data.seed, swaps.noise_shift) == ("out/nano/sft_names", 1300, 9, 20.0)
    shares = {source.name: source.weight for source in swaps.data.sources}
    assert shares["word_changes"] == 0.17
    for task in ("t2i", "edit"):
        assert sum(source.weight for source in swaps.data.sources if source.task == task) == pytest.approx(1)


def test_unknown_names():
    with pytest.raises(DeepGenError, match=r"nano/sft_wrds: .*did you mean nano/sft_words\?"):
        load_config("nano/sft_wrds")
