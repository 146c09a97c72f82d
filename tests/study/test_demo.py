"""An organism by its name in a configuration, and how a study of one is scored; the studies themselves are slow."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxmech.models.outline import outline
from jaxmech.sae.formats import load_saes
from jaxmech.study import demo
from jaxmech.study.config import StudyConfig
from jaxmech.study.demo import SWITCHES, demo_rows, score_run
from jaxmech.study.folder import RunFolder, read_json
from jaxmech.study.organisms import organism_of, with_organism
from jaxmech.study.run import INSTRUMENT, _instrument


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMECH_CACHE", str(tmp_path / "cache"))

    def make(model, **settings):
        small = dict(
            bank=dict(selection=6, development=0, test=6, pairs=1, examples=2), dual_process=dict(items=2),
            transfer=dict(families=1),
        )  # fmt: skip
        return StudyConfig(model=model, run_dir=str(tmp_path / "run"), **(small | settings))

    return make


def test_a_name_stands_for_a_model_and_its_dictionaries(config):
    opened = with_organism(config("organism:mapping=true,readout=0.5"))
    made = organism_of(config("organism:mapping=true,readout=0.5"))
    assert made.wiring.mapping and made.wiring.readout == 0.5 and made.wiring.seed == 0
    assert outline(opened.model).config == made.lm.config
    np.testing.assert_array_equal(load_saes(opened.dictionaries.path).params["W_dec"], made.saes.params["W_dec"])
    assert with_organism(config("organism")).model != opened.model
    assert organism_of(config("organism", seed=3)).wiring.seed == 3


@pytest.mark.parametrize(
    "model, settings, message",
    [
        ("organism:maping=true", {}, "did you mean 'mapping'"),
        ("organism:mapping", {}, "written organism:switch=value"),
        ("organism:mapping=3", {}, "mapping: expected true or false, got 3"),
        ("organism:seed=3", {}, "the study's own, the key seed"),
        ("organism", {"dictionaries": {"path": "somewhere"}}, "an organism has its own, got somewhere"),
    ],
)
def test_mistakes_are_named(config, model, settings, message):
    with pytest.raises(ValueError, match=message):
        with_organism(config(model, **settings))


class Tables:
    """A finished run that selected the causal features at one layer and a passenger."""

    def __init__(self, truth, lost):
        rows = [row for row in truth["causal"] if row["layer"] == 2][lost:] + truth["passengers"][:1]
        self.selected = pd.DataFrame(rows)[["layer", "feature"]].assign(selected=True)
        self.classes = self.selected.assign(**{"class": [row["class"] or "silent" for row in rows]})
        causal = np.arange(len(rows)) < len(rows) - 1
        total = np.where(causal, 0.05, 1e-6)
        self.features = self.classes.assign(total=total, direct=0.6 * total, proximity=0.6)
        self.singles = self.selected.assign(passenger=~causal)

    def table(self, stage, name):
        return {"classes": self.classes, "features": self.features, "singles": self.singles}[name]


def test_what_was_found_is_scored(config):
    study = config("organism")
    truth = organism_of(study).truth
    at_two = sum(row["layer"] == 2 for row in truth["causal"])
    claims = {"behavior": {"answer": "yes"}, "cause": {"answer": "no"}}
    results = {"behavior": {"shift_pp": 20.0}, "claims": claims, "selection": {"mode": "rule"}}
    score = score_run(study, Tables(truth, lost=1), results)
    assert score["precision"] == 1 and score["recall"] == (at_two - 1) / len(truth["causal"])
    assert score["classes_f1"] == 1 and score["direct_share"] == {"found": pytest.approx(0.6), "true": 0.6}
    assert score["claims"]["cause"] == {"said": "no", "true": "yes"}
    row = demo_rows({"altruist": score}).iloc[0]
    assert (row["behavior"], row["cause"], row["features"]) == ("✓ yes", "✗ no (is: yes)", "n/a (is: yes)")


def test_the_instrument_is_checked_before_a_study(config, monkeypatch):
    """On the organisms that are named, with the study's seed; what was said of them is kept beside the study."""
    asked = {}

    def run_demo(organism, *, report, switches):
        asked.update(seed=organism.seed, folder=organism.run_dir, switches=switches)
        Path(organism.run_dir).mkdir(parents=True)
        said = {"behavior": {"said": "yes", "true": "yes"}, "cause": {"said": "no", "true": "yes"}}
        return {name: {"claims": said} for name in switches}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    study = config("gemma-3-270m", seed=7, instrument=["altruist", "no stance"])
    scores = demo.check_instrument(study)
    assert asked == {
        "seed": 7, "folder": f"{study.run_dir}/instrument",
        "switches": {"altruist": "", "no stance": "stance=false"},
    }  # fmt: skip
    assert demo.count_right(scores) == (2, 4)
    assert read_json(Path(study.run_dir) / INSTRUMENT) == scores
    folder = RunFolder(study.run_dir)
    for named, told in ((study.instrument, scores), ([], {}), (["altruist"], {})):  # nothing of what it does not name
        assert _instrument(config("gemma-3-270m", seed=7, instrument=named), folder) == told
    for wrong, said in ((["egoist"], "unknown egoist"), (["altruist"] * 2, "one of them twice")):
        with pytest.raises(ValueError, match=f"^instrument: expected some of altruist, .*, got {said}"):
            demo.check_instrument(config("gemma-3-270m", instrument=wrong))


@pytest.mark.slow
def test_every_switch_can_be_built(config):
    assert {name: organism_of(config(f"organism:{switch}")).wiring for name, switch in SWITCHES.items()}
