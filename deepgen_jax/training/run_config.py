"""Frozen dataclasses that describe a training run; `configs/` holds one file for each published stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepgen_jax.data.data_config import DataConfig
from deepgen_jax.errors import DeepGenError
from deepgen_jax.local_paths import LocalPath, refuse_urls
from deepgen_jax.models.stack import Remat
from deepgen_jax.settings import at_least
from deepgen_jax.stores.model_folder import locate
from deepgen_jax.training.optimizer import OptimizerConfig

#: What can be trained by name, as `deepgen_jax.training.partition.TRAINABLE`.
Trainable = Literal["bridge", "mmdit", "lora", "mmdit_lora", "vae", "text", "vision"]


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters on every Linear and the Embedding of the language model (paper, Table 9).

    Attributes:
      rank: of each adapter.
      alpha: the update is scaled by alpha / rank.
      dropout: probability with which an adapter's input is dropped.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        if not 0 <= self.dropout < 1:
            raise DeepGenError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
      every: steps between checkpoints; one more is written at the end and on SIGTERM.
      keep_last: the newest ones that are kept.
      keep_every: those of steps divisible by this are kept for good; 0 keeps none.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0

    def __post_init__(self) -> None:
        at_least("checkpoints.every", self.every, 1)
        at_least("checkpoints.keep_last", self.keep_last, 1)
        at_least("checkpoints.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class LogConfig:
    """Logging, besides `metrics.jsonl` in the run's folder.

    Attributes:
      every: steps between entries.
      tensorboard: write event files.
      wandb: Weights & Biases project; "" for none.
      sample_ids: write the ids of the samples of every step to `samples-HOST.jsonl`.
      peak_flops: of one device, for MFU; 0 looks the device up, and leaves MFU out where it is not known.
    """

    every: int = 1
    tensorboard: bool = True
    wandb: str = ""
    sample_ids: bool = False
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        at_least("log.every", self.every, 1)


@dataclass(frozen=True)
class SampleConfig:
    """Pictures made during training, always from the same noise.

    Attributes:
      every: steps between them; 0 for none.
      prompts: what to generate.
      images: reference image of each prompt, "" for none; empty for no references at all.
      size: side of the pictures in pixels.
      num_inference_steps, guidance_scale, sampler, seed: as those of the pipeline; None for the model's default.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    images: tuple[LocalPath, ...] = ()
    size: int = 512
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        at_least("samples.every", self.every, 0)
        if self.every and not self.prompts:
            raise DeepGenError("samples.every asks for pictures but samples.prompts is empty; give prompts")
        if self.images and len(self.images) != len(self.prompts):
            raise DeepGenError(f"samples: {len(self.images)} images for {len(self.prompts)} prompts; give one each")


