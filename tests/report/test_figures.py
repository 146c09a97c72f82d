"""Figures show the tables' numbers, thin what is too much, and say so when there is nothing to show."""

import numpy as np
import pandas as pd
import pytest

from jaxmech.report import behavior, contrast, fidelity, patching, steering, transfer
from jaxmech.report.words import Said
from tests.report.synthetic import altruism

SAID = Said.of({"behavior": {"words": altruism().said()}})


def test_volcano_keeps_every_feature_in_use_and_thins_the_rest():
    rng, n = np.random.default_rng(0), 20_000
    p = rng.uniform(0, 1, n)
    p[0] = 0.0  # beyond double precision: must stay on the page
    frame = pd.DataFrame(dict(layer=0, feature=np.arange(n), live=np.arange(n) % 2 == 0, d_z=rng.normal(0, 1, n), p=p))
    frame.loc[2, "d_z"] = np.inf
    rest, used = contrast.draw_volcano(frame, frame.iloc[[0, 2, 4]]).data
    assert len(rest.x) == contrast.BACKGROUND_POINTS and len(used.x) == 3
    assert np.isfinite(np.concatenate([rest.x, rest.y, used.x, used.y]).astype(float)).all()


def test_layer_histogram_counts_both_signs():
    used = pd.DataFrame(dict(layer=[4, 4, 6], dz=[1.0, -1.0, 2.0]))
    generous, selfish = contrast.draw_layer_histogram(used, [2, 4, 6], SAID).data
    assert list(generous.y) == [0, 1, 1] and list(selfish.y) == [0, 1, 0]


def test_shifts_put_intervals_around_their_value():
    table = pd.DataFrame(
        dict(
            contrast=["poles", "placebo"],
            shift_pp=[20.0, 1.0],
            low_pp=[15.0, -1.0],
            high_pp=[26.0, 2.0],
            p=[0.001, 0.5],
        )
    )
    stance, placebo = behavior.draw_shifts(table, SAID).data
    assert (stance.x[0], stance.error_x.array[0], stance.error_x.arrayminus[0]) == (20.0, 6.0, 5.0)
    assert stance.name == "stance" and placebo.name == "control"


def test_effects_that_are_undefined_are_left_out_of_a_forest():
    bars = pd.DataFrame(
        dict(
            direction="to_plus",
            name=["selected features", "all features"],
            kind=["effect", "reference"],
            recovered=[0.4, np.nan],
            low=[0.3, np.nan],
            high=[0.5, np.nan],
            change_pp=[9.0, np.nan],
        )
    )
    assert len(patching.draw_patching_bars(bars, "to_plus").data) == 1


def test_stability_says_why_it_is_empty():
    frame = pd.DataFrame(dict(layer=[0], feature=[0], auroc=[0.5], stability=[np.nan]))
    figure = contrast.draw_stability(frame, frame, needed=0.8)
    assert not figure.data and "no half-split" in figure.layout.annotations[0].text


@pytest.mark.parametrize(("usable", "shapes"), [((-1.0, 2.0), 1), ((0.0, 0.0), 0)])
def test_dose_shades_the_usable_range_only_where_there_is_one(usable, shapes):
    alphas = np.array([-1.0, 0.0, 1.0, 2.0])
    table = pd.DataFrame(dict(alpha=alphas, g=0.3 + alphas / 50, g_low=0.2, g_high=0.4))
    figure = steering.draw_dose(table, usable, SAID)
    spans = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert len(spans) == shapes
    if spans:
        assert (spans[0].x0, spans[0].x1) == usable


def test_costs_are_in_units_of_their_limits_and_clipped_marks_keep_their_value():
    table = pd.DataFrame(
        dict(alpha=[0.0, 1.0], perplexity=[10.0, 11.0], kl=[0.0, 1.0], accuracy=[1.0, 0.98], mass=[0.9, 0.9])
    )
    by = {trace.name: trace for trace in steering.draw_cost_limits(table, (0.0, 0.0)).data if trace.name}
    assert by["perplexity (limit +10 %)"].y[1] == pytest.approx(1.0)
    assert by["arithmetic (limit −2 pp)"].y[1] == pytest.approx(1.0)
    assert by["KL (limit 0.1 nat)"].y[1] == steering.COST_TOP
    assert by["KL (limit 0.1 nat)"].customdata[1] == pytest.approx(10.0)


def test_the_null_band_of_a_game_is_centred_on_zero():
    table = pd.DataFrame(
        dict(label=["Public goods"], slope_pp=[2.0], low_pp=[1.0], high_pp=[3.0], p_holm=[0.01], null_sd_pp=[0.5])
    )
    band = transfer.draw_tasks(table).data[-1]
    assert band.base[0] == pytest.approx(-0.98) and band.base[0] + band.x[0] == pytest.approx(0.98)


def test_density_draws_every_layer_at_the_middle_of_its_bins():
    table = pd.DataFrame(dict(layer=[3, 3, 5, 5], low=[-2, -1, -2, -1], high=[-1, 0, -1, 0], features=[4, 1, 0, 7]))
    early, late = fidelity.draw_density(table).data
    assert list(early.x) == [-1.5, -0.5] and list(early.y) == [4, 1] and list(late.y) == [0, 7]
    assert late.opacity > early.opacity and list(late.customdata[1]) == [10, 100]
