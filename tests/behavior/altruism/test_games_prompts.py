"""Prompts of games: worked examples that favour no answer, options whose place says nothing, stance examples."""

import re
from itertools import pairwise

import numpy as np
import pytest

from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.altruism.games import GAMES, game_prompts
from tests.behavior.fake_tokenizer import FakeTokenizer

OPTIONS = [game for game in GAMES.values() if game.answers in ("words", "letters")]
NUMBERS = [game for game in GAMES.values() if game not in OPTIONS]


def answered(prefix):
    """What the worked examples answer."""
    return re.findall(r"\nA:( ?\$?)([\w.]+)\n", prefix)


def item_of(game, row):
    return next(item for item in game.items if str(item) == row.item)


@pytest.mark.parametrize("game", GAMES.values(), ids=lambda g: g.name)
def test_every_game(game):
    table = game_prompts(game, families=6, seed=0, tokenizer=FakeTokenizer())
    assert len(table) == 6 and table.family.is_unique and table["query"].is_unique
    assert (table["variant"] == "plain").all() and (table["frame"] == game.frame).all()
    for row in table.itertuples():
        item = item_of(game, row)
        actions = game.actions(item)
        assert row.score == [game.score(a, item) for a in actions] and len(set(row.answers)) == len(actions)
        assert {said for _, said in answered(row.prefix)} <= {answer.strip() for answer in row.answers}
        names = re.findall(r"\b([A-Z][a-z]+)\b", row.query)
        assert "{" not in row.query + row.prefix and names and row.condition == "neutral"
        assert row.query.endswith("\nA: $" if game.answers == "dollars" else "\nA:")
        assert all(answer.startswith(" ") == (game.answers != "dollars") for answer in row.answers)
    again = game_prompts(game, families=6, seed=0)
    assert again.equals(table) and game_prompts(game, seed=1).prefix.ne(table.prefix).any()
    assert table["item"].nunique() == min(6, len(game.playable()))


@pytest.mark.parametrize("game", NUMBERS, ids=lambda g: g.name)
def test_examples_show_numbers_evenly(game):
    for row in game_prompts(game, families=6).itertuples():
        shown = [float(said) for _, said in answered(row.prefix)]
        allowed = [float(answer) for answer in row.answers]
        middle, span = (allowed[0] + allowed[-1]) / 2, allowed[-1] - allowed[0]
        assert len(shown) == 6 and set(shown) <= set(allowed)
        assert np.mean(shown) == pytest.approx(middle, abs=0.06 * span)
        assert len(set(shown)) == (6 if len(allowed) > 9 else 4)


def places(game, row):
    """Where the query names each action."""
    if game.lettered:
        named = re.findall(r"\b([A-I]) \d+/", row.query)
    else:
        named = re.search(r"(\w+) or (\w+)\?\nA:$", row.query).groups()
    return [named.index(answer.strip()) for answer in row.answers]


