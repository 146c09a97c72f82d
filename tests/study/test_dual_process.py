"""The stage's own parts: what is read from the model, its conditions, and which features are lexical."""

from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest

from jaxmech.behavior.dual_process.prompts import build_items, shared_tail
from jaxmech.behavior.scoring import encode_table
from jaxmech.models.decoder import forward
from jaxmech.models.text import encode_prompts, token_ids
from jaxmech.sae.module import SAE, SAEConfig
from jaxmech.study import lexical
from jaxmech.study.context import Context
from jaxmech.study.stages import dual_process


@pytest.fixture(scope="module")
def saes(word_lm):
    D, F, keys = word_lm.config.d_model, 6, jax.random.split(jax.random.key(1), 2)
    params = {
        "W_enc": jax.random.normal(keys[0], (2, D, F)), "b_enc": np.zeros((2, F)),
        "W_dec": jax.random.normal(keys[1], (2, F, D)), "b_dec": np.zeros((2, D)),
    }  # fmt: skip
    return SAE(params, SAEConfig(d_in=D, d_sae=F, activation="relu", layers=(0, 2)))


@pytest.fixture
def context(word_lm, saes):
    """As much of a context as the stage's parts ask for; features deliberately not in the order of their layers."""
    selected = pd.DataFrame(dict(layer=[2, 0, 2], feature=[4, 1, 0]))
    out = SimpleNamespace(
        lm=word_lm, saes=saes, selected=selected,
        config=SimpleNamespace(batch=16, seed=0, dual_process=SimpleNamespace(items=2, cut=0.3)),
    )  # fmt: skip
    out.room = lambda *sets: Context.room(out, *sets)
    out.selection = lambda features=None: Context.selection(out, features)
    return out


@pytest.mark.slow
def test_what_is_read_equals_whole_texts_prompt_by_prompt(context):
    """Each text alone, without shared examples: log-likelihoods from its logits, features by encoding its tokens."""
    lm = context.lm
    items = build_items(per_generator=2).groupby("arm").head(10).reset_index(drop=True)
    queries = [token_ids(lm.tokenizer, query) for query in items["query"]]
    items = items.assign(tokens=[len(ids) for ids in queries])
    tail = shared_tail(items, queries)
    got, z = dual_process.read(context, items, encode_table(lm, items))
    for i in (0, 3, 11, 18):
        tokens, mask = encode_prompts(lm, [items["text"][i]], length=256)
        out = forward(lm.config, lm.params, tokens, mask=mask, logits="all", taps=("resid_post",))
        count, logprobs = len(queries[i]), np.asarray(jax.nn.log_softmax(out.logits[0]))
        want = np.mean([logprobs[t - 1, tokens[0, t]] for t in range(256 - count + 1, 256)])
        assert got["log_likelihood"][i] == pytest.approx(want, abs=1e-4)
        for k, (layer, feature) in enumerate(zip(*context.selected.to_numpy().T, strict=True)):
            resid = np.asarray(out.taps["resid_post"])[layer, 0, -tail[i] :]
            slot = context.saes.config.layers.index(layer)
            pre = resid @ np.asarray(context.saes.params["W_enc"][slot])[:, feature]
            np.testing.assert_allclose(z[i, k], np.maximum(pre, 0).max(), rtol=1e-3, atol=1e-3)


def answers(**p_correct):
    """Items on which the model has the same accuracy in every generator, but for a little noise."""
    items, rng = build_items(per_generator=2), np.random.default_rng(0)
    return items.assign(p_correct=items["condition"].map(p_correct) + rng.normal(0, 0.01, len(items)))


@pytest.mark.parametrize(
    "changed, name, defined, arms",
    [
        ({}, None, True, ["demand", "instruction"]),
        ({"no_conflict": 0.5, "conflict": 0.3}, "accuracy", False, ["demand", "instruction"]),
        ({"conflict": 0.9}, "lure_cost", False, ["demand", "instruction"]),
        ({"instinct": 0.6}, "instruction_gain", True, ["demand"]),
    ],
)
def test_each_condition_can_fail_alone(changed, name, defined, arms):
    found = dual_process.behavior(answers(**(dict(no_conflict=0.9, conflict=0.5, think=0.6, instinct=0.4) | changed)))
    assert [n for n, condition in found["conditions"].items() if not condition["met"]] == ([name] if name else [])
    assert found["defined"] is defined and bool(found["reason"]) is not defined and found["arms"] == arms
    value, (low, high) = (found["conditions"]["lure_cost"][key] for key in ("value", "ci"))
    assert low < value < high and found["behavior"]["conflict_cost"] == value


@pytest.mark.slow
@pytest.mark.parametrize("defined", [True, False])
def test_classes_are_computed_only_if_the_model_behaves(context, monkeypatch, defined):
    real = dual_process.behavior
    monkeypatch.setattr(dual_process, "behavior", lambda items: real(items) | {"defined": defined})
    monkeypatch.setattr(dual_process, "lexical_flags", lambda ctx, features: np.array([True, False, False]))
    if not defined:
        monkeypatch.setattr(dual_process, "read", None)
    outcome = dual_process.run(context)
    classes, counts = outcome.tables["classes"], [outcome.results[name] for name in dual_process.index.CLASSES]
    assert list(classes["layer"]) == [2, 0, 2] and outcome.results["lexical"] == 1
    if defined:
        assert sum(counts) == 3 and classes["index"].notna().all() and len(outcome.tables["sensitivity"]) == 5
        assert outcome.tables["items"]["log_likelihood"].lt(0).all()
    else:
        assert counts == [None] * 5 and set(classes["class"]) == {"undefined"} and classes["index"].isna().all()
        assert outcome.tables["sensitivity"].empty


def test_lexical_features_fire_on_their_triggers_in_unrelated_text(context, monkeypatch):
    """Of four: one fires on a word anywhere, one on that word in the prompts alone, one never, one on another word."""
    ids = lambda text: token_ids(context.lm.tokenizer, text)  # noqa: E731
    (word,), (other,), (also,) = ids("generous"), ids("selfish"), ids("player")
    said = {"plus": "A generous player .", "minus": "A selfish player ."}
    context.prompts = lambda split, pole: pd.DataFrame(dict(prefix=[""], query=[said[pole]]))
    context.selected = pd.DataFrame(dict(layer=[2, 0, 2, 0], feature=[4, 1, 0, 2]))

    def activations(ctx, tokens, mask, selection):
        tokens = np.asarray(tokens)
        z = np.zeros((*tokens.shape, 4))
        place = {(0, 1): 0, (0, 2): 1, (2, 4): 2, (2, 0): 3}  # by layer, then as listed
        z[..., place[2, 4]] = tokens == word
        z[..., place[0, 1]] = (tokens == word) & (tokens == also).any(1, keepdims=True)
        z[..., place[0, 2]] = tokens == other
        return z

    monkeypatch.setattr(lexical, "selected_activations", activations)
    assert list(lexical.lexical_flags(context, context.selected)) == [True, False, False, True]


def test_trigger_tokens_are_the_strongest_distinct_ones():
    tokens, z = np.array([[5, 6, 7, 8], [6, 9, 5, 1]]), np.array([[0.1, 0.9, 0.0, 0.3], [0.8, 0.2, 0.5, 0.0]])
    assert lexical.trigger_tokens(tokens, z) == [6, 5, 8]
    assert lexical.trigger_tokens(tokens, 0 * z) == []
