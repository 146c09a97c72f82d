"""Streaming moments of every feature by family, of the pairs and of their difference.

`B` denotes pairs in a batch, `K` families, `L` layers, `F` features per layer. A pair has a plus (+) and a minus
(-) prompt; d = z+ - z- is a feature's difference at the decision token. Nothing dense over prompts is kept: batches are
folded into `Moments` by Chan, Golub & LeVeque's update (1979), in float32.
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
    active [2,L,K,F], pairs that fire; mean_g, m2_g [2,K] of the share given; c_zg [2,L,K,F], co-moment of z and g.
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

    def __repr__(self) -> str:
        return short_repr(self)


def empty_moments(L: int, K: int, F: int) -> Moments:
    """Moments of no pairs."""
    shapes = {"n": (K,), "mean_g": (2, K), "m2_g": (2, K)}
    shapes |= dict.fromkeys(("mean", "m2", "active", "c_zg"), (2, L, K, F))
    # An array of its own for every field: they are donated together.
    return Moments(**{name: jnp.zeros(shapes.get(name, (L, K, F))) for name in Moments._fields})


def batch_moments(z: jax.Array, g: jax.Array, member: jax.Array) -> Moments:
    """Moments of one batch.

    Args:
      z: [2,L,B,F] activations at the decision token; g: [2,B] share given; member: [B,K], 1 where the pair belongs to
        the family, an all-zero row for padding.
    """
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
    )


def pool_families(m: Moments) -> Moments:
    """All families merged into one (K = 1): what a correlation over every prompt of a pole needs."""
    axis = {name: 0 for name in ("n",)} | {name: 1 for name in ("mean_g", "m2_g")}
    take = lambda k: Moments(  # noqa: E731
        **{f: jnp.take(v, jnp.array([k]), axis=axis.get(f, v.ndim - 2)) for f, v in m._asdict().items()}
    )
    out = take(0)
    for k in range(1, m.n.shape[0]):
        out = merge_moments(out, take(k))
    return out


def correlation_with_g(m: Moments) -> np.ndarray:
    """Pearson correlation of z with the score within a pole, [2,L,F]; 0 where either is constant."""
    pooled = pool_families(m)
    spread = np.sqrt(np.asarray(pooled.m2)[:, :, 0] * np.asarray(pooled.m2_g)[:, None])
    return np.divide(np.asarray(pooled.c_zg)[:, :, 0], spread, out=np.zeros_like(spread), where=spread > 0)
