"""Social-preference games: actions, payoffs, a score that rises with altruism, and prompts that play them.

An action is an amount, another number, a word, or one of several options that a prompt gives letters to. What one
decision starts from is its *item*: in most games the endowment; in others an offer, a wage, prices, or a row of a
published table. Human numbers are context, never pass or fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxmech.behavior import behavior, prompts
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.altruism.game_wordings import NAMES, WORDINGS
from jaxmech.behavior.altruism.preferences import ALTRUIST, svo_angle
from jaxmech.behavior.rendering import PLAIN, Rendering

Action = int | float | str

COLUMNS = (*behavior.COLUMNS, "scenario", "word", "frame", "stake", "variant", "item")
VARIANTS = ("plain", "stance")
STRATEGIC, ENFORCEMENT = "strategic", "norm enforcement"
LETTERS = "ABCDEFGHI"

POT = 10
"""Dollars that an ultimatum's responder is offered a part of."""
TRUST_FACTOR = 3
GROUP, RETURN_RATE = 4, 0.4
DICTATOR, WITNESS, PENALTY = 100, 50, 3
"""Third-party punishment: what the dictator and the third party have, and what a dollar spent costs the dictator."""
VALUE = 120
"""Gift exchange: the firm gets (VALUE - wage) * effort; costs of effort as in Fehr, Kirchsteiger & Riedl (1993)."""
EFFORT_COST = dict(zip([i / 10 for i in range(1, 11)], (0, 1, 2, 4, 6, 8, 10, 12, 15, 18), strict=True))

SVO: dict[int, tuple[tuple[int, int], ...]] = {
    number: tuple(zip(own, other, strict=True))
    for number, own, other in (
        (1, (85,) * 9, (85, 76, 68, 59, 50, 41, 33, 24, 15)),
        (2, (85, 87, 89, 91, 93, 94, 96, 98, 100), (15, 19, 24, 28, 33, 37, 41, 46, 50)),
        (3, (50, 54, 59, 63, 68, 72, 76, 81, 85), (100, 98, 96, 94, 93, 91, 89, 87, 85)),
        (4, (50, 54, 59, 63, 68, 72, 76, 81, 85), (100, 89, 79, 68, 58, 47, 36, 26, 15)),
        (5, (100, 94, 88, 81, 75, 69, 63, 56, 50), (50, 56, 63, 69, 75, 81, 88, 94, 100)),
        (6, (100, 98, 96, 94, 93, 91, 89, 87, 85), (50, 54, 59, 63, 68, 72, 76, 81, 85)),
    )
}
"""The six primary items of the slider measure: (own, other's) points of each option (Murphy et al. 2011)."""

CHARNESS_RABIN: dict[str, dict[str, tuple[int, int]]] = {
    "Berk29": {"left": (400, 400), "right": (750, 400)},
    "Barc2": {"left": (400, 400), "right": (750, 375)},
    "Berk23": {"left": (800, 200), "right": (0, 0)},
    "Barc8": {"left": (300, 600), "right": (700, 500)},
    "Berk15": {"left": (200, 700), "right": (600, 600)},
    "Berk26": {"left": (0, 800), "right": (400, 400)},
}
"""(A's, B's) payoffs of the two options; B decides."""

BUDGETS = ((40, 3, 1), (40, 1, 3), (60, 2, 1), (60, 1, 2), (75, 2, 1), (75, 1, 2), (60, 1, 1), (100, 1, 1))
"""Modified dictator: tokens, points of a token that is held, of one that is passed (Andreoni & Miller 2002)."""


def _dollars(stake: int) -> dict[str, str]:
    return {"E": f"${stake}", "pot": f"${stake}"}


