"""Further rounds of nano's stages, each starting from an earlier one: ``deepgen train nano/sft_words``.

docs/experiments/nano.md has their results. The stage files of this folder are rounds as well: `vae_small` comes
before `vae`, `pretrain_relations` to `pretrain_counts` before `pretrain`, all others after their stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deepgen_jax.configs.nano import MODEL, caption_data, pretrain, sft, vae, world_data, world_sources
from deepgen_jax.data.data_config import MixtureConfig
from deepgen_jax.training.optimizer import OptimizerConfig
from deepgen_jax.training.run_config import AutoencoderConfig, CheckpointConfig, RunConfig, SupervisedConfig

#: (name of the source, its skills and other conditions, its share of the task's samples).
Shares = Sequence[tuple[str, str, float]]

_EDITS_LAST = MixtureConfig(cycle=("t2i", "edit", "edit"))
_ALTERNATING = MixtureConfig(cycle=("t2i", "edit"))
_RELATIONS = (("words", "text", 0.5), ("relations", "relation", 0.15), ("world", "", 0.35))
_FEWER_WORDS = (("words", "text", 0.35), ("relations", "relation", 0.15), ("world", "", 0.5))
_PAIRS = (("words", "text", 0.3), ("pairs", "relation+two+count", 0.3), ("world", "", 0.4))


def _vae_small() -> AutoencoderConfig:
    """Images of 64x64, which are cheaper."""
    return AutoencoderConfig(
        model=MODEL, out="out/nano/vae_small", steps=5000, dtype="float32", loss="l1", kl_weight=1e-4,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.02), data=world_data(4, ("t2i",), size=64),
        checkpoints=CheckpointConfig(every=1000),
    )  # fmt: skip


def _vae_long() -> AutoencoderConfig:
    """More and smaller steps: colours are learned after shapes."""
    return _next(
        vae.get_config(), "vae_long", "vae", steps=1500, optimizer=OptimizerConfig(learning_rate=5e-4, warmup=0.05),
        data=world_data(4, ("t2i",)),
    )  # fmt: skip


def _vae_colours() -> AutoencoderConfig:
    """Squared error, which weighs a wrong colour more than an outline."""
    return _next(
        _vae_small(), "vae_colours", "vae_long", steps=2000, loss="l2", kl_weight=1e-5,
        data=world_data(8, ("t2i",), size=64),
    )  # fmt: skip


def _vae_signs() -> AutoencoderConfig:
    """Only the decoder, mostly on signs: absolute error, latents perturbed to resemble the MMDiT's."""
    config = vae.get_config()
    sources = world_sources(
        ("words", "t2i", "text", 0.6), ("world", "t2i", "", 0.4), ("signs", "edit", "replace_word", 0.4),
        ("edits", "edit", "", 0.6),
    )  # fmt: skip
    return _next(
        config, "vae_signs", "vae_colours", steps=1500, decoder_only=True, latent_noise=0.1,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.03),
        data=replace(config.data, sources=sources, mixture=MixtureConfig(cycle=("t2i", "t2i", "edit"))),
    )  # fmt: skip


def _pretrain_relations() -> SupervisedConfig:
    """Single things and relations, at higher noise levels, where only the text carries information."""
    config = pretrain.get_config()
    return _next(
        config, "pretrain_relations", "language", steps=430, optimizer=replace(config.optimizer, warmup=50),
        noise_shift=6.0, data=caption_data(64, "single+relation"),
    )  # fmt: skip


def _pretrain_relations_long() -> SupervisedConfig:
    """Smaller steps of less noise."""
    return _next(
        pretrain.get_config(), "pretrain_relations_long", "pretrain_relations", steps=558, noise_shift=5.0,
        data=caption_data(32, "single+relation"),
    )  # fmt: skip


def _pretrain_counts() -> SupervisedConfig:
    """Adds pairs and counts; their captions are slightly shorter than those of signs."""
    data = replace(caption_data(48, "single+relation+two+count"), token_multiple=52)
    return _next(pretrain.get_config(), "pretrain_counts", "pretrain_relations_long", steps=824, data=data)