@dataclass(frozen=True)
class EvalConfig:
    """Benchmarks during training, of the weights of the moment and of their moving average if there is one.

    Attributes:
      every: steps between them; 0 for none.
      benchmarks: their names, see `deepgen eval list`.
      data: inputs of each that needs any, in their order.
      limit: prompts of each, evenly spaced.
      images_per_prompt: at most.
      size, num_inference_steps: of the images; None for the model's or the benchmark's own.
      batch_size: images made at once.
      seed: of the images.
      judge, judge_model: server and name of the judge, for benchmarks that need one.
    """

    every: int = 0
    benchmarks: tuple[str, ...] = ()
    data: tuple[LocalPath, ...] = ()
    limit: int = 16
    images_per_prompt: int = 1
    size: int | None = None
    num_inference_steps: int | None = None
    batch_size: int = 8
    seed: int = 0
    judge: str = ""
    judge_model: str = ""

    def __post_init__(self) -> None:
        at_least("eval.every", self.every, 0)
        for name in ("limit", "images_per_prompt", "batch_size"):
            at_least(f"eval.{name}", getattr(self, name), 1)
        if self.every and not self.benchmarks:
            raise DeepGenError("eval.every asks for benchmarks but eval.benchmarks is empty; name some")
        if len(self.data) > len(self.benchmarks):
            raise DeepGenError(f"eval: {len(self.data)} data for {len(self.benchmarks)} benchmarks; give one each")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings shared by all stages.

    Attributes:
      model: model folder that the run starts from, or "nano" for the one in the package.
      start: folder of an earlier run whose newest trained weights replace the model folder's; "" for none.
      out: folder of this run; an interrupted run continues from its newest checkpoint there.
      steps: optimiser steps.
      trains: names of the parts that train.
      seed: of noise, noise levels, dropout and new adapters.
      mesh: sizes of the mesh axes, such as "data=2,fsdp=4"; "auto": batches over all devices, weights over the GPUs of
        a host or 16 chips, or over more if they would not fit (`deepgen_jax.training.auto_settings`).
      dtype: of the computation; trained parameters are float32 masters in any case.
      remat: what the backward pass computes again: "none", "dots" (all but linear layers), "mlp" (all but the first
        products of feed-forward layers, and flash attention), "flash" (all but flash attention), "full" (all, but on
        GPUs not flash attention either), or "auto": the fastest that fits.
      ema_decay: of a moving average of the trained parameters; None for none.
      max_bad_steps: the run stops after this many consecutive steps without a finite loss and gradient.
    """

    model: LocalPath
    out: LocalPath
    start: LocalPath = ""
    steps: int
    trains: tuple[Trainable, ...]
    seed: int = 0
    mesh: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["auto", "none", "dots", "mlp", "flash", "full"] = "auto"
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float | None = None
    max_bad_steps: int = 10
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        refuse_urls(self)
        at_least("steps", self.steps, 1)
        at_least("max_bad_steps", self.max_bad_steps, 1)
        if not 0 <= self.seed < 2**32:
            raise DeepGenError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not self.trains or len(set(self.trains)) != len(self.trains):
            raise DeepGenError(f"trains is {self.trains}; name each part that trains once")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise DeepGenError(f"ema_decay is {self.ema_decay}; it must be between 0 and 1, or null")

    @property
    def chosen_remat(self) -> Remat:
        """``remat`` once it is chosen; `deepgen_jax.training.stage.make_stage` does that.

        Raises:
          ValueError: it is still "auto".
        """
        if self.remat == "auto":
            raise ValueError("remat is still auto; make the stage with make_stage")
        return self.remat

    @property
    def model_folder(self) -> Path:
        """Path of ``model``."""
        return locate(self.model)

    @property
    def model_changes(self) -> dict[str, Any]:
        """Entries of the model's ``config.json`` that training changes, nested as there; see `lineage.changed`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """Stages 1 and 2: flow matching on pictures with texts.

    Attributes:
      data: what is learned from.
      accumulation: micro-batches of one optimiser step; a multiple of the mixture's cycle gives every step the same
        shares of the tasks, and one program.
      merge: micro-batches of one task that the network sees at once, at most; the same gradient in fewer, larger
        products, with more memory for activations. Above 1, tasks with one pass left run through each layer one after
        the other, so that its weights are gathered once.
      gather_frozen: replicate the frozen layers of the language model on every device instead of gathering them at each
        use. Takes their size in memory (5.2 GiB), and pays where gathering takes longer than computing. "auto" where it
        pays and fits.
      weighting: of noise levels, "auto" (as the scheduler's shift asks), "none" (uniform) or "logit_normal".
      noise_shift: of the noise levels, in place of the scheduler's; larger trains more on nearly pure noise, where only
        the text says what is in the picture.
    """

    data: DataConfig
    accumulation: int = 3
    merge: int = 1
    gather_frozen: bool | Literal["auto"] = "auto"
    weighting: Literal["auto", "none", "logit_normal"] = "auto"
    noise_shift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("accumulation", self.accumulation, 1)
        at_least("merge", self.merge, 1)
        if self.noise_shift is not None and self.noise_shift <= 0:
            raise DeepGenError(f"noise_shift is {self.noise_shift}; it must be above 0, and 1 does not shift")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(RunConfig):
    """Training of the autoencoder itself, for models that do not take the released one: before all other stages, but
    for its decoder alone.

    Attributes:
      data: whose targets and references are reconstructed; its texts are not used.
      accumulation: micro-batches of one optimiser step.
      loss: "l1" (mean absolute) or "l2" (mean squared) difference of pixels in -1..1.
      kl_weight: of the divergence of latents from the mean and deviation in the model's VAE config, in nats per latent
        value. Larger makes latents more regular and pictures less exact.
      decoder_only: the encoder stays as it is, so that the model's other parts may have been trained before.
      latent_noise: standard deviation of noise on normalised latents, besides the posterior's own, before they are
        decoded: makes the decoder forgive what an MMDiT does not denoise exactly.
    """

    data: DataConfig
    trains: tuple[Trainable, ...] = ("vae",)
    accumulation: int = 1
    loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-4
    decoder_only: bool = False
    latent_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("accumulation", self.accumulation, 1)
        at_least("kl_weight", self.kl_weight, 0)
        at_least("latent_noise", self.latent_noise, 0)
        if self.trains != ("vae",):
            raise DeepGenError(f"trains is {self.trains}; this stage trains only the vae")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """Training of the vision-language model itself, for models that do not take the released one.

    Attributes:
      data: whose texts are learned, token by token, behind their references; targets are not used. The answer of a
        text "question? answer" counts in ``answers_right``.
      accumulation: micro-batches of one optimiser step.
    """

    data: DataConfig
    trains: tuple[Trainable, ...] = ("text", "vision")
    accumulation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("accumulation", self.accumulation, 1)
        if set(self.trains) != {"text", "vision"}:
            raise DeepGenError(f"trains is {self.trains}; this stage trains text and vision, both")
