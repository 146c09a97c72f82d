"""Rotary position embeddings, plain and scaled."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequency of each rotated pair, [head_dim // 2] float32.

    Plain RoPE is `theta ** (-2i / head_dim)`. "linear" divides by the factor (Chen et al. 2023, arXiv 2306.15595);
    "llama3" divides long wavelengths only and blends between (Llama 3.1, as in HF's `rope_utils`).

    Raises:
      ValueError: the scaling is of another kind.
    """
    freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = dict(rope.scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        freq = freq / scaling["factor"]
    elif kind == "llama3":
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / freq
        keep = np.clip((old / wavelength - low) / (high - low), 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} is not supported; expected 'default', 'linear' or 'llama3'")
    return freq.astype(np.float32)


def rope_tables(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions [B,T]: two arrays [B,T,1,head_dim // 2], float32."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B,T,H,h], whose halves hold the pairs' two coordinates (HF's layout), in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
