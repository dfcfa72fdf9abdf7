from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgen_jax.errors import DeepGenError
from deepgen_jax.models.patches import pack, patchify, position_ids, sincos_table, unpack, unpatchify

sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(grid=sizes, lead=st.lists(st.integers(1, 3), max_size=2), channels=st.integers(1, 3), p=st.integers(1, 3))
def test_unpatchify_inverts_patchify(grid, lead, channels, p):
    height, width = grid[0] * p, grid[1] * p
    latent = np.random.default_rng(0).normal(size=(*lead, channels, height, width))
    patches = patchify(latent, p)
    assert patches.shape == (*lead, grid[0] * grid[1], p * p * channels)
    np.testing.assert_array_equal(unpatchify(patches, height, width, p, channels), latent)


def test_patch_is_row_column_channel_ordered():
    latent = jnp.arange(3 * 4 * 6).reshape(3, 4, 6)
    patches = patchify(latent, 2)
    expected = [latent[c, 2 + row, 4 + column] for row in range(2) for column in range(2) for c in range(3)]
    np.testing.assert_array_equal(patches[1 * 3 + 2], np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (24, 24), (10, 2)])
def test_position_ids_are_the_centre_crop_of_diffusers(height, width):
    from diffusers.models.embeddings import PatchEmbed

    embed = PatchEmbed(height=8, width=8, patch_size=2, in_channels=4, embed_dim=8, pos_embed_max_size=12)
    expected = embed.cropped_pos_embed(height, width)[0].numpy()
    np.testing.assert_array_equal(embed.pos_embed[0].numpy()[position_ids(height, width, 2, 12)], expected)


@pytest.mark.parametrize(("max_size", "sample_size"), [(12, 4), (24, 8), (16, 16)])
def test_sincos_table_is_that_of_diffusers(max_size, sample_size):
    from diffusers.models.embeddings import PatchEmbed

    embed = PatchEmbed(sample_size, sample_size, 1, in_channels=4, embed_dim=20, pos_embed_max_size=max_size)
    np.testing.assert_allclose(sincos_table(max_size, sample_size, 20), embed.pos_embed[0].numpy(), atol=2e-6)


def test_an_image_larger_than_the_table_is_refused():
    with pytest.raises(DeepGenError, match="13x2 patches, but the position table has 12x12"):
        position_ids(26, 4, 2, 12)


def test_a_latent_of_broken_patches_is_refused():
    with pytest.raises(DeepGenError, match="latent of 4x5 is not a whole number of 2x2 patches"):
        patchify(np.zeros((1, 4, 5)), 2)
    with pytest.raises(DeepGenError, match="latent of 6x3"):
        pack([np.zeros((1, 4, 4))], [[np.zeros((1, 6, 3))]], patch_size=2, max_size=12)


def test_pack_lays_out_targets_then_references():
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 2, 6))]
    references = [[rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 4, 2))], []]
    packed = pack(targets, references, patch_size=2, max_size=6)
    assert packed.num_targets == 4
    assert packed.patches.shape == (2, 4 + 3, 12)
    np.testing.assert_array_equal(packed.patch_mask, [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    assert not packed.patches[~packed.patch_mask].any()
    np.testing.assert_array_equal(packed.patches[0, 4:5], patchify(references[0][0], 2))
    np.testing.assert_array_equal(packed.patches[0, 5:7], patchify(references[0][1], 2))
    np.testing.assert_array_equal(packed.position_ids[0, 5:7], position_ids(4, 2, 2, 6))


@given(grids=st.lists(st.tuples(sizes, st.lists(sizes, max_size=2)), min_size=1, max_size=3), extra=st.integers(0, 5))
def test_unpack_inverts_pack(grids, extra):
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=(2, 2 * h, 2 * w)) for (h, w), _ in grids]
    references = [[rng.normal(size=(2, 2 * h, 2 * w)) for h, w in sample] for _, sample in grids]
    longest = max(t[0].size // 4 for t in targets)
    packed = pack(targets, references, patch_size=2, max_size=5, target_tokens=longest + extra, reference_tokens=7)
    assert packed.num_targets == longest + extra
    tokens = [sum(image[0].size // 4 for image in [t, *r]) for t, r in zip(targets, references, strict=True)]
    np.testing.assert_array_equal(packed.patch_mask.sum(axis=1), tokens)
    velocity = packed.patches[:, : packed.num_targets]
    for target, image in zip(targets, unpack(velocity, [t.shape[1:] for t in targets], 2, 2), strict=True):
        np.testing.assert_array_equal(image, target)
