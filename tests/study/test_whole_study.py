"""One whole study on a tiny model: what each stage leaves, by definition, and that a killed one resumes to the same."""

import dataclasses
import json

import chex
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jaxmech.behavior.behavior import poles
from jaxmech.behavior.scoring import allocate, encode_table
from jaxmech.contrast.statistics import paired_t
from jaxmech.io.settings import build
from jaxmech.models.decoder import forward
from jaxmech.models.text import encode_prompts
from jaxmech.sae.collect import run_decision
from jaxmech.sae.formats import load_saes
from jaxmech.study import run as runner
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import Context
from jaxmech.study.effects import FEW
from jaxmech.study.folder import RunFolder, read_json
from jaxmech.study.stages import steering
from jaxmech.study.tables import TABLES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(word_lm, tmp_path_factory, small_settings):
    """The configuration and the folder of a whole study, and its context."""
    config = small_settings(tmp_path_factory.mktemp("study") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "lm", property(lambda self: word_lm))
        folder = RunFolder(runner.run_study(config))
        yield config, folder, Context(config)


def test_every_declared_table_is_there(finished):
    _, folder, _ = finished
    for stage, tables in TABLES.items():
        assert {file.stem for file in folder.stage(stage).glob("*.parquet")} == set(tables), stage


def test_behavior(finished, word_lm):
    _, folder, context = finished
    prompts, effects = (folder.table("behavior", name) for name in ("prompts", "effects"))
    wide = prompts.astype({"g": float}).pivot_table(index="family", columns="condition", values="g")
    for row in effects.itertuples():
        plus, minus = poles(None if row.contrast == "poles" else row.contrast)
        assert row.shift_pp == pytest.approx(100 * (wide[plus] - wide[minus]).mean()) and row.families == 6
    spread = folder.table("behavior", "distributions")
    np.testing.assert_allclose(spread.groupby("condition")["probability"].sum(), 1.0, rtol=1e-5)
    table, encoded = context.encoded
    again = allocate(word_lm, table, encoded, batch=5)  # another batch, the same numbers
    np.testing.assert_allclose(again["g"], prompts["g"], atol=1e-5)
    chex.assert_shape(encoded.values, (len(table), 11))


def test_text_and_dictionaries(finished, word_lm):
    config, folder, context = finished
    arrays, results = folder.arrays("text"), folder.results("text")
    assert len(arrays["heldout_tokens"]) == results["held_out_rows"] == 1
    assert results["training_tokens"] == arrays["mask"].sum()
    assert results["development_prompts"] == len(context.prompts("development", "plus", "minus", "neutral"))
    saes = load_saes(folder.stage("dictionaries") / "saes")
    chex.assert_shape(saes.params["W_dec"], (2, config.dictionaries.train.d_sae, word_lm.config.d_model))
    assert folder.table("dictionaries", "training")["step"].max() == config.dictionaries.train.steps


def codes_of(context, lm, saes):
    """The codes [L',B,F] at the decision tokens of all pairs, by pole."""
    codes = {}
    for pole in ("plus", "minus"):
        table = context.prompts("selection", pole).sort_values(["family", "pair"])
        resid = run_decision(lm.config, lm.params, encode_table(lm, table.reset_index(drop=True)).prompts).resid
        codes[pole] = np.asarray(saes.encode(resid[np.array(saes.config.layers)]))
    return codes


