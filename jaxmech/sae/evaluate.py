"""How faithful dictionaries are: FVU, L0, cosine, dead share and density, and the model's loss with them spliced in.

`B` denotes texts, `T` tokens, `D` the width at the site, `F` dictionary features, `L'` the dictionaries' layers,
`L` the model's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxmech.edits import Replace
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params, forward
from jaxmech.sae.module import SAE


class Fidelity(NamedTuple):
    """table: a row per layer; density [L',F]: the share of tokens at which each feature fires."""

    table: pd.DataFrame
    density: np.ndarray


def evaluate(sae: SAE, batches: Iterable[jax.Array]) -> Fidelity:
    """Reconstruction and sparsity over all given activations, which should not be those trained on.

    Args:
      sae: a stack.
      batches: activations [L',n,D]; `stream.chunks()` gives every row of a stream once. What the stream leaves out
        (padding, BOS) is left out here.

    Returns:
      `Fidelity`, whose table has for each layer: `tokens`; `fvu` = sum |x - y|^2 / sum |x - mean x|^2; `fvu_median`,
      the median of the same over single dimensions, which a few massive ones cannot rule; `cosine` of x - mean and
      y - mean, averaged; `l0`; `dead`, the share of features that never fire; `dense`, those that fire
      on more than a tenth of the tokens; `norm_ratio` = |y - mean| / |x - mean|, averaged.
    """
    if not sae.stacked:
        sae = sae.replace(params={name: leaf[None] for name, leaf in sae.params.items()})
    n, mean, square, error, sums, fired = 0, 0.0, 0.0, 0.0, None, 0.0
    reference = None
    for x in batches:
        if reference is None:
            reference = jnp.asarray(x, jnp.float32).mean(1)
        got = jax.tree.map(partial(np.asarray, dtype=np.float64), jax.device_get(_measure(sae, x, reference)))
        m = x.shape[1]
        shift = got["mean"] - mean
        square = square + got["square"] + shift**2 * n * m / (n + m)  # Chan's update
        mean = mean + shift * m / (n + m)
        error, fired, n = error + got["error"], fired + got["fired"], n + m
        sums = got["sums"] if sums is None else sums + got["sums"]
    if not n:
        raise ValueError("batches: expected at least one batch of activations")
    density = fired / n
    spread = np.where(square > 0, square, np.inf)
    table = {
        "layer": sae.config.layers,
        "tokens": n,
        "fvu": error.sum(1) / square.sum(1),
        "fvu_median": np.median(error / spread, axis=1),
        "cosine": sums[:, 0] / n,
        "norm_ratio": sums[:, 1] / n,
        "l0": density.sum(1),
        "dead": (density == 0).mean(1),
        "dense": (density > 0.1).mean(1),
    }
    return Fidelity(pd.DataFrame(table), density)


@jax.jit
def _measure(sae: SAE, x: jax.Array, reference: jax.Array) -> dict[str, jax.Array]:
    x = x.astype(jnp.float32)
    f = sae.encode(x)
    y = sae.decode(f)
    mean = x.mean(1)
    a, b = x - reference[:, None], y - reference[:, None]
    lengths = jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, -1) / jnp.maximum(lengths[0] * lengths[1], 1e-12)
    ratio = lengths[1] / jnp.maximum(lengths[0], 1e-12)
    return {
        "mean": mean,
        "square": jnp.sum((x - mean[:, None]) ** 2, axis=1),
        "error": jnp.sum((x - y) ** 2, axis=1),
        "fired": jnp.sum(f > 0, axis=1),
        "sums": jnp.stack([cosine.sum(1), ratio.sum(1)], axis=1),
    }


