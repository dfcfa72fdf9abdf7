"""Parameter trees from torch state dicts, by the converter's name tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepgen_jax.config import MMDiTConfig, VAEConfig
from deepgen_jax.convert.names import MMDIT, VAE, Weight, mmdit_weights, vae_weights
from deepgen_jax.convert.transforms import to_target

State = dict[str, Any]


@pytest.fixture(scope="session")
def read_state() -> Callable[[Path], State]:
    """Reads the state dict of a diffusers folder."""
    from safetensors.torch import load_file

    return lambda folder: load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def mmdit_params() -> Callable[[State, MMDiTConfig], dict[str, Any]]:
    """Parameters of the MMDiT from a state dict under diffusers' names."""
    return lambda state, config: parameters(mmdit_weights(config), state, MMDIT)["mmdit"]


@pytest.fixture(scope="session")
def vae_params() -> Callable[[State, VAEConfig], dict[str, Any]]:
    """Parameters of the autoencoder from a state dict under diffusers' names."""
    return lambda state, config: parameters(vae_weights(config), state, VAE)["vae"]


def parameters(weights: Iterable[Weight], state: State, prefix: str) -> dict[str, Any]:
    """Nested float32 parameters; every tensor of ``state`` (keys without ``prefix``) is used exactly once."""
    tree: dict[str, Any] = {}
    state = dict(state)
    for weight in weights:
        *parents, leaf = weight.path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        value = to_target(weight.transform, state.pop(weight.key.removeprefix(prefix)).float().numpy())
        node.setdefault(leaf, np.empty(weight.stack + value.shape, np.float32))[weight.index] = value
    assert not state, f"not in the name table: {sorted(state)}"
    return tree
