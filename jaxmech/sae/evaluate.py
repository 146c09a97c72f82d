"""How faithful dictionaries are: FVU, L0, cosine, dead share and density, and the model's loss with them spliced in.

`B` denotes texts, `T` tokens, `D` the width at the site, `F` dictionary features, `L'` the dictionaries' layers,
`L` the model's. x is the input, t the target (x itself unless the dictionary is a transcoder), y the output. Where
SAELens measures the same, its name is in brackets; `scripts/checks/check_evaluation.py` compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sized
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.activations.stream import after_first, token_rows
from jaxmech.io.arguments import Array, whole_number
from jaxmech.io.progress import counted, progress
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, forward
from jaxmech.models.edits import Replace, at_positions
from jaxmech.sae.module import SAE, SAEConfig

_TINY = 1e-12


class Fidelity(NamedTuple):
    """table: a row per layer; density [L',F]: the share of tokens at which each feature fires [feature_density]."""

    table: pd.DataFrame
    density: np.ndarray

    def __repr__(self) -> str:
        return short_repr(self)


def evaluate_saes(saes: SAE, batches: Iterable[jax.Array | tuple[jax.Array, jax.Array]]) -> Fidelity:
    """Reconstruction and sparsity over all given activations, which should not be those trained on.

    Args:
      saes: a stack, or a single dictionary.
      batches: activations [L',n,D]; `stream.chunks()` gives every row of a stream once. What the stream leaves out
        (padding, BOS) is left out here. For a single dictionary they may be [n,D]. A transcoder takes pairs (x, t)
        of activations at its two sites: `zip(a.chunks(), b.chunks())` of two streams that differ only in the site.

    Returns:
      `Fidelity`, whose table has for each layer `tokens` and, averaged over tokens unless said otherwise,
      - `fvu` = sum |t - y|^2 / sum |t - mean t|^2, sums over tokens [1 - explained_variance];
      - `fvu_median`, the median of the same over single dimensions, which a few massive ones cannot dominate;
      - `fvu_token`, |t - y|^2 / |t - m|^2 [1 - explained_variance_legacy];
      - `mse`, |t - y|^2, summed over dimensions [mse];
      - `cosine` of t and y [cossim]; `cosine_centred` of t - m and y - m, which a large common mean cannot raise;
      - `norm_ratio`, |y| / |t| [l2_ratio]; `norm_ratio_centred`, |y - m| / |t - m|;
      - `l0`, the features that fire, that is differ from 0 [l0]; `l1`, the sum of |f| [l1];
      - `dead`, the share of features that never fire; `dense`, of those that fire on over a tenth of the tokens.
      m is the first batch's mean, so that batches can be taken one by one. SAELens uses each batch's own
      mean: `fvu_token` agrees where there is one batch.

    Raises:
      ValueError: no batch, one that does not fit or is not finite, or single activations for a dictionary whose two
        sites differ.
    """
    with progress("evaluating", len(batches) if isinstance(batches, Sized) else None, unit="batches") as advance:
        return _evaluate(saes.as_stack(), counted(batches, advance))


def _evaluate(sae: SAE, batches: Iterable) -> Fidelity:
    maths = SAE(sae.params, _maths(sae.config))
    zero: Any = 0.0  # until the first batch gives the shapes
    n, mean, square, error, means, fired, centre = 0, zero, zero, zero, zero, zero, None
    for number, batch in enumerate(batches):
        x, target = _pair(sae, batch)
        centre = jnp.asarray(target, jnp.float32).mean(1) if centre is None else centre
        stats = jax.tree.map(partial(np.asarray, dtype=np.float64), jax.device_get(_measure(maths, x, target, centre)))
        if not (finite := stats.pop("finite").astype(bool)).all():
            layers = ", ".join(str(layer) for layer, good in zip(sae.config.layers, finite, strict=True) if not good)
            raise ValueError(f"batches: layer {layers} of batch {number} is not finite; leave such tokens out, or "
                             "check the model's weights and dtype")  # fmt: skip
        m = x.shape[1]
        shift = stats["mean"] - mean
        square = square + stats["square"] + shift**2 * n * m / (n + m)  # Chan's update
        mean = mean + shift * m / (n + m)
        error, fired, means, n = error + stats["error"], fired + stats["fired"], means + stats["sums"], n + m
    if not n:
        raise ValueError("batches: expected at least one batch of activations")
    density, means = fired / n, means / n
    spread, total = np.where(square > 0, square, np.inf), square.sum(1)
    table = {
        "layer": sae.config.layers,
        "tokens": n,
        "fvu": np.divide(error.sum(1), total, out=np.full_like(total, np.nan), where=total > 0),
        "fvu_median": np.median(error / spread, axis=1),
        **dict(zip(_MEANS, means.T, strict=True)),
        "mse": error.sum(1) / n,
        "l0": density.sum(1),
        "dead": (density == 0).mean(1),
        "dense": (density > 0.1).mean(1),
    }
    return Fidelity(pd.DataFrame(table), density)


def density_histogram(fidelity: Fidelity, per_decade: int = 2) -> pd.DataFrame:
    """How many features fire how often: `layer`, log10 of the density from `low` to `high`, `features`.

    Dead features have no logarithm: they are in the table's `dead`. The bins reach from one token to all.
    """
    decades = np.ceil(np.log10(fidelity.table["tokens"].max()))
    edges = np.linspace(-decades, 0, int(decades * per_decade) + 1) if decades else np.array([-1.0, 0.0])
    rows = []
    for layer, density in zip(fidelity.table["layer"], fidelity.density, strict=True):
        counts, _ = np.histogram(np.log10(density[density > 0]), edges)
        rows.append(pd.DataFrame({"layer": layer, "low": edges[:-1], "high": edges[1:], "features": counts}))
    return pd.concat(rows, ignore_index=True)


def _maths(config: SAEConfig) -> SAEConfig:
    """Only what affects the numbers, so that dictionaries that differ in the rest share one compiled program."""
    neutral: dict[str, Any] = {"site": "resid_post", "site_out": "resid_post", "skip_first": 0, "l0": ()}
    neutral |= {"model": None, "source": None, "units": "unknown"}
    return dataclasses.replace(config, layers=tuple(range(len(config.layers))), **neutral)


def _pair(sae: SAE, batch) -> tuple[jax.Array, jax.Array]:
    """Input and target, [L',n,D] each."""
    config = sae.config
    if not isinstance(batch, tuple):
        if config.site_out != config.site:
            raise ValueError(
                f"batches: these dictionaries read {config.site} and write {config.site_out}; give pairs (x, target)"
                " of activations at both, as zip(reads.chunks(), writes.chunks()) of two streams does"
            )
        batch = (batch, batch)
    x, target = (jnp.asarray(a, jnp.float32) for a in batch)
    if len(config.layers) == 1 and x.ndim == 2:
        x, target = x[None], target[None]
    shapes = [(len(config.layers), *x.shape[1:2], width) for width in (config.d_in, config.d_out)]
    if [x.shape, target.shape] != shapes:
        raise ValueError(
            f"batches: expected [L', n, D] as {shapes[0]} in, {shapes[1]} out, got {x.shape}, {target.shape}; one"
            " array alone is given as [x]"
        )
    return x, target


_MEANS = ("fvu_token", "cosine", "cosine_centred", "norm_ratio", "norm_ratio_centred", "l1")


@jax.jit
def _measure(sae: SAE, x: jax.Array, target: jax.Array, centre: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens of one batch, for every layer. One layer's code is in memory at a time."""

    def layer(args):
        sae, x, t, centre = args
        f = sae.encode(x)
        y = sae.decode(f, x)
        mean, wrong = t.mean(0), (t - y) ** 2
        a, b = t - centre, y - centre
        (t_, y_, a_, b_) = (jnp.linalg.norm(v, axis=-1) for v in (t, y, a, b))
        parts = {
            "fvu_token": wrong.sum(-1) / jnp.maximum(a_**2, _TINY),
            "cosine": jnp.sum(t * y, -1) / jnp.maximum(t_ * y_, _TINY),
            "cosine_centred": jnp.sum(a * b, -1) / jnp.maximum(a_ * b_, _TINY),
            "norm_ratio": y_ / jnp.maximum(t_, _TINY),
            "norm_ratio_centred": b_ / jnp.maximum(a_, _TINY),
            "l1": jnp.sum(jnp.abs(f), -1),
        }
        return {
            "mean": mean,
            "square": jnp.sum((t - mean) ** 2, axis=0),
            "error": jnp.sum(wrong, axis=0),
            "fired": jnp.sum(f != 0, axis=0),
            "finite": jnp.isfinite(x).all() & jnp.isfinite(t).all(),
            "sums": jnp.stack([parts[name].sum() for name in _MEANS]),
        }

    return jax.lax.map(layer, (sae, x, target, centre))


def loss_recovered(
    config: ModelConfig,
    params: Params,
    tokens: Array,
    *,
    saes: SAE,
    mask: Array | None = None,
    skip_first: int | None = None,
    zero_skipped: bool = False,
    batch: int = 4,
) -> pd.DataFrame:
    """The model's predictions with what a layer writes replaced by the dictionary's output, one layer at a time.

    Replaces it at the tokens that dictionaries are trained on: not padding, nor the first `skip_first` real tokens of a
    text (by default as many as the dictionaries declare, mostly BOS at least). Scores the predictions made there.

    Args:
      saes: a stack or a single dictionary; of a transcoder, x is read at one site and y put in at the other.
      tokens: [N,T] int; mask: [N,T] bool, True on real tokens.
      batch: texts in one forward pass.
      zero_skipped: whether `*_zero` has zeros at the skipped first tokens too, as SAELens does when it ignores special
        tokens. A model without its BOS breaks down, so that any dictionary then looks good.

    Returns:
      A row per layer. In nats per token: cross-entropy `ce` of the model as it is [ce_loss_without_sae], `ce_spliced`
      [ce_loss_with_sae], `ce_zero` [ce_loss_with_ablation] and `ce_mean` (what the layer writes replaced by y, by 0,
      and by its mean over these tokens); and the divergence KL(model || changed model) of the same three, `kl_spliced`
      [kl_div_with_sae], `kl_zero` [kl_div_with_ablation], `kl_mean`, which counts last tokens too. Shares of the loss
      recovered: `recovered_zero` = (ce_zero - ce_spliced) / (ce_zero - ce) [ce_loss_score], `recovered_mean` likewise,
      `recovered_kl` = (kl_zero - kl_spliced) / kl_zero [kl_div_score]. `tokens` scored by cross-entropy, and `excluded`
      (padding, the skipped first tokens, and last tokens, which have no next one).

    Raises:
      ValueError: tokens that the model does not have, a mask of another shape, or no prediction left to score.
    """
    tokens, mask = token_rows(config, tokens, mask)
    skip_first = whole_number("skip_first", saes.config.skip_first if skip_first is None else skip_first, 0)
    batch = whole_number("batch", batch, 1)
    kept = after_first(mask, skip_first)
    scored = kept[:, :-1] & mask[:, 1:]
    if not scored.any():
        raise ValueError(f"tokens: no prediction left to score with skip_first={skip_first}; give longer texts")
    layers, sites = saes.config.layers, (saes.config.site, saes.config.site_out)
    batches = list(_blocks(batch, tokens, mask, kept, scored))
    means = sum(_site_sums(config, sites, layers, params, t, m, k) for t, m, k, _ in batches) / kept.sum()
    total = {name: np.zeros(len(layers)) for part in ("ce", "kl") for name in (part, *(f"{part}_{c}" for c in _CASES))}
    with progress("loss recovered", len(batches) * len(layers), unit="layers") as advance:
        for t, m, k, s in batches:
            clean, x, target = _clean(config, sites, layers, params, t, m)
            total["ce"] += float(_cross_entropy(clean, t, s))
            y = _spliced(saes, x, target, k)
            for i, layer in enumerate(layers):
                donors = (y[i], jnp.zeros_like(target[i]), jnp.broadcast_to(means[i], target[i].shape))
                for case, donor in zip(_CASES, donors, strict=True):
                    where = m if case == "zero" and zero_skipped else k
                    ce, kl = _changed(config, sites[1], params, clean, donor, where, layer, t, m, k, s)
                    total[f"ce_{case}"][i] += float(ce)
                    total[f"kl_{case}"][i] += float(kl)
                advance()
    table = {name: v / (scored if name.startswith("ce") else kept).sum() for name, v in total.items() if name != "kl"}
    for name, part, against in (("zero", "ce", "zero"), ("mean", "ce", "mean"), ("kl", "kl", "zero")):
        lost = table[f"{part}_{against}"] - table.get(part, 0.0)
        regained = table[f"{part}_{against}"] - table[f"{part}_spliced"]
        table[f"recovered_{name}"] = np.divide(regained, lost, out=np.full_like(lost, np.nan), where=lost != 0)
    counts = {"tokens": int(scored.sum()), "excluded": int(tokens.size - scored.sum())}
    return pd.DataFrame({"layer": layers} | table | counts)


_CASES = ("spliced", "zero", "mean")


def _blocks(size: int, tokens, mask, kept, scored):
    """Batches of one shape; the rows that pad the last one are not counted."""
    scored = np.pad(scored, ((0, 0), (0, 1)))
    for start in range(0, len(tokens), size):
        rows = np.arange(start, start + size)
        real = (rows < len(tokens))[:, None]
        rows = np.minimum(rows, len(tokens) - 1)
        yield tokens[rows], mask[rows], kept[rows] & real, scored[rows] & real


@partial(jax.jit, static_argnums=(0, 1, 2))
def _clean(config, sites, layers, params, tokens, mask):
    """Logits [B,T,V], and the activations at both sites, [L',B,T,D] each."""
    out = forward(config, params, tokens, mask=mask, taps=tuple(set(sites)), logits="all")
    return out.logits, *(out.taps[site][np.array(layers)] for site in sites)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _site_sums(config, sites, layers, params, tokens, mask, kept):
    """Sums [L',D] of what is written over the kept tokens."""
    taps = forward(config, params, tokens, mask=mask, taps=sites[1:], logits="none").taps
    return jnp.sum(jnp.where(kept[..., None], taps[sites[1]][np.array(layers)], 0.0), axis=(1, 2))


def _spliced(sae: SAE, x, target, kept):
    """`target` with y at the kept tokens. Only these are encoded: all that are share the budget of a BatchTopK."""
    return target.at[:, kept].set(sae.as_stack()(x[:, kept]))


@jax.jit
def _cross_entropy(logits, tokens, scored):
    """Summed over the scored predictions."""
    right = jnp.take_along_axis(logits, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(scored, jax.nn.logsumexp(logits, axis=-1) - right, 0.0))


@partial(jax.jit, static_argnums=(0, 1))
def _changed(config, site, params, clean, donor, where, layer, tokens, mask, kept, scored):
    """Summed cross-entropy and divergence from `clean`, with `donor` [B,T,D] at `layer` in place of what is there."""
    at_layer = jnp.arange(config.n_layers) == layer
    # The donor is the same at every layer: the spans alone say at which one it is used.
    donor = jnp.broadcast_to(donor, (config.n_layers, *donor.shape))
    edit = Replace(donor=donor, spans=at_positions(config.n_layers, where, at_layer))
    logits = forward(config, params, tokens, mask=mask, edits={site: (edit,)}, logits="all").logits
    assert logits is not None
    # KL = sum p (log p - log q), the two normalisers taken out of the sum.
    kl = jnp.sum(jax.nn.softmax(clean) * (clean - logits), -1)
    kl += jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(clean, axis=-1)
    return _cross_entropy(logits, tokens, scored), jnp.sum(jnp.where(kept, kl, 0.0))
