"""Opens the inputs of a conversion and infers the model's configuration."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen_jax.config import DeepGenConfig, LoRAConfig, SchedulerConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.stores.path_kinds import Folder, require_folder

from . import configs
from .checkpoints import open_checkpoint
from .hparams import HParams, parse_hparams
from .initial_bridge import InitialBridge
from .names import MMDIT, VAE
from .plan import Inventory, take_inventory
from .sources import Source, open_safetensors

#: Prefix that gives the tensors of a Qwen2.5-VL folder their place in a checkpoint's key space.
_VLM = "lmm."
#: Hyper-parameters beside an exported release.
_HPARAMS_FILE = "deepgen_config.json"


@dataclass(frozen=True)
class Release:
    """Open sources and parsed configurations of one conversion.

    Attributes:
      sources: all of them, for the provenance; later ones supersede earlier ones.
      inventory: their tensors.
      config: sizes; whether word embeddings are tied is as the source says.
      scheduler: the sampling schedule.
      tokenizer: folder of the tokenizer's files.
      hparams: as given, or as found with the weights.
    """

    sources: list[Source]
    inventory: Inventory
    config: DeepGenConfig
    scheduler: SchedulerConfig
    tokenizer: Path
    hparams: HParams


def open_bases(
    qwen: Path,
    sd3: Path,
    checkpoint: Path | None,
    hparams: HParams | None,
    *,
    member: str | None,
    ema: bool,
    seed: int,
    stack: contextlib.ExitStack,
) -> Release:
    """The two base models and, on top, a stage checkpoint or a newly initialised bridge.

    Files stay open until ``stack`` closes them. ``ema``: take the checkpoint's moving average.

    Raises:
      DeepGenError: something is missing or damaged, or the checkpoint has no moving average.
    """
    require_folder(qwen, Folder.QWEN, "--qwen")
    require_folder(sd3, Folder.SD3, "--sd3")
    sources = [(_opened(open_safetensors(qwen, "Qwen2.5-VL"), stack), _VLM), *_diffusion_sources(sd3, stack)]
    if checkpoint is not None:
        source = _opened(open_checkpoint(checkpoint, member, ema=ema), stack)
        sources.append((source, ""))
        if hparams is None and source.hparams is not None:
            hparams = parse_hparams(source.hparams, source.label)
    inventory = take_inventory(sources, ema=ema)
    if checkpoint is not None and ema and not (inventory.averages or sources[-1][0].average):
        raise DeepGenError(f"--ema: {checkpoint} holds no moving average of the weights; leave out --ema")
    hparams = hparams or HParams()
    config, scheduler = _configure(qwen, sd3, inventory, hparams, hparams.connector, hparams.where, qwen)
    if checkpoint is None:
        sources.append((InitialBridge(config, seed), ""))
        inventory = take_inventory(sources)
    return Release([source for source, _ in sources], inventory, config, scheduler, qwen, hparams)


def open_release(folder: Path, hparams: HParams | None, stack: contextlib.ExitStack) -> Release:
    """A diffusers release. Files stay open until ``stack`` closes them."""
    require_folder(folder, Folder.RELEASE, "--diffusers")
    sources = [
        (_opened(open_safetensors(folder / "vlm", "Qwen2.5-VL of a diffusers release"), stack), _VLM),
        *_diffusion_sources(folder, stack),
        (_opened(open_safetensors(folder / "connector", "bridge of a diffusers release"), stack), ""),
    ]
    connector_file, hparams_file = folder / "connector" / "config.json", folder / _HPARAMS_FILE
    connector = configs.read_json(connector_file) if connector_file.is_file() else {}
    where = str(connector_file)
    if hparams is None and hparams_file.is_file():
        hparams = parse_hparams(configs.read_json(hparams_file), str(hparams_file))
    hparams = hparams or HParams()
    if hparams.connector:
        connector, where = {**connector, **hparams.connector}, hparams.where
    inventory = take_inventory(sources)
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder / "vlm"
    config, scheduler = _configure(folder / "vlm", folder, inventory, hparams, connector, where, tokenizer)
    return Release([source for source, _ in sources], inventory, config, scheduler, tokenizer, hparams)


def _diffusion_sources(folder: Path, stack: contextlib.ExitStack) -> list[tuple[Source, str]]:
    return [
        (_opened(open_safetensors(folder / "transformer", "diffusers SD3Transformer2DModel"), stack), MMDIT),
        (_opened(open_safetensors(folder / "vae", "diffusers AutoencoderKL"), stack), VAE),
    ]


def _opened(source: Source, stack: contextlib.ExitStack) -> Source:
    stack.callback(source.close)
    return source


def _configure(
    vlm: Path,
    diffusion: Path,
    inventory: Inventory,
    hparams: HParams,
    connector: Mapping[str, Any],
    connector_file: str,
    tokenizer: Path,
) -> tuple[DeepGenConfig, SchedulerConfig]:
    """The model's configuration, from the releases' files and the shapes of the bridge."""

    def parse(path: Path, parser: Callable[..., Any]) -> Any:
        return parser(configs.read_json(path), str(path))

    text, vision = parse(vlm / "config.json", configs.qwen_configs)
    pad = _token_id(tokenizer, "<|endoftext|>")
    if pad is not None:
        text = dataclasses.replace(text, pad_token_id=pad)
    shapes = {key: tensor.shape for key, tensor in inventory.weights.items()}
    config = DeepGenConfig(
        text=text,
        vision=vision,
        bridge=configs.bridge_config(shapes, connector, connector_file, text.hidden_size),
        mmdit=parse(diffusion / "transformer" / "config.json", configs.mmdit_config),
        vae=parse(diffusion / "vae" / "config.json", configs.vae_config),
        max_prompt_tokens=hparams.max_prompt_tokens,
        **hparams.call_defaults,
    )
    return config, parse(diffusion / "scheduler" / "scheduler_config.json", configs.scheduler_config)


def _token_id(folder: Path, token: str) -> int | None:
    """The id of a special token, or None if the tokenizer's files lack it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    added = configs.read_json(path).get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise DeepGenError(f"{path}: added_tokens is no list of tokens; download the tokenizer again")
    found = next((entry.get("id") for entry in added if entry.get("content") == token), None)
    if found is not None and type(found) is not int:
        raise DeepGenError(f"{path}: the id of {token} is {found!r}; download the tokenizer again")
    return found


def lora_config(release: Release, alpha: float | None) -> LoRAConfig | None:
    """Rank from the adapters' shapes; alpha as asked for, as the hyper-parameters say, or 2 x rank."""
    rank, hparams = release.inventory.lora_rank, release.hparams
    if rank is None:
        return None
    if hparams.lora_rank not in (None, rank):
        raise DeepGenError(
            f"{hparams.where}: lora_rank is {hparams.lora_rank}, but the checkpoint's adapters have "
            f"rank {rank}; use the file that belongs to the checkpoint"
        )
    stated = next((a for a in (alpha, hparams.lora_alpha) if a is not None), 2.0 * rank)
    return LoRAConfig(rank=rank, alpha=float(stated))