@dataclasses.dataclass(frozen=True)
class Game:
    """One game, seen by the player whose action is asked for.

    Attributes:
      actions_of: item -> the allowed actions.
      payoffs_of: (action, item) -> (own, other's) payoff; where others act too, they contribute nothing.
      score_of: (action, item) -> [0, 1], rising with altruism, or, where a norm is enforced, with enforcement.
      people: what human players do, with the source.
      items: what families start from, in turn.
      details: item -> what a wording may name.
      stake_of: item -> the largest amount that can be asked for.
      answers: what actions are: "dollars", other "numbers", "words", or "letters" that stand for an option.
      frame: "give" where giving more is a larger number, "take" where it is a smaller one; other names elsewhere.
      kind: "" for plain giving; `STRATEGIC` where giving can be in the player's own interest, so that the score is not
        altruism alone; `ENFORCEMENT` where it is the enforcement of a norm. Each is reported apart.
      expected_sign: of the score's slope when the model is steered towards generosity; 0 where that is open.
    """

    name: str
    payoffs_of: Callable[[Any, Any], tuple[float, float]]
    score_of: Callable[[Any, Any], float]
    people: str
    actions_of: Callable[[Any], Sequence[Action]] = prompts.allowed_amounts
    items: tuple[Any, ...] = (10,)
    details: Callable[[Any], Mapping[str, str]] = _dollars
    stake_of: Callable[[Any], int] = lambda stake: stake
    answers: str = "dollars"
    frame: str = "give"
    kind: str = ""
    expected_sign: int = 1

    @property
    def strategic(self) -> bool:
        return self.kind == STRATEGIC

    @property
    def named(self) -> bool:
        """Whether a prompt names the options."""
        return self.answers in ("words", "letters")

    @property
    def lettered(self) -> bool:
        return self.answers == "letters"

    def actions(self, item: Any = None) -> list[Action]:
        """The allowed actions; of amounts 11 equal steps, or every whole number of a pot below 20."""
        return list(self.actions_of(self._item(item)))

    def payoffs(self, action: Action, item: Any = None) -> tuple[float, float]:
        """(own, other's) payoff."""
        return self.payoffs_of(self._allowed(action, item), self._item(item))

    def score(self, action: Action, item: Any = None) -> float:
        """Altruism of an action, in [0, 1]."""
        return self.score_of(self._allowed(action, item), self._item(item))

    def playable(self) -> list[Any]:
        """The items whose score depends on the action, which the slider's second one does not."""
        return [item for item in self.items if len({self.score(a, item) for a in self.actions(item)}) > 1]

    def _item(self, item: Any) -> Any:
        if item is None:
            return self.items[0]
        if self.lettered and item not in self.items:  # elsewhere any offer, wage or endowment will do
            raise ValueError(f"item: {self.name} has {', '.join(map(str, self.items))}, got {item!r}")
        return item

    def _allowed(self, action: Action, item: Any) -> Action:
        if action not in (allowed := self.actions(item)):
            raise ValueError(
                f"action: {self.name} allows {', '.join(map(str, allowed))} for the item {self._item(item)}, got "
                f"{action!r}"
            )
        return action


def _divide(given: int, stake: int) -> tuple[float, float]:
    return stake - given, given


def _share(given: int, stake: int) -> float:
    return given / stake


def _public_good(put: int, stake: int) -> tuple[float, float]:
    return stake - put + RETURN_RATE * put, RETURN_RATE * put


def _respond(answer: str, offer: int) -> tuple[float, float]:
    return (offer, POT - offer) if answer == "accept" else (0, 0)


def _offered(offer: int) -> dict[str, str]:
    return {"pot": f"${POT}", "offer": f"${offer}", "rest": f"${POT - offer}"}


def _defector_opposite(move: str, payoffs: tuple[int, int, int, int]) -> tuple[float, float]:
    temptation, _, punishment, sucker = payoffs
    return (sucker, temptation) if move == "cooperate" else (punishment, punishment)


def _dilemma(payoffs: tuple[int, int, int, int]) -> dict[str, str]:
    said = {name: f"${amount}" for name, amount in zip("TRPS", payoffs, strict=True)}
    temptation, _, punishment, sucker = payoffs
    return said | {"cost": f"${punishment - sucker}", "benefit": f"${temptation - punishment}"}


def _punish(spent: int, given: int) -> tuple[float, float]:
    return WITNESS - spent, DICTATOR - given - PENALTY * spent


def _judged(given: int) -> dict[str, str]:
    return {"total": f"${DICTATOR}", "kept": f"${DICTATOR - given}", "given": f"${given}", "E": f"${WITNESS}"}


def _svo_score(option: int, item: int) -> float:
    return float(np.clip(svo_angle([SVO[item][option - 1]]) / ALTRUIST, 0, 1))


def _helps_more(option: str, item: str) -> float:
    """1 for the option that gives A more; it is also the one with the larger, or equal, sum."""
    return float(CHARNESS_RABIN[item][option][0] == max(a for a, _ in CHARNESS_RABIN[item].values()))


