"""The MMDiT against the golden arrays and against diffusers' SD3Transformer2DModel."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepgen_jax.config import MMDiTConfig
from deepgen_jax.models.mmdit import MMDiT, block_runs, timestep_embedding
from deepgen_jax.models.patches import pack, patchify, position_ids, unpack, unpatchify
from deepgen_jax.models.plan import Plan

TINY = MMDiTConfig(
    num_layers=4,
    num_heads=4,
    head_dim=12,
    joint_attention_dim=40,
    caption_projection_dim=48,
    pooled_projection_dim=24,
    dual_attention_layers=(0, 1),
    pos_embed_max_size=24,
    sample_size=16,
)


@pytest.fixture(scope="module")
def weights(data_dir, read_state, mmdit_params):
    """"base" and "sft" parameters of the golden arrays."""
    import torch

    sft = torch.load(data_dir / "deepgen_sft.pth", weights_only=True)["state_dict"]
    prefix = "transformer."
    sft = {name.removeprefix(prefix): value for name, value in sft.items() if name.startswith(prefix)}
    return {
        "base": mmdit_params(read_state(data_dir / "sd3_5_kontext/transformer"), TINY),
        "sft": mmdit_params(sft, TINY),
    }


@partial(jax.jit, static_argnames=("model", "num_targets"))
def velocity_of(model, params, *inputs, num_targets=None, **masks):
    return model.apply({"params": params}, *inputs, num_targets=num_targets, **masks)


def golden_inputs(golden, case):
    """Packed latents, their sizes, timestep, pooled and context of one golden case."""
    samples = range(len(golden[f"{case}/t"]))
    targets = [golden[f"{case}/latent/{i}"] for i in samples]
    references = [[v for k, v in golden.items() if k.startswith(f"{case}/ref/{i}/")] for i in samples]
    packed = pack(targets, references, patch_size=2, max_size=TINY.pos_embed_max_size)
    return packed, [t.shape[1:] for t in targets], [golden[f"{case}/{name}"] for name in ("t", "pooled", "ctx")]


@pytest.mark.parametrize("kernel", ["xla", "loop"])
@pytest.mark.parametrize(
    ("case", "checkpoint"),
    [("noref", "base"), ("ref1", "base"), ("ref1", "sft"), ("ref2", "base"), ("mixed", "base"), ("mixed", "sft")],
)
def test_velocity_matches_goldens(case, checkpoint, kernel, weights, goldens, tolerance):
    golden = goldens("dit")
    packed, sizes, condition = golden_inputs(golden, case)
    velocity = velocity_of(
        MMDiT(TINY, plan=Plan(kernel)),
        weights[checkpoint],
        packed.patches,
        packed.position_ids,
        *condition,
        patch_mask=packed.patch_mask,
        num_targets=packed.num_targets,
    )
    for i, image in enumerate(unpack(velocity, sizes, 2, TINY.out_channels)):
        name = f"{case}/{checkpoint}/velocity/{i}"
        np.testing.assert_allclose(image, golden[name], rtol=0, atol=tolerance("dit", name), err_msg=name)


def peer_config(**overrides):
    sizes = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 22, "pooled_projection_dim": 18}
    hidden = overrides["num_heads"] * overrides["head_dim"]
    positions = {"pos_embed_max_size": 10, "sample_size": 8}
    return MMDiTConfig(**{**sizes, **positions, "caption_projection_dim": hidden, **overrides})


PEERS = {
    "no dual attention": peer_config(num_layers=3, num_heads=2, head_dim=8, dual_attention_layers=()),
    "scattered dual attention": peer_config(num_layers=5, num_heads=3, head_dim=12, dual_attention_layers=(0, 2, 3)),
    "dual attention to the end": peer_config(num_layers=2, num_heads=1, head_dim=16, dual_attention_layers=(0, 1)),
    "one layer": peer_config(num_layers=1, num_heads=5, head_dim=4, dual_attention_layers=()),
    "more out than in, large patches": peer_config(
        num_layers=3, num_heads=2, head_dim=14, dual_attention_layers=(1,), patch_size=4, out_channels=6
    ),
}


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS)
def test_velocity_matches_diffusers(config, mmdit_params):
    import torch
    from diffusers import SD3Transformer2DModel

    names = dataclasses.asdict(config)
    del names["estimates"]  # a distilled model's
    names["attention_head_dim"], names["num_attention_heads"] = names.pop("head_dim"), names.pop("num_heads")
    torch.manual_seed(0)
    peer = SD3Transformer2DModel(**names, qk_norm="rms_norm").eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    rng = np.random.default_rng(0)
    height, width = 3 * config.patch_size, 5 * config.patch_size
    latent, context, pooled = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2, 4, height, width), (2, 7, 22), (2, 18)]
    )
    timestep = np.asarray([3.7, 981.25], np.float32)
    with torch.no_grad():
        expected = peer(*map(torch.from_numpy, (latent, context, pooled, timestep))).sample.numpy()

    ids = position_ids(height, width, config.patch_size, config.pos_embed_max_size)
    params = mmdit_params(peer.state_dict(), config)
    velocity = velocity_of(
        MMDiT(config), params, patchify(latent, config.patch_size), np.stack([ids, ids]), timestep, pooled, context
    )
    actual = unpatchify(velocity, height, width, config.patch_size, config.out_channels)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


SMALL = dataclasses.replace(
    TINY,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    caption_projection_dim=16,
    in_channels=2,
    out_channels=2,
    dual_attention_layers=(0,),
)


def random_params(config, seed=0):
    """Every parameter drawn, so that no gate is closed and no scale is one."""
    inputs = (jnp.zeros((1, 1, 4 * config.in_channels)), jnp.zeros((1, 1), jnp.int32), jnp.zeros(1))
    condition = (jnp.zeros((1, config.pooled_projection_dim)), jnp.zeros((1, 1, config.joint_attention_dim)))
    shapes = jax.eval_shape(partial(MMDiT(config).init, jax.random.key(0)), *inputs, *condition)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def small_params():
    return random_params(SMALL)


side = st.integers(1, 4).map(lambda patches: 2 * patches)
size = st.tuples(side, side)


@settings(max_examples=15)
@given(
    samples=st.lists(st.tuples(size, st.lists(size, max_size=2), st.integers(1, 6)), min_size=2, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_velocity_of_a_sample_does_not_depend_on_its_batch(small_params, samples, seed):
    """Other samples, the length of the padding and what the padding holds leave a sample's velocity as it is."""
    rng = np.random.default_rng(seed)
    samples = (samples * 2)[:3]
    targets = [rng.normal(size=(2, *target)).astype(np.float32) for target, _, _ in samples]
    references = [[rng.normal(size=(2, *r)).astype(np.float32) for r in refs] for _, refs, _ in samples]
    context_mask = np.arange(6) >= 6 - np.asarray([[length] for _, _, length in samples])
    pooled, context = (rng.normal(size=s).astype(np.float32) for s in [(3, 24), (3, 6, 40)])
    timestep = rng.uniform(0, 1000, 3).astype(np.float32)

    def run(rows, context_pads, target_tokens, reference_tokens):
        packed = pack(
            [targets[i] for i in rows],
            [references[i] for i in rows],
            patch_size=2,
            max_size=24,
            target_tokens=target_tokens,
            reference_tokens=reference_tokens,
        )
        noise = rng.normal(scale=100, size=packed.patches.shape).astype(np.float32)
        pads = rng.normal(scale=100, size=(len(rows), context_pads, 40)).astype(np.float32)
        visible = context_mask[rows]
        return velocity_of(
            MMDiT(SMALL),
            small_params,
            np.where(packed.patch_mask[..., None], packed.patches, noise),
            np.where(packed.patch_mask, packed.position_ids, 5),
            timestep[rows],
            pooled[rows],
            np.concatenate([pads, np.where(visible[..., None], context[rows], 7)], axis=1),
            patch_mask=packed.patch_mask,
            context_mask=np.pad(visible, [(0, 0), (context_pads, 0)]),
            num_targets=packed.num_targets,
        )

    sizes = [target for target, _, _ in samples]
    together = unpack(run([0, 1, 2], 3, 16, 32), sizes, 2, 2)
    for i in range(3):
        (alone,) = unpack(run([i], 0, 21, 37), [sizes[i]], 2, 2)
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def small_inputs():
    rng = np.random.default_rng(1)
    patches, pooled, context = (rng.normal(size=s).astype(np.float32) for s in [(2, 6, 8), (2, 24), (2, 5, 40)])
    ids = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    return patches, ids, np.asarray([1.0, 500.0], np.float32), pooled, context


