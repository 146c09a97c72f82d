"""Configuration: the committed files load, and mistakes are named."""

from pathlib import Path

import pytest

from jaxmech.study.config import load_config

ALL = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in ALL if not path.stem.startswith("train-sae")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configurations_load(path):
    assert load_config(path).model == "gemma-3-270m"


def test_overrides_win():
    config = load_config(CONFIGS[-1], ["seed=3", "alphas=[-1,0,1]", "sae_layers=[4]"])
    assert (config.seed, config.alphas, config.sae_layers) == (3, [-1.0, 0.0, 1.0], [4])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", "unknown configuration key 'sede' .did you mean 'seed'"),
        ("seed=three", "seed"),
        ("alphas=[1,2,3]", "0 among them"),
        ("selection=best", "selection: expected one of rule, budget"),
        ("test_families=2", "at least 6"),
        ("random_sets=-1", "random_sets"),
        ("sae_sparsity=100000", "sae_sparsity: .*0 < k <= sae_features=2048"),
        ("sae_kind=l1", "sae_kind: expected one of topk, batchtopk"),
        ("stakes=[10,10]", "stakes: 10 stands twice"),
        ("budget_share=0", "budget_share: expected a share above 0"),
        ("budget_share=2", "budget_share: expected a share"),
        ("index_cut=5", "index_cut: expected less than 1"),
        ("seed", "key=value"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(CONFIGS[-1], [override])


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        load_config("nowhere.yaml")
