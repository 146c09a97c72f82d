"""Payoffs and scores of the games against numbers worked out by hand."""

import numpy as np
import pytest

from jaxmech.behavior.altruism.altruism import LABELS, games
from jaxmech.behavior.altruism.game_wordings import WORDINGS
from jaxmech.behavior.altruism.games import BUDGETS, GAMES
from jaxmech.behavior.behavior import Task

DILEMMA = (9, 6, 3, 0)

# game, action, item, (own, other), score
BY_HAND = [
    ("dictator_give", 3, 10, (7, 3), 0.3),
    ("dictator_take", 3, 10, (3, 7), 0.7),
    ("dictator_take", 10, 10, (10, 0), 0.0),
    ("ultimatum_proposer", 4, 10, (6, 4), 0.8),
    ("ultimatum_proposer", 8, 10, (2, 8), 1.0),
    ("trust_returner", 6, 3, (3, 6), 2 / 3),
    ("trust_returner", 15, 10, (15, 15), 0.5),
    ("public_goods", 5, 10, (7.0, 2.0), 0.5),
    ("public_goods", 10, 10, (4.0, 4.0), 1.0),
    ("charity", 2, 20, (18, 2), 0.1),
    ("trust_sender", 5, 10, (5, 15), 0.5),
    ("ultimatum_responder", "accept", 2, (2, 8), 0.0),
    ("ultimatum_responder", "reject", 2, (0, 0), 1.0),
    ("prisoners_dilemma", "cooperate", DILEMMA, (0, 9), 1.0),
    ("prisoners_dilemma", "defect", DILEMMA, (3, 3), 0.0),
    ("third_party_punishment", 10, 20, (40, 50), 0.2),
    ("third_party_punishment", 0, 0, (50, 100), 0.0),
    ("third_party_punishment", 50, 50, (0, -100), 1.0),
    ("gift_exchange", 0.1, 50, (50, 7.0), 0.0),
    ("gift_exchange", 0.7, 70, (60, 35.0), 2 / 3),
    ("gift_exchange", 1.0, 30, (12, 90.0), 1.0),
    ("svo_slider", 1, 1, (85, 85), 45 / 57.15),
    ("svo_slider", 5, 1, (85, 50), 0.0),
    ("svo_slider", 9, 1, (85, 15), 0.0),
    ("svo_slider", 9, 2, (100, 50), 0.0),
    ("svo_slider", 1, 3, (50, 100), 1.0),
    ("svo_slider", 9, 3, (85, 85), 45 / 57.15),
    ("svo_slider", 5, 4, (68, 58), 23.9625 / 57.15),
    ("svo_slider", 5, 5, (75, 75), 45 / 57.15),
    ("svo_slider", 4, 5, (81, 69), 31.5043 / 57.15),
    ("svo_slider", 1, 6, (100, 50), 0.0),
    ("charness_rabin", "left", "Berk29", (400, 400), 0.0),
    ("charness_rabin", "right", "Berk29", (400, 750), 1.0),
    ("charness_rabin", "left", "Barc2", (400, 400), 0.0),
    ("charness_rabin", "right", "Barc2", (375, 750), 1.0),
    ("charness_rabin", "left", "Berk23", (200, 800), 1.0),
    ("charness_rabin", "right", "Berk23", (0, 0), 0.0),
    ("charness_rabin", "left", "Barc8", (600, 300), 0.0),
    ("charness_rabin", "right", "Barc8", (500, 700), 1.0),
    ("charness_rabin", "left", "Berk15", (700, 200), 0.0),
    ("charness_rabin", "right", "Berk15", (600, 600), 1.0),
    ("charness_rabin", "left", "Berk26", (800, 0), 0.0),
    ("charness_rabin", "right", "Berk26", (400, 400), 1.0),
    ("modified_dictator", 10, (40, 3, 1), (90, 10), 0.25),
    ("modified_dictator", 75, (75, 1, 2), (0, 150), 1.0),
    ("modified_dictator", 25, (100, 1, 1), (75, 25), 0.25),
]


@pytest.mark.parametrize(("name", "action", "item", "payoffs", "score"), BY_HAND)
def test_by_hand(name, action, item, payoffs, score):
    assert GAMES[name].payoffs(action, item) == pytest.approx(payoffs)
    assert GAMES[name].score(action, item) == pytest.approx(score, abs=1e-6)


PLAIN_GIVING = [game for game in GAMES.values() if game.name not in ("ultimatum_responder", "third_party_punishment")]


