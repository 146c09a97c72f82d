"""Rotary position embeddings, plain and scaled."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.models.config import Rope


def inverse_frequencies(rope: Rope, dim: int, long: bool = False) -> np.ndarray:
    """Angular frequency of each rotated pair, [dim // 2] float32.

    Plain RoPE is `theta ** (-2i / dim)`. "linear" divides by the factor (Chen et al. 2023, arXiv 2306.15595); "llama3"
    divides long wavelengths only and blends between (Llama 3.1, as in HF's `rope_utils`); "yarn" blends by the number
    of turns in the original context (Peng et al. 2023, arXiv 2309.00071); "longrope" divides each frequency by its own
    factor, and by another for texts beyond the original context (Ding et al. 2024, arXiv 2402.13753).

    Args:
      dim: rotated dimensions of a head.
      long: for "longrope", whether the text is longer than the original context.

    Raises:
      ValueError: the scaling is of another kind.
    """
    freq = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling: dict[str, Any] = dict(rope.scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        freq = freq / scaling["factor"]
    elif kind == "llama3":
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old * freq / (2 * math.pi)
        freq = _blend(np.clip((turns - low) / (high - low), 0.0, 1.0), freq, scaling["factor"])
    elif kind == "yarn":
        freq = _blend(1 - _yarn_ramp(rope.theta, scaling, dim), freq, scaling["factor"])
    elif kind == "longrope":
        factors = np.asarray(scaling["long_factor" if long else "short_factor"], np.float64)
        if factors.shape != freq.shape:
            raise ValueError(f"longrope: expected {freq.size} factors, one per rotated pair, got {factors.size}")
        freq = freq / factors
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} is not supported; expected default, linear, llama3, yarn or longrope")
    return freq.astype(np.float32)


def _blend(keep: np.ndarray, freq: np.ndarray, factor: float) -> np.ndarray:
    return keep * freq + (1 - keep) * freq / factor


def _yarn_ramp(theta: float, scaling: dict, dim: int) -> np.ndarray:
    """How far each pair is interpolated: 0 where it turns `beta_fast` times in the old context, 1 at `beta_slow`."""

    def pair_that_turns(times):
        return (
            dim * math.log(scaling["original_max_position_embeddings"] / (times * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = pair_that_turns(scaling.get("beta_fast", 32.0)), pair_that_turns(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)


def rope_tables(rope: Rope | None, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions [B,T]: two arrays [B,T,1,dim // 2], float32; unrotated without a `rope`.

    "longrope" takes its long factors for the rows whose last position passes the original context. What was cached
    before a row crossed it does not fit what comes after; `generate` then recomputes the text, as HF does.
    """
    if rope is None:
        ones = jnp.ones((*positions.shape, 1, dim // 2), jnp.float32)
        return ones, jnp.zeros_like(ones)
    scaling: dict[str, Any] = dict(rope.scaling)
    freq = jnp.asarray(inverse_frequencies(rope, dim))
    if scaling.get("rope_type") == "longrope":
        passed = positions.max(axis=1)[:, None, None, None] >= scaling["original_max_position_embeddings"]
        freq = jnp.where(passed, inverse_frequencies(rope, dim, long=True), freq)
    angles = positions[..., None, None].astype(jnp.float32) * freq
    scale = scaling.get("attention_factor", 1.0)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first dimensions of x [B,T,H,h], twice as many as cos has, in float32.

    Their halves hold the pairs' two coordinates (HF's layout); the dimensions after them are unchanged.
    """
    half = cos.shape[-1]
    a, b, unrotated = jnp.split(x, [half, 2 * half], axis=-1)
    wide_a, wide_b = a.astype(jnp.float32), b.astype(jnp.float32)
    rotated = jnp.concatenate([wide_a * cos - wide_b * sin, wide_b * cos + wide_a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, unrotated], axis=-1) if unrotated.shape[-1] else rotated
