"""Streaming moments of every feature by family, of the pairs and of their difference.

`B` denotes pairs in a batch, `K` families, `C` cells (a family and a pair of words), `L` layers, `F` features per
layer. A pair has a plus (+) and a minus (-) prompt; d = z+ - z- is a feature's difference, at the decision token or as
a mean over tokens (`Positions`). Nothing dense over prompts is kept: batches are folded into `Moments` by Chan, Golub &
LeVeque's update (1979), in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmech.io.reprs import short_repr

_PRECISION = jax.lax.Precision.HIGHEST


class Moments(NamedTuple):
    """Sufficient statistics. Pole axis: 0 plus, 1 minus.

    n [K] pairs; mean, m2 [2,L,K,F] of z; mean_d, m2_d [L,K,F]; positive, negative [L,K,F], pairs with d > 0, d < 0;
    active [2,L,K,F], pairs that fire; mean_g, m2_g [2,K] of the share given; c_zg [2,L,K,F], co-moment of z and g;
    cells [L,C,F], sums of d in each cell.
    """

    n: jax.Array
    mean: jax.Array
    m2: jax.Array
    mean_d: jax.Array
    m2_d: jax.Array
    positive: jax.Array
    negative: jax.Array
    active: jax.Array
    mean_g: jax.Array
    m2_g: jax.Array
    c_zg: jax.Array
    cells: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


class Positions(NamedTuple):
    """Moments at the decision token, and of means over the tokens that both prompts of a pair share after what they
    differ in."""

    decision: Moments
    after: Moments

    def __repr__(self) -> str:
        return short_repr(self)


def empty_moments(L: int, K: int, F: int, *, C: int = 0) -> Moments:
    """Moments of no pairs."""
    shapes = {"n": (K,), "mean_g": (2, K), "m2_g": (2, K), "cells": (L, C, F)}
    shapes |= dict.fromkeys(("mean", "m2", "active", "c_zg"), (2, L, K, F))
    # An array of its own for every field: they are donated together.
    return Moments(**{name: jnp.zeros(shapes.get(name, (L, K, F))) for name in Moments._fields})


def batch_moments(z: jax.Array, g: jax.Array, member: jax.Array, cell: jax.Array | None = None) -> Moments:
    """Moments of one batch.

    Args:
      z: [2,L,B,F] activations; g: [2,B] share given; member: [B,K], 1 where the pair belongs to the family, an all-zero
        row for padding; cell: [B,C], the same for cells, none by default.
    """
    cell = jnp.zeros((len(member), 0)) if cell is None else cell
    n = member.sum(0)
    share = member / jnp.maximum(n, 1.0)  # [B,K]
    mean = lambda v: jnp.einsum("...bf,bk->...kf", v, share, precision=_PRECISION)  # noqa: E731
    total = lambda v: jnp.einsum("...bf,bk->...kf", v, member, precision=_PRECISION)  # noqa: E731
    to_pairs = lambda m: jnp.einsum("...kf,bk->...bf", m, member, precision=_PRECISION)  # noqa: E731
    z, d, g = z * member.any(1)[:, None], z[0] - z[1], g[..., None]  # g [2,B,1]
    mean_z, mean_d, mean_g = mean(z), mean(d), mean(g)
    off_z, off_d, off_g = z - to_pairs(mean_z), d - to_pairs(mean_d), g - to_pairs(mean_g)
    return Moments(
        n, mean_z, total(off_z**2), mean_d, total(off_d**2), total(1.0 * (d > 0)), total(1.0 * (d < 0)),
        total(1.0 * (z > 0)), mean_g[..., 0], total(off_g**2)[..., 0], total(off_z * off_g[:, None]),
        jnp.einsum("...bf,bc->...cf", d, cell, precision=_PRECISION),
    )  # fmt: skip


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of pairs."""
    n = a.n + b.n
    weight = b.n / jnp.maximum(n, 1.0)
    cross = a.n * weight

    def means(x, y, w):
        return x + (y - x) * w

    f, cf = weight[:, None], cross[:, None]
    shift_z, shift_d, shift_g = b.mean - a.mean, b.mean_d - a.mean_d, b.mean_g - a.mean_g
    return Moments(
        n=n,
        mean=means(a.mean, b.mean, f),
        m2=a.m2 + b.m2 + shift_z**2 * cf,
        mean_d=means(a.mean_d, b.mean_d, f),
        m2_d=a.m2_d + b.m2_d + shift_d**2 * cf,
        positive=a.positive + b.positive,
        negative=a.negative + b.negative,
        active=a.active + b.active,
        mean_g=means(a.mean_g, b.mean_g, weight),
        m2_g=a.m2_g + b.m2_g + shift_g**2 * cross,
        c_zg=a.c_zg + b.c_zg + shift_z * shift_g[:, None, :, None] * cf,
        cells=a.cells + b.cells,
    )


def correlation_with_g(m: Moments) -> np.ndarray:
    """Pearson correlation of z with the score within a pole, over the prompts of all families, [2,L,F]; 0 where either
    is constant."""
    n = np.asarray(m.n)
    share = n / n.sum()
    mean_z, mean_g = np.asarray(m.mean), np.asarray(m.mean_g)
    off_z = mean_z - np.einsum("slkf,k->slf", mean_z, share)[:, :, None]  # Chan, Golub & LeVeque, of all families
    off_g = mean_g - (mean_g @ share)[:, None]
    m2_z = np.asarray(m.m2).sum(2) + np.einsum("slkf,k->slf", off_z**2, n)
    m2_g = (np.asarray(m.m2_g) + n * off_g**2).sum(1)
    both = np.asarray(m.c_zg).sum(2) + np.einsum("slkf,sk,k->slf", off_z, off_g, n)
    spread = np.sqrt(m2_z * m2_g[:, None, None])
    return np.divide(both, spread, out=np.zeros_like(spread), where=spread > 0)