def _tokens(budget: tuple[int, int, int]) -> dict[str, str]:
    tokens, hold, give = budget
    points = {1: "1 point"}
    return {"E": str(tokens), "hold": points.get(hold, f"{hold} points"), "give": points.get(give, f"{give} points")}


GAMES: dict[str, Game] = {
    game.name: game
    for game in (
        Game("dictator_give", _divide, _share, "28 % given, 36 % give nothing (Engel 2011)"),
        Game(
            "dictator_take", lambda taken, stake: (taken, stake - taken), lambda taken, stake: 1 - taken / stake,
            "about 35 % left (Flage)", frame="take",
        ),
        Game("charity", _divide, _share, "more than to a student recipient (Eckel & Grossman 1996)"),
        Game(
            "ultimatum_proposer", _divide, lambda offer, stake: min(2 * offer / stake, 1.0),
            "40 % offered, 16 % of offers rejected (Oosterbeek et al. 2004)", kind=STRATEGIC,
        ),
        Game(
            "ultimatum_responder", _respond, lambda answer, offer: float(answer == "reject"),
            "offers below 20 % rejected about half the time (Camerer 2003); the score is rejection",
            actions_of=lambda offer: ("accept", "reject"), items=(1, 2, 3, 4, 5), details=_offered,
            stake_of=lambda offer: POT, answers="words", frame="word", kind=ENFORCEMENT, expected_sign=0,
        ),
        Game(
            "trust_sender", lambda sent, stake: (stake - sent, TRUST_FACTOR * sent), _share,
            "50 % sent (Johnson & Mislin 2011)", kind=STRATEGIC,
        ),
        Game(
            "trust_returner", lambda back, sent: (TRUST_FACTOR * sent - back, back),
            lambda back, sent: back / (TRUST_FACTOR * sent), "37 % returned (Johnson & Mislin 2011)", items=(3,),
            actions_of=lambda sent: prompts.allowed_amounts(TRUST_FACTOR * sent),
            details=lambda sent: {"E": f"${sent}", "pot": f"${TRUST_FACTOR * sent}"},
            stake_of=lambda sent: TRUST_FACTOR * sent,
        ),
        Game("public_goods", _public_good, _share, "35 to 55 % contributed (Zelmer 2003)"),
        Game(
            "prisoners_dilemma", _defector_opposite, lambda move, _: float(move == "cooperate"),
            "37 % cooperate (Mengel 2018)", actions_of=lambda _: ("cooperate", "defect"), items=((9, 6, 3, 0),),
            details=_dilemma, stake_of=max, answers="words", frame="word",
        ),
        Game(
            "third_party_punishment", _punish, lambda spent, _: spent / WITNESS,
            "about 60 % punish (Fehr & Fischbacher 2004)", actions_of=lambda _: prompts.allowed_amounts(WITNESS),
            items=(0, 10, 20, 30, 40, 50), details=_judged, stake_of=lambda _: WITNESS, frame="punish",
            kind=ENFORCEMENT, expected_sign=0,
        ),
        Game(
            "gift_exchange", lambda effort, wage: (wage - EFFORT_COST[effort], (VALUE - wage) * effort),
            lambda effort, _: (effort - 0.1) / 0.9, "effort rises with the wage (Fehr, Kirchsteiger & Riedl 1993)",
            actions_of=lambda _: tuple(EFFORT_COST), items=(30, 50, 70, 90), details=lambda wage: {"wage": f"${wage}"},
            stake_of=lambda _: 1, answers="numbers", frame="effort",
        ),
        Game(
            "svo_slider", lambda option, item: SVO[item][option - 1], _svo_score,
            "altruists above 57.15 degrees, prosocials above 22.45, individualists above -12.04 (Murphy et al. 2011)",
            actions_of=lambda item: range(1, 10), items=tuple(SVO), details=lambda item: {},
            stake_of=lambda item: 100, answers="letters", frame="option",
        ),
        Game(
            "charness_rabin", lambda option, item: CHARNESS_RABIN[item][option][::-1], _helps_more,
            "chose the first option: Berk29 31 %, Barc2 52, Berk23 100, Barc8 67, Berk15 27, Berk26 78 "
            "(Charness & Rabin 2002)",
            actions_of=lambda item: ("left", "right"), items=tuple(CHARNESS_RABIN), details=lambda item: {},
            stake_of=lambda item: max(map(max, CHARNESS_RABIN[item].values())), answers="letters", frame="option",
        ),
        Game(
            "modified_dictator",
            lambda passed, budget: ((budget[0] - passed) * budget[1], passed * budget[2]),
            lambda passed, budget: passed / budget[0],
            "about 23 % given at a price of 1 (Andreoni & Miller 2002)",
            actions_of=lambda budget: range(0, budget[0] + 1, 5), items=BUDGETS, details=_tokens,
            stake_of=lambda budget: budget[0], answers="numbers",
        ),
    )
}  # fmt: skip

