"""The bridge against PyTorch (transformers' SigLIP encoder between plain linear layers), at independent widths."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from deepgen_jax.config import BridgeConfig, TextConfig
from deepgen_jax.convert.names import bridge_weights
from deepgen_jax.convert.random_release import tiny_config
from deepgen_jax.models.bridge import Bridge
from deepgen_jax.models.deepgen import abstract_params
from deepgen_jax.models.qwen_text import selected_layers
from deepgen_jax.parallel import rules
from deepgen_jax.parallel.mesh import make_mesh

from .conftest import parameters


class Peer(torch.nn.Module):
    """The bridge of the PyTorch system; its parameters have the names of the released checkpoints."""

    def __init__(self, config: BridgeConfig, states: int, text_dim: int, pooled_dim: int, sequence_dim: int) -> None:
        super().__init__()
        encoder = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            layer_norm_eps=config.layer_norm_eps,
        )
        encoder._attn_implementation = "eager"
        self.meta_queries = torch.nn.Parameter(torch.randn(config.num_queries, text_dim))
        self.projector_1 = torch.nn.Linear(states * text_dim, config.hidden_size)
        self.projector_2 = torch.nn.Linear(config.hidden_size, pooled_dim)
        self.projector_3 = torch.nn.Linear(config.hidden_size, sequence_dim)
        self.connector = SiglipEncoder(encoder)

    def forward(self, states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.projector_1(torch.cat(states, dim=-1))
        x = self.connector(inputs_embeds=x).last_hidden_state
        return self.projector_2(x.mean(dim=1)), self.projector_3(x)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_connector_of_any_width_equals_pytorch(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from([1, 2, 4]), "heads")
    config = BridgeConfig(
        num_queries=data.draw(st.integers(1, 5), "queries"),
        hidden_size=heads * data.draw(st.integers(2, 12), "head_dim"),
        intermediate_size=data.draw(st.integers(3, 40), "intermediate"),
        num_layers=data.draw(st.integers(1, 3), "layers"),
        num_heads=heads,
        selection_stride=data.draw(st.integers(1, 6), "stride"),
    )
    text = TextConfig(hidden_size=4 * data.draw(st.integers(1, 8), "text"), num_layers=12, num_heads=2)
    states = len(range(text.num_layers - 1, 0, -config.selection_stride))
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    peer = Peer(config, states, text.hidden_size, 7, 9).eval()
    params = parameters(bridge_weights(config, text, 7, 9), peer.state_dict(), "")["bridge"]
    model = Bridge(config, text.hidden_size, 7, 9)
    inputs = torch.randn(states, 2, 6, text.hidden_size)
    with torch.no_grad():
        expected = peer(list(inputs))
    ours: Any = model.apply({"params": params}, inputs.numpy(), np.ones((2, 6), bool))
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=2e-5)
    think: Any = model.apply({"params": params}, inputs[0].numpy(), method=model.append_think_tokens)
    np.testing.assert_array_equal(think[1, 6:], peer.meta_queries.detach().numpy())


def test_the_whole_model_takes_the_width_of_its_bridge() -> None:
    config = tiny_config()
    config = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, hidden_size=48, num_heads=3))
    params = abstract_params(config)
    states = len(selected_layers(config.text.num_layers, config.bridge.selection_stride))
    assert params["bridge"]["projector_in"]["kernel"].shape == (states * 32, 48)
    assert params["bridge"]["meta_queries"].shape == (16, 32)
    laid_out = rules.shardings(params, make_mesh(None))
    assert jax.tree.structure(laid_out) == jax.tree.structure(params)