def test_contrast(finished, word_lm):
    """A feature's mean difference, by encoding every pair's decision tokens."""
    config, folder, context = finished
    features, saes = folder.table("contrast", "features"), context.saes
    codes = codes_of(context, word_lm, saes)
    chex.assert_shape(codes["plus"], (2, 6, config.dictionaries.train.d_sae))
    want = (codes["plus"] - codes["minus"]).mean(1).reshape(-1)
    np.testing.assert_allclose(features["dz"], want, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(features["fires_plus"], (codes["plus"] > 0).mean(1).reshape(-1), atol=1e-6)
    results = folder.results("contrast")
    assert results["positions"]["decision"] == features["selected"].sum() and results["relabelings"] == 3
    assert 0 <= results["null_share"] < results["null_upper"] <= 1 and results["null_p"] >= 1 / 4
    remaining = folder.table("contrast", "criteria")["remaining"]
    assert (remaining.diff().dropna() <= 0).all() and remaining.iloc[-1] == features["selected"].sum()
    budget = folder.table("contrast", "budgets").set_index("share").loc[config.selection.budget, "features"]
    assert features["in_budget"].sum() == budget


def test_a_second_seed(finished, word_lm):
    """Which of the directions in use a second training has in use as well, one by one."""
    config, folder, context = finished
    first, second = context.saes, context.saes_again
    assert np.abs(np.asarray(first.params["W_dec"]) - np.asarray(second.params["W_dec"])).max() > 0.1
    codes = codes_of(context, word_lm, second)
    F, d = second.config.d_sae, codes["plus"] - codes["minus"]
    fires = np.maximum((codes["plus"] > 0).mean(1), (codes["minus"] > 0).mean(1)) > 0
    t = np.where(fires, np.abs(stats.ttest_1samp(d, 0, axis=1).statistic), -1)
    theirs = np.argsort(-t.reshape(-1))[: round(config.selection.budget * t.size)]
    assert folder.results("contrast")["mode"] == "budget"
    best = []
    for layer, feature in folder.table("contrast", "selected")[["layer", "feature"]].to_numpy():
        at = first.config.layers.index(layer)
        a = np.asarray(first.params["W_dec"])[at, feature]
        rows = [np.asarray(second.params["W_dec"])[at, i % F] for i in theirs if i // F == at]
        best.append(max((a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in rows), default=0.0))
    again = folder.results("contrast")["again"]
    assert again["cosine"] == pytest.approx(np.median(best), abs=1e-3)
    assert again["share"] == np.mean(np.array(best) >= 0.7)


def test_contrast_after_the_stance(finished, word_lm):
    """The same over the tokens that both prompts share at their end, pair by pair and token by token."""
    _, folder, context = finished
    saes, d = context.saes, []
    table = context.prompts("selection", "plus", "minus")
    for _, pair in table.groupby(["family", "pair"]):
        texts = dict(zip(pair["condition"], pair["prefix"] + pair["query"], strict=True))
        plus, minus = (word_lm.tokenizer(texts[pole], add_special_tokens=False).input_ids for pole in poles())
        same = next(i for i, (a, b) in enumerate(zip(plus[::-1], minus[::-1], strict=False)) if a != b)
        codes = []
        for pole in poles():
            tokens, mask = encode_prompts(word_lm, [texts[pole]])
            x = forward(word_lm.config, word_lm.params, tokens, mask=mask, taps=("resid_post",)).taps["resid_post"]
            codes.append(np.asarray(saes.encode(x[np.array(saes.config.layers), 0, -same:])).mean(1))
        d.append((codes[0] - codes[1]).reshape(-1))
    got, moved = folder.table("contrast", "features")["d_z_after"], np.abs(np.mean(d, 0)) > 1e-3
    np.testing.assert_allclose(got[moved], paired_t(np.array(d))[2][moved], rtol=0.02, atol=0.02)
    assert moved.sum() > 10


def test_dual_process(finished):
    _, folder, _ = finished
    classes, items = (folder.table("dual_process", name) for name in ("classes", "items"))
    selected = folder.table("contrast", "selected")
    assert (classes[["layer", "feature"]].to_numpy() == selected[["layer", "feature"]].to_numpy()).all()
    assert items["p_correct"].between(0, 1).all() and (items.groupby("item").size() == 4).all()
    counts = folder.table("dual_process", "sensitivity").drop(columns="cut").sum(axis=1)
    assert (counts == len(selected)).all()


def test_patching_and_proximity(finished):
    config, folder, _ = finished
    bars, null = (folder.table("patching", name) for name in ("bars", "null"))
    drawn = null.groupby(["direction", "null"]).size().unstack()
    assert (drawn["matched sets"] == config.patching.random_sets).all()
    assert folder.results("contrast")["mode"] == "budget" and FEW < config.patching.random_directions
    assert (drawn["random directions"] == FEW).all() and folder.results("patching")["random_directions"] == FEW
    singles = folder.table("patching", "singles")
    assert len(singles) == len(folder.table("contrast", "selected")) and singles["p_holm"].between(0, 1).all()
    for _, part in bars.groupby("direction"):
        assert part["name"].is_unique and (part["kind"] == "effect").sum() == 1
    sets = folder.table("proximity", "sets")
    np.testing.assert_allclose(sets["direct_pp"] + sets["indirect_pp"], sets["total_pp"], atol=1e-6)
    moved = bars[(bars["direction"] == "to_plus") & (bars["kind"] == "effect")]["change_pp"].iloc[0]
    assert sets.loc[sets["set"] == "all", "total_pp"].iloc[0] == pytest.approx(moved, abs=1e-3)  # the same patch


def test_attribution(finished):
    _, folder, _ = finished
    frame, audit = (folder.table("attribution", name) for name in ("attribution", "audit"))
    chex.assert_shape(frame[["attribution", "integrated"]].to_numpy(), (2 * 48, 2))
    assert np.isfinite(frame[["attribution", "integrated"]]).all(axis=None) and frame["attribution"].any()
    top = audit[audit["group"] == "top"]["attribution"].abs()
    assert top.min() >= audit[audit["group"] == "random"]["attribution"].abs().max()
    assert not audit.duplicated(["layer", "feature"]).any()


def test_steering_and_transfer(finished, word_lm):
    config, folder, context = finished
    dose = folder.table("steering", "dose").set_index("alpha")
    neutral = folder.table("behavior", "prompts").query("condition == 'neutral'")
    assert dose.loc[0.0, "g"] == pytest.approx(neutral.groupby("family")["g"].first().mean(), abs=1e-4)
    others = folder.table("steering", "comparators")
    counts = others[others["kind"] == "null"]["name"].value_counts()
    assert counts["matched random features"] == config.patching.random_sets
    assert counts["random directions"] == config.steering.random_directions
    direction = folder.arrays("steering")["direction"]
    chex.assert_shape(direction, (3, word_lm.config.d_model))
    weighted = np.zeros_like(direction)
    alone = folder.table("patching", "singles").set_index(["layer", "feature"])["change_pp"]
    dz = folder.table("contrast", "selected").set_index(["layer", "feature"])["dz"]
    for (layer, feature), change in alone.items():
        slot = context.saes.config.layers.index(layer)
        weighted[layer] += change * dz[layer, feature] * np.asarray(context.saes.params["W_dec"][slot, feature])
    named = {name: vector for name, _, vector in steering.named_directions(context.of("steering"), direction)}
    np.testing.assert_allclose(named["weighted by effect alone"], weighted, rtol=1e-4, atol=1e-5)
    assert {"weighted by effect alone", "mean difference"} <= set(others["name"])
    tasks = folder.table("transfer", "tasks").set_index("task")
    assert tasks["home"].sum() == 1 and set(tasks.index) == set(context.tasks)
    for name, task in context.tasks.items():
        alone = allocate(word_lm, task.prompts, encode_table(word_lm, task.prompts))
        assert tasks.loc[name, "baseline"] == pytest.approx(alone["g"].mean(), abs=1e-4)
    assert isinstance(folder.table("transfer", "curves"), pd.DataFrame)


def numbers(folder):
    results = read_json(folder / "results.json")
    results.pop("stages")
    return results


def test_a_killed_study_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch):
    config, whole, _ = finished
    interrupted = dataclasses.replace(config, run_dir=str(tmp_path / "again"))
    # Killed in the middle of training, after a checkpoint of step 6 of 12, and once more before the last stage.
    from jaxmech.sae.training import loop as training

    original = training.train_step
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        runner.run_study(interrupted)
    monkeypatch.setattr(training, "train_step", original)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner.STAGES[-1].__class__, "run", killed_at("transfer", runner.STAGES[-1].__class__.run))
        runner.run_study(interrupted)
    again = runner.run_study(interrupted)
    a, b = numbers(whole.path), numbers(again)
    a["dictionaries"].pop("source"), b["dictionaries"].pop("source")  # the folder's own name
    assert json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    required = {
        "behavior": {"words", "mean_plus", "mean_minus", "shift_pp", "ci", "controls", "mass", "parts"},
        "selection": {"features_total", "features_live", "selected", "share", "expected_false"},
        "dual_process": {"s1", "s2", "mixed", "neither", "silent", "defined"},
        "patching": {"recovered_to_plus", "recovered_to_minus", "p_random"},
        "steering": {"slope_pp", "usable_range", "p_random"},
    }
    for section, keys in required.items():
        assert keys <= set(a[section]), section
    assert all({"slope", "ci"} <= set(game) for game in a["transfer"].values())
    records = read_json(again / "manifest.json")["stages"]
    assert all(record["environment"]["packages"]["jax"] for record in records.values())
    assert {path.name for path in again.iterdir()} == {"manifest.json", "results.json", "stages", ".lock"}
    assert (again / "stages/dictionaries/saes/layer_0").is_dir()  # what was trained is kept with its stage
    states = dict(runner.plan(interrupted))
    assert set(states.values()) == {"kept"}
    changed = dict(runner.plan(build(StudyConfig, {"transfer": {"families": 1}}, interrupted)))
    assert [name for name, state in changed.items() if state == "changed"] == ["transfer"]


def killed_at(name, original):
    def run(stage, context):
        if stage.name == name:
            raise KeyboardInterrupt
        return original(stage, context)

    return run
