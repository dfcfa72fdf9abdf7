"""The nodes: generate, and edit with references and a mask.

ComfyUI's protocol: images are float tensors [B, H, W, 3] in 0..1, masks [B, H, W] with 1 where the picture may change.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from . import client

try:
    import torch
except ImportError:
    # ComfyUI always has torch; without it the nodes pass NumPy arrays, which tests use.
    torch = None  # type: ignore[assignment]

_MAX_SEED = 2**32 - 10
_SAMPLERS = ["default", "euler", "heun", "dpmpp_2m"]


def _settings() -> dict[str, Any]:
    return {
        "seed": ("INT", {"default": 0, "min": 0, "max": _MAX_SEED, "control_after_generate": True}),
        "num_images": ("INT", {"default": 1, "min": 1, "max": 10}),
        "server": ("STRING", {"default": "http://127.0.0.1:8000"}),
    }


def _options() -> dict[str, Any]:
    return {
        "negative_prompt": ("STRING", {"default": "", "multiline": True}),
        "steps": ("INT", {"default": 0, "min": 0, "max": 200, "tooltip": "0 takes the model's own"}),
        "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
                               "tooltip": "0 takes the model's own, 1 turns guidance off"}),
        "sampler": (_SAMPLERS, {"default": "default"}),
        "api_key": ("STRING", {"default": ""}),
        "timeout_seconds": ("FLOAT", {"default": 600.0, "min": 1.0, "max": 86400.0}),
    }  # fmt: skip


class DeepGenGenerate:
    """Images from a prompt."""

    CATEGORY = "DeepGen"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "run"
    DESCRIPTION = "Generates images with a DeepGen server (deepgen serve)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI reads them."""
        sides = {"default": 0, "min": 0, "max": 4096, "step": 32, "tooltip": "0 takes the model's own"}
        required = {"prompt": ("STRING", {"multiline": True}), "width": ("INT", sides), "height": ("INT", sides)}
        return {"required": {**required, **_settings()}, "optional": _options()}

    def run(
        self, prompt: str, width: int, height: int, seed: int, num_images: int, server: str, **options: Any
    ) -> tuple[Any]:
        """Asks the server; returns images [B, H, W, 3]."""
        fields = _fields(prompt, width, height, seed, num_images, options)
        key, timeout = options.get("api_key", ""), options.get("timeout_seconds", 600.0)
        return (_to_tensor(client.generate(server, key, fields, timeout)),)


class DeepGenEdit:
    """Changes pictures by an instruction."""

    CATEGORY = "DeepGen"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "run"
    DESCRIPTION = "Edits an image, with further references and a mask, on a DeepGen server (deepgen serve)."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs as ComfyUI reads them."""
        strength = {"default": 1.0, "min": 0.05, "max": 1.0, "step": 0.05}
        return {
            "required": {"image": ("IMAGE",), "prompt": ("STRING", {"multiline": True}), **_settings()},
            "optional": {"mask": ("MASK",), "reference_1": ("IMAGE",), "reference_2": ("IMAGE",),
                         "reference_3": ("IMAGE",), "strength": ("FLOAT", strength), **_options()},
        }  # fmt: skip

    def run(
        self, image: Any, prompt: str, seed: int, num_images: int, server: str, mask: Any = None,
        reference_1: Any = None, reference_2: Any = None, reference_3: Any = None, strength: float = 1.0,
        **options: Any,
    ) -> tuple[Any]:  # fmt: skip
        """Asks the server; returns images [B, H, W, 3]. Of a batch each image is edited with the same settings."""
        fields = {**_fields(prompt, 0, 0, seed, num_images, options), "strength": strength}
        references = [picture for batch in (reference_1, reference_2, reference_3) if batch is not None
                      for picture in _pictures(batch)]  # fmt: skip
        masks = None if mask is None else _array(mask).reshape(-1, *_array(mask).shape[-2:])
        key, timeout = options.get("api_key", ""), options.get("timeout_seconds", 600.0)
        made: list[bytes] = []
        for i, picture in enumerate(_pictures(image)):
            painted = None if masks is None else _mask_file(masks[min(i, len(masks) - 1)], picture.size)
            images = [_png(picture), *map(_png, references)]
            made += client.edit(server, key, fields, images, painted, timeout)
        return (_to_tensor(made),)


NODE_CLASS_MAPPINGS = {"DeepGenGenerate": DeepGenGenerate, "DeepGenEdit": DeepGenEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"DeepGenGenerate": "DeepGen Generate", "DeepGenEdit": "DeepGen Edit"}


def _fields(prompt: str, width: int, height: int, seed: int, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request; those left at the model's own value are not sent."""
    if bool(width) != bool(height):
        raise client.ServerError("width and height go together; set both, or both to 0")
    fields: dict[str, Any] = {"prompt": prompt, "seed": seed, "n": count}
    if width:
        fields["size"] = f"{width}x{height}"
    if options.get("negative_prompt"):
        fields["negative_prompt"] = options["negative_prompt"]
    if options.get("steps"):
        fields["num_inference_steps"] = options["steps"]
    if options.get("guidance"):
        fields["guidance_scale"] = options["guidance"]
    if options.get("sampler", "default") != "default":
        fields["sampler"] = options["sampler"]
    return fields


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.cpu() if hasattr(tensor, "cpu") else tensor, np.float32)


def _pictures(batch: Any) -> list[Image.Image]:
    array = np.clip(np.rint(_array(batch) * 255), 0, 255).astype(np.uint8)
    return [Image.fromarray(image[..., :3]) for image in array]


def _mask_file(mask: np.ndarray, size: tuple[int, int]) -> bytes:
    """A mask [H, W], 1 where the picture may change -> PNG of a picture's size, transparent there."""
    alpha = Image.fromarray(np.where(mask >= 0.5, 0, 255).astype(np.uint8))
    picture = Image.new("RGBA", size)
    picture.putalpha(alpha.resize(size, Image.Resampling.NEAREST))
    return _png(picture)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _to_tensor(files: list[bytes]) -> Any:
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255 for data in files]
    if len({image.shape for image in images}) > 1:
        raise client.ServerError("the images have different sizes; edit pictures of one size, or one at a time")
    batch = np.stack(images)
    return batch if torch is None else torch.from_numpy(batch)
