"""Altruism as a behaviour: the dictator game's prompts and controls, and the games that it may carry over to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from jaxmech.behavior.altruism.dictator import BankConfig, build_bank
from jaxmech.behavior.altruism.games import GAMES, game_prompts
from jaxmech.behavior.behavior import Behavior, Control, Parsed, Task, Words
from jaxmech.behavior.parsing import parse_amount
from jaxmech.behavior.rendering import PLAIN, Rendering

WORDS = Words(
    plus="generous",
    minus="selfish",
    varies="stance",
    outcome="share given",
    levels=("nothing", "half", "everything"),
    tasks="games",
    setting="After worked examples in which kind players give much and unkind ones little, ",
    about="This is an independent implementation, worked from the abstract of arXiv:2604.19260 and not from the "
    "paper's text: prompts, thresholds and sizes are this study's own, and its numbers are no replication of the "
    "paper's.",
)

CONTROLS = {
    "flipped": Control(
        "that it is what the worked examples teach, not what the words mean", "Worked examples flipped",
        ("generous", "selfish"), flips=True,
    ),
    "unstanced": Control(
        "that it is what the worked examples teach, not what the words mean", "Worked examples without stance",
        ("generous", "selfish"), moves=True,
    ),
    "heldout": Control(
        "that it hangs on the very words that features were selected with", "Held-out stance words",
        ("generous", "selfish"), moves=True,
    ),
    "placebo": Control(
        "that any word about a person moves the answer", "Placebo words", ("first word", "second word"), oriented=False
    ),
    "valence": Control("that it is mood, not giving", "Cheerful or gloomy", ("cheerful", "gloomy"), needed=True),
    "number": Control("that it is the size of numbers, not giving", "Likes large numbers", ("large", "small")),
    "other": Control(
        "that a stance named anywhere in the prompt does it", "Someone else's stance", ("generous", "selfish"),
        gate=False,
    ),
    "own_accounts": Control(
        "that it is the amount moved, whoever gains", "Own two accounts", ("generous", "selfish"), gate=False
    ),
    "keep": Control("that it is saying a larger number, not giving", "Asked what to keep", moves=True, needed=True),
    "take": Control("that it is saying a larger number, not giving", "Asked what to take", moves=True, needed=True),
}  # fmt: skip


LABELS = {
    "dictator_give": "Dictator (give)",
    "dictator_take": "Dictator (take)",
    "ultimatum_proposer": "Ultimatum (proposer)",
    "trust_returner": "Trust (returner)",
    "charity": "Charity",
    "ultimatum_responder": "Ultimatum (responder)",
    "trust_sender": "Trust (sender)",
    "public_goods": "Public goods",
    "prisoners_dilemma": "Prisoner's dilemma",
    "third_party_punishment": "Third-party punishment",
    "gift_exchange": "Gift exchange",
    "svo_slider": "Slider (SVO)",
    "charness_rabin": "Charness and Rabin",
    "modified_dictator": "Dictator (prices)",
}


def altruism(config: BankConfig, tokenizer: Any, *, seed: int = 0) -> Behavior:
    """The dictator game's families of minimal pairs, without the other games (`games`).

    Args:
      tokenizer: what every prompt is checked with.

    Raises:
      ValueError: as `build_bank`.
    """
    bank = build_bank(config, tokenizer, seed=seed)
    return Behavior(
        "altruism", WORDS, bank.prompts, CONTROLS, exclusions=bank.exclusions, parse=parse,
        factors=("word", "stake", "form"),
    )  # fmt: skip


def games(
    families: int,
    tokenizer: Any,
    *,
    seed: int = 0,
    names: Collection[str] | None = None,
    examples: int | None = None,
    rendering: Rendering = PLAIN,
) -> dict[str, Task]:
    """Each game in some of its wordings, without any stance and with stance examples; the dictator game is home.

    Args:
      names: of the games, all by default. examples, rendering: as in `game_prompts`; with 0 examples there are no
        prompts with a stance.

    Raises:
      ValueError: a name that is no game's; as `game_prompts`.
    """
    names = tuple(GAMES) if names is None else names
    if unknown := [name for name in names if name not in GAMES]:
        raise ValueError(f"names: expected some of {', '.join(GAMES)}; got {', '.join(unknown)}")
    make = partial(
        game_prompts, families=families, examples=examples, seed=seed, tokenizer=tokenizer, rendering=rendering
    )
    return {
        name: Task(
            make(game), game.expected_sign, game.people, home=name == "dictator_give", label=LABELS[name],
            kind=game.kind,
            stance_prompts=make(game, variant="stance") if game.expected_sign and examples != 0 else None,
        )
        for name, game in GAMES.items()
        if name in names
    }  # fmt: skip


def parse(row: Mapping[str, Any], text: str) -> Parsed:
    """The share given by the amount that the first line of a sampled answer names."""
    parsed = parse_amount(text.split("\n")[0], stake=int(row["stake"]))
    if parsed.amount is None:
        return Parsed(None, parsed.reason)
    share = parsed.amount / row["stake"]
    return Parsed(share if row["frame"] in ("give", "own_accounts") else 1 - share, None)
