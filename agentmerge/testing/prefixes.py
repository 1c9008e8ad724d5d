"""A Llama's forward pass, made fast for benchmarks: every distinct prefix is computed once.

Grouped-query attention and a tied head, on token rows that share beginnings. Linear layers run over
distinct prefixes only, attention over the rows, and the last layer over the positions that are
asked for only. Checked against transformers in the tests; knows no tasks and no merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

Weights = Mapping[str, torch.Tensor]
NO_TOKEN = -1


@dataclass(frozen=True)
class Rows:
    """Token rows, padded on the right to shape (rows, length), as distinct prefixes.

    tokens, positions: (nodes,). path: (rows, length), each position's node. first: (nodes,), a
    flat position in ``path`` of each node. asked: (rows, answers), the positions that predict the
    answer; gold: (rows, answers), what they should, NO_TOKEN where a row has fewer.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    path: torch.Tensor
    first: torch.Tensor
    asked: torch.Tensor
    gold: torch.Tensor

    @classmethod
    def of(cls, inputs: list[list[int]], gold: list[list[int]]) -> Rows:
        """gold: of the last positions of each row, what comes next."""
        length, answers = max(map(len, inputs)), max(map(len, gold))
        number: dict[tuple[int, ...], int] = {}
        first: list[int] = []
        path = torch.zeros((len(inputs), length), dtype=torch.long)
        asked = torch.zeros((len(inputs), answers), dtype=torch.long)
        told = torch.full((len(inputs), answers), NO_TOKEN)
        for row, tokens in enumerate(inputs):
            for place in range(len(tokens)):
                key = tuple(tokens[: place + 1])
                if key not in number:
                    number[key] = len(first)
                    first.append(row * length + place)
                path[row, place] = number[key]
            count = len(gold[row])
            asked[row, :count] = torch.arange(len(tokens) - count, len(tokens))
            told[row, :count] = torch.tensor(gold[row])
        nodes = list(number)
        return cls(
            torch.tensor([key[-1] for key in nodes]),
            torch.tensor([len(key) - 1 for key in nodes]),
            path,
            torch.tensor(first),
            asked,
            told,
        )


def answer_logits(
    weights: Weights,
    config: Any,
    rows: Rows,
    begun: torch.Tensor | None = None,
    kept: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits at the positions that predict the answer: (rows, answers, vocabulary).

    begun: the stream, a row a node, that the layers go on from, in place of the embedding. kept:
    gets the stream before every layer.
    """
    heads, kv, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    count, length = rows.path.shape
    answers = rows.asked.shape[1]
    every = torch.arange(count)[:, None]
    head = weights["model.embed_tokens.weight"]
    hidden = head[rows.tokens] if begun is None else begun
    cos, sin = _rotations(rows.positions, width, config.rope_parameters["rope_theta"], head.dtype)
    for layer in range(config.num_hidden_layers):
        if kept is not None:
            kept.append(hidden)
        last = layer == config.num_hidden_layers - 1
        name = f"model.layers.{layer}."
        normed = _rms(hidden, weights[name + "input_layernorm.weight"], config.rms_norm_eps)
        q = linear(normed, weights[name + "self_attn.q_proj.weight"]).view(-1, heads, width)
        k = linear(normed, weights[name + "self_attn.k_proj.weight"]).view(-1, kv, width)
        v = linear(normed, weights[name + "self_attn.v_proj.weight"])
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        mixed = scaled_dot_product_attention(
            _by_row(q, rows).transpose(1, 2),
            _by_row(k, rows).transpose(1, 2),
            _by_row(v.view(-1, kv, width), rows).transpose(1, 2),
            is_causal=True,
            enable_gqa=heads != kv,
        ).transpose(1, 2)
        if last:
            mixed = mixed[every, rows.asked].reshape(count * answers, -1)
            hidden = hidden[rows.path[every, rows.asked].reshape(-1)]
        else:
            mixed = mixed.reshape(count * length, -1)[rows.first]
        hidden = hidden + linear(mixed, weights[name + "self_attn.o_proj.weight"])
        normed = _rms(
            hidden, weights[name + "post_attention_layernorm.weight"], config.rms_norm_eps
        )
        gate = silu(linear(normed, weights[name + "mlp.gate_proj.weight"]))
        up = linear(normed, weights[name + "mlp.up_proj.weight"])
        hidden = hidden + linear(gate * up, weights[name + "mlp.down_proj.weight"])
    hidden = _rms(hidden, weights["model.norm.weight"], config.rms_norm_eps)
    return linear(hidden, head).view(count, answers, -1)


def _by_row(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """(nodes, heads, width) -> (rows, length, heads, width)."""
    flat = x.reshape(len(x), -1)[rows.path.reshape(-1)]
    return flat.view(*rows.path.shape, *x.shape[1:])


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotations(
    positions: torch.Tensor, width: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rates = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = positions[:, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
