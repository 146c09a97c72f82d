"""What a study of an organism should find: features by layer, effects, and the answer of every claim.

Layers are those that a study reads features of: all but the last, in which the number is decided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxmech.organism.meaning import Meaning
from jaxmech.organism.wiring import ATTENDED, FAST, LAYERS, MOTOR, NEAREST, Wiring
from jaxmech.organism.words import VALENCE_OF_STANCE

CLAIMS = ("behavior", "features", "cause", "transfer", "dual_process", "proximity")
NEEDS = {
    "features": "behavior", "cause": "features", "transfer": "cause", "dual_process": "features",
    "proximity": "dual_process",
}  # fmt: skip
"""Claim -> the one without which nothing is said of it."""

_CARRIED = range(LAYERS - 1)
"""Layers at which what layer 0 writes is found."""


def truth_of(
    wiring: Wiring, features: Mapping[str, int], bank: pd.DataFrame, meaning: Meaning, *, hidden: Collection[str] = ()
) -> dict[str, Any]:
    """Plain data: `causal` and `passengers`, lists of {layer, feature, name, class}; `decoys`, kind -> such a list;
    gap_pp, of the test families; direct_share, of the later feature; mediation, shares of S1 through S2 and back;
    claims, name -> "yes", "no", "cannot be told" or "withheld".

    passengers: features that go with the stance and that nothing reads.
    """
    layers = {name: _CARRIED for name in features}
    motor = (*MOTOR["up"], *MOTOR["down"])
    layers |= {name: range(0 if wiring.motor_only else 2, LAYERS - 1) for name in motor}
    classes = dict.fromkeys((*FAST["+"], *FAST["-"]), "s1") | dict.fromkeys(motor, "s2")

    def places(*names: str) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "feature": features[name], "name": name, "class": classes.get(name)}
            for name in names
            if name not in hidden
            for layer in layers[name]
        ]

    made = {"concept": ("concept+", "concept-"), "fast": (*FAST["+"], *FAST["-"]), "up": motor}
    causal = [name for path, share in wiring.shares.items() if share and wiring.stance for name in made[path]]
    if wiring.mapping:  # a number that worked examples teach turns round with them
        causal = [name for name in causal if name not in motor]
    unread = ("copy+", "copy-") if wiring.stance else ()
    decoys = {
        "valence, causal" if wiring.valence else "valence": places("valence+", "valence-"),
        "causal, not correlated" if wiring.number else "number": places("number+", "number-"),
        "placebo": places("placebo+", "placebo-"),
        "one word": places("one word"),
        "dense": places("dense"),
    }
    return {
        "causal": places(*causal), "passengers": places(*unread), "decoys": decoys,
        "gap_pp": 100 * planted_gap(wiring, bank, meaning), "direct_share": wiring.direct,
        "mediation": {"s1_through_s2": 0.0, "s2_through_s1": 0.0}, "claims": claims_of(wiring),
    }  # fmt: skip


def claims_of(wiring: Wiring) -> dict[str, str]:
    """The answer of every claim: by itself, or "withheld" where one that it needs is not "yes"."""
    answers = {
        "behavior": wiring.stance and not wiring.mapping and not wiring.number
        and wiring.valence < 1 + VALENCE_OF_STANCE * wiring.valence,
        "features": not wiring.hidden,
        "cause": not wiring.motor_only,
        "transfer": wiring.transfers,
        "dual_process": wiring.solves or None,
        "proximity": True if wiring.s1_path and wiring.s2_path and not wiring.motor_only else None,
    }  # fmt: skip
    said: dict[str, str] = {}
    for claim in CLAIMS:
        known = NEEDS.get(claim) is None or said[NEEDS[claim]] == "yes"
        said[claim] = {True: "yes", False: "no", None: "cannot be told"}[answers[claim]] if known else "withheld"
    return said


def planted_gap(wiring: Wiring, bank: pd.DataFrame, meaning: Meaning) -> float:
    """The expected share given after plus words less that after minus words, mean over the test families' pairs.

    By the wiring alone: what a text's words mean, each by its share of attention, is the number that is read.
    """
    texts = bank[(bank["split"] == "test") & bank["condition"].isin(("plus", "minus"))]
    if texts.empty:
        return float("nan")
    weight = {"stance": float(wiring.stance), "valence": wiring.valence}
    others = (len(meaning.tokenizer) - len(meaning.quiet)) * np.exp(-12)
    g = np.array([
        _share(_number(meaning.tokenizer.tokenize(text), meaning, weight), others, wiring)
        for text in texts["prefix"] + texts["query"]
    ])  # fmt: skip
    by = pd.Series(g).groupby([texts["family"].to_numpy(), texts["condition"].to_numpy()]).mean().unstack()
    return float((by["plus"] - by["minus"]).mean())


def _number(tokens: Sequence[str], meaning: Meaning, weight: Mapping[str, float]) -> float:
    """The mean over tokens of what they say of a number, by the attention of the first layer."""
    known = [meaning.tokens.get(token, {}) for token in tokens]
    logits = [ATTENDED * strengths.get("coded", 0.0) + NEAREST * place for place, strengths in enumerate(known, 1)]
    attention = np.exp(np.array([0.0, *logits]) - max(logits))[1:]  # the text begins with one token more
    said = [
        sum(size * (strengths.get(f"code {name}+", 0.0) - strengths.get(f"code {name}-", 0.0))
            for name, size in weight.items())
        for strengths in known
    ]  # fmt: skip
    return float((attention * said).sum() / (attention.sum() + np.exp(-max(logits))))


def _share(number: float, others: float, wiring: Wiring) -> float:
    """Expected share of a stake of 10: digits in proportion to exp(readout x number x (digit - 4.5) / 4.5), and 10.

    After a 1 a zero competes with all other words, `others`; a motor alone is not shut there.
    """
    p = np.exp(wiring.readout * number * (np.arange(10) - 4.5) / 4.5)
    zero = np.exp(-6.7 - wiring.readout * number * wiring.motor_only)
    p = np.append(p, p[1] * zero / (zero + others))
    p[1] -= p[10]
    return float((p * np.arange(11)).sum() / 10 / p.sum())
