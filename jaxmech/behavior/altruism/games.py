"""Other social-preference games: actions, payoffs, a score that rises with altruism, and prompts that play them.

Actions are whole amounts. `stake` is what a game starts from: the endowment, or, for the trust game's returner, the
amount that the sender sent. Human numbers are context, never pass or fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pandas as pd

from jaxmech.behavior import prompts
from jaxmech.behavior.altruism.dictator import COLUMNS
from jaxmech.behavior.altruism.game_wordings import NAMES, WORDINGS
from jaxmech.behavior.rendering import PLAIN, Rendering

TRUST_FACTOR = 3
GROUP, RETURN_RATE = 4, 0.4


@dataclasses.dataclass(frozen=True)
class Game:
    """One game, seen by the player whose action is asked for.

    Attributes:
      payoffs_of: (action, stake) -> (own, other's) payoff; in the public goods game what the action brings to the
        player and to each of the others, who contribute nothing.
      score_of: (action, stake) -> [0, 1], rising with altruism.
      pot: stake -> the largest action.
      reverse: the action is what the player takes, so that the score falls with the number.
      strategic: giving can be in the player's own interest, so that the score is not altruism alone.
      expected_sign: of the score's slope when the model is steered towards generosity.
      stake: the default stake, whose answers have few digits.
      people: what human players do, with the source.
    """

    name: str
    payoffs_of: Callable[[int, int], tuple[float, float]]
    score_of: Callable[[int, int], float]
    people: str
    pot: Callable[[int], int] = lambda stake: stake
    reverse: bool = False
    strategic: bool = False
    expected_sign: int = 1
    stake: int = 10

    def actions(self, stake: int | None = None) -> list[int]:
        """The allowed actions: 11 equal steps, or every whole number of a pot below 20."""
        return prompts.allowed_amounts(self.pot(self._stake(stake)))

    def payoffs(self, action: int, stake: int | None = None) -> tuple[float, float]:
        """(own, other's) payoff."""
        return self.payoffs_of(self._allowed(action, stake), self._stake(stake))

    def score(self, action: int, stake: int | None = None) -> float:
        """Altruism of an action, in [0, 1]."""
        return self.score_of(self._allowed(action, stake), self._stake(stake))

    def _stake(self, stake: int | None) -> int:
        return self.stake if stake is None else stake

    def _allowed(self, action: int, stake: int | None) -> int:
        top = self.pot(self._stake(stake))
        if not 0 <= action <= top:
            raise ValueError(
                f"action: {self.name} allows 0 to {top} with a stake of {self._stake(stake)}, got {action}"
            )
        return action


def _divide(given: int, stake: int) -> tuple[float, float]:
    return stake - given, given


def _share(given: int, stake: int) -> float:
    return given / stake


GAMES: dict[str, Game] = {
    game.name: game
    for game in (
        Game("dictator_give", _divide, _share, "28 % given, 36 % give nothing (Engel 2011)"),
        Game(
            "dictator_take", lambda taken, stake: (taken, stake - taken), lambda taken, stake: 1 - taken / stake,
            "about 35 % left (Flage)", reverse=True,
        ),
        Game(
            "ultimatum_proposer", _divide, lambda offer, stake: min(2 * offer / stake, 1.0),
            "40 % offered, 16 % of offers rejected (Oosterbeek et al. 2004)", strategic=True,
        ),
        Game(
            "trust_returner", lambda back, sent: (TRUST_FACTOR * sent - back, back),
            lambda back, sent: back / (TRUST_FACTOR * sent), "37 % returned (Johnson & Mislin 2011)",
            pot=lambda sent: TRUST_FACTOR * sent, stake=3,
        ),
        Game(
            "public_goods", lambda put, stake: (stake - put + RETURN_RATE * put, RETURN_RATE * put), _share,
            "35 to 55 % contributed (Zelmer 2003)",
        ),
    )
}  # fmt: skip

MORE_GAMES: dict[str, Game] = {
    game.name: game
    for game in (
        Game("charity", _divide, _share, "more than to a student recipient (Eckel & Grossman 1996)"),
        Game(
            "trust_sender", lambda sent, stake: (stake - sent, TRUST_FACTOR * sent), _share,
            "50 % sent (Johnson & Mislin 2011)", strategic=True,
        ),
    )
}  # fmt: skip

# Tenths of the pot that worked examples answer: over the whole range, five tenths on average.
_EXAMPLE_TENTHS = (1, 9, 3, 7, 2, 8, 4, 6, 0, 10)


def game_prompts(
    game: Game, *, families: int = 6, examples: int = 6, stake: int | None = None, seed: int = 0, tokenizer: Any = None,
    rendering: Rendering = PLAIN,
) -> pd.DataFrame:  # fmt: skip
    """Prompts without any stance, one per wording.

    Args:
      families: wordings, the first ones of the game's stock.
      examples: worked examples before the query, even; each has another player's name and a number of its own, so
        that they show the range of answers and favour none.
      tokenizer: when given, prefix, query and answers are checked to tokenise separately.

    Returns:
      Columns as in a dictator bank; `stake` is the largest amount.

    Raises:
      ValueError: more families or examples than there are, or answers that this tokenizer cannot write.
    """
    stock = WORDINGS[game.name]
    if not 1 <= families <= len(stock):
        raise ValueError(f"families: {game.name} has {len(stock)} wordings, got {families}; add some to have more")
    if not 2 <= examples <= len(_EXAMPLE_TENTHS) or examples % 2:
        raise ValueError(f"examples: expected an even number from 2 to {len(_EXAMPLE_TENTHS)}, got {examples}")
    rows = [_prompt(game, i, wording, examples, stake, seed, rendering) for i, wording in enumerate(stock[:families])]
    for row in rows if tokenizer is not None else ():
        checked = prompts.check_boundary(tokenizer, row["prefix"], row["query"], row["answers"])
        if checked.reason:
            raise ValueError(f"prompt {row['id']}: {checked.reason} in this model's tokenizer; choose another stake")
    return pd.DataFrame(rows, columns=COLUMNS)


def _prompt(
    game: Game, index: int, wording: str, examples: int, stake: int | None, seed: int, rendering: Rendering
) -> dict:
    stake = game.stake if stake is None else stake
    amounts, family = game.actions(stake), f"{game.name}.{index}"
    top, random = amounts[-1], prompts.rng(seed, family)
    *names, player = random.sample(NAMES, examples + 1)
    answers = [min(amounts, key=lambda a: abs(a - top * tenths / 10)) for tenths in _EXAMPLE_TENTHS[:examples]]
    random.shuffle(answers)

    def ask(name: str) -> str:
        return wording.format(who=name, E=f"${stake}", pot=f"${top}")

    solved = [(ask(name), str(answer)) for name, answer in zip(names, answers, strict=True)]
    return {
        "id": f"{family}/neutral/0", "family": family, "split": "test", "pair": 0, "condition": "neutral",
        "prefix": rendering.examples(solved, " $"), "query": rendering.query(ask(player), " $"),
        "answers": [str(a) for a in amounts], "score": [game.score(a, stake) for a in amounts], "scenario": game.name,
        "word": "", "frame": "take" if game.reverse else "give", "stake": top,
    }  # fmt: skip
