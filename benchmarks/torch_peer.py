"""The same model in PyTorch: transformers' language model, the bridge in plain torch, diffusers' MMDiT and VAE.

Text-to-image with guidance, as the released system runs it: prompt and negative prompt left-padded to the longer of the
two, pads hidden from the language model and seen by the bridge and the MMDiT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from deepgen_jax.config import BridgeConfig, DeepGenConfig, MMDiTConfig, TextConfig, VAEConfig, VisionConfig
from deepgen_jax.convert.names import MMDIT, TEXT, VAE, Weight, weights
from deepgen_jax.convert.transforms import to_source
from deepgen_jax.data.tokens import TokenizedPrompt, pad_prompts
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.models.stack import restack
from deepgen_jax.training.optimizer import OptimizerConfig

_BRIDGE = "bridge."


class ConnectorLayer(nn.Module):
    """Pre-norm encoder layer of the SigLIP kind."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        hidden = config.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        query, key, value = (
            self.self_attn[f"{name}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv"
        )
        h = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](h)
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](F.gelu(h, approximate="tanh"))


class Connector(nn.Module):
    """All connector layers."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(config) for _ in range(config.num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Bridge(nn.Module):
    """Think tokens, projectors and connector."""

    def __init__(self, config: DeepGenConfig) -> None:
        super().__init__()
        bridge, width = config.bridge, config.bridge.hidden_size
        states = len(selected_layers(config.text.num_layers, bridge.selection_stride))
        self.meta_queries = nn.Parameter(torch.zeros(bridge.num_queries, config.text.hidden_size))
        self.projector_1 = nn.Linear(states * config.text.hidden_size, width)
        self.projector_2 = nn.Linear(width, config.mmdit.pooled_projection_dim)
        self.projector_3 = nn.Linear(width, config.mmdit.joint_attention_dim)
        self.connector = Connector(bridge)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Selected states, channels concatenated [B, L, n D] -> pooled [B, P], sequence [B, L, J]."""
        x = self.connector(self.projector_1(states))
        return self.projector_2(x.mean(dim=1)), self.projector_3(x)


def text_model(config: TextConfig) -> Any:
    """transformers' language model without its last decoder layer and final norm, which nothing reads."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    names = Qwen2_5_VLTextConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers - 1,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": list(config.mrope_sections)},
        max_position_embeddings=config.max_position_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = Qwen2_5_VLTextModel(names)
    model.norm = nn.Identity()
    return model


def vision_tower(config: VisionConfig) -> Any:
    """transformers' vision tower."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    names = Qwen2_5_VLVisionConfig(
        depth=config.depth,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        out_hidden_size=config.out_hidden_size,
        window_size=config.window_size,
        fullatt_block_indexes=list(config.full_attention_blocks),
        attn_implementation="sdpa",
    )
    return Qwen2_5_VisionTransformerPretrainedModel(names)


def mmdit(config: MMDiTConfig) -> Any:
    """diffusers' MMDiT."""
    from diffusers import SD3Transformer2DModel

    names = dataclasses.asdict(config)
    del names["estimates"]  # a distilled model's
    names["attention_head_dim"], names["num_attention_heads"] = names.pop("head_dim"), names.pop("num_heads")
    return SD3Transformer2DModel(**names, qk_norm="rms_norm")


def autoencoder(config: VAEConfig) -> Any:
    """diffusers' autoencoder."""
    from diffusers import AutoencoderKL

    count = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _tensor(array: Any) -> torch.Tensor:
    """A copy of a JAX or numpy array, bfloat16 bit for bit."""
    value = np.ascontiguousarray(np.asarray(array))
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(value))


