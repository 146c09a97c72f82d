"""Payoffs and scores against numbers worked out by hand, and prompts that show the range of answers evenly."""

import re

import numpy as np
import pytest

from jaxmech.behavior.altruism.game_wordings import WORDINGS
from jaxmech.behavior.altruism.games import GAMES, MORE_GAMES, game_prompts
from tests.behavior.fake_tokenizer import FakeTokenizer

ALL = GAMES | MORE_GAMES

# game, action, stake, (own, other), score
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
]


@pytest.mark.parametrize(("name", "action", "stake", "payoffs", "score"), BY_HAND)
def test_by_hand(name, action, stake, payoffs, score):
    assert ALL[name].payoffs(action, stake) == pytest.approx(payoffs)
    assert ALL[name].score(action, stake) == pytest.approx(score)


@pytest.mark.parametrize("game", ALL.values(), ids=lambda g: g.name)
def test_scores_rise_with_what_the_other_gets(game):
    actions = game.actions()
    other = np.array([game.payoffs(a)[1] for a in actions])
    own = np.array([game.payoffs(a)[0] for a in actions])
    score = np.array([game.score(a) for a in actions])
    order = np.argsort(other)
    assert (np.diff(score[order]) >= 0).all() and score.min() == 0 and score.max() == 1
    assert (np.diff(own[order]) < 0).all()
    with pytest.raises(ValueError, match="action"):
        game.payoffs(actions[-1] + 1)


def test_the_required_games():
    assert list(GAMES) == ["dictator_give", "dictator_take", "ultimatum_proposer", "trust_returner", "public_goods"]
    assert set(WORDINGS) == set(ALL) and all(len(set(w)) == len(w) >= 6 for w in WORDINGS.values())


@pytest.mark.parametrize("game", ALL.values(), ids=lambda g: g.name)
def test_prompts(game):
    table = game_prompts(game, families=6, seed=0, tokenizer=FakeTokenizer())
    assert len(table) == 6 and table.family.is_unique and table["query"].is_unique
    for row in table.itertuples():
        shown = [int(n) for n in re.findall(r"\nA: \$(\d+)\n", row.prefix)]
        assert len(shown) == 6 and set(shown) <= set(map(int, row.answers))
        assert np.mean(shown) == pytest.approx(row.stake / 2, abs=0.06 * row.stake) and len(set(shown)) == 6
        assert row.score == [game.score(int(a)) for a in row.answers]
        assert row.query.endswith("\nA: $") and row.condition == "neutral" and (row.frame == "take") == game.reverse
        names = re.findall(r"\b([A-Z][a-z]+)\b", row.query)
        assert "{" not in row.query + row.prefix and names
    assert game_prompts(game, seed=1).prefix.ne(table.prefix).any()


def test_refused():
    with pytest.raises(ValueError, match="families: charity has 6 wordings, got 9"):
        game_prompts(MORE_GAMES["charity"], families=9)
    with pytest.raises(ValueError, match="examples"):
        game_prompts(GAMES["dictator_give"], examples=5)
