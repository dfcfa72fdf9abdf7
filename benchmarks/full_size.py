"""Compares every part of the model with PyTorch's at full size, on random weights, in float32, within 20 GB of memory.

Writes a random release (`random_release.py`), converts it with `deepgen convert`, and runs each part twice, one process
after the other: from the model folder in JAX, from the release's own files in PyTorch (transformers' vision tower and
language model, diffusers' MMDiT and autoencoder, the bridge in plain torch). Prints the differences as JSON and, with
``--table``, as Markdown.

    python benchmarks/full_size.py --work /tmp/full            # 27 GB of disk, about 20 minutes on two cores
    python benchmarks/full_size.py --work /tmp/tiny --size tiny

Differences are relative to the values: ``max`` is the largest absolute difference over the largest absolute value,
``rms`` the root mean square of the differences over that of the values.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("vision", "text", "bridge", "mmdit", "vae")
FRAMEWORKS = ("jax", "torch")
#: Side of images in pixels: that of the released system, and the minimum for the tiny model's position table.
SIDES = {"full": 512, "tiny": 64}
PROMPT_TOKENS = 48


def inputs(config: Any, part: str, side: int) -> dict[str, np.ndarray]:
    """Inputs of both frameworks, drawn from one seed, float32 or int32."""
    rng = np.random.default_rng(sum(part.encode()))
    edge, length = side // config.vae.downscale, PROMPT_TOKENS + config.bridge.num_queries

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if part == "vision":
        return {"pixels": rng.uniform(-1, 1, (side, side, 3)).astype(np.float32)}
    if part == "text":
        return {"ids": rng.integers(10, config.text.vocab_size // 2, (1, PROMPT_TOKENS)).astype(np.int32)}
    if part == "bridge":
        return {"states": normal(_states(config), 1, length, config.text.hidden_size)}
    if part == "mmdit":
        channels = config.mmdit.in_channels
        return {
            "target": normal(channels, edge, edge),
            "reference": normal(channels, edge, edge),
            "pooled": normal(1, config.mmdit.pooled_projection_dim),
            "sequence": normal(1, length, config.mmdit.joint_attention_dim),
            "timestep": np.array([700.0], np.float32),
        }
    return {
        "pixels": rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32),
        "latents": normal(1, edge, edge, config.vae.latent_channels),
    }


def _states(config: Any) -> int:
    from deepgen_jax.models.qwen_text import selected_layers

    return len(selected_layers(config.text.num_layers, config.bridge.selection_stride))


def run_jax(work: Path, config: Any, part: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One part in JAX, from the model folder."""
    import jax
    import jax.numpy as jnp

    from deepgen_jax.data.vision_inputs import patch_grid, patchify_for_vlm
    from deepgen_jax.models import patches
    from deepgen_jax.models.deepgen import DeepGen
    from deepgen_jax.models.qwen_vision import patch_layout
    from deepgen_jax.stores import model_folder

    model = DeepGen(config, dtype=jnp.float32)
    parts = ("text", "bridge") if part == "text" else (part,)
    params = model_folder.load_params(work / "model", parts, jnp.float32)

    def apply(method: Any, *arguments: Any, **settings: Any) -> Any:
        # Pass weights as arguments: closed-over arrays would be copied into the program.
        run = jax.jit(lambda p, a: model.apply({"params": p}, *a, method=method, **settings))
        return jax.tree.map(np.asarray, run(params, arguments))

    if part == "vision":
        grid = patch_grid(x["pixels"].shape[:2], config.vision)
        layout = (axis[None] for axis in patch_layout(*grid, config.vision))
        return {"tokens": apply(DeepGen.encode_images, patchify_for_vlm(x["pixels"], config.vision)[None], *layout)[0]}
    if part == "text":
        length = PROMPT_TOKENS + config.bridge.num_queries
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, 1, length))
        states = apply(DeepGen.hidden_states, x["ids"], positions, np.ones((1, length), bool))
        return {f"layer {i}": states[n] for n, i in enumerate(_layers(config))}
    if part == "bridge":
        mask = np.ones(x["states"].shape[1:3], bool)
        pooled, sequence = apply(lambda whole, *arguments: whole.bridge(*arguments), x["states"], mask)
        return {"pooled": pooled, "sequence": sequence}
    if part == "mmdit":
        size, most = config.mmdit.patch_size, config.mmdit.pos_embed_max_size
        packed = patches.pack([x["target"]], [[x["reference"]]], patch_size=size, max_size=most)
        velocity = apply(
            DeepGen.velocity, packed.patches, packed.position_ids, x["timestep"], x["pooled"], x["sequence"],
            num_targets=packed.num_targets,
        )  # fmt: skip
        sizes = [x["target"].shape[1:]]
        return {"velocity": patches.unpack(velocity, sizes, size, config.mmdit.out_channels)[0]}
    mean, logvar = apply(DeepGen.vae_encode, x["pixels"])
    return {"mean": mean, "logvar": logvar, "pixels": apply(DeepGen.vae_decode, x["latents"])}


