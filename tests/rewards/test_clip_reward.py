"""CLIP in Flax against transformers, with small random weights."""

from __future__ import annotations

import asyncio
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from transformers import CLIPConfig as PeerConfig

from deepgen_jax.convert.clip_weights import clip_config, clip_params, load_clip
from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.clip import CLIP, CLIPConfig
from deepgen_jax.rewards import RewardConfig, RewardSample, make
from deepgen_jax.rewards.clip_score import preprocess

torch = pytest.importorskip("torch")

#: Two models that differ in every size, in the activation and in how the end of a text is found.
SHAPES = {
    "legacy_end": {
        "text_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "eos_token_id": 2, "max_position_embeddings": 77,
        },
        "vision_config": {
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 28, "patch_size": 7,
        },
        "projection_dim": 16,
    },
    "gelu": {
        "text_config": {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "hidden_act": "gelu", "max_position_embeddings": 24,
        },
        "vision_config": {
            "hidden_size": 40, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 5,
            "image_size": 32, "patch_size": 16, "hidden_act": "gelu",
        },
        "projection_dim": 12,
    },
}  # fmt: skip
PROMPTS = ["a red fox", "fox", "", 'a sign that says "Open Late" ' * 40]


def write_tokenizer(folder):
    """Bytes as tokens and a few merges, in the layout of CLIP's tokenizer."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("f", "o"), ("fo", "x</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return len(tokens)


@pytest.fixture(scope="module", params=list(SHAPES))
def peer(request, tmp_path_factory):
    """A folder, the model in it, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip") / request.param
    folder.mkdir()
    size = write_tokenizer(folder)
    values = json.loads(json.dumps(SHAPES[request.param]))
    values["text_config"] |= {"vocab_size": size, "bos_token_id": size - 2, "pad_token_id": size - 1}
    values["text_config"].setdefault("eos_token_id", size - 1)
    torch.manual_seed(0)
    model = CLIPModel(PeerConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    length = values["text_config"]["max_position_embeddings"]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model, AutoTokenizer.from_pretrained(folder)


def images(count=4):
    noise = np.random.default_rng(0)
    shapes = [(64, 64), (40, 61), (90, 33), (28, 200)]
    small = [noise.integers(0, 256, (6, 6, 3), np.uint8) for _ in range(count)]
    sizes = [(width, height) for height, width in shapes[:count]]
    return [np.asarray(Image.fromarray(x).resize(size)) for x, size in zip(small, sizes, strict=True)]


def peer_cosines(peer, prompts):
    _, model, tokenizer = peer
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    length = model.config.text_config.max_position_embeddings
    text = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    pixels = processor([Image.fromarray(image) for image in images()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(**text, pixel_values=pixels)
    return (out.text_embeds * out.image_embeds).sum(-1).numpy()


def test_both_towers_match_transformers(peer):
    folder, torch_model, _ = peer
    config, params = load_clip(folder)
    rng = np.random.default_rng(1)
    size, end = config.vocab_size, config.vocab_size - 1
    ids = rng.integers(0, size - 2, (5, 12))
    for row, place in enumerate([11, 3, 7, 1, 0]):
        ids[row, place:] = end
    pixels = rng.normal(size=(3, config.image_size, config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        texts = torch_model.text_projection(torch_model.text_model(torch.tensor(ids)).pooler_output)
        pooled = torch_model.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
        pictures = torch_model.visual_projection(pooled)
    model = CLIP(config)

    @jax.jit
    def features(params, ids, pixels):
        variables = {"params": params}
        return (
            model.apply(variables, ids, method="text_features"),
            model.apply(variables, pixels, method="image_features"),
        )

    got = features(params, ids.astype(np.int32), pixels)
    np.testing.assert_allclose(got[0], texts, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(got[1], pictures, atol=1e-4, rtol=1e-4)


def test_reward_is_the_cosine_of_transformers(peer):
    reward = make(RewardConfig("clip", options={"folder": str(peer[0]), "batch_size": 3, "device": "cpu"}))
    samples = [RewardSample(image, prompt) for image, prompt in zip(images(), PROMPTS, strict=True)]
    scores = asyncio.run(reward.score(samples)).values
    assert (np.abs(scores) <= 1).all()
    np.testing.assert_allclose(scores, peer_cosines(peer, PROMPTS), atol=2e-4)
    # Batches are padded, and what else is in one does not matter.
    alone = asyncio.run(reward.score(samples[2:3])).values
    np.testing.assert_allclose(alone, scores[2:3], atol=1e-6)


@pytest.mark.parametrize("shape", [(224, 224), (512, 512), (300, 451), (700, 225), (224, 500), (64, 48), (331, 777)])
def test_preprocessing_matches_transformers(shape):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image = np.asarray(Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC))
    wanted = CLIPImageProcessor()(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(preprocess(image, 224), wanted.transpose(1, 2, 0), atol=1e-3)


def test_weights_in_a_pickle_are_the_same(peer, tmp_path):
    folder, model, _ = peer
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(
        {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(9)}, tmp_path / "pytorch_model.bin"
    )
    from_pickle, usual = load_clip(tmp_path), load_clip(folder)
    assert from_pickle[0] == usual[0]
    np.testing.assert_array_equal(
        from_pickle[1]["text_layers"]["fc1"]["kernel"], usual[1]["text_layers"]["fc1"]["kernel"]
    )


def test_every_tensor_is_accounted_for(peer):
    folder, model, _ = peer
    config = clip_config(json.loads((folder / "config.json").read_text()))
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    clip_params(config, tensors, "model")
    with pytest.raises(DeepGenError, match="1 tensors are unknown, such as extra"):
        clip_params(config, {**tensors, "extra": np.zeros(1)}, "model")
    name = "visual_projection.weight"
    with pytest.raises(DeepGenError, match=f"{name} is missing"):
        clip_params(config, {k: v for k, v in tensors.items() if k != name}, "model")
    with pytest.raises(DeepGenError, match=r"vision_projection.*has shape"):
        clip_params(config, {**tensors, name: tensors[name][:-1]}, "model")


def test_published_model_is_the_default():
    values = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14,
        },
    }  # fmt: skip
    assert clip_config(values) == CLIPConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "siglip"}, "give the folder of a CLIP model"),
        ({"model_type": "clip", "text_config": {"hidden_act": "relu"}}, "hidden_act='relu' is not supported"),
        ({"model_type": "clip", "projection_dim": "wide"}, "cannot be read"),
    ],
)
def test_other_configurations_are_refused(values, message):
    with pytest.raises(DeepGenError, match=message):
        clip_config(values)


def test_folder_without_tokenizer_is_refused(peer, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((peer[0] / name).read_bytes())
    with pytest.raises(DeepGenError, match="no tokenizer"):
        make(RewardConfig("clip", options={"folder": str(tmp_path)}))