@pytest.mark.parametrize("game", [g for g in OPTIONS if g.name != "svo_slider"], ids=lambda g: g.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_two_options_either_score_has_each_place_and_letter_equally_often(game, seed):
    table = game_prompts(game, seed=seed)
    kind = [(places(game, row)[(best := row.score.index(1))], row.answers[best]) for row in table.itertuples()]
    for families in (2, 4, 6):
        where, letters = zip(*kind[:families], strict=True)
        assert sum(where) == families / 2
        assert not game.lettered or letters.count(" A") == families / 2
    assert not game.lettered or sorted(kind[:4]) == [(0, " A"), (0, " B"), (1, " A"), (1, " B")]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_nine_options_neither_place_nor_letter_goes_with_the_score(seed):
    game = GAMES["svo_slider"]
    for row in game_prompts(game, seed=seed).itertuples():
        for order in (places(game, row), [ord(answer.strip()) for answer in row.answers]):
            assert abs(np.corrcoef(order, row.score)[0, 1]) < 0.1


@pytest.mark.parametrize("game", [g for g in OPTIONS if g.name != "svo_slider"], ids=lambda g: g.name)
def test_examples_of_two_options_show_each_in_each_place(game):
    for row in game_prompts(game, families=6).itertuples():
        shown = [said for _, said in answered(row.prefix)]
        assert len(shown) == 4 and {shown.count(said) for said in shown} == {2}


def test_examples_of_the_slider_show_different_letters():
    for row in game_prompts(GAMES["svo_slider"], families=6).itertuples():
        assert len({said for _, said in answered(row.prefix)}) == 4


@pytest.mark.parametrize("game", [g for g in GAMES.values() if g.expected_sign], ids=lambda g: g.name)
def test_stance_examples(game):
    """Kind players' worked examples give more than unkind ones', whatever the form of the answer."""
    bank = BankConfig()
    plain, table = (game_prompts(game, families=6, variant=variant) for variant in ("plain", "stance"))
    assert list(table["query"]) == list(plain["query"]) and (table["variant"] == "stance").all()
    kind, unkind = ({pair[side] for pair in bank.example_words} for side in (0, 1))
    for row in table.itertuples():
        item = item_of(game, row)
        given = {True: [], False: []}
        for asked in row.prefix.split("Q: ")[1:]:
            word = re.search(r"\b[Vv]ery ([a-z]+) ", asked)[1]
            score = _score(game, item, asked)
            if word in kind | unkind:
                given[word in kind].append(score)
        most, least = max(row.score), min(row.score)
        assert len(given[True]) == len(given[False]) >= 2
        assert np.mean(given[True]) >= least + 0.7 * (most - least)
        assert np.mean(given[False]) <= least + 0.3 * (most - least)


def _score(game, item, asked):
    """Of a worked example's answer, read from its own text."""
    said = answered(asked)[0][1]
    if not game.lettered:
        return next(game.score(a, item) for a in game.actions(item) if str(a) == said)
    own, other = map(int, re.search(rf"\b{said} (\d+)/(\d+)", asked).groups())
    return next(game.score(a, item) for a in game.actions(item) if game.payoffs(a, item) == (own, other))


def test_letters_stand_for_the_same_payoffs_in_question_and_answers():
    for name in ("svo_slider", "charness_rabin"):
        game = GAMES[name]
        for row in game_prompts(game, families=6).itertuples():
            item = item_of(game, row)
            listed = {
                letter: (int(own), int(other)) for letter, own, other in re.findall(r"\b([A-I]) (\d+)/(\d+)", row.query)
            }
            for action, answer in zip(game.actions(item), row.answers, strict=True):
                assert listed[answer.strip()] == game.payoffs(action, item)


def test_items_are_dealt_in_turn():
    items = list(game_prompts(GAMES["charness_rabin"], seed=3)["item"])
    order = list(GAMES["charness_rabin"].items)
    assert all((order.index(b) - order.index(a)) % len(order) == 1 for a, b in pairwise(items))
    one = game_prompts(GAMES["charness_rabin"], item="Barc2")
    assert set(one["item"]) == {"Barc2"} and set(map(tuple, one["score"])) == {(0.0, 1.0)}


class Turns:
    """A rendering whose queries end in a line break, as a chat template's do."""

    def query(self, question, lead=""):
        return f"user: {question}\nmodel:\n{lead.strip()}"

    def examples(self, solved, lead=""):
        return "".join(f"{self.query(question, lead)}{answer}\n" for question, answer in solved)


def test_answers_follow_the_rendering():
    word, dollars = (game_prompts(GAMES[name], rendering=Turns()) for name in ("prisoners_dilemma", "charity"))
    assert word["answers"][0] == ["cooperate", "defect"] and "model:\ncooperate\n" in word["prefix"][0]
    assert dollars["query"][0].endswith("\n$") and dollars["answers"][0][0] == "0"


def test_refused():
    with pytest.raises(ValueError, match="families: charity has 6 wordings, got 9"):
        game_prompts(GAMES["charity"], families=9)
    with pytest.raises(ValueError, match="examples"):
        game_prompts(GAMES["dictator_give"], examples=5)
    with pytest.raises(ValueError, match="variant: expected one of plain, stance, got 'both'"):
        game_prompts(GAMES["dictator_give"], variant="both")
    with pytest.raises(ValueError, match="variant: third_party_punishment has no stance examples"):
        game_prompts(GAMES["third_party_punishment"], variant="stance")
    with pytest.raises(ValueError, match="item: charness_rabin has Berk29"):
        game_prompts(GAMES["charness_rabin"], item="Berk1")
