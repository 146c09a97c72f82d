"""Items whose answers are numbers: bat and ball, machines, doubling, arithmetic of one to five steps."""

from __future__ import annotations

import random

from jaxmech.behavior.dual_process.twins import Twins

STEPS = 5


def bat_and_ball(rng: random.Random, wording: int) -> Twins:
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


def machines(rng: random.Random, wording: int) -> Twins:
    """n machines make n in n minutes: m machines need n minutes for m, the same n machines need m."""
    story = (
        "{n} machines make {n} {x} in {n} minutes. How many minutes do {team} machines need for {m} {x}?",
        "{n} cooks bake {n} {x} in {n} minutes. In how many minutes do {team} cooks bake {m} {x}?",
        "It takes {n} printers {n} minutes to print {n} {x}. How many minutes do {team} printers take for {m} {x}?",
    )[wording]
    n, m = rng.sample(range(2, 10), 2)
    x = rng.choice((("toys", "bolts", "cups"), ("pies", "cakes", "rolls"), ("maps", "posters", "cards"))[wording])
    conflict, twin = (story.format(n=n, m=m, x=x, team=team) for team in (m, f"the same {n}"))
    return Twins(conflict, twin, str(n), str(m), str(m), str(n))


def doubling(rng: random.Random, wording: int) -> Twins:
    story = (
        "A patch of {x} {grows}. It covers the pond after {d} days. After how many days did it cover half the pond?",
        "The {x} in a jar {grows}. The jar is full after {d} days. After how many days was the jar half full?",
        "The {x} on a wall {grows}. The wall is covered after {d} days. After how many days was half of it covered?",
    )[wording]
    growth = ("doubles every day", "grows by the same amount every day")
    things = (
        ("lilies", "weeds", "algae", "reeds"), ("yeast", "mold", "plankton", "slime"),
        ("ivy", "moss", "fungus", "lichen"),
    )  # fmt: skip
    x, day = rng.choice(things[wording]), rng.randrange(4, 25, 2)
    conflict, twin = (story.format(x=x, d=day, grows=grows) for grows in growth)
    return Twins(conflict, twin, str(day - 1), str(day // 2), str(day // 2), str(day - 1))


def arithmetic(rng: random.Random, wording: int) -> Twins:
    """Two to five steps against one, the others being of 0, so that length and digits are the same at every level; the
    lure stops after the first step."""
    story = ("Start with {a}. {steps}. What is the result?", "You have {a}. {steps}. How many are there now?")[wording]
    plus, minus = (("Add {n}", "Subtract {n}"), ("Get {n}", "Lose {n}"))[wording]
    level = rng.randint(2, STEPS)
    while True:
        start = rng.randint(3, 9)
        values = [rng.choice((-3, -2, -1, 1, 2, 3)) if step < level else 0 for step in range(STEPS)]
        rng.shuffle(values)
        totals = [start + sum(values[: i + 1]) for i in range(STEPS)]
        first = next(i for i, value in enumerate(values) if value)
        if all(0 < total < 20 for total in totals) and totals[-1] != totals[first]:
            break
    signs = [rng.random() < 0.5 if value == 0 else value > 0 for value in values]

    def ask(values: list[int]) -> str:
        steps = [(plus if up else minus).format(n=abs(v)) for up, v in zip(signs, values, strict=True)]
        return story.format(a=start, steps=". ".join(steps))

    one_step = [value if i == first else 0 for i, value in enumerate(values)]
    right, lure = str(totals[-1]), str(totals[first])
    return Twins(ask(values), ask(one_step), right, lure, lure, right, level)
