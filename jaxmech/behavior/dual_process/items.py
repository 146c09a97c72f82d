"""The eleven generators of dual-process items, in their wordings, with worked examples in the same answer format."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from jaxmech.behavior.dual_process import knowledge, numbers, options
from jaxmech.behavior.dual_process.twins import Twins


@dataclasses.dataclass(frozen=True)
class Generator:
    """`make(rng, wording)` for `wordings` wordings, so that numbers and stories vary independently; `examples` are
    plain questions in the same answer format; `offers`: questions offer the answers to be chosen from."""

    name: str
    make: Callable[[random.Random, int], Twins]
    wordings: int
    examples: tuple[tuple[str, str], ...]
    offers: bool = False

    @property
    def numeric(self) -> bool:
        """Whether answers are written in digits (after a space) or in words."""
        return self.examples[0][1].isdigit()


_SUMS = (
    ("What is 2 plus 5?", "7"),
    ("What is 9 minus 6?", "3"),
    ("What is 4 times 2?", "8"),
    ("What is 6 plus 6?", "12"),
)
_LETTERS = (
    ("Box A has 3 red. Box B has 5 red. Which has more red?", "B"),
    ("Is 7 in A or 2 in B larger?", "A"),
    ("Jar A weighs 9. Jar B weighs 4. Which is lighter?", "B"),
    ("A is full. B is empty. Which is full?", "A"),
)

GENERATORS: tuple[Generator, ...] = (
    Generator("bat_and_ball", numbers.bat_and_ball, 3, _SUMS),
    Generator("machines", numbers.machines, 3, _SUMS),
    Generator("doubling", numbers.doubling, 3, _SUMS),
    Generator("arithmetic", numbers.arithmetic, 2, _SUMS),
    Generator("ratio_bias", options.ratio_bias, 3, _LETTERS, offers=True),
    Generator(
        "base_rate", options.base_rate, 3,
        (("Is a bigger animal a mouse or a horse?", "horse"), ("Does a baker or a pilot make bread?", "baker"),
         ("Is 8 plus 1 nine or ten?", "nine"), ("Is ice hot or cold?", "cold")),
        offers=True,
    ),
    Generator("conjunction", options.conjunction, 3, _LETTERS, offers=True),
    Generator("framing", options.framing, 3, _LETTERS, offers=True),
    Generator(
        "syllogism", options.syllogism, 2,
        (("Is 2 plus 2 equal to 4, yes or no?", "yes"), ("Is 5 larger than 9, yes or no?", "no"),
         ("Is 3 times 3 equal to 8, yes or no?", "no"), ("Is 10 minus 4 equal to 6, yes or no?", "yes")),
        offers=True,
    ),
    Generator(
        "semantic_illusion", knowledge.semantic_illusion, 3,
        (("Say true or false: snow is white.", "true"), ("Is it wrong that fire is cold, no or yes?", "yes"),
         ("Is it right that dogs can fly, yes or no?", "no"), ("Say false or true: cows lay eggs.", "false")),
        offers=True,
    ),
    Generator(
        "anchor", knowledge.anchor, 3,
        (("What is the opposite of up?", "down"),
         ("In most towns a baker has an oven. What does a baker have?", "oven"),
         ("In this list tea is paired with milk. What is tea paired with?", "milk"),
         ("Suppose it rains. What falls from the sky then?", "water")),
    ),
)  # fmt: skip