def loss_recovered(
    config: ModelConfig,
    params: Params,
    sae: SAE,
    tokens,
    mask=None,
    *,
    skip_first: int = 1,
    forward_batch: int = 4,
) -> pd.DataFrame:
    """The model's cross-entropy with each layer's activations replaced by their reconstruction, one layer at a time.

    Replaced are the tokens that dictionaries are trained on: not padding, nor the first `skip_first` real tokens of a
    text (BOS). Scored are the predictions made at those tokens.

    Args:
      tokens: [N,T] int; mask: [N,T] bool, True on real tokens.

    Returns:
      A row per layer, in nats per token: `ce` of the model as it is, `ce_spliced`, `ce_zero` and `ce_mean` (the
      activations replaced by 0, and by their mean over these tokens), and the shares of the loss recovered
      `recovered_zero` = (ce_zero - ce_spliced) / (ce_zero - ce) and `recovered_mean`; `tokens` scored, and `excluded`
      (padding, the skipped first tokens, and last tokens, whose next one is unknown).
    """
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(f"tokens, mask: expected two arrays [N,T], got shapes {tokens.shape} and {mask.shape}")
    kept = mask & (np.cumsum(mask, axis=1) > skip_first)
    scored = kept[:, :-1] & mask[:, 1:]
    if not scored.any():
        raise ValueError(f"tokens: no prediction left to score with skip_first={skip_first}; give longer texts")
    layers, site, batches = sae.config.layers, sae.config.site, list(_blocks(forward_batch, tokens, mask, kept, scored))
    run = partial(_loss, config, site, params)
    means = sum(_site_sums(config, site, layers, params, t, m, k) for t, m, k, _ in batches) / kept.sum()
    total = {name: np.zeros(len(layers)) for name in ("ce", "ce_spliced", "ce_zero", "ce_mean")}
    for t, m, k, s in batches:
        x = _activations(config, site, layers, params, t, m)  # [L',B,T,D]
        total["ce"] += float(run(None, 0, t, m, k, s))
        y = sae(x) if sae.stacked else sae(x[0])[None]
        for i, layer in enumerate(layers):
            donors = {
                "ce_spliced": y[i],
                "ce_zero": jnp.zeros_like(x[i]),
                "ce_mean": jnp.broadcast_to(means[i], x[i].shape),
            }
            for name, donor in donors.items():
                total[name][i] += float(run(donor, layer, t, m, k, s))
    table = {name: values / scored.sum() for name, values in total.items()}
    for name in ("zero", "mean"):
        lost = table[f"ce_{name}"] - table["ce"]
        regained = table[f"ce_{name}"] - table["ce_spliced"]
        table[f"recovered_{name}"] = np.divide(regained, lost, out=np.full_like(lost, np.nan), where=lost != 0)
    counts = {"tokens": int(scored.sum()), "excluded": int(tokens.size - scored.sum())}
    return pd.DataFrame({"layer": layers} | table | counts)


def _blocks(size: int, tokens, mask, kept, scored):
    """Batches of one shape; rows that fill up the last one count nowhere."""
    scored = np.pad(scored, ((0, 0), (0, 1)))
    for start in range(0, len(tokens), size):
        rows = np.arange(start, start + size)
        real = (rows < len(tokens))[:, None]
        rows = np.minimum(rows, len(tokens) - 1)
        yield tokens[rows], mask[rows], kept[rows] & real, scored[rows] & real


@partial(jax.jit, static_argnums=(0, 1, 2))
def _activations(config, site, layers, params, tokens, mask):
    """[L',B,T,D]."""
    return forward(config, params, tokens, mask=mask, taps=(site,), logits="none").taps[site][np.array(layers)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _site_sums(config, site, layers, params, tokens, mask, kept):
    """Sums [L',D] over the kept tokens."""
    x = _activations(config, site, layers, params, tokens, mask)
    return jnp.sum(jnp.where(kept[..., None], x, 0.0), axis=(1, 2))


@partial(jax.jit, static_argnums=(0, 1))
def _loss(config, site, params, donor, layer, tokens, mask, kept, scored):
    """Summed cross-entropy of the scored predictions, with `donor` [B,T,D] in place of x at `layer` where kept."""
    edits = None
    if donor is not None:
        at = jnp.arange(config.n_layers) == layer
        where = at[:, None, None] & kept
        # The donor is the same at every layer: `where` alone says at which one it is used.
        donor = jnp.broadcast_to(donor, (config.n_layers, *donor.shape))
        edits = {site: (Replace(where=where, after=jnp.zeros((config.n_layers, 1), bool), donor=donor),)}
    logits = forward(config, params, tokens, mask=mask, edits=edits, logits="all").logits
    right = jnp.take_along_axis(logits, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - right
    return jnp.sum(jnp.where(scored, losses, 0.0))
