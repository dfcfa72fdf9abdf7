"""DeepGen's bridge for diffusers: think tokens, projectors and the connector encoder (arXiv 2602.12205, section 3.1).

An export in the diffusers layout holds a copy of this file; it depends on torch, safetensors and diffusers alone.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import nn


class _Layer(nn.Module):
    """Pre-norm encoder layer of the SigLIP kind."""

    def __init__(self, hidden_size: int, intermediate_size: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.layer_norm2 = nn.LayerNorm(hidden_size, eps=eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(hidden_size, hidden_size) for name in names})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(hidden_size, intermediate_size), "fc2": nn.Linear(intermediate_size, hidden_size)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{n}_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](h)


class DeepGenConnector(ModelMixin, ConfigMixin):
    """Stacked hidden states [B, L, n x D] -> pooled [B, P] and sequence [B, L, S]; ``meta_queries`` [Q, D]."""

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_queries: int,
        text_dim: int,
        stacked_dim: int,
        pooled_dim: int,
        sequence_dim: int,
        layer_norm_eps: float = 1e-6,
        selection_stride: int = 6,
    ) -> None:
        super().__init__()
        self.meta_queries = nn.Parameter(torch.zeros(num_queries, text_dim))
        self.projector_1 = nn.Linear(stacked_dim, hidden_size)
        self.projector_2 = nn.Linear(hidden_size, pooled_dim)
        self.projector_3 = nn.Linear(hidden_size, sequence_dim)
        layers = [
            _Layer(hidden_size, intermediate_size, num_attention_heads, layer_norm_eps)
            for _ in range(num_hidden_layers)
        ]
        self.connector = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.projector_1(states)
        for layer in self.connector["layers"]:
            x = layer(x)
        return self.projector_2(x.mean(dim=1)), self.projector_3(x)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **_: Any) -> DeepGenConnector:
        """Reads ``config.json`` and ``*.safetensors`` of a folder; some sizes come from the tensors."""
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = {name: value for name, value in json.load(file).items() if not name.startswith("_")}
        state: dict[str, torch.Tensor] = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors"):
                state |= load_file(os.path.join(folder, name))
        queries = state.setdefault("meta_queries", torch.zeros(0, state["projector_1.weight"].shape[1]))
        model = cls(
            **config,
            text_dim=queries.shape[1],
            stacked_dim=state["projector_1.weight"].shape[1],
            pooled_dim=state["projector_2.weight"].shape[0],
            sequence_dim=state["projector_3.weight"].shape[0],
        )
        model.load_state_dict(state)
        return model.to(torch_dtype or state["projector_1.weight"].dtype).eval()
