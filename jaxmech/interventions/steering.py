"""Steering: features set to a dose, or vectors added to the residual stream, swept in one program.

`B` denotes prompts, `T` tokens, `L` layers, `D` the residual width, `K` selected features per layer, `S` sweep points.

Set to a dose (`set_to_dose`), coefficient 1 is one gap between the poles, whatever the number of layers at which a
feature is seen: what an upstream layer has set already, the next one need not. A vector added at every layer
(`steer`) adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import optimize, stats

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices
from jaxmech.interventions.edits import (
    Edits,
    Selection,
    Spans,
    add_vector,
    at_last,
    features,
    gather,
    set_features,
)
from jaxmech.interventions.patching import check_donors, donor_values
from jaxmech.interventions.sweep import sweep
from jaxmech.io.arguments import Array
from jaxmech.io.reprs import short_repr
from jaxmech.models.checks import check_tokens
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, Tap, forward
from jaxmech.sae.module import SAE

WAYS = ("set", "add", "multiply")
"""How a coefficient changes features: see `gain_and_shift`."""


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


def set_to_dose(
    config: ModelConfig,
    params: Params,
    prompts: Prompts,
    alphas: Array,
    *,
    saes: SAE,
    selection: Selection,
    gap: Array,
    base: jax.Array,
    **options: Any,
) -> Choices:
    """Choices, logprobs [S,B,N], with the selected features at the decision token set to base + alpha * gap.

    Args:
      alphas: [S]; 0 changes nothing, to rounding.
      gap: [L,K], each feature's mean difference between the poles.
      base: the same prompts' residuals [L,B,D] without steering.
      options: as for `sweep`.
    """
    build = dose_at_last(config, prompts, saes=saes, selection=selection, gap=gap, base=base)
    return sweep(config, params, prompts, build, np.asarray(alphas, np.float32), **options)


def dose_at_last(
    config: ModelConfig, prompts: Prompts, *, saes: SAE, selection: Selection, gap: Array, base: jax.Array
) -> SetToDose:
    """What `set_to_dose` sweeps; arguments as there."""
    check_donors(config, prompts, base, saes.config.site)
    values = donor_values(gather(saes, selection)[0], base)[:, :, None]
    spans = at_last(config.n_layers, prompts.tokens.shape[1])
    return SetToDose(saes, selection, jnp.asarray(gap), values, spans)


@struct.dataclass
class SetToDose:
    """Edits for a sweep over coefficients: the selected features are set to max(0, values + alpha * gap).

    gap [L,K]; values [L,B,T,K] without steering, T being 1 for the decision token alone.
    """

    saes: SAE
    selection: Selection
    gap: jax.Array
    values: jax.Array
    spans: Spans

    __repr__ = short_repr

    def __call__(self, alpha: jax.Array) -> Edits:
        gap = jnp.where(self.selection.valid, self.gap, 0.0)[:, None, None]
        target = jnp.maximum(self.values + alpha * gap, 0.0)  # no code is negative
        return {self.saes.config.site_out: (set_features(self.saes, self.selection, target=target, spans=self.spans),)}


def gain_and_shift(way: str, alpha: float, *, values: Array, gap: Array) -> tuple[np.ndarray, np.ndarray]:
    """What a coefficient makes of features z, as gain * z + shift, [L,B,K] each: a point of a sweep of `ScaleAndShift`.

    Args:
      way: "set", to max(0, values + alpha * gap), as `SetToDose`; "add", alpha * gap, which adds up over the layers at
        which a feature persists; "multiply", by 1 + alpha * sign(gap), so that 1 doubles what speaks for plus and
        silences what speaks for minus.
      values: [L,B,K] without steering. gap: [L,K].

    Raises:
      ValueError: another way.
    """
    values = np.asarray(values)
    gap = np.broadcast_to(np.asarray(gap, values.dtype)[:, None], values.shape)
    if way == "set":
        return np.zeros_like(values), np.maximum(values + alpha * gap, 0.0)
    if way == "add":
        return np.ones_like(values), alpha * gap
    if way == "multiply":
        return 1 + alpha * np.sign(gap), np.zeros_like(values)
    raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")


@struct.dataclass
class ScaleAndShift:
    """Edits for a sweep over (gain, shift), [L,B,K] each: the selected features become gain * z + shift.

    Where gain is 1 and shift 0 nothing changes, so that points may differ in the layers at which they act.
    """

    saes: SAE
    selection: Selection
    spans: Spans

    __repr__ = short_repr

    def __call__(self, point: tuple[jax.Array, jax.Array]) -> Edits:
        gain, shift = point
        edit = features(self.saes, self.selection, gain=gain, shift=shift, spans=self.spans)
        return {self.saes.config.site_out: (edit,)}


def values_in_text(
    config: ModelConfig, params: Params, tokens: Array, *, mask: Array, saes: SAE, selection: Selection
) -> jax.Array:
    """The selected features' values [L,B,T,K] at every token of texts [B,T]: what `SetToDose` starts from."""
    encoder, _ = gather(saes, selection)
    tap = Tap(saes.config.site, _encode, encoder)
    tokens, mask = check_tokens(config, tokens, mask)
    return forward(config, params, tokens, mask=mask, taps={"values": tap}, logits="none").taps["values"]