def _bridge_trial() -> SupervisedConfig:
    """Stage 1 in small, to compare bridges: 19,200 pictures with trained encoders, the learning rate falls to zero.

    ``deepgen nano init --encoders nano --out out/nano/bridge_trial/model`` writes the model that it starts from.
    """
    config = pretrain.get_config()
    return replace(
        config, model="out/nano/bridge_trial/model", start="", out="out/nano/bridge_trial/run", steps=300,
        optimizer=replace(config.optimizer, schedule="cosine"), ema_decay=None,
        data=caption_data(64, "single+relation"),
    )  # fmt: skip


def _sft_long() -> SupervisedConfig:
    """A second cycle of the learning rate."""
    return _next(sft.get_config(), "sft_long", "sft", steps=3700)


def _sft_words() -> SupervisedConfig:
    """Adds the remaining edits; more words, relations and recolouring."""
    config = sft.get_config()
    edits = (
        ("colours", "recolour", 0.3), ("places", "move+remove", 0.26),
        ("edits", "add+replace_word+multi_step+reference", 0.44),
    )  # fmt: skip
    data = replace(config.data, micro_batch=24, mixture=_ALTERNATING)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=2e-3), data=data, accumulation=2)
    return _sft_round(config, "sft_words", "sft_long", 0, _RELATIONS, edits, steps=1800)


def _sft_edits() -> SupervisedConfig:
    """Two edits to one picture, most of them changes and removals."""
    config = _sft_words()
    edits = (("colours", "recolour", 0.42), ("removals", "remove", 0.22), ("edits", "add+move+multi_step", 0.36))
    config = replace(config, data=replace(config.data, micro_batch=16, mixture=_EDITS_LAST), accumulation=3)
    return _sft_round(config, "sft_edits", "sft_words", 1, _RELATIONS, edits, steps=2000)


def _sft_colours() -> SupervisedConfig:
    """Half of the edits are changes of colour."""
    edits = (("colours", "recolour", 0.5), ("removals", "remove", 0.15), ("edits", "add+move+multi_step", 0.35))
    return _sft_round(_sft_edits(), "sft_colours", "sft_edits", 2, _FEWER_WORDS, edits, steps=1400)


def _sft_noise() -> SupervisedConfig:
    """80% of noise levels are above 0.9 (14% before), so that the model must rely on text and source."""
    edits = (
        ("colours", "recolour", 0.42), ("removals", "remove", 0.14), ("edits", "add+move+multi_step", 0.32),
        ("word_changes", "replace_word", 0.12),
    )  # fmt: skip
    config = _sft_colours()
    return _sft_round(config, "sft_noise", "sft_colours", 3, _FEWER_WORDS, edits, steps=1500, noise_shift=20.0)


def _sft_phrases() -> SupervisedConfig:
    """All wordings of the world; as many pictures as edits."""
    pictures = (("words", "text", 0.3), ("relations", "relation+two", 0.3), ("world", "", 0.4))
    edits = (
        ("colours", "recolour", 0.45), ("removals", "remove", 0.17), ("edits", "add+move+multi_step", 0.3),
        ("word_changes", "replace_word", 0.08),
    )  # fmt: skip
    config = _sft_noise()
    config = replace(config, data=replace(config.data, micro_batch=24, mixture=_ALTERNATING), accumulation=2)
    return _sft_round(config, "sft_phrases", "sft_noise", 4, pictures, edits, steps=1600)


def _sft_shapes() -> SupervisedConfig:
    """Shapes without colour cues: things on grey, and things named only by their shape."""
    config = _sft_phrases()
    config = replace(config, data=replace(config.data, micro_batch=16, mixture=_EDITS_LAST), accumulation=3)
    edits = _edits(colours=0.12, on_grey=0.3, by_shape=0.2, removals=0.08, edits=0.2, additions=0.04, words=0.06)
    return _sft_round(config, "sft_shapes", "sft_phrases", 5, _PAIRS, edits, steps=1000)


