"""Which features are lexical: set off by a few tokens, whatever the text says."""

from __future__ import annotations

import numpy as np
import pandas as pd

from jaxmech.models.text import encode_prompts, left_padded, text_ids, token_ids
from jaxmech.study.cards import selected_activations, selection_order
from jaxmech.study.context import Context

TRIGGERS, PROMPTS = 3, 6
"""Trigger tokens per feature, and prompts of each pole that they are taken from, spread over families."""
FRAMES = (
    ("The weather report on the radio said", " and then it ended."),
    ("On the shelf next to the blue box there was", " last week."),
    ("She closed the window, looked outside and read", " on a wall."),
    ("The third chapter of the manual begins with", " in small print."),
)
"""Sentences unrelated to any behaviour, into which trigger tokens are put."""


def lexical_flags(ctx: Context, features: pd.DataFrame) -> np.ndarray:
    """Whether each feature fires when its trigger tokens stand in unrelated text, in at least half of `FRAMES`.

    Trigger tokens are those on which it is largest in the prompts that it was selected on.
    """
    poles = (ctx.prompts("selection", pole) for pole in ("plus", "minus"))
    rows = pd.concat([pole.iloc[np.unique(np.linspace(0, len(pole) - 1, PROMPTS, dtype=int))] for pole in poles])
    tokens, mask = (np.asarray(a) for a in encode_prompts(ctx.lm, list(rows["prefix"] + rows["query"])))
    selection = ctx.selection(features)
    z = selected_activations(ctx, tokens, mask, selection)
    injected, feature, places = [], [], []
    for k in range(z.shape[-1]):
        triggers = trigger_tokens(tokens, z[..., k])
        for head, tail in FRAMES if triggers else ():
            before, after = text_ids(ctx.lm, head), token_ids(ctx.lm.tokenizer, tail)
            injected.append([*before, *triggers, *after])
            feature.append(k)
            places.append((len(after) + len(triggers), len(after)))
    flags = np.zeros(len(features), bool)
    if not injected:
        return flags
    names = [f"trigger tokens of feature {k}" for k in feature]
    put = selected_activations(ctx, *left_padded(ctx.lm, "text", injected, names, None), selection)
    T = put.shape[1]
    fired = [(put[i, T - a : T - b, k] > 0).any() for i, (k, (a, b)) in enumerate(zip(feature, places, strict=True))]
    share = pd.Series(fired).groupby(feature).mean()
    order = [row.Index for row in selection_order(features.reset_index(drop=True))]
    flags[np.array(order)[share.index[share >= 0.5]]] = True
    return flags


def trigger_tokens(tokens: np.ndarray, z: np.ndarray) -> list[int]:
    """The ids of the distinct tokens [N,T] on which a feature's activations z [N,T] are largest, at most `TRIGGERS`."""
    order = np.argsort(-z, axis=None)
    fires = order[z.ravel()[order] > 0]
    return [int(token) for token in dict.fromkeys(tokens.ravel()[fires])][:TRIGGERS]
