"""The index on planted features, its pooling against a hand computation, and covariates that are not demand."""

import numpy as np
import pytest
from scipy import stats

from jaxmech.behavior.dual_process import index
from tests.behavior.dual_process.planted import KINDS, planted, planted_items


def items(seed=0, n=60):
    rng = np.random.default_rng(seed)
    family = np.arange(n) % 6
    return rng, family, np.zeros((n, 1))


def arms(effects, seed=0, n=60):
    """Two arms with planted standardised differences, one entry per feature: [(demand, instruction), ...]."""
    out = []
    for arm in range(2):
        rng, family, nothing = items(seed + arm, n)
        size = np.array([e[arm] for e in effects])
        low = rng.normal(size=(n, len(effects)))
        high = low + size + 0.3 * rng.normal(size=low.shape)
        out.append(index.arm_index(high, low, (nothing, nothing), family))
    return out


def test_planted_classes_are_found():
    demand, instruction = arms([(1.0, 0.8), (-1.0, -0.8), (1.0, -1.0), (0.0, 0.0), (1.0, 0.0), (2.0, 2.0)])
    fires = np.array([1, 1, 1, 1, 1, 0.01])
    got = index.classify(demand, instruction, fires)
    assert list(got) == ["s2", "s1", "mixed", "neither", "neither", "silent"]


def test_a_covariate_is_taken_out():
    rng, family, _ = items()
    length = rng.normal(size=(60, 1))
    low = rng.normal(size=(60, 1))
    high = low + 2.0 * length
    raw = index.arm_index(high, low, (np.zeros((60, 1)),) * 2, family)
    clean = index.arm_index(high, low, (length, np.zeros((60, 1))), family)
    assert np.abs(clean.families).max() < np.abs(raw.families).max()


def test_random_effects_by_hand():
    """Two families, equal variances v: Q = (d1 - d2)^2 / 2v, tau2 = Q v - v, mean = average."""
    mean, se = index.pool_random_effects(np.array([[1.0], [3.0]]), np.array([[0.5], [0.5]]))
    tau2 = (4 / 1.0 - 1) / (4 - 8 / 4)
    assert mean[0] == pytest.approx(2.0) and se[0] == pytest.approx(np.sqrt((0.5 + tau2) / 2))


def test_classes_cover_every_feature():
    rng = np.random.default_rng(1)
    demand, instruction = arms([tuple(e) for e in rng.normal(0, 0.7, (40, 2))], seed=3)
    got = index.classify(demand, instruction, rng.uniform(size=40))
    assert set(got) <= set(index.CLASSES) and len(got) == 40


def test_intervals_are_students():
    demand, _ = arms([(1.0, 0.8)])
    assert demand.high[0] - demand.index[0] == pytest.approx(stats.t.ppf(0.975, 5) * demand.se[0])


@pytest.fixture(scope="module")
def planted_classes():
    """`planted_classes(per_generator)` -> the classes of 40 features of each kind, at 0.8 of a standard deviation."""
    found = {}

    def classes(per_generator):
        if per_generator not in found:
            items = planted_items(per_generator)
            z = [planted(items, kind, 0.8, 40, seed=number) for number, kind in enumerate(KINDS)]
            table = index.dual_index(items, np.concatenate(z, axis=1))
            found[per_generator] = table.assign(kind=np.repeat(KINDS, 40))
        return found[per_generator]

    return classes


@pytest.mark.parametrize("per_generator", [6, 16])
def test_planted_features_on_the_real_items_get_their_class(planted_classes, per_generator):
    table = planted_classes(per_generator)
    for name in ("s2", "s1"):
        said, true = table["class"] == name, table["kind"] == name
        assert 2 * (said & true).sum() / (said.sum() + true.sum()) >= 0.9, name
    for kind in KINDS[2:]:
        false = table[table["kind"] == kind]["class"].isin(["s1", "s2", "mixed"])
        assert false.mean() <= 0.05, kind


def test_planted_effects_are_estimated_without_bias(planted_classes):
    means = planted_classes(16).groupby("kind")[["demand", "instruction"]].mean()
    for kind, (demand, instruction) in {"s2": (0.8, 0.8), "s1": (-0.8, -0.8), "demand only": (0.8, 0)}.items():
        np.testing.assert_allclose(means.loc[kind], [demand, instruction], atol=0.06)
    np.testing.assert_allclose(means.loc[["generator level only", "length only", "noise"]], 0, atol=0.06)


def test_the_demand_arm_alone_decides_where_the_instruction_does_not_count():
    items = planted_items(16)
    z = planted(items, "demand only", 0.8, 20)
    alone = index.dual_index(items, z, arms=["demand"])
    assert (alone["class"] == "s2").mean() >= 0.9
    np.testing.assert_allclose(alone["index"], alone["demand"])


def test_system_1_must_show_on_the_anchors():
    items = planted_items(16)
    z = planted(items, "s1", 0.8, 20)
    anchor = (items["generator"] == index.ANCHOR).to_numpy()
    z[anchor] = planted(items, "s2", 2.0, 20)[anchor]  # more active where what comes to mind must be set aside
    assert (index.dual_index(items, z)["class"] != "s1").all()


def test_the_slope_over_steps_is_the_planted_one():
    items = planted_items(64)
    z = planted(items, "noise", 0.0, 20) + 0.5 * items["level"].to_numpy()[:, None]
    table = index.dual_index(items, z)
    assert table["arithmetic_slope"].mean() == pytest.approx(0.5, abs=0.05)
    covered = (table["arithmetic_slope_low"] < 0.5) & (table["arithmetic_slope_high"] > 0.5)
    assert covered.mean() >= 0.7
