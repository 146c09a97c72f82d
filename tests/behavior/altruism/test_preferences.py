"""The slider's angle against its published types, CES utility against numerical maximisation, consistency by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from jaxmech.behavior.altruism.games import BUDGETS, SVO
from jaxmech.behavior.altruism.preferences import (
    ALTRUIST,
    INDIVIDUALIST,
    PROSOCIAL,
    ces_share,
    efficiency_index,
    fit_ces,
    svo_angle,
)


@pytest.mark.parametrize(
    ("utility", "angle"),
    [(lambda own, other: other + own / 1e6, 61.39), (lambda own, other: own, 7.82), (np.subtract, -16.26)],
    ids=["altruist", "individualist", "competitor"],
)
def test_the_angles_of_perfectly_consistent_types(utility, angle):
    chosen = [max(options, key=lambda option: utility(*option)) for options in SVO.values()]
    assert svo_angle(chosen) == pytest.approx(angle, abs=0.005)
    assert (svo_angle(chosen) > ALTRUIST) == (angle > 60) and (svo_angle(chosen) < INDIVIDUALIST) == (angle < -15)
    assert svo_angle(chosen) < PROSOCIAL or angle > 60


@pytest.mark.parametrize("rho", [-2.0, 0.0, 0.6])
def test_ces_share_maximises_the_utility(rho):
    for tokens, hold, give in BUDGETS:

        def loss(share, tokens=tokens, hold=hold, give=give):
            own, other = tokens * (1 - share) * hold, tokens * share * give
            if rho == 0:
                return -(0.7 * np.log(own) + 0.3 * np.log(other))
            return -np.sign(rho) * (0.7 * own**rho + 0.3 * other**rho)

        best = minimize_scalar(loss, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-9}).x
        assert ces_share(hold / give, weight=0.7, rho=rho) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(("weight", "rho"), [(0.7, 0.5), (0.5, -1.0), (0.9, 0.0)])
def test_the_utility_is_found_again(weight, rho):
    prices = [hold / give for _, hold, give in BUDGETS]
    shares = [ces_share(price, weight=weight, rho=rho) for price in prices]
    assert fit_ces(prices, shares) == pytest.approx((weight, rho))
    chosen = [
        ((1 - s) * tokens * hold, s * tokens * give) for s, (tokens, hold, give) in zip(shares, BUDGETS, strict=True)
    ]
    points = [(1 / (tokens * hold), 1 / (tokens * give)) for tokens, hold, give in BUDGETS]
    assert efficiency_index(points, chosen) == 1


def test_consistency_by_hand():
    """Each of two budgets of 1 could have bought the other's bundle, the first for 0.8 and the second for 0.9."""
    prices, chosen = [[1.0, 2.0], [2.0, 1.0]], [[0.2, 0.4], [0.4, 0.2]]
    assert efficiency_index(prices, chosen) == pytest.approx(0.8)
    assert efficiency_index(prices, chosen[::-1]) == 1
    lopsided = [[0.1, 0.45], [0.36, 0.28]]  # costs: own 1.00 and 1.00, the other's 0.92 and 0.65
    assert efficiency_index(prices, lopsided) == pytest.approx(0.92)


def test_a_cycle_of_three_is_found():
    """No two of these contradict each other; the three together do."""
    prices = np.array([[4.0, 5.0, 10.0], [10.0, 4.0, 5.0], [5.0, 10.0, 4.0]])
    chosen = np.eye(3)[[1, 2, 0]]  # each costs 5 where 4, on the next one's bundle, would have done
    cost = prices @ chosen.T
    assert (np.diag(cost) == 5).all() and efficiency_index(prices, chosen) == pytest.approx(0.8)


def test_refused():
    with pytest.raises(ValueError, match="ces_share"):
        ces_share(1, weight=1.5, rho=0)
    with pytest.raises(ValueError, match="fit_ces: expected shares"):
        fit_ces([1, 2], [0, 0.5])
    with pytest.raises(ValueError, match="fit_ces: no CES"):
        fit_ces([1, 2], [0.2, 0.9])
