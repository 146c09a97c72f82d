"""Items that offer their answers: ratios, base rates, conjunctions, gains and losses, syllogisms.

Which of the options is right is no clue to which is intuitive: letters and orders are drawn.
"""

from __future__ import annotations

import random

from jaxmech.behavior.dual_process.twins import Twins

LETTERS = ("A", "B")


def ratio_bias(rng: random.Random, wording: int) -> Twins:
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
    if rng.random() < 0.5:
        return Twins(ask(worse, better), ask(large, better), "B", "A", "A", "B")
    return Twins(ask(better, worse), ask(better, large), "A", "B", "B", "A")


def base_rate(rng: random.Random, wording: int) -> Twins:
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


# (what is known, what fits it, what does not)
_PEOPLE = (
    ("reads about rivers and forests", "plants trees", "collects stamps"),
    ("was the best at sums in school", "plays chess", "boxes"),
    ("lifts weights every morning", "boxes", "knits"),
    ("cannot see a stray cat without feeding it", "walks dogs", "hunts"),
    ("sang before learning to speak", "plays the violin", "mends cars"),
    ("took every clock in the house apart", "mends cars", "dances"),
    ("hums and taps all day", "dances", "plays chess"),
    ("spends the weekends with old maps", "collects stamps", "plants trees"),
)


def conjunction(rng: random.Random, wording: int) -> Twins:
    """One statement against the same and another: the lure fits the person, in the twin it does not."""
    story = (
        "{name} {known}. Which is more likely: A, {name} {a}, or B, {name} {b}?",
        "{name} {known}. What would you rather bet on: A, that {name} {a}, or B, that {name} {b}?",
        "It is known that {name} {known}. Is it more probable A, that {name} {a}, or B, that {name} {b}?",
    )[wording]
    name = rng.choice(("Mara", "Tom", "Ines", "Paul", "Greta", "Hugo"))
    job = rng.choice(("works in an office", "sells shoes", "drives a bus", "teaches", "bakes bread", "paints houses"))
    known, fits, unfit = rng.choice(_PEOPLE)
    swapped = rng.random() < 0.5
    right, lure = LETTERS[swapped], LETTERS[not swapped]

    def ask(also: str) -> str:
        first, second = (job, f"{job} and {also}")[:: -1 if swapped else 1]
        return story.format(name=name, known=known, a=first, b=second)

    return Twins(ask(fits), ask(unfit), right, lure, right, lure)


def framing(rng: random.Random, wording: int) -> Twins:
    """A plan told as a gain against one told as a loss: the gain sounds better; in the twin it is."""
    gain, loss, story = (
        (
            "{s} people live", "{d} people die",
            "{t} people are ill. Under plan A {a}. Under plan B {b}. Under which plan are more people alive?",
        ),
        (
            "you keep ${s}", "you lose ${d}",
            "You have ${t}. With offer A {a}. With offer B {b}. Which offer leaves you more?",
        ),
        (
            "{s} jobs are saved", "{d} jobs are cut",
            "A firm has {t} jobs. Under plan A {a}. Under plan B {b}. Which plan leaves more jobs?",
        ),
    )[wording]  # fmt: skip
    total = rng.randrange(300, 1000, 100)
    left = rng.randrange(150, total - 50, 50)  # after the loss
    fewer, more = rng.randrange(50, left, 50), rng.randrange(left + 50, total, 50)
    gain_is_b = rng.random() < 0.5
    lure, right = LETTERS[gain_is_b], LETTERS[not gain_is_b]

    def ask(kept: int) -> str:
        first, second = (gain.format(s=kept), loss.format(d=total - left))[:: -1 if gain_is_b else 1]
        return story.format(t=total, a=first, b=second)

    return Twins(ask(fewer), ask(more), right, lure, lure, right)


# (kind, examples of it, property of the kind that other things have as well)
_KINDS = (
    ("flowers", ("roses", "tulips", "daisies"), "need water"),
    ("birds", ("sparrows", "owls", "geese"), "have two legs"),
    ("fish", ("sharks", "trout", "eels"), "can swim"), ("dogs", ("terriers", "poodles", "beagles"), "have four legs"),
    ("trees", ("oaks", "pines", "elms"), "grow in soil"), ("cars", ("taxis", "limousines", "jeeps"), "have wheels"),
    ("fruits", ("apples", "plums", "figs"), "contain sugar"), ("insects", ("ants", "wasps", "beetles"), "are small"),
    ("metals", ("iron bars", "steel rods", "copper pipes"), "are hard"),
)  # fmt: skip
_ALIEN = (("fruits", "contain sugar"), ("cars", "have wheels"), ("trees", "grow in soil"))
_NEVER_ALIEN = tuple(kind for kind in _KINDS if kind[0] in ("birds", "fish", "dogs", "insects", "metals"))


def syllogism(rng: random.Random, wording: int) -> Twins:
    """Validity against believability: half believable but invalid, half unbelievable but valid."""
    story = (
        "All {a} {p}. All {b} {r}. Does it follow that all {b} {c}, yes or no?",
        "Suppose all {a} {p} and all {b} {r}. Must all {b} then {c}, yes or no?",
    )[wording]
    bare = lambda verb: verb.replace("are ", "be ") if wording else verb  # noqa: E731
    if rng.random() < 0.5:
        a, members, p = rng.choice(_KINDS)
        b = rng.choice(members)
        invalid = story.format(a=a, b=b, p=p, r=p, c=bare(f"are {a}"))
        return Twins(invalid, story.format(a=a, b=b, p=p, r=f"are {a}", c=bare(p)), "no", "yes", "yes", "no")
    (a, p), (_, members, own) = rng.choice(_ALIEN), rng.choice(_NEVER_ALIEN)
    b = rng.choice(members)
    valid = story.format(a=a, b=b, p=p, r=f"are {a}", c=bare(p))
    return Twins(valid, story.format(a=a, b=b, p=p, r=own, c=bare(p)), "yes", "no", "no", "yes")
