"""Generators of dual-process items: a *conflict* item, in which intuition points the wrong way, and its twin.

The twin keeps the story and lets intuition be right. Only isomorphs are generated; the classics are memorised. Every
generator is a function of a random stream and a wording, so that numbers and stories vary independently.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Twins:
    """A conflict item and its no-conflict twin: questions, right answers, and the intuitive answer of each.

    In the twin the intuitive answer is the right one, and `foil` is the wrong one it is set against.
    """

    conflict: str
    no_conflict: str
    correct: str
    lure: str
    easy: str
    foil: str


@dataclasses.dataclass(frozen=True)
class Generator:
    """`make(rng, wording)` for `wordings` wordings; `examples` are plain questions in the same answer format."""

    name: str
    make: Callable[[random.Random, int], Twins]
    wordings: int
    examples: tuple[tuple[str, str], ...]

    @property
    def numeric(self) -> bool:
        """Whether answers are written in digits (after a space) or in words."""
        return self.examples[0][1].isdigit()


def _bat_and_ball(rng: random.Random, wording: int) -> Twins:
    story = (
        "A {x} and a {y} cost ${t} together. The {x} costs ${d} {more}. How many dollars does the {y} cost?",
        "Together a {x} and a {y} weigh {t} pounds. The {x} weighs {d} pounds {more}. How many pounds is the {y}?",
        "The {x} and the {y} took {t} minutes to fix. The {x} took {d} minutes {more}. How many minutes for the {y}?",
    )[wording]
    x, y = rng.sample(("lamp", "chair", "kettle", "drum", "basket", "mirror", "jacket", "clock", "suitcase"), 2)
    small = rng.randint(1, 3)
    difference = rng.randint(2, 9)
    total = 2 * small + difference
    ask = lambda more: story.format(x=x, y=y, t=total, d=difference, more=more)  # noqa: E731
    easy = str(total - difference)
    return Twins(ask(f"more than the {y}"), ask("alone"), str(small), easy, easy, str(small))


def _machines(rng: random.Random, wording: int) -> Twins:
    story = (
        "{n} machines make {n} {x} in {n} minutes. How many minutes do {m} machines need for {m} {x}?",
        "{n} cooks bake {n} {x} in {n} minutes. In how many minutes do {m} cooks bake {m} {x}?",
        "It takes {n} printers {n} minutes to print {n} {x}. How many minutes do {m} printers take for {m} {x}?",
    )[wording]
    easy = (
        "1 machine makes 1 of the {x} in {n} minutes. How many minutes does 1 machine need for {k} of the {x}?",
        "1 cook bakes 1 of the {x} in {n} minutes. In how many minutes does 1 cook bake {k} of the {x}?",
        "It takes 1 printer {n} minutes to print 1 of the {x}. How many minutes does it take for {k} of the {x}?",
    )[wording]
    things = (("toys", "bolts", "cups"), ("pies", "cakes", "rolls"), ("maps", "posters", "cards"))[wording]
    n, m = rng.sample(range(2, 10), 2)
    x, k, per = rng.choice(things), rng.randint(2, 4), rng.randint(2, 4)
    return Twins(
        story.format(n=n, m=m, x=x), easy.format(n=per, k=k, x=x), str(n), str(m), str(per * k), str(per)
    )  # fmt: skip


def _doubling(rng: random.Random, wording: int) -> Twins:
    story = (
        "A patch of {x} {grows}. It covers the pond after {d} days. After how many days did it cover half the pond?",
        "The {x} in a jar {grows}. The jar is full after {d} days. After how many days was the jar half full?",
        "The {x} on a wall {grows}. The wall is covered after {d} days. After how many days was half of it covered?",
    )[wording]
    growth = ("doubles every day", "grows by the same amount every day")
    x = rng.choice((("lilies", "weeds", "algae"), ("yeast", "mold", "plankton"), ("ivy", "moss", "fungus"))[wording])
    day = rng.choice((4, 6, 8, 12, 14, 16, 18))
    conflict, twin = (story.format(x=x, d=day, grows=grows) for grows in growth)
    return Twins(conflict, twin, str(day - 1), str(day // 2), str(day // 2), str(day - 1))


def _ratio_bias(rng: random.Random, wording: int) -> Twins:
    story = (
        "Bowl A has {a} red beans among {s}. Bowl B has {b} red beans among {l}. Which bowl gives red more often?",
        "Urn A holds {a} winning tickets out of {s}. Urn B holds {b} out of {l}. Which urn wins more often?",
        "Tray A has {a} gold coins in {s}. Tray B has {b} gold coins in {l}. Which tray is better for drawing gold?",
    )[wording]
    small, factor = rng.choice((10, 20)), rng.choice((5, 10))
    a = rng.randint(2, 3)
    fewer, more = rng.randint(a + 1, a * factor - 1), rng.randint(a * factor + 1, (a + 2) * factor)
    ask = lambda first, second: story.format(a=first[0], s=first[1], b=second[0], l=second[1])  # noqa: E731
    better, worse, large = (a, small), (fewer, small * factor), (more, small * factor)
    if rng.random() < 0.5:  # the letter of the intuitive bowl is no clue
        return Twins(ask(worse, better), ask(large, better), "B", "A", "A", "B")
    return Twins(ask(better, worse), ask(better, large), "A", "B", "B", "A")


def _base_rate(rng: random.Random, wording: int) -> Twins:
    story = (
        "In a group of 100 people {p} are {x}s and {q} are {y}s. Someone drawn at random {trait}. "
        "Is it more likely a {x} or a {y}?",
        "A room holds {p} {x}s and {q} {y}s. One of them, picked blindly, {trait}. More likely a {x} or a {y}?",
        "Of 100 files {p} describe a {x} and {q} a {y}. The file on top says: {trait}. A {x} or a {y}?",
    )[wording]
    jobs = {
        "farmer": "likes tractors", "nurse": "likes caring for people", "lawyer": "likes arguing",
        "teacher": "likes children", "driver": "likes long roads", "singer": "likes the stage",
    }  # fmt: skip
    typical, atypical = rng.sample(sorted(jobs), 2)
    many = rng.randint(94, 99)
    first, second = rng.sample((typical, atypical), 2)

    def ask(majority: str) -> str:
        counts = {"p": many, "q": 100 - many} if first == majority else {"p": 100 - many, "q": many}
        return story.format(x=first, y=second, trait=jobs[typical], **counts)

    return Twins(ask(atypical), ask(typical), atypical, typical, typical, atypical)


def _arithmetic(rng: random.Random, wording: int) -> Twins:
    """Three to five steps against one; the lure stops after the first."""
    start = ("Start with {a}. {steps}. What is the result?", "You have {a}. {steps}. How many are there now?")[wording]
    plus, minus = (("Add {n}", "Subtract {n}"), ("Get {n}", "Lose {n}"))[wording]
    while True:
        a, values = rng.randint(3, 9), [rng.choice((-3, -2, -1, 1, 2, 3)) for _ in range(rng.randint(3, 5))]
        totals = [a + sum(values[: i + 1]) for i in range(len(values))]
        if all(0 < total < 20 for total in totals) and totals[-1] != totals[0]:
            break
    words = [(plus if v > 0 else minus).format(n=abs(v)) for v in values]
    ask = lambda steps: start.format(a=a, steps=". ".join(steps))  # noqa: E731
    return Twins(ask(words), ask(words[:1]), str(totals[-1]), str(totals[0]), str(totals[0]), str(totals[-1]))


# (kind, example of it, property of the kind that other things have as well)
_KINDS = (
    ("flowers", "roses", "need water"), ("birds", "sparrows", "have two legs"), ("fish", "sharks", "can swim"),
    ("dogs", "terriers", "have four legs"), ("trees", "oaks", "grow in soil"), ("cars", "taxis", "have wheels"),
    ("fruits", "apples", "contain sugar"), ("insects", "ants", "are small"), ("metals", "iron bars", "are hard"),
)  # fmt: skip
_ALIEN = (("fruits", "contain sugar"), ("cars", "have wheels"), ("trees", "grow in soil"))
_NEVER_ALIEN = tuple(kind for kind in _KINDS if kind[0] in ("birds", "fish", "dogs", "insects", "metals"))


def _syllogism(rng: random.Random, wording: int) -> Twins:
    """Validity against believability: half believable but invalid, half unbelievable but valid."""
    story = (
        "All {a} {p}. All {b} {r}. Does it follow that all {b} {c}, yes or no?",
        "Suppose all {a} {p} and all {b} {r}. Must all {b} then {c}, yes or no?",
    )[wording]
    bare = lambda verb: verb.replace("are ", "be ") if wording else verb  # noqa: E731
    if rng.random() < 0.5:
        a, b, p = rng.choice(_KINDS)
        invalid = story.format(a=a, b=b, p=p, r=p, c=bare(f"are {a}"))
        return Twins(invalid, story.format(a=a, b=b, p=p, r=f"are {a}", c=bare(p)), "no", "yes", "yes", "no")
    (a, p), (_, b, own) = rng.choice(_ALIEN), rng.choice(_NEVER_ALIEN)
    valid = story.format(a=a, b=b, p=p, r=f"are {a}", c=bare(p))
    return Twins(valid, story.format(a=a, b=b, p=p, r=own, c=bare(p)), "yes", "no", "no", "yes")


_SUMS = (
    ("What is 2 plus 5?", "7"),
    ("What is 9 minus 6?", "3"),
    ("What is 4 times 2?", "8"),
    ("What is 6 plus 6?", "12"),
)

GENERATORS: tuple[Generator, ...] = (
    Generator("bat_and_ball", _bat_and_ball, 3, _SUMS),
    Generator("machines", _machines, 3, _SUMS),
    Generator("doubling", _doubling, 3, _SUMS),
    Generator("arithmetic", _arithmetic, 2, _SUMS),
    Generator(
        "ratio_bias", _ratio_bias, 3,
        (("Box A has 3 red. Box B has 5 red. Which has more red?", "B"), ("Is 7 in A or 2 in B larger?", "A"),
         ("Jar A weighs 9. Jar B weighs 4. Which is lighter?", "B"), ("A is full. B is empty. Which is full?", "A")),
    ),
    Generator(
        "base_rate", _base_rate, 3,
        (("Is a bigger animal a mouse or a horse?", "horse"), ("Does a baker or a pilot make bread?", "baker"),
         ("Is 8 plus 1 nine or ten?", "nine"), ("Is ice hot or cold?", "cold")),
    ),
    Generator(
        "syllogism", _syllogism, 2,
        (("Is 2 plus 2 equal to 4, yes or no?", "yes"), ("Is 5 larger than 9, yes or no?", "no"),
         ("Is 3 times 3 equal to 8, yes or no?", "no"), ("Is 10 minus 4 equal to 6, yes or no?", "yes")),
    ),
)  # fmt: skip
