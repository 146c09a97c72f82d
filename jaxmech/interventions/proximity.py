"""How directly features act on the answer: total effect, direct effect with everything downstream frozen, their ratio.

`B` denotes prompts, `T` tokens of the pass (prompt and answers), `L` layers, `D` the residual width, `S` feature sets.

TE(S) sets the features of S to the donor's values. DE(S) does the same while every attention and feed-forward output
is held at its base value, so that only the residual stream carries the change to the logits. IE = TE - DE, and
proximity is pi = sum DE / sum TE (Pearl 2001; Vig et al. 2020, arXiv 2004.12265). Later layers are more direct by
construction, which is why classes are compared within layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxmech.answers.prompts import Prompts
from jaxmech.answers.score import Choices, score
from jaxmech.interventions.edits import Edits, Replace, Selection, Spans, at_last, everywhere, merge
from jaxmech.interventions.patching import check_donors, patch_edit
from jaxmech.interventions.sweep import sweep
from jaxmech.io.arguments import rng_of
from jaxmech.io.reprs import short_repr
from jaxmech.models.config import ModelConfig
from jaxmech.models.decoder import Params
from jaxmech.sae.module import SAE


class Sublayers(NamedTuple):
    """Base values of every sublayer's output, attn_out and mlp_out [L,B,T,D]."""

    attn_out: jax.Array
    mlp_out: jax.Array

    def __repr__(self) -> str:
        return short_repr(self)


@partial(jax.jit, static_argnums=0)
def base_sublayers(config: ModelConfig, params: Params, prompts: Prompts) -> Sublayers:
    """What attention and feed-forward sublayers write in the unedited run, at the prompt's and the answers' tokens."""
    _, out = score(config, params, prompts, taps=("attn_out", "mlp_out"))
    return Sublayers(out.taps["attn_out"], out.taps["mlp_out"])


def freeze(base: Sublayers, layers: jax.Array) -> Edits:
    """The edit that holds every sublayer's output at its base value, at `layers` [L] bool."""
    spans = everywhere(len(layers), layers).replace(prefix=None)
    return {site: (Replace(donor=donor, spans=spans),) for site, donor in base._asdict().items()}


def direct_effects(
    config: ModelConfig, params: Params, prompts: Prompts,
    selections: Selection, *, saes: SAE, donor: jax.Array, base: Sublayers,
    **options: Any,
) -> Choices:  # fmt: skip
    """Choices, logprobs [S,B,N], with each set [S,L,K] patched from donors [L,B,D] and all sublayers frozen.

    The features are read from the frozen stream, with upstream patches of the same set already in it. `options` as for
    `sweep`.
    """
    check_donors(config, prompts, donor, saes.config.site)
    spans = at_last(config.n_layers, prompts.tokens.shape[1])
    build = PatchFrozen(saes, donor, spans, base)
    return sweep(config, params, prompts, build, selections, **options)


@struct.dataclass
class PatchFrozen:
    """Edits for a sweep over selections: each takes the donor's values while all sublayers keep the base's outputs."""

    saes: SAE
    donor: jax.Array
    spans: Spans
    base: Sublayers

    __repr__ = short_repr

    def __call__(self, selection: Selection) -> Edits:
        downstream = jnp.cumsum(selection.valid.any(1)) > 0  # before that nothing has changed yet
        return merge(
            patch_edit(self.saes, selection, donor=self.donor, spans=self.spans), freeze(self.base, downstream)
        )


def mediated_effect(
    config: ModelConfig, params: Params, prompts: Prompts,
    *, saes: SAE, patched: Selection, held: Selection, donor: jax.Array,
    base_donor: jax.Array,
) -> Choices:  # fmt: skip
    """Choices, logprobs [B,N], with `patched` set to the donor's values while `held` stays at the base run's values.

    Raises:
      ValueError: a feature in both sets; residuals that are not [L,B,D].
    """
    for resid in (donor, base_donor):
        check_donors(config, prompts, resid, saes.config.site)
    if len(both := set(listed(patched)) & set(listed(held))):
        raise ValueError(f"held: {', '.join(map(str, sorted(both)))} cannot be patched and held at once")
    return _mediated(config, params, prompts, saes, patched, held, donor, base_donor)


def listed(selection: Selection) -> list[tuple[int, int]]:
    """The (layer, feature) pairs of one set."""
    index, valid = np.asarray(selection.index), np.asarray(selection.valid)
    return [(int(layer), int(index[layer, k])) for layer, k in np.argwhere(valid)]


@partial(jax.jit, static_argnums=0)
def _mediated(config, params, prompts, saes, patched, held, donor, base_donor):
    spans = at_last(config.n_layers, prompts.tokens.shape[1])
    edits = merge(
        patch_edit(saes, patched, donor=donor, spans=spans), patch_edit(saes, held, donor=base_donor, spans=spans)
    )
    return score(config, params, prompts, edits=edits)[0]


def within_layer_difference(
    proximity: np.ndarray, layer: np.ndarray, is_s2: np.ndarray, *, permutations: int, key: jax.Array
) -> tuple[float, float, int]:
    """S2's mean proximity minus S1's, compared within layers, by label permutation within layers.

    Args:
      proximity, layer, is_s2: [n] of the features of either class.

    Returns:
      The difference (layers weighted by the smaller class's size), its two-sided p, and the number of layers that have
      both classes. With none, the difference is not identifiable beyond depth: NaN, NaN, 0.
    """
    shared = [k for k in np.unique(layer) if 0 < is_s2[layer == k].sum() < (layer == k).sum()]
    if not shared:
        return float("nan"), float("nan"), 0
    rng = rng_of(key)

    def statistic(labels):
        parts = []
        for k in shared:
            values, s2 = proximity[layer == k], labels[layer == k]
            parts.append((min(s2.sum(), (~s2).sum()), values[s2].mean() - values[~s2].mean()))
        weights, differences = np.array(parts).T
        return float((weights * differences).sum() / weights.sum())

    def shuffled():
        labels = is_s2.copy()
        for k in shared:
            labels[layer == k] = rng.permutation(labels[layer == k])
        return labels

    observed = statistic(is_s2)
    if np.isnan(observed):
        return float("nan"), float("nan"), len(shared)
    null = np.array([statistic(shuffled()) for _ in range(permutations)])
    return observed, float((1 + (np.abs(null) >= abs(observed) - 1e-12).sum()) / (1 + permutations)), len(shared)