def _layers(config: Any) -> tuple[int, ...]:
    from deepgen_jax.models.qwen_text import selected_layers

    return tuple(selected_layers(config.text.num_layers, config.bridge.selection_stride))


def run_torch(work: Path, config: Any, part: str, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One part in PyTorch, from the release's files."""
    import torch

    arrays = {name: torch.from_numpy(value) for name, value in x.items()}
    with torch.inference_mode():
        found = _TORCH[part](work / "release", config, arrays)
    return {name: value.numpy() for name, value in found.items()}


def _tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name without ``prefix``, float32 tensor) of a release's folder."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name).float()


def _fill(module: Any, folder: Path, prefix: str = "", *, spare: tuple[str, ...] = ()) -> Any:
    """Loads weights one tensor at a time; names with the prefix ``spare`` exist only in the files."""
    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    filled = set()
    for name, tensor in _tensors(folder, prefix):
        if name in parameters:
            parameters[name].data.copy_(tensor)
            filled.add(name)
        elif not name.startswith(spare or ("\0",)):
            raise ValueError(f"{folder} holds {name}, which the peer lacks")
    if missing := sorted({name for name, _ in module.named_parameters()} - filled):
        raise ValueError(f"{folder} lacks {missing}")
    return module.eval()


def _torch_vision(release: Path, config: Any, x: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch_peer import vision_tower

    from deepgen_jax.data.vision_inputs import patch_grid, patchify_for_vlm

    rows, columns = patch_grid(x["pixels"].shape[:2], config.vision)
    patches = torch.from_numpy(patchify_for_vlm(x["pixels"].numpy(), config.vision))
    tower = _fill(vision_tower(config.vision), release / "vlm", "visual.")
    tokens = tower(patches, grid_thw=torch.tensor([[1, rows, columns]]))
    return {"tokens": getattr(tokens, "pooler_output", tokens)}


def _torch_text(release: Path, config: Any, x: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch_peer import text_model

    last = config.text.num_layers - 1
    model = _fill(text_model(config.text), release / "vlm", "model.", spare=(f"layers.{last}.", "norm."))
    think = dict(_tensors(release / "connector", "meta_queries"))[""]
    embeddings = torch.cat([model.embed_tokens(x["ids"].long()), think[None]], dim=1)
    positions = torch.arange(embeddings.shape[1]).expand(3, 1, -1)
    states: dict[int, Any] = {}

    def keep(index: int) -> Any:
        return lambda _, __, out: states.__setitem__(index, out[0] if isinstance(out, tuple) else out)

    for index, layer in enumerate(model.layers, start=1):
        layer.register_forward_hook(keep(index))
    model(inputs_embeds=embeddings, position_ids=positions)
    return {f"layer {i}": states[i] for i in _layers(config)}


def _torch_bridge(release: Path, config: Any, x: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch_peer import Bridge

    bridge = _fill(Bridge(config), release / "connector")
    pooled, sequence = bridge(torch.cat(list(x["states"]), dim=-1))
    return {"pooled": pooled, "sequence": sequence}


def _torch_mmdit(release: Path, config: Any, x: dict[str, Any]) -> dict[str, Any]:
    """diffusers' blocks over the tokens of the target, then those of the reference."""
    import torch
    from torch_peer import mmdit

    model = _fill(mmdit(config.mmdit), release / "transformer")
    tokens = torch.cat([model.pos_embed(x[name][None]) for name in ("target", "reference")], dim=1)
    modulation = model.time_text_embed(x["timestep"], x["pooled"])
    context = model.context_embedder(x["sequence"])
    for block in model.transformer_blocks:
        context, tokens = block(hidden_states=tokens, encoder_hidden_states=context, temb=modulation)
    tokens = model.proj_out(model.norm_out(tokens, modulation))
    channels, height, width = x["target"].shape
    size = config.mmdit.patch_size
    grid = tokens[0, : height * width // size**2].reshape(height // size, width // size, size, size, channels)
    return {"velocity": grid.permute(4, 0, 2, 1, 3).reshape(channels, height, width)}


def _torch_vae(release: Path, config: Any, x: dict[str, Any]) -> dict[str, Any]:
    from torch_peer import autoencoder

    model = _fill(autoencoder(config.vae), release / "vae")
    posterior = model.encode(x["pixels"].permute(0, 3, 1, 2)).latent_dist
    pixels = model.decode(x["latents"].permute(0, 3, 1, 2)).sample
    # A posterior limits its logvar; ours is limited where it is sampled.
    moments = posterior.parameters.chunk(2, dim=1)
    named = {"mean": moments[0], "logvar": moments[1], "pixels": pixels}
    return {name: value.permute(0, 2, 3, 1) for name, value in named.items()}


_TORCH = {
    "vision": _torch_vision, "text": _torch_text, "bridge": _torch_bridge, "mmdit": _torch_mmdit, "vae": _torch_vae,
}  # fmt: skip


def compare(ours: np.ndarray, peer: np.ndarray) -> dict[str, float]:
    """Differences relative to the peer's values; equal shapes."""
    if ours.shape != peer.shape:
        raise ValueError(f"shapes differ: {ours.shape} and {peer.shape}")
    a, b = ours.astype(np.float64), peer.astype(np.float64)
    error = a - b
    return {
        "max": float(np.abs(error).max() / np.abs(b).max()),
        "rms": float(np.sqrt(np.mean(error**2) / np.mean(b**2))),
        "largest_value": float(np.abs(b).max()),
    }


def worker(options: argparse.Namespace) -> None:
    """Runs one part in one framework: writes its outputs, prints seconds and peak memory."""
    from deepgen_jax.stores import model_folder

    config = model_folder.read_manifest(options.work / "model").config
    start = time.perf_counter()
    run = run_jax if options.framework == "jax" else run_torch
    found: Any = run(options.work, config, options.part, inputs(config, options.part, SIDES[options.size]))
    np.savez(options.work / f"{options.part}-{options.framework}.npz", **found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_gib": round(peak, 2)}))


def prepare(options: argparse.Namespace) -> None:
    """Creates a random release and converts it to a model folder, unless they exist."""
    here = Path(__file__).parent
    if not (options.work / "release").exists():
        command = [sys.executable, str(here / "random_release.py"), "--size", options.size]
        subprocess.run([*command, "--out", str(options.work / "release")], check=True, stdout=sys.stderr)
    if not (options.work / "model").exists():
        command = [sys.executable, "-m", "deepgen_jax.cli.main", "convert", "--out", str(options.work / "model")]
        subprocess.run([*command, "--diffusers", str(options.work / "release")], check=True, stdout=sys.stderr)


def measure(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """Runs one part in both frameworks, in consecutive processes."""
    result: dict[str, Any] = {}
    for framework in FRAMEWORKS:
        command = [sys.executable, __file__, "--work", str(options.work), "--size", options.size]
        done = subprocess.run(
            [*command, "--part", part, "--framework", framework], check=True, capture_output=True, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        result[framework] = json.loads(done.stdout.splitlines()[-1])
    files = [np.load(options.work / f"{part}-{framework}.npz") for framework in FRAMEWORKS]
    result["outputs"] = {name: compare(files[0][name], files[1][name]) for name in files[1].files}
    return result


def table(results: dict[str, Any]) -> str:
    """Markdown table with one row per output."""
    rows = ["| part | output | max | rms | JAX, s and GiB | PyTorch, s and GiB |", "| --- " * 6 + "|"]
    for part, result in results.items():
        costs = " | ".join(f"{result[f]['seconds']:g}, {result[f]['peak_gib']:g}" for f in FRAMEWORKS)
        for name, difference in result["outputs"].items():
            rows.append(f"| {part} | {name} | {difference['max']:.1e} | {difference['rms']:.1e} | {costs} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the release, the model and the outputs")
    parser.add_argument("--size", choices=tuple(SIDES), default="full", help="default: full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    parser.add_argument("--delete", action="store_true", help="remove the work folder at the end")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--framework", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        worker(options)
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options)
    results = {}
    for part in options.parts:
        results[part] = measure(options, part)
        print(f"{part}: {json.dumps(results[part])}", file=sys.stderr, flush=True)
    print(table(results) if options.table else json.dumps(results))
    if options.delete:
        shutil.rmtree(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
