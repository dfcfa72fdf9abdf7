"""The vision tower and the language model against transformers, on random models of other shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from deepgen_jax.config import BridgeConfig, DeepGenConfig, MMDiTConfig, TextConfig, VisionConfig
from deepgen_jax.convert import names, transforms
from deepgen_jax.data.tokens import TokenizedPrompt, pad_prompts, rope_positions
from deepgen_jax.data.vision_inputs import batch_images
from deepgen_jax.models.deepgen import DeepGen
from deepgen_jax.models.qwen_text import selected_layers

IDS = {"pad_token_id": 0, "eos_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4}
SHAPES = {
    "deep, grouped": (
        TextConfig(48, 80, 14, 6, 2, 97, mrope_sections=(1, 2, 1), video_token_id=5, **IDS),
        VisionConfig(3, 32, 40, 2, full_attention_blocks=(2,), out_hidden_size=48),
    ),
    "one key head, small theta": (
        TextConfig(64, 96, 7, 4, 1, 61, rope_theta=1e4, mrope_sections=(2, 3, 3), video_token_id=5, **IDS),
        VisionConfig(5, 48, 64, 3, full_attention_blocks=(0, 3), out_hidden_size=64, window_size=56),
    ),
    "every head its keys, no full blocks": (
        TextConfig(32, 40, 20, 2, 2, 73, rms_norm_eps=1e-5, mrope_sections=(4, 2, 2), video_token_id=5, **IDS),
        VisionConfig(2, 64, 48, 4, full_attention_blocks=(), out_hidden_size=32),
    ),
}


def peer_model(text: TextConfig, vision: VisionConfig) -> torch.nn.Module:
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "vocab_size": text.vocab_size,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "type": "mrope",
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_sections),
            },
            "max_window_layers": text.num_layers,
            "pad_token_id": text.pad_token_id,
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
        },
        image_token_id=text.image_token_id,
        vision_start_token_id=text.vision_start_token_id,
        vision_end_token_id=text.vision_end_token_id,
        video_token_id=text.video_token_id,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name or "ln_q" in name
            weight.copy_(torch.randn_like(weight) * (0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5) + is_norm)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    """(our model, its parameters, the peer) with the same weights."""
    text, vision = SHAPES[request.param]
    peer = peer_model(text, vision)
    mmdit = MMDiTConfig(num_layers=1, num_heads=1, head_dim=8, caption_projection_dim=8, pos_embed_max_size=4)
    bridge = BridgeConfig(num_queries=3, hidden_size=text.hidden_size, num_layers=1, num_heads=1, intermediate_size=8)
    config = DeepGenConfig(text=text, vision=vision, bridge=bridge, mmdit=mmdit)
    state = {f"lmm.{name}": tensor.detach().numpy() for name, tensor in peer.state_dict().items()}
    params: dict = {"bridge": {"meta_queries": np.zeros((3, text.hidden_size), np.float32)}}
    for key, weight in names.weights(config).items():
        if weight.part in ("text", "vision"):
            node = params
            for part in weight.path[:-1]:
                node = node.setdefault(part, {})
            leaf = node.setdefault(weight.path[-1], np.zeros((*weight.stack, *weight.target_shape), np.float32))
            leaf[weight.index] = transforms.to_target(weight.transform, state[key])
    return DeepGen(config), params, peer


def close(got, want):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_vision_tower(pair):
    model, params, peer = pair
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (h, w, 3)).astype(np.float32) for h, w in ((96, 160), (64, 64), (256, 96))]
    batch = batch_images(images, model.config.vision, multiple=8)
    layout = (batch.rows, batch.columns, batch.windows)
    got = model.apply({"params": params}, batch.patches, *layout, method="encode_images")
    for row, (image, tokens) in enumerate(zip(images, batch.tokens, strict=True)):
        grid = torch.tensor([[1, image.shape[0] // 16, image.shape[1] // 16]])
        with torch.no_grad():
            out = peer.model.visual(torch.tensor(batch.patches[row, : 4 * tokens]), grid_thw=grid)
        # Newer transformers return an output object whose pooler_output holds the merged tokens.
        close(got[row, :tokens], getattr(out, "pooler_output", out))


def test_hidden_states(pair):
    model, params, peer = pair
    text, queries = model.config.text, model.config.bridge.num_queries
    rng = np.random.default_rng(1)
    grid = (2, 3)
    ids = np.concatenate([rng.integers(6, 60, 5), [2], np.full(6, 4), [3], rng.integers(6, 60, 7)]).astype(np.int32)
    positions = rope_positions(ids, [grid], text.image_token_id, queries)
    image = rng.standard_normal((6, text.hidden_size)).astype(np.float32)
    batch = pad_prompts([TokenizedPrompt(ids, positions)], [len(ids)], model.config, multiple=32)
    inputs = (batch.input_ids, batch.position_ids, batch.real, batch.image_slots, image)
    got = model.apply({"params": params}, *inputs, method="hidden_states")[:, 0, -len(ids) - queries :]

    embeddings = peer.get_input_embeddings()(torch.tensor(ids).long()).detach()
    embeddings[torch.tensor(ids == 4)] = torch.tensor(image)
    embeddings = torch.cat([embeddings, torch.zeros(queries, text.hidden_size)])[None]
    padded = np.concatenate([ids, np.full(queries, 7, np.int32)])[None]
    rope = {"image_grid_thw": torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])}
    if "mm_token_type_ids" in peer.model.get_rope_index.__code__.co_varnames:
        rope["mm_token_type_ids"] = torch.tensor((padded == 4).astype(np.int32))
    want_positions, _ = peer.model.get_rope_index(torch.tensor(padded).long(), **rope)
    np.testing.assert_array_equal(positions, want_positions[:, 0])
    with torch.no_grad():
        options = {"position_ids": want_positions, "output_hidden_states": True, "use_cache": False}
        states = peer.model.language_model(inputs_embeds=embeddings, **options).hidden_states
    for mine, layer in zip(got, selected_layers(text.num_layers, 6), strict=True):
        close(mine, states[layer][0])