class TorchPeer:
    """Generates from the weights of a parameter tree; every method waits until the device is done.

    Args:
      config: the model.
      params: our parameter tree.
      dtype: "float32" or "bfloat16".
      device: "cpu" or "cuda".
      compiled: run the MMDiT through ``torch.compile``.
    """

    def __init__(self, config: DeepGenConfig, params: dict[str, Any], dtype: str, device: str, compiled: bool) -> None:
        self.config = config
        params = restack(jax.device_get(params), config.bridge.selection_stride)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.text = self._filled(text_model, config.text, params, TEXT, self.dtype)
        self.bridge = self._filled(Bridge, config, params, _BRIDGE, self.dtype)
        self.mmdit = self._filled(mmdit, config.mmdit, params, MMDIT, self.dtype)
        self.vae_dtype = torch.float32 if config.vae.force_upcast else self.dtype
        self.vae = self._filled(autoencoder, config.vae, params, VAE, self.vae_dtype)
        if compiled:
            self.compile()
        self._states: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.text.layers, start=1):
            if index in selected_layers(config.text.num_layers, config.bridge.selection_stride):
                layer.register_forward_hook(lambda _, __, out, index=index: self._keep(index, out))
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * self._real,))

    def compile(self) -> None:
        """Runs the MMDiT through ``torch.compile`` from now on."""
        self.mmdit.compile(fullgraph=True, dynamic=False)

    def _keep(self, index: int, output: Any) -> None:
        self._states[index] = output[0] if isinstance(output, tuple) else output

    def _filled(self, build: Any, config: Any, params: dict[str, Any], prefix: str, dtype: torch.dtype) -> Any:
        """A part with our weights; only weights unused in the computation may be missing."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                module = build(config)
        finally:
            torch.set_default_dtype(before)
        state = {}
        for key, weight in weights(self.config).items():
            name = key if weight.part != "bridge" else _BRIDGE + key
            if weight.part == "unused" or not name.startswith(prefix):
                continue
            value: Any = params
            for step in weight.path:
                value = value[step]
            source = to_source(weight.transform, np.asarray(value[weight.index]), weight.shape)
            state[name.removeprefix(prefix)] = _tensor(source)
        missing, unexpected = module.load_state_dict(state, strict=False)
        missing = [key for key in missing if "add_q" not in key and "norm_added_q" not in key]
        if missing or unexpected:
            raise ValueError(f"peer's weights do not match: missing {missing}, unexpected {unexpected}")
        return module.eval()

    @torch.inference_mode()
    def condition(self, prompts: Sequence[TokenizedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled [B, P] and sequence [B, L, J] of prompts, left-padded to the longest."""
        result = self.differentiable_condition(prompts)
        self.wait()
        return result

    def differentiable_condition(self, prompts: Sequence[TokenizedPrompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`condition` with gradients, where they are enabled."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        batch = pad_prompts(prompts, [longest] * len(prompts), self.config)
        ids, positions, real = (
            torch.from_numpy(x).to(self.device) for x in (batch.input_ids, batch.position_ids, batch.real)
        )
        self._real = real[..., None].to(self.dtype)
        think = self.bridge.meta_queries.expand(len(prompts), -1, -1)
        embeddings = torch.cat([self.text.embed_tokens(ids.long()), think], dim=1)
        self.text(inputs_embeds=embeddings, attention_mask=real.long(), position_ids=positions.long())
        order = selected_layers(self.config.text.num_layers, self.config.bridge.selection_stride)
        result: tuple[torch.Tensor, torch.Tensor] = self.bridge(torch.cat([self._states[i] for i in order], dim=-1))
        return result

    @torch.inference_mode()
    def denoise(
        self, noise: np.ndarray, pooled: torch.Tensor, sequence: torch.Tensor, sigmas: np.ndarray, guidance: float
    ) -> torch.Tensor:
        """Euler steps from ``noise`` [B, C, h, w]; the condition is of the prompts, then of the negative prompts."""
        x = torch.from_numpy(noise).to(self.device)
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            timestep = torch.full((2 * len(x),), sigma * 1000, device=self.device)
            velocity = self.mmdit(torch.cat([x, x]).to(self.dtype), sequence, pooled, timestep, return_dict=False)[0]
            positive, negative = velocity.float().chunk(2)
            x = x + (following - sigma) * (negative + guidance * (positive - negative))
        self.wait()
        return x

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents -> uint8 pixels [B, H, W, 3], one picture at a time."""
        config = self.config.vae
        z = (latents / config.scaling_factor + config.shift_factor).to(self.vae_dtype)
        pixels = torch.cat([self.vae.decode(one[None], return_dict=False)[0] for one in z])
        return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def wait(self) -> None:
        """Waits until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class TorchTraining:
    """The training step of stage 2 without adapters: flow matching, clipping by the global norm, AdamW.

    Args:
      peer: the model.
      trains: parts that train, among "bridge" and "mmdit".
      config: of the optimiser; its learning rate is constant.
    """

    def __init__(self, peer: TorchPeer, trains: Sequence[str], config: OptimizerConfig) -> None:
        self._peer, self._clip = peer, config.clip_norm
        self._parts = {name: getattr(peer, name).train() for name in trains}
        for module in (peer.text, peer.vae, peer.bridge, peer.mmdit):
            module.requires_grad_(module in self._parts.values())
        prefixes = {"bridge": "", "mmdit": MMDIT}
        rows = {weight.key: weight for weight in weights(peer.config).values()}
        self._weights = {part: {key: rows.get(prefixes[part] + key) for key in dict(module.named_parameters())}
                         for part, module in self._parts.items()}  # fmt: skip
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in self._parts.values():
            for parameter in module.parameters():
                (decayed if parameter.ndim > 1 else others).append(parameter)
        self._parameters = decayed + others
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups, config.learning_rate, (config.beta1, config.beta2), config.eps, config.weight_decay, fused=True
        )

    def gradients(self, *batch: Any) -> float:
        """Flow-matching loss, whose gradients are left in the parameters.

        The arguments are prompts, latents and noise [B, C, h, w], and noise levels [B].
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._peer.wait()
        return float(loss.detach())

    def step(self, *batch: Any) -> float:
        """One step; returns the loss before it."""
        loss = self.gradients(*batch)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._peer.wait()
        return loss

    def gradients_by_name(self) -> Iterator[tuple[str, Weight, np.ndarray]]:
        """(part, weight, gradient) of every parameter that our model has, too."""
        for part, module in self._parts.items():
            for name, parameter in module.named_parameters():
                weight = self._weights[part][name]
                if weight is not None and weight.part == part and parameter.grad is not None:
                    yield part, weight, parameter.grad.float().cpu().numpy()

    def _loss(
        self, prompts: Sequence[TokenizedPrompt], latents: np.ndarray, noise: np.ndarray, sigma: np.ndarray
    ) -> torch.Tensor:
        device, dtype = self._peer.device, self._peer.dtype
        clean, drawn, levels = (torch.from_numpy(np.array(x)).to(device) for x in (latents, noise, sigma))
        pooled, sequence = self._peer.differentiable_condition(prompts)
        wide = levels[:, None, None, None]
        noisy = (1 - wide) * clean + wide * drawn
        velocity = self._peer.mmdit(noisy.to(dtype), sequence, pooled, levels * 1000, return_dict=False)[0]
        return F.mse_loss(velocity.float(), drawn - clean)


def device_for(platform: str) -> str | None:
    """The torch device that matches JAX's platform; None if torch has none."""
    if platform == "gpu":
        return "cuda" if torch.cuda.is_available() else None
    return "cpu" if platform == "cpu" else None


def versions() -> dict[str, str]:
    """Versions of the peer's packages."""
    import diffusers
    import transformers

    return {module.__name__: module.__version__ for module in (torch, transformers, diffusers)}