def _sft_changes() -> SupervisedConfig:
    """Words replaced on signs, next to all other changes."""
    edits = _edits(colours=0.3, on_grey=0.12, by_shape=0.14, removals=0.12, edits=0.14, additions=0.03, words=0.15)
    return _sft_round(_sft_shapes(), "sft_changes", "sft_shapes", 6, _PAIRS, edits, steps=1000)


def _sft_scenes() -> SupervisedConfig:
    """Images of three things, and more wordings; nearly all texts fit into 56 or 84 tokens."""
    edits = _edits(
        colours=0.34, on_grey=0.12, by_shape=0.1, removals=0.14, edits=0.14, additions=0.03, words=0.13, things=3
    )
    config = _sft_changes()
    config = replace(config, data=replace(config.data, token_multiple=28))
    return _sft_round(config, "sft_scenes", "sft_changes", 7, _PAIRS, edits, steps=1300)


def _sft_names() -> SupervisedConfig:
    """More things named only by their shape, as most errors change the wrong thing."""
    edits = _edits(
        colours=0.28, on_grey=0.1, by_shape=0.18, removals=0.14, edits=0.14, additions=0.03, words=0.13, things=3
    )
    return _sft_round(_sft_scenes(), "sft_names", "sft_scenes", 8, _PAIRS, edits)


def _sft_swaps() -> SupervisedConfig:
    """More replaced words; the packaged weights are the moving average of this round."""
    pictures = (("words", "text", 0.35), ("pairs", "relation+two+count", 0.3), ("world", "", 0.35))
    edits = _edits(
        colours=0.3, on_grey=0.08, by_shape=0.17, removals=0.12, edits=0.13, additions=0.03, words=0.17, things=3
    )
    return _sft_round(_sft_names(), "sft_swaps", "sft_names", 9, pictures, edits)


def _edits(
    *, colours: float, on_grey: float, by_shape: float, removals: float, edits: float, additions: float, words: float,
    things: int = 0,
) -> Shares:  # fmt: skip
    """Shares of the kinds of edits; ``things``: number of things in recolouring and removal, 0 for any."""
    among = f",things={things}" if things else ""
    return (
        ("colours", f"recolour{among}", colours), ("colours_on_grey", "recolour,background=grey", on_grey),
        ("by_shape", "recolour+remove+move,named=shape", by_shape), ("removals", f"remove{among}", removals),
        ("edits", "move+multi_step", edits), ("additions", "add", additions), ("word_changes", "replace_word", words),
    )  # fmt: skip


def _sft_round(
    config: SupervisedConfig, name: str, start: str, seed: int, pictures: Shares, edits: Shares, **changes: Any
) -> SupervisedConfig:
    """A round of stage 2; its seed changes the order of samples."""
    shares = [("t2i", *share) for share in pictures] + [("edit", *share) for share in edits]
    sources = world_sources(*((source, task, skills, share) for task, source, skills, share in shares))
    return _next(config, name, start, **changes, data=replace(config.data, sources=sources, seed=seed))


def _next(config: Any, name: str, start: str, **changes: Any) -> Any:
    """A configuration that starts from an earlier round and has its own folder."""
    return replace(config, start=f"out/nano/{start}", out=f"out/nano/{name}", **changes)


#: Name -> configuration.
ROUNDS: dict[str, Callable[[], RunConfig]] = {
    get_config.__name__.removeprefix("_"): get_config
    for get_config in (
        _vae_small, _vae_long, _vae_colours, _vae_signs, _pretrain_relations, _pretrain_relations_long,
        _pretrain_counts, _bridge_trial, _sft_long, _sft_words, _sft_edits, _sft_colours, _sft_noise, _sft_phrases,
        _sft_shapes, _sft_changes, _sft_scenes, _sft_names, _sft_swaps,
    )
}  # fmt: skip
