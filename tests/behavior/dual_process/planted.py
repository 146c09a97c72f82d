"""Activations planted on the real item table: what each kind of feature does is known."""

import numpy as np

from jaxmech.behavior.dual_process.prompts import build_items
from tests.behavior.fake_tokenizer import FakeTokenizer

KINDS = ("s2", "s1", "demand only", "generator level only", "length only", "noise", "sparse noise")


def planted_items(per_generator, seed=0):
    """The item table with the covariates that a model's pass adds: tokens, and likelihoods that fall with length."""
    items = build_items(per_generator=per_generator, seed=seed)
    rng, tokenizer = np.random.default_rng(seed), FakeTokenizer()
    tokens = np.array([len(tokenizer(query, add_special_tokens=False).input_ids) for query in items["query"]])
    likelihood = -3 - 0.02 * tokens + rng.normal(0, 0.3, len(items))
    return items.assign(tokens=tokens, log_likelihood=likelihood)


def planted(items, kind, delta, count, seed=0):
    """Activations [m,count] with a standard deviation of 1 within generator and condition, half of it the item's."""
    rng = np.random.default_rng(seed)
    by_item = rng.normal(size=(items["item"].nunique(), count))[items["item"].factorize()[0]]
    z = np.sqrt(0.5) * (by_item + rng.normal(size=by_item.shape))
    side = items["condition"].map({"conflict": 0.5, "think": 0.5, "no_conflict": -0.5, "instinct": -0.5}).to_numpy()
    if kind == "demand only":
        side = np.where(items["arm"] == "demand", side, 0)
    if kind in ("s2", "s1", "demand only", "sparse s2"):
        z += (-delta if kind == "s1" else delta) * side[:, None]
    if kind == "generator level only":
        z += 3 * rng.normal(size=(items["generator"].nunique(), count))[items["generator"].factorize()[0]]
    if kind == "length only":
        z += ((items["tokens"] - items["tokens"].mean()) / items["tokens"].std()).to_numpy()[:, None]
    if kind.startswith("sparse"):
        return np.maximum(z - np.quantile(z, 0.9, axis=0), 0)
    return np.maximum(z + 10, 0)
