"""Configuration: the committed files load, and mistakes are named."""

from pathlib import Path

import pytest

from jaxmech.study.config import load_config

ALL = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in ALL if not path.stem.startswith("train-sae")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configurations_load(path):
    assert load_config(path).model == ("organism" if path.stem == "organism" else "gemma-3-270m")


def test_overrides_win():
    config = load_config(CONFIGS[-1], ["seed=3", "steering.alphas=[-1,0,1]", "dictionaries.layers=[4]"])
    assert (config.seed, config.steering.alphas, config.dictionaries.layers) == (3, [-1.0, 0.0, 1.0], [4])
    assert config.dictionaries.train.d_sae == load_config(CONFIGS[-1]).dictionaries.train.d_sae == 2048


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", "unknown configuration key 'sede' .did you mean 'seed'"),
        ("seed=three", "seed: expected a whole number, got 'three'"),
        ("steering.alphas=[1,2,3]", "steering.alphas: .*0 among them"),
        ("selection.mode=best", "selection.mode: expected one of rule, budget"),
        ("bank.test=2", "bank.test: .*at least 6"),
        ("bank.tests=9", "unknown configuration key 'bank.tests' .did you mean 'bank.test'.*the keys of bank are: sel"),
        ("bank=9", r"bank: expected a section of settings .bank.selection, "),
        ("patching.random_sets=-1", "patching.random_sets: expected at least 1"),
        ("dictionaries.train.sparsity=100000", "dictionaries.train.sparsity: .*0 < k <= d_sae=2048"),
        ("dictionaries.train.kind=l1", "dictionaries.train.kind: expected one of topk, batchtopk"),
        ("bank.stakes=[10,10]", "bank.stakes: 10 occurs twice"),
        ("bank.stakes=[ten]", "bank.stakes: expected a whole number, got 'ten'"),
        ("bank.stance_words=[[generous]]", "bank.stance_words: expected 2 entries"),
        ("selection.budget=0", "selection.budget: expected a share above 0"),
        ("selection.budget=2", "selection.budget: expected a share"),
        ("dual_process.cut=5", "dual_process.cut: expected less than 1"),
        (
            "dictionaries.train.lrr=1",
            "configuration key 'dictionaries.train.lrr' .did you mean 'dictionaries.train.lr'",
        ),
        ("rule.q=3", "rule.q: expected a share from 0 to 1"),
        ("rule_q=.05", "'rule_q' is now 'rule.q'"),
        ("sae_features=9", "'sae_features' is now 'dictionaries.train.d_sae'"),
        ("selection=budget", "'selection' is now 'selection.mode'"),
        ("words.plus=kind", "words: altruism has its own"),
        ("seed", "key=value"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS[-1], [override])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        load_config("nowhere.yaml")
