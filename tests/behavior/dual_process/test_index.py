"""The index on planted features, its pooling against a hand computation, and covariates that are not demand."""

import numpy as np
import pytest

from jaxmech.behavior.dual_process import index


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