# Tenths of the range of actions that worked examples answer: five tenths on average.
_EXAMPLE_TENTHS = (1, 9, 3, 7, 2, 8, 4, 6, 0, 10)


def game_prompts(
    game: Game, *, families: int = 6, variant: str = "plain", examples: int | None = None, item: Any = None,
    seed: int = 0, tokenizer: Any = None, rendering: Rendering = PLAIN,
) -> pd.DataFrame:  # fmt: skip
    """Neutral prompts, one per wording; families play the game's items in turn, from one that the seed chooses.

    Where options are named, their order and their letters change from family to family: of two, that with the higher
    score comes first, and has the first letter, in half of an even number of families; of more, the order is one that
    is uncorrelated with the score.

    Args:
      families: wordings, the first ones of the game's stock.
      variant: "plain", worked examples that show the range of answers evenly and say nothing about who answers; or
        "stance", a bank's (`BankConfig`): kind players give much and unkind ones little. The query is neutral in both.
      examples: their number, even; 0 for none; by default 6 where answers are numbers, and 4 elsewhere. In "stance"
        the bank's decoys come on top.
      item: played by all families instead.
      tokenizer: when given, prefix, query and answers are checked to tokenise separately.

    Returns:
      Columns of a behaviour (`jaxmech.behavior.behavior`), `answers` in the order of `game.actions`; scenario (the
      game), word (""), frame, stake (the largest amount), variant, item.

    Raises:
      ValueError: more families or examples than there are, stance examples of a game in which kind players' actions
        are open, or answers that this tokenizer cannot write.
    """
    stock = WORDINGS[game.name]
    if not 1 <= families <= len(stock):
        raise ValueError(f"families: {game.name} has {len(stock)} wordings, got {families}; add some to have more")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if examples is None:
        examples = 4 if game.named else 6
    if not 0 <= examples <= len(_EXAMPLE_TENTHS) or examples % 2:
        raise ValueError(f"examples: expected an even number from 0 to {len(_EXAMPLE_TENTHS)}, got {examples}")
    if variant == "stance" and not (game.expected_sign and examples):
        raise ValueError(
            f"variant: {game.name} has no stance examples: what kind players do is open, or none are asked"
        )
    items = game.playable() if item is None else [item]
    first = prompts.digest(seed, game.name)
    rows = []
    for index, wording in enumerate(stock[:families]):
        turn = first + index
        played = items[turn % len(items)]
        letters = LETTERS[: len(game.actions(played))]
        decision = _Decision(
            game, played, wording, rendering, lower_first=turn % 2 == 0,
            letters=letters[::-1] if index // 2 % 2 else letters,
        )  # fmt: skip
        rows.append(_prompt(decision, f"{game.name}.{index}", variant, examples, seed))
    for row in rows if tokenizer is not None else ():
        checked = prompts.check_boundary(tokenizer, row["prefix"], row["query"], row["answers"])
        if checked.reason:
            raise ValueError(f"prompt {row['id']}: {checked.reason} in this model's tokenizer; choose another item")
    return pd.DataFrame(rows, columns=COLUMNS)


