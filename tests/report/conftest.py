"""Synthetic run folders with every table that the stages write, small and plausible, one a named scenario."""

import copy
import dataclasses

import numpy as np
import pytest

from jaxmech.report.verdict import STAGES
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import Outcome, RunFolder
from jaxmech.study.tables import TABLES
from tests.report import synthetic as made_of

SCENARIOS = {
    "finding": made_of.Scenario(),
    "null": made_of.Scenario(effect=False),
    "no_behaviour": made_of.Scenario(gate=False, rule=False, effect=False, defined=False),
    "fallback": made_of.Scenario(rule=False, usable=False),
    "coarse": made_of.Scenario(defined=False, directions=10),
}


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """`run_of(name)` -> (RunFolder, manifest) of a scenario."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = build_run(tmp_path_factory.mktemp(name), SCENARIOS[name])
        return made[name]

    return make


@pytest.fixture
def changed(run_of):
    """`changed(name, change)` -> (results by stage, settings) of a scenario, changed in place by `change`."""

    def make(name, change=None):
        folder, manifest = run_of(name)
        results = {stage: folder.results(stage) for stage in STAGES}
        settings = copy.deepcopy(manifest["config"])
        if change:
            change(results, settings)
        return results, settings

    return make


def filled_up(stage, tables):
    """With the declared columns that a page does not look at."""
    return {
        name: frame.assign(**{column: None for column in TABLES[stage][name] if column not in frame})
        for name, frame in tables.items()
    }


def build_run(path, scenario, seed=0):
    rng, folder = np.random.default_rng(seed), RunFolder(path)
    config = StudyConfig(
        model="gemma-3-270m",
        run_dir=str(path),
        transfer={"random_directions": scenario.directions},
    )
    features, used = made_of.feature_tables(rng, scenario)
    stages = {
        "behavior": made_of.behaviour(rng, scenario),
        "text": Outcome({"source": "sampled from the model", "rows": 72}),
        "dictionaries": made_of.dictionaries(rng),
        "fidelity": made_of.fidelity(rng, scenario),
        "contrast": made_of.contrast(features, used, scenario),
        "dual_process": made_of.dual_process(rng, used, scenario),
        "patching": made_of.patching(rng, used, scenario),
        "attribution": made_of.attribution(rng, features),
        "proximity": made_of.proximity(rng, used, scenario),
        "steering": made_of.steering(rng, scenario),
        "transfer": made_of.transfer(rng, scenario),
    }
    records = {}
    for number, (name, outcome) in enumerate(stages.items()):
        records[name] = {"key": f"{number:016x}", "seconds": 7.5 * number + 1, "peak_gb": 2.0 + 0.1 * number}
        folder.save(name, outcome._replace(tables=filled_up(name, outcome.tables)), records[name])
    manifest = {
        "study": "0123456789abcdef",
        "config": dataclasses.asdict(config),
        "stages": records,
        "environment": {
            "python": "3.12.0",
            "platform": "Linux",
            "devices": ["cpu:cpu"],
            "packages": {"jaxmech": "0.1.0", "jax": "0.10.2"},
        },
        "exclusions": {"pairs": 2},
        "fidelity": stages["fidelity"].results,
    }
    return folder, manifest
