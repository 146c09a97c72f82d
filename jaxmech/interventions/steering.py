"""Steering: vectors added to the residual stream, swept over coefficients and directions in one program.

`B` denotes prompts, `T` tokens, `L` layers, `D` the residual width, `K` selected features per layer, `S` sweep points.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import optimize, stats

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices
from jaxmech.interventions.edits import Edits, Selection, Spans, add_vector, at_last, everywhere, gather
from jaxmech.interventions.sweep import sweep
from jaxmech.io.arguments import Array
from jaxmech.io.reprs import short_repr
from jaxmech.models.checks import check_tokens
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, forward
from jaxmech.sae.module import SAE


def feature_direction(saes: SAE, selection: Selection, dz: jax.Array) -> jax.Array:
    """v_l = sum_j dz_j D_j, [L,D]: coefficient 1 is one gap between plus and minus. dz [L,K] mean differences."""
    _, W_dec = gather(saes, selection)
    return jnp.einsum("lk,lkd->ld", jnp.where(selection.valid, dz, 0.0), W_dec, precision=jax.lax.Precision.HIGHEST)


def steer(
    config: ModelConfig, params: Params, prompts: Prompts,
    vectors: Array, *, site: str = "resid_post", spans: Spans | None = None,
    **options: Any,
) -> Choices:  # fmt: skip
    """Choices, logprobs [S,B,N], with vectors [S,L,D] added at `spans`: by default the decision token alone.

    `jm.edits.everywhere(L)` steers every token, worked examples and answers included. `options` as for `sweep`.
    """
    if spans is None:
        spans = at_last(config.n_layers, prompts.tokens.shape[1])
    return sweep(config, params, prompts, AddVector(spans, site), vectors, **options)


@struct.dataclass
class AddVector:
    """Edits for a sweep over vectors [L,D]: each is added at `site`."""

    spans: Spans
    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, vector: jax.Array) -> Edits:
        return {self.site: (add_vector(vector, self.spans),)}


def language_cost(
    config: ModelConfig, params: Params, tokens: Array, vectors: Array, *, mask: Array
) -> tuple[jax.Array, jax.Array]:
    """What steering at every token costs on text.

    Args:
      tokens, mask: [B,T] text; the first token of a row is not predicted.
      vectors: [S,L,D].

    Returns:
      nll [S], mean negative log-likelihood, and kl [S], mean KL(unsteered || steered), both in nats per token.
    """
    return _language_cost(config, params, *check_tokens(config, tokens, mask), vectors)


@partial(jax.jit, static_argnums=0)
def _language_cost(config, params, tokens, mask, vectors):
    counted = mask[:, 1:] & mask[:, :-1]

    def logprobs(vector):
        edits = None if vector is None else {"resid_post": (add_vector(vector, everywhere(config.n_layers)),)}
        logits = forward(config, params, tokens, mask=mask, edits=edits, logits="all").logits
        assert logits is not None
        return jax.nn.log_softmax(logits[:, :-1])

    def mean(v):
        return (v * counted).sum() / counted.sum()

    base = logprobs(None)

    def costs(vector):
        steered = logprobs(vector)
        nll = -jnp.take_along_axis(steered, tokens[:, 1:, None], axis=-1)[..., 0]
        return mean(nll), mean((jnp.exp(base) * (base - steered)).sum(-1))

    return jax.lax.map(costs, vectors)


def next_token(config: ModelConfig, params: Params, tokens: Array, vectors: Array, *, mask: Array) -> jax.Array:
    """The likeliest next token [S,B] of each row with vectors [S,L,D] added at every token."""
    return _next_token(config, params, *check_tokens(config, tokens, mask), vectors)


@partial(jax.jit, static_argnums=0)
def _next_token(config, params, tokens, mask, vectors):
    def likeliest(vector):
        edits = {"resid_post": (add_vector(vector, everywhere(config.n_layers)),)}
        logits = forward(config, params, tokens, mask=mask, edits=edits).logits
        assert logits is not None
        return logits.argmax(-1)

    return jax.lax.map(likeliest, vectors)


def dose_response(alphas: np.ndarray, means: np.ndarray) -> dict[str, float]:
    """Summary of mean outcomes [S] over coefficients [S].

    slope: least squares, outcome per unit of alpha; spearman; isotonic_r2: share of variance a monotone curve explains
    (in the slope's direction); asymmetry: |up + down| / (|up| + |down|) for the largest |alpha|, 0 when symmetric.
    """
    slope = float(np.polyfit(alphas, means, 1)[0])
    spearman = float(stats.spearmanr(alphas, means).statistic) if np.ptp(means) > 0 else 0.0
    fitted = optimize.isotonic_regression(means, increasing=slope >= 0).x
    total = ((means - means.mean()) ** 2).sum()
    zero = float(np.interp(0.0, alphas, means))
    up, down = means[-1] - zero, means[0] - zero
    return {
        "slope": slope,
        "spearman": spearman,
        "isotonic_r2": float(1 - ((means - fitted) ** 2).sum() / total) if total > 0 else 0.0,
        "asymmetry": float(abs(up + down) / (abs(up) + abs(down))) if abs(up) + abs(down) > 0 else 0.0,
    }


def usable_range(alphas: np.ndarray, usable: np.ndarray) -> tuple[float, float]:
    """The largest interval of consecutive usable coefficients around 0, (0, 0) when only 0 itself is usable.

    Args:
      alphas: [S] ascending, 0 among them; usable: [S] bool.
    """
    zero = int(np.flatnonzero(alphas == 0)[0])
    low = high = zero
    while low > 0 and usable[low - 1]:
        low -= 1
    while high < len(alphas) - 1 and usable[high + 1]:
        high += 1
    return float(alphas[low]), float(alphas[high])
