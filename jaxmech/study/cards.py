"""What a person looks at to understand a feature: the tokens that fire it, and the tokens that it promotes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from jaxmech.interventions import edits, steering
from jaxmech.io.arguments import Array
from jaxmech.study.context import Context

TOP, CONTEXT, ROWS = 5, 5, 16


def feature_cards(ctx: Context, picked: pd.DataFrame) -> pd.DataFrame:
    """One row per selected feature: promoted and suppressed tokens, the tokens that fire it most, in context."""
    text = ctx.folder.arrays("text")
    rows = {
        k: np.concatenate([text[f"heldout_{k}"], text[k][:, : text[f"heldout_{k}"].shape[1]]])[:ROWS]
        for k in ("tokens", "mask")
    }
    tokens, mask = rows["tokens"], rows["mask"].astype(bool)
    z = selected_activations(ctx, tokens, mask, ctx.selection(picked))
    promoted, suppressed = logit_tokens(ctx, picked)
    cards = []
    for i, row in enumerate(selection_order(picked)):
        best = [divmod(int(place), tokens.shape[1]) for place in np.argsort(-z[..., i], axis=None)[:TOP]]
        best = [(b, t) for b, t in best if z[b, t, i] > 0]
        cards.append(
            dict(
                layer=int(row.layer), feature=int(row.feature),
                promoted=promoted[row.Index], suppressed=suppressed[row.Index],
                top_tokens=[decode(ctx, [tokens[b, t]]) for b, t in best],
                contexts=[decode(ctx, tokens[b, max(0, t - CONTEXT) : t + 1]) for b, t in best],
                activations=[float(z[b, t, i]) for b, t in best], trigger_ids=[int(tokens[b, t]) for b, t in best],
            )
        )  # fmt: skip
    return pd.DataFrame(cards)


def selection_order(features: pd.DataFrame) -> Iterator[Any]:
    """Rows of `features` in the order in which a `Selection` lists them: by layer, then in table order."""
    return features.sort_values("layer", kind="stable").itertuples()


def decode(ctx: Context, ids: Sequence[int] | Array) -> str:
    return ctx.lm.tokenizer.decode([int(i) for i in ids])


def selected_activations(
    ctx: Context, tokens: Array, mask: Array, selection: edits.Selection, batch: int = 8
) -> np.ndarray:
    """Activations [N,T,n] of the chosen features, in the selection's order; 0 at padding and BOS, which never count."""
    parts = []
    read = partial(steering.values_in_text, ctx.lm.config, ctx.lm.params, saes=ctx.saes, selection=selection)
    for start in range(0, len(tokens), batch):
        rows = np.minimum(np.arange(start, start + batch), len(tokens) - 1)
        z = read(tokens[rows], mask=mask[rows])
        parts.append(np.moveaxis(np.asarray(z), 0, 2)[: len(tokens) - start])  # [N,T,L,K]
    listed, real = np.concatenate(parts)[:, :, np.asarray(selection.valid)], np.asarray(mask)
    return np.where((real & (np.cumsum(real, axis=1) > 1))[..., None], listed, 0.0)


def logit_tokens(ctx: Context, picked: pd.DataFrame, n: int = 8) -> tuple[dict, dict]:
    """Tokens whose logits each feature's decoder row raises and lowers most, through the final norm's gain alone."""
    params, config = ctx.lm.params, ctx.lm.config
    slots = [ctx.saes.config.layers.index(layer) for layer in picked["layer"]]
    rows = ctx.saes.params["W_dec"][np.array(slots), picked["feature"].to_numpy()]
    gain = config.norm_offset + params["final_norm"]["scale"]
    unembed = params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]
    logits = np.asarray((rows * gain) @ unembed)
    up, down = np.argsort(-logits, axis=1)[:, :n], np.argsort(logits, axis=1)[:, :n]
    spell = lambda table: {i: [decode(ctx, [t]) for t in row] for i, row in zip(picked.index, table, strict=True)}  # noqa: E731
    return spell(up), spell(down)
