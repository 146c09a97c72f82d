"""Stage text: what dictionaries are trained and judged on: a file, a data set, or the model's own samples."""

from __future__ import annotations

from jaxmech.activations import text as source
from jaxmech.behavior.behavior import POLES
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome

HELD_OUT = 1 / 6


def run(ctx: Context) -> Outcome:
    """Draws `text.count` rows, holds a sixth of them out, and mixes the development families' prompts into the rest."""
    asked, lm = ctx.config.text, ctx.lm
    key = ctx.key("text.samples")
    rows, origin = source.draw(lm, asked.count, asked.length, key, file=asked.file, dataset=asked.dataset)
    held = max(1, round(HELD_OUT * len(rows.tokens)))
    table = ctx.prompts("development", *POLES)
    train = source.Tokens(rows.tokens[held:], rows.mask[held:])
    if len(table):
        train = source.mix(train, source.from_prompts(lm, list(table["prefix"] + table["query"])))
    results = {
        "source": origin,
        "rows": len(rows.tokens),
        "held_out_rows": held,
        "development_prompts": len(table),
        "training_tokens": int(train.mask.sum()),
    }
    arrays = {
        "tokens": train.tokens, "mask": train.mask,
        "heldout_tokens": rows.tokens[:held], "heldout_mask": rows.mask[:held],
    }  # fmt: skip
    return Outcome(results, arrays=arrays)