@pytest.mark.parametrize("masked", [("patch_mask",), ("context_mask",), ("patch_mask", "context_mask")])
def test_masks_of_true_change_nothing(masked, small_params):
    masks = {"patch_mask": np.ones((2, 6), bool), "context_mask": np.ones((2, 5), bool)}
    plain = velocity_of(MMDiT(SMALL), small_params, *small_inputs())
    same = velocity_of(MMDiT(SMALL), small_params, *small_inputs(), **{name: masks[name] for name in masked})
    np.testing.assert_allclose(same, plain, rtol=0, atol=2e-5 * np.abs(plain).max())


def test_targets_are_the_first_tokens_of_the_whole_result(weights, goldens):
    """Leaving the references' queries out of the last layer does not change the targets."""
    packed, _, condition = golden_inputs(goldens("dit"), "ref2")
    inputs = (weights["base"], packed.patches, packed.position_ids, *condition)
    whole = velocity_of(MMDiT(TINY), *inputs)
    assert whole.shape[1] == packed.patches.shape[1]
    targets = velocity_of(MMDiT(TINY), *inputs, num_targets=packed.num_targets)
    np.testing.assert_allclose(targets, whole[:, : packed.num_targets], rtol=0, atol=2e-6)


def test_order_of_references_does_not_matter(weights, goldens):
    """References share one table of positions with the target, so the first and the second are indistinguishable."""
    golden = goldens("dit")
    references = [golden["ref2/ref/0/0"], golden["ref2/ref/0/1"]]
    velocities = []
    for order in (references, references[::-1]):
        packed = pack([golden["ref2/latent/0"]], [order], patch_size=2, max_size=24)
        condition = [golden[f"ref2/{name}"] for name in ("t", "pooled", "ctx")]
        inputs = (packed.patches, packed.position_ids, *condition)
        velocities.append(velocity_of(MMDiT(TINY), weights["base"], *inputs, num_targets=packed.num_targets))
    np.testing.assert_allclose(*velocities, rtol=0, atol=2e-6)


