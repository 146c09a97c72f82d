"""Floating-point operations that a decoder cannot do without; two for each multiplication in a matrix product."""

from __future__ import annotations


def layer_flops(config) -> float:
    """Of the products with one layer's weights, a token."""
    heads = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    return 2.0 * config.d_model * (heads + (2 + config.gated) * config.d_mlp)


def attention_flops(config, seen: float) -> float:
    """Of one layer's attention for a query that looks at `seen` tokens."""
    return 4.0 * config.n_heads * config.head_dim * seen


def text_flops(config, length: int) -> float:
    """Of all layers for a text of `length` tokens, causal."""
    return config.n_layers * length * (layer_flops(config) + attention_flops(config, (length + 1) / 2))


def unembed_flops(config) -> float:
    """Of the unembedding, a slot."""
    return 2.0 * config.d_model * config.vocab_size