@pytest.mark.parametrize("game", PLAIN_GIVING, ids=lambda g: g.name)
def test_scores_rise_with_what_the_other_gets(game):
    for item in game.playable():
        actions = game.actions(item)
        own, other = np.array([game.payoffs(a, item) for a in actions]).T
        score = np.array([game.score(a, item) for a in actions])
        order = np.argsort(other)
        assert (np.diff(score[order]) >= 0).all() and score.min() >= 0 and score.max() <= 1
        if game.name == "charness_rabin":  # in Berk29 helping is free, in Berk23 it pays
            continue
        assert (np.diff(own[order]) <= 0).all() and (np.diff(own[order]) < 0).any() or item == 1
        if game.name != "svo_slider":
            assert score.min() == 0 and score.max() == 1 and (np.diff(own[order]) < 0).all()


@pytest.mark.parametrize("game", GAMES.values(), ids=lambda g: g.name)
def test_what_is_not_allowed_is_refused(game):
    with pytest.raises(ValueError, match=f"action: {game.name} allows"):
        game.payoffs("nothing")
    if game.lettered:
        with pytest.raises(ValueError, match=f"item: {game.name} has .* got 7"):
            game.actions(7)
    else:
        with pytest.raises(ValueError, match="action"):
            game.score(1000)


def test_the_slider_has_six_items_of_nine_options_from_corner_to_corner():
    slider = GAMES["svo_slider"]
    ends = {item: {slider.payoffs(1, item), slider.payoffs(9, item)} for item in slider.items}
    equal, own, other, spite = (85, 85), (100, 50), (50, 100), (85, 15)
    assert ends == {
        1: {equal, spite}, 2: {spite, own}, 3: {other, equal}, 4: {other, spite}, 5: {own, other}, 6: {own, equal},
    }  # fmt: skip
    for item in slider.items:  # nine points on a straight line, rounded to whole points
        points = np.array([slider.payoffs(option, item) for option in slider.actions(item)])
        assert len(points) == 9 and np.abs(points - np.linspace(points[0], points[-1], 9)).max() <= 0.76
    assert slider.playable() == [1, 3, 4, 5, 6]  # in the second no angle is above 0


def test_budgets():
    assert len(set(BUDGETS)) == 8
    assert sorted(hold / give for _, hold, give in BUDGETS) == pytest.approx([1 / 3, 0.5, 0.5, 1, 1, 2, 2, 3])


def test_the_fourteen_games():
    assert set(GAMES) == {
        "dictator_give", "dictator_take", "charity", "ultimatum_proposer", "ultimatum_responder", "trust_sender",
        "trust_returner", "public_goods", "prisoners_dilemma", "third_party_punishment", "gift_exchange",
        "svo_slider", "charness_rabin", "modified_dictator",
    }  # fmt: skip
    assert set(WORDINGS) == set(LABELS) == set(GAMES)
    assert all(len(set(wordings)) == len(wordings) >= 6 for wordings in WORDINGS.values())
    kinds = {kind: {g.name for g in GAMES.values() if g.kind == kind} for kind in ("strategic", "norm enforcement")}
    assert kinds == {
        "strategic": {"ultimatum_proposer", "trust_sender"},
        "norm enforcement": {"ultimatum_responder", "third_party_punishment"},
    }
    assert {g.name for g in GAMES.values() if not g.expected_sign} == kinds["norm enforcement"]
    assert {g.name for g in GAMES.values() if g.strategic} == kinds["strategic"]


def test_tasks():
    tasks = games(2, None)
    assert list(tasks) == list(GAMES) and [name for name, task in tasks.items() if task.home] == ["dictator_give"]
    for name, task in tasks.items():
        assert task.kind == GAMES[name].kind and task.label == LABELS[name] and task.human
        assert (task.stance_prompts is None) == (task.expected_sign == 0)
        if task.stance_prompts is not None:
            assert list(task.stance_prompts["query"]) == list(task.prompts["query"])
            assert (task.stance_prompts["prefix"] != task.prompts["prefix"]).all()
    assert list(games(1, None, names=["charity", "dictator_give"])) == ["dictator_give", "charity"]
    with pytest.raises(ValueError, match="names: expected some of dictator_give.*got chess"):
        games(1, None, names=["chess"])
    bare = games(2, None, names=["charity"], examples=0)["charity"]
    assert bare.stance_prompts is None and (bare.prompts["prefix"] == "").all()


def test_tasks_that_cannot_be_are_refused():
    charity = games(2, None, names=["charity"])["charity"]
    with pytest.raises(ValueError, match="stance_prompts: expected the families"):
        Task(charity.prompts, stance_prompts=charity.stance_prompts[:1])
    with pytest.raises(ValueError, match="expected_sign: expected -1, 0 or 1, got 2"):
        Task(charity.prompts, expected_sign=2)
