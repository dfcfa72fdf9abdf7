"""DeepGen's text-to-image pipeline for diffusers (arXiv 2602.12205).

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe("a red fox in fresh snow", generator=torch.Generator().manual_seed(0)).images[0].save("fox.png")

An export in the diffusers layout holds a copy of this file; it depends on torch, transformers and diffusers alone.
Editing with reference images is in the DeepGen-JAX package.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

_TEMPLATE = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n"


class DeepGenPipeline(DiffusionPipeline):
    """Text to image: Qwen2.5-VL with think tokens, the connector, the SD3.5 transformer, and the autoencoder."""

    model_cpu_offload_seq = "vlm->connector->transformer->vae"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: SD3Transformer2DModel,
        vae: AutoencoderKL,
        vlm: Qwen2_5_VLForConditionalGeneration,
        connector: Any,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler, transformer=transformer, vae=vae, vlm=vlm, connector=connector, tokenizer=tokenizer
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts, left-padded to the longest -> pooled [B, P] and sequence [B, L + think tokens, S].

        As in the released system, padding is hidden from the language model and seen by all that follows.
        """
        text = self.vlm.model.language_model
        device, queries = text.embed_tokens.weight.device, self.connector.meta_queries
        ids = [self.tokenizer(_TEMPLATE.format(prompt), add_special_tokens=False).input_ids for prompt in prompts]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
        think = len(queries)
        real = torch.tensor([[0] * (longest - len(row)) + [1] * (len(row) + think) for row in ids], device=device)
        positions = (real.cumsum(-1) - 1).masked_fill(real == 0, 1).expand(3, -1, -1)
        embeddings = text.embed_tokens(tokens)
        embeddings = torch.cat([embeddings, queries.to(embeddings).expand(len(ids), -1, -1)], dim=1)

        # Attention gives zero where a pad asks (FlashAttention 2), which other kernels do not.
        keep = real[..., None].to(embeddings)
        hooks = [
            layer.self_attn.register_forward_hook(lambda _, __, out: (out[0] * keep, *out[1:])) for layer in text.layers
        ]
        try:
            states = text(
                inputs_embeds=embeddings,
                attention_mask=real,
                position_ids=positions,
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        finally:
            for hook in hooks:
                hook.remove()
        stride = self.connector.config.selection_stride
        chosen = [states[i] for i in range(len(text.layers) - 1, 0, -stride)]
        return self.connector(torch.cat(chosen, dim=-1).to(self.connector.projector_1.weight))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates images.

        Args:
          prompt: one text, or several of equal standing; each is paired with the negative prompt.
          negative_prompt: of classifier-free guidance.
          height, width: in pixels, multiples of 16.
          num_inference_steps: Euler steps.
          guidance_scale: of classifier-free guidance; 1 for none.
          generator: of the noise.
          latents: the noise itself, [B, channels, height / 8, width / 8].
          output_type: "pil", "np", "pt" or "latent".
          return_dict: return an ``ImagePipelineOutput``, not a tuple.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        unit = self.vae_scale_factor * self.transformer.config.patch_size
        if height % unit or width % unit:
            raise ValueError(f"height {height} and width {width} must be multiples of {unit}")
        weight = self.transformer.proj_out.weight
        if latents is None:
            rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
            shape = (len(prompts), self.transformer.config.in_channels, rows, columns)
            latents = randn_tensor(shape, generator, weight.device, torch.float32)
        latents = latents.to(weight.device, torch.float32)
        guided = guidance_scale != 1
        # One pair at a time, so that an image does not depend on the others' lengths.
        conditions = [self.encode_prompt([text, negative_prompt] if guided else [text]) for text in prompts]
        images = []
        for x, (pooled, sequence) in zip(latents.split(1), conditions, strict=True):
            self.scheduler.set_timesteps(num_inference_steps, device=weight.device, **self._shift(latents))
            for timestep in self.progress_bar(self.scheduler.timesteps):
                velocity = self.transformer(
                    hidden_states=x.expand(len(pooled), -1, -1, -1).to(weight),
                    encoder_hidden_states=sequence.to(weight),
                    pooled_projections=pooled.to(weight),
                    timestep=timestep.expand(len(pooled)),
                    return_dict=False,
                )[0].float()
                if guided:
                    positive, negative = velocity.chunk(2)
                    velocity = negative + guidance_scale * (positive - negative)
                x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
            images.append(x)
        result: Any = torch.cat(images)
        if output_type != "latent":
            z = result / self.vae.config.scaling_factor + self.vae.config.shift_factor
            pixels = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0]
            result = self.image_processor.postprocess(pixels.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _shift(self, latents: torch.Tensor) -> dict[str, float]:
        """``mu`` of dynamic shifting, by the number of image tokens."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return {}
        tokens = latents.shape[-1] * latents.shape[-2] // self.transformer.config.patch_size**2
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return {"mu": config.base_shift + slope * (tokens - config.base_image_seq_len)}