def _encode(encoder, x):
    return encoder.encode(x.astype(jnp.float32))


@struct.dataclass
class AddVector:
    """Edits for a sweep over vectors [L,D]: each is added at `site`."""

    spans: Spans
    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, vector: jax.Array) -> Edits:
        return {self.site: (add_vector(vector, self.spans),)}


@struct.dataclass
class AddOn:
    """Edits for a sweep over (vector [L,D], spans): a vector is added on tokens that differ among points."""

    site: str = struct.field(pytree_node=False, default="resid_post")

    __repr__ = short_repr

    def __call__(self, point: tuple[jax.Array, Spans]) -> Edits:
        vector, spans = point
        return {self.site: (add_vector(vector, spans),)}


def language_cost(
    config: ModelConfig, params: Params, tokens: Array, edits: Callable[[Any], Edits], points: Any, *, mask: Array
) -> tuple[jax.Array, jax.Array]:
    """What an intervention at every token costs on text.

    Args:
      tokens, mask: [B,T] text; the first token of a row is not predicted.
      edits, points: as for `sweep`, such as `AddVector(everywhere(L))` and vectors [S,L,D].

    Returns:
      nll [S], mean negative log-likelihood, and kl [S], mean KL(unsteered || steered), both in nats per token.
    """
    return _language_cost(config, params, *check_tokens(config, tokens, mask), edits, points)


@partial(jax.jit, static_argnums=0)
def _language_cost(config, params, tokens, mask, build, points):
    counted = mask[:, 1:] & mask[:, :-1]

    def logprobs(edits):
        logits = forward(config, params, tokens, mask=mask, edits=edits, logits="all").logits
        assert logits is not None
        return jax.nn.log_softmax(logits[:, :-1])

    def mean(v):
        return (v * counted).sum() / counted.sum()

    base = logprobs(None)

    def costs(point):
        steered = logprobs(build(point))
        nll = -jnp.take_along_axis(steered, tokens[:, 1:, None], axis=-1)[..., 0]
        return mean(nll), mean((jnp.exp(base) * (base - steered)).sum(-1))

    return jax.lax.map(costs, points)


def next_token(
    config: ModelConfig, params: Params, tokens: Array, edits: Callable[[Any], Edits], points: Any, *, mask: Array
) -> jax.Array:
    """The likeliest next token [S,B] of each row under each of S interventions; `edits` and `points` as for `sweep`.

    Raises:
      ValueError: logits that are no numbers, which have no likeliest.
    """
    likeliest = _next_token(config, params, *check_tokens(config, tokens, mask), edits, points)
    if not isinstance(likeliest, jax.core.Tracer) and len(wrong := np.argwhere(np.asarray(likeliest) < 0)):
        raise ValueError(f"point {wrong[0][0]}, row {wrong[0][1]}: the logits are NaN or infinite; steer less")
    return likeliest


@partial(jax.jit, static_argnums=0)
def _next_token(config, params, tokens, mask, build, points):
    def likeliest(point):
        logits = forward(config, params, tokens, mask=mask, edits=build(point)).logits
        assert logits is not None
        return jnp.where(jnp.isfinite(logits.max(-1)), logits.argmax(-1), -1)

    return jax.lax.map(likeliest, points)


def dose_response(alphas: np.ndarray, means: np.ndarray) -> dict[str, float]:
    """Summary of mean outcomes [S] over coefficients [S].

    slope: least squares, outcome per unit of alpha; spearman; isotonic_r2: share of variance a monotone curve explains
    (in the slope's direction); asymmetry: |up + down| / (|up| + |down|) for the largest |alpha|, 0 when symmetric. All
    NaN where a mean is no number.
    """
    if not np.isfinite(means).all():
        return dict.fromkeys(("slope", "spearman", "isotonic_r2", "asymmetry"), float("nan"))
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


def usable_range(alphas: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """The interval around 0 in which the cost stays within its limit, interpolated linearly between coefficients.

    Args:
      alphas: [S] ascending, 0 among them; cost: [S] in units of its limit, so that 1 is the most that is allowed; what
        it is at 0 does not count.
    """
    zero = int(np.flatnonzero(alphas == 0)[0])
    cost = np.where(np.isfinite(cost), cost, np.inf)
    cost[zero] = 0.0

    def reach(side: slice) -> float:
        a, c = alphas[side], cost[side]
        over = np.flatnonzero(c > 1)
        if not len(over):
            return float(a[-1])
        i = over[0]
        step = 0.0 if np.isinf(c[i]) else (1 - c[i - 1]) / (c[i] - c[i - 1])
        return float(a[i - 1] + step * (a[i] - a[i - 1]))

    return reach(slice(zero, None, -1)), reach(slice(zero, None))
