"""The pipeline against the PyTorch system's outputs, through model folders converted from every released layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
BASE = {"sft": "sft", "base": "pretrain"}
LAYOUT_OF = {"deepgen_sft.pth": "sft", "deepgen_pretrain.pth": "pretrain"}


def golden_names(part):
    with np.load(DATA / f"goldens_{part}.npz") as arrays:
        return arrays.files


def pairs_with_goldens(part, names, pattern):
    """The (tag, name) pairs for which a golden array exists."""
    files = golden_names(part)
    pairs = [(tag, name) for tag in BASE for name in names]
    return [pair for pair in pairs if any(file.startswith(pattern.format(*pair)) for file in files)]


def references(case, pictures):
    return case["refs"] and [[pictures[name] for name in row] for row in case["refs"]]


@pytest.mark.parametrize("tag", BASE)
@pytest.mark.parametrize("name", ["a", "b", "s"])
def test_vision_tower(tag, name, pipelines, pictures, check_golden):
    check_golden("vision", f"{tag}/vit/{name}", pipelines(BASE[tag]).encode_image(pictures[name]))


@pytest.mark.parametrize("name", CASES["prompts"])
def test_tokens_and_rotary_positions(name, cases, pipelines, pictures, goldens):
    case, arrays = cases["prompts"][name], goldens("tokens")
    pipe = pipelines("sft")
    for row, text in enumerate(case["texts"]):
        sizes = [pictures[ref].size for ref in case["refs"][row]] if case["refs"] else None
        got = pipe.tokenize(text, sizes)
        real = arrays[f"{name}/mask"][row].astype(bool)
        np.testing.assert_array_equal(got["input_ids"], arrays[f"{name}/ids"][row][real])
        length = got["position_ids"].shape[1]
        np.testing.assert_array_equal(got["position_ids"], arrays[f"{name}/pos"][:, row, -length:])


@pytest.mark.parametrize("case", CASES["plain_tokenization"], ids=lambda case: repr(case["text"]))
def test_plain_tokenization(case, pipelines):
    assert pipelines("sft")._prompts.tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize(("tag", "name"), pairs_with_goldens("llm", CASES["prompts"], "{0}/{1}/"))
def test_condition(tag, name, cases, pipelines, pictures, goldens, check_golden):
    case, pipe = cases["prompts"][name], pipelines(BASE[tag])
    wanted = [key for key in goldens("llm") if key.startswith(f"{tag}/{name}/") and "trunc" not in key]
    refs = references(case, pictures)
    pooled, sequence, mask = pipe.encode_prompt(case["texts"], refs, padding="batch")
    sequence = sequence[:, -mask[0].sum() :]
    for key in wanted:
        kind = key.rpartition("/")[2]
        if kind == "pooled":
            check_golden("llm", key, pooled)
        elif kind in ("seq", "seq_every4"):
            check_golden("llm", key, sequence[:, :: 4 if kind == "seq_every4" else 1])
        elif kind == "fused_every8" and len(case["texts"]) == 1:
            states = pipe.hidden_states(case["texts"][0], refs and refs[0])
            check_golden("llm", key, np.concatenate(list(states), axis=-1)[None, ::8])


@pytest.mark.parametrize("layout", ["sft", "sft_adapters"])
def test_adapters_merged_or_kept(layout, cases, pipelines, check_golden):
    pooled, _, _ = pipelines(layout).encode_prompt(cases["prompts"]["t2i_pair"]["texts"], padding="batch")
    check_golden("llm", "sft/t2i_pair/pooled", pooled)
    check_golden("lora", "merged/t2i_pair/pooled", pooled)


def test_adapter_scale(data_dir, cases, tmp_path, check_golden):
    from deepgen_jax import DeepGenPipeline
    from deepgen_jax.convert import convert

    convert(
        out=tmp_path / "model",
        qwen=data_dir / "qwen2_5_vl",
        sd3=data_dir / "sd3_5_kontext",
        checkpoint=data_dir / "deepgen_sft.pth",
        hparams=data_dir / "deepgen_config.json",
        lora_alpha=2,
    )
    pipe = DeepGenPipeline.from_pretrained(tmp_path / "model")
    pooled, _, _ = pipe.encode_prompt(cases["prompts"]["t2i_pair"]["texts"], padding="batch")
    check_golden("lora", "scale_0.5/t2i_pair/pooled", pooled)


@pytest.mark.parametrize(
    ("tag", "name"), pairs_with_goldens("dit", ("noref", "ref1", "ref2", "mixed"), "{1}/{0}/velocity/")
)
def test_velocity_of_samples_of_any_size(tag, name, pipelines, goldens, check_golden):
    arrays = goldens("dit")
    count = sum(key.startswith(f"{name}/latent/") for key in arrays)
    latents = [arrays[f"{name}/latent/{i}"] for i in range(count)]
    refs = [[arrays[key] for key in sorted(arrays) if key.startswith(f"{name}/ref/{i}/")] for i in range(count)]
    inputs = (arrays[f"{name}/{key}"] for key in ("t", "pooled", "ctx"))
    got = pipelines(BASE[tag]).velocity(latents, refs, *inputs)
    for i, velocity in enumerate(got):
        check_golden("dit", f"{name}/{tag}/velocity/{i}", velocity)


@pytest.mark.parametrize("name", ["s", "t"])
def test_vae_posterior(name, pipelines, pictures, check_golden):
    pixels = np.moveaxis(np.asarray(pictures[name], np.float32) / 255 * 2 - 1, -1, 0)[None]
    mean, logvar = pipelines("sft").vae_encode(pixels)
    check_golden("vae", f"encode/{name}/mean", mean[0])
    check_golden("vae", f"encode/{name}/logvar", logvar[0])


def test_vae_decoder(pipelines, goldens, check_golden):
    check_golden("vae", "decode/pixels", pipelines("sft").vae_decode(goldens("vae")["decode/z"]))


@pytest.mark.parametrize("name", CASES["generate"])
def test_generation_and_editing(name, cases, pipelines, pictures, goldens, check_golden):
    case, arrays = cases["generate"][name], goldens("generate")
    refs = references(case, pictures)
    sampled = bool(refs) and "sample" in case["reference_latents"]
    noise = (
        [[arrays[f"{name}/eps/{i}/{j}"] for j in range(len(row))] for i, row in enumerate(refs)] if sampled else None
    )
    out = pipelines(LAYOUT_OF[case["checkpoint"]])(
        case["texts"],
        refs,
        case["negative"],
        case["height"],
        case["width"],
        case["steps"],
        case["guidance"],
        latents=arrays[f"{name}/noise"],
        padding="batch",
        reference_posterior="sample" if sampled else "mean",
        reference_noise=noise,
        output_type="np",
    )
    check_golden("generate", f"{name}/latents", out.latents)
    check_golden("generate", f"{name}/uint8", out.images)


def test_trace_of_every_step(cases, pipelines, goldens, check_golden):
    import jax.numpy as jnp

    from deepgen_jax.flow.schedule import make_sigmas
    from deepgen_jax.inference import programs

    case, arrays = cases["generate"]["sft_t2i_square"], goldens("generate")
    pipe = pipelines("sft")
    pooled, sequence, mask = pipe.encode_prompt(
        [*case["texts"], *case["negative"]], pair_with=[*case["negative"], *case["texts"]]
    )
    trace = programs.denoise(
        pipe.model,
        {"mmdit": pipe.params["mmdit"]},
        jnp.asarray(arrays["sft_t2i_square/noise"]),
        None,
        programs.Condition(*map(jnp.asarray, (pooled, sequence, mask))),
        jnp.asarray(make_sigmas(pipe.scheduler, case["steps"])),
        jnp.float32(case["guidance"]),
        trajectory=True,
    )
    check_golden("generate", "sft_t2i_square/trace", trace)


LAYOUTS = ("sft", "pretrain", "rl", "ds", "model_pt", "zip", "diffusers")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_condition_of_every_layout(layout, cases, pipelines, goldens, check_golden):
    pooled, sequence, mask = pipelines(layout).encode_prompt(cases["prompts"]["t2i_en"]["texts"])
    check_golden("checkpoints", f"{layout}/pooled", pooled)
    check_golden("checkpoints", f"{layout}/seq_every16", sequence[:, -mask[0].sum() :][:, ::16])


@pytest.mark.parametrize("layout", [*LAYOUTS, "none"])
def test_velocity_of_every_layout(layout, pipelines, goldens, check_golden):
    arrays = goldens("checkpoints")
    inputs = (arrays[f"in/{key}"] for key in ("t", "pooled", "ctx"))
    velocity = pipelines(layout).velocity([arrays["in/latent"]], None, *inputs)
    check_golden("checkpoints", f"{layout}/velocity", velocity[0])


def test_cut_to_the_last_tokens(cases, pipelines, check_golden):
    """Training cuts prompts from the left; the golden keeps the last 10 tokens and the think tokens."""
    from deepgen_jax.data.tokens import pad_prompts
    from deepgen_jax.inference import programs

    pipe = pipelines("sft")
    prompt = pipe._prompts.tokenize(cases["prompts"]["t2i_en"]["texts"][0]).last(10)
    batch = pad_prompts([prompt], [10], pipe.config)
    part = {name: pipe.params[name] for name in ("text", "bridge")}
    inputs = (batch.input_ids, batch.position_ids, batch.real, batch.visible)
    pooled, sequence = programs.condition(pipe.model, part, *inputs)
    check_golden("llm", "sft/t2i_en/trunc10/pooled", pooled)
    check_golden("llm", "sft/t2i_en/trunc10/seq_every4", np.asarray(sequence)[:, ::4])
