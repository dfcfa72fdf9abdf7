"""Stages of DeepGen-nano, one file each, and further rounds of them in `rounds.py`; docs/nano.md has their order."""

from dataclasses import replace

from deepgen_jax.data.data_config import DataConfig, MixtureConfig, SourceConfig

#: Model folder that `deepgen nano init` writes.
MODEL = "out/nano/model"


def world_source(name: str, task: str, size: int = 96, skills: str = "") -> SourceConfig:
    """200,000 samples of a size per epoch, of the given skills or of all.

    After the skills may follow other conditions, "recolour,background=grey"; such samples are searched for, 20,000 an
    epoch.
    """
    path = f"size={size},samples={20_000 if '=' in skills else 200_000},seed=0"
    return SourceConfig(name, "synthetic", f"{path},skills={skills}" if skills else path, task=task)


def world_sources(*shares: tuple[str, str, str, float]) -> tuple[SourceConfig, ...]:
    """Sources from (name, task, skills, weight) of each; all skills where none is named."""
    return tuple(
        replace(world_source(name, task, skills=skills), weight=weight) for name, task, skills, weight in shares
    )


def world(size: int = 96, skills: str = "", changes: str = "") -> tuple[SourceConfig, SourceConfig]:
    """Equal numbers of images and edits, each of the given skills or of all."""
    return world_source("world", "t2i", size, skills), world_source("edits", "edit", size, changes)


def world_data(
    micro_batch: int,
    cycle: tuple[str, ...] = ("t2i", "t2i", "edit"),
    size: int = 96,
    skills: str = "",
    changes: str = "",
) -> DataConfig:
    """Most prompts have one length, so that few programs are compiled."""
    return DataConfig(
        sources=tuple(source for source in world(size, skills, changes) if source.task in cycle),
        micro_batch=micro_batch,
        mixture=MixtureConfig(cycle=cycle),
        image_size=size,
        min_side=0,
        token_multiple=68,
        threads=1,
    )


def caption_data(micro_batch: int, skills: str = "") -> DataConfig:
    """Only images, whose captions are all shorter than the longest instruction."""
    return replace(world_data(micro_batch, ("t2i",), skills=skills), token_multiple=56)