def test_rematerialisation_keeps_the_gradient(small_params):
    def gradient(remat):
        def loss(params):
            velocity = MMDiT(SMALL, remat=remat).apply({"params": params}, *small_inputs())
            return jnp.mean(jnp.square(velocity))

        return jax.jit(jax.grad(loss))(small_params)

    plain = gradient("none")
    for remat in ("full", "flash", "mlp", "dots"):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(remat), plain)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree.leaves_with_path(plain) if not np.any(g)]
    assert silent == ["['pos_embed']"]


def test_bfloat16_stays_near_float32(weights, goldens):
    golden = goldens("dit")
    packed, sizes, condition = golden_inputs(golden, "mixed")
    velocity = velocity_of(
        MMDiT(TINY, dtype=jnp.bfloat16),
        weights["base"],
        packed.patches,
        packed.position_ids,
        *condition,
        patch_mask=packed.patch_mask,
        num_targets=packed.num_targets,
    )
    assert velocity.dtype == jnp.float32
    for i, image in enumerate(unpack(velocity, sizes, 2, TINY.out_channels)):
        expected = golden[f"mixed/base/velocity/{i}"]
        assert np.linalg.norm(image - expected) < 0.02 * np.linalg.norm(expected)


def test_runs_of_the_released_model():
    runs = block_runs(MMDiTConfig())
    assert [tuple(run) for run in runs] == [(0, 13, True, False), (13, 10, False, False), (23, 1, False, True)]


def test_program_does_not_grow_with_depth():
    def program(depth, dual):
        config = dataclasses.replace(SMALL, num_layers=depth, dual_attention_layers=tuple(range(dual)))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_params(config))
        inputs = (jnp.zeros((1, 4, 8)), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))
        return velocity_of.lower(MMDiT(config), params, *inputs, jnp.zeros((1, 24)), jnp.zeros((1, 5, 40))).as_text()

    assert len(program(6, 3)) == len(program(12, 5))


@pytest.mark.parametrize("channels", [8, 256])
def test_timestep_embedding_is_that_of_diffusers(channels):
    import torch
    from diffusers.models.embeddings import get_timestep_embedding

    timestep = np.asarray([0.0, 0.5, 12.25, 999.0, 1000.0], np.float32)
    expected = get_timestep_embedding(
        torch.from_numpy(timestep), channels, flip_sin_to_cos=True, downscale_freq_shift=0
    ).numpy()
    np.testing.assert_allclose(timestep_embedding(timestep, channels), expected, rtol=0, atol=2e-4)