@dataclasses.dataclass(frozen=True)
class _Decision:
    """An item in a wording: how it is asked and answered. A *listing* is the order in which options are named.

    lower_first: of two options, whether the query names that with the lower score first. letters: in the order of a
    listing.
    """

    game: Game
    item: Any
    wording: str
    rendering: Rendering
    lower_first: bool
    letters: str

    @property
    def actions(self) -> list[Action]:
        return self.game.actions(self.item)

    @property
    def scores(self) -> list[float]:
        return [self.game.score(action, self.item) for action in self.actions]

    @property
    def lead(self) -> str:
        return " $" if self.game.answers == "dollars" else ""

    def listing(self, random: Any) -> list[Action]:
        """The query's, which tells nothing of the score by a place in it."""
        actions = self.actions
        if len(actions) == 2:
            return sorted(actions, key=lambda action: self.game.score(action, self.item), reverse=not self.lower_first)
        scores = dict(zip(actions, np.subtract(self.scores, np.mean(self.scores)), strict=True))
        tried = [random.sample(actions, len(actions)) for _ in range(200)]
        return min(tried, key=lambda order: abs(sum(place * scores[action] for place, action in enumerate(order))))

    def ask(self, who: str, listing: Sequence[Action]) -> str:
        if self.game.lettered:
            payoffs = [self.game.payoffs(action, self.item) for action in listing]
            named = zip(self.letters, payoffs, strict=True)
            options = ", ".join(f"{letter} {own}/{other}" for letter, (own, other) in named)
        else:
            options = " or ".join(map(str, listing))
        text = self.wording.format(who=who, options=options, **self.game.details(self.item))
        return text[0].upper() + text[1:]

    def answer(self, action: Action, listing: Sequence[Action]) -> str:
        said = self.letters[listing.index(action)] if self.game.lettered else str(action)
        return said if self.rendering.query("", self.lead)[-1] in " \n$" else f" {said}"


def _prompt(decision: _Decision, family: str, variant: str, examples: int, seed: int) -> dict:
    game, item, random = decision.game, decision.item, prompts.rng(seed, family)
    *names, player = random.sample(NAMES, examples + 1)
    if variant == "stance":
        shown = _with_stance(decision, examples, prompts.rng(seed, family, "stance"))
        names = [name for name in NAMES if name != player][: len(shown)]
    else:
        shown = _evenly(decision, examples)
    solved = _placed(decision, shown, random)
    random.shuffle(solved)
    texts = [
        (decision.ask(f"{stance} {name}".strip(), listing), decision.answer(action, listing))
        for name, (stance, action, listing) in zip(names, solved, strict=True)
    ]
    listing = decision.listing(prompts.rng(seed, family, "listing")) if game.named else decision.actions
    return {
        "id": f"{family}/neutral/0", "family": family, "split": "test", "pair": 0, "condition": "neutral",
        "prefix": decision.rendering.examples(texts, decision.lead) if texts else "",
        "query": decision.rendering.query(decision.ask(player, listing), decision.lead),
        "answers": [decision.answer(action, listing) for action in decision.actions], "score": decision.scores,
        "scenario": game.name, "word": "", "frame": game.frame, "stake": game.stake_of(item), "variant": variant,
        "item": str(item),
    }  # fmt: skip


def _evenly(decision: _Decision, examples: int) -> list[tuple[str, Action]]:
    """("", action) of worked examples over the whole range."""
    last = len(decision.actions) - 1
    return [("", decision.actions[round(last * tenths / 10)]) for tenths in _EXAMPLE_TENTHS[:examples]]


def _with_stance(decision: _Decision, examples: int, random: Any) -> list[tuple[str, Action]]:
    """(stance, action) of worked examples as a bank has them: half of either stance, and its decoys."""
    bank, half = BankConfig(), examples // 2
    dealt = list(bank.decoys)
    for side, tenths in enumerate((bank.generous_tenths, bank.selfish_tenths)):
        words = random.sample([pair[side] for pair in bank.example_words], half)
        dealt += zip(words, (tenths * half)[:half], strict=True)
    lowest, highest = min(decision.scores), max(decision.scores)
    scored = dict(zip(decision.actions, decision.scores, strict=True))

    def nearest(tenths: int) -> Action:
        target = lowest + (highest - lowest) * tenths / 10
        return min(scored, key=lambda action: abs(scored[action] - target))

    return [(f"{bank.intensifier} {word}".strip(), nearest(tenths)) for word, tenths in dealt]


def _placed(
    decision: _Decision, shown: Sequence[tuple[str, Action]], random: Any
) -> list[tuple[str, Action, list[Action]]]:
    """Adds a listing to each worked example, such that every action is named in every place equally often."""
    actions = decision.actions
    if not decision.game.named:
        return [(stance, action, actions) for stance, action in shown]
    places, placed = random.sample(range(len(actions)), len(actions)), []
    for number, (stance, action) in enumerate(sorted(shown, key=lambda example: actions.index(example[1]))):
        listing = random.sample([other for other in actions if other != action], len(actions) - 1)
        listing.insert(places[number % len(places)], action)
        placed.append((stance, action, listing))
    return placed
