"""Items on what is known by heart: semantic illusions, and the anchors of System 1.

Anchors are what intuition is for (antonyms, associations, familiar facts); their conflict items turn what comes to mind
into the lure. Without them "System 1" would only mean "not System 2".
"""

from __future__ import annotations

import random

from jaxmech.behavior.dual_process.twins import Twins

# (statement, who or what makes it true, an impostor that readers let pass)
FACTS = (
    ("{} took two of each animal onto the ark", "Noah", "Moses"),
    ("{} led his people through the Red Sea", "Moses", "Noah"),
    ("{} wrote Romeo and Juliet", "Shakespeare", "Dickens"),
    ("{} wrote Oliver Twist", "Dickens", "Shakespeare"),
    ("{} painted the Mona Lisa", "Leonardo", "Raphael"),
    ("{} composed the Moonlight Sonata", "Beethoven", "Mozart"),
    ("{} composed The Magic Flute", "Mozart", "Beethoven"),
    ("{} proposed the theory of relativity", "Einstein", "Newton"),
    ("{} explained why apples fall to the ground", "Newton", "Einstein"),
    ("{} wrote about the origin of species", "Darwin", "Pasteur"),
    ("{} was the first man on the Moon", "Armstrong", "Gagarin"),
    ("{} was the first man in space", "Gagarin", "Armstrong"),
    ("{} was defeated at Waterloo", "Napoleon", "Nelson"),
    ("{} sailed to America in 1492", "Columbus", "Magellan"),
    ("{} was the first president of the United States", "Washington", "Jefferson"),
    ("{} told the tale of the little mermaid", "Andersen", "Grimm"),
    ("{} was asked to lie still in a coffin of glass", "Snow White", "Cinderella"),
    ("{} lost a glass slipper at the ball", "Cinderella", "Snow White"),
    ("{} climbed a beanstalk to the giant", "Jack", "Hansel"),
    ("{} could not tell a lie without his nose growing", "Pinocchio", "Peter Pan"),
    ("{} lived in Sherwood Forest and robbed the rich", "Robin Hood", "King Arthur"),
    ("{} pulled a sword out of a stone", "King Arthur", "Robin Hood"),
    ("the largest ocean on Earth is the {}", "Pacific", "Atlantic"),
    ("the ocean between Europe and America is the {}", "Atlantic", "Pacific"),
    ("the largest planet is {}", "Jupiter", "Saturn"),
    ("the planet with the bright rings is {}", "Saturn", "Jupiter"),
    ("the river that flows through Egypt is the {}", "Nile", "Amazon"),
    ("the river that flows through Brazil is the {}", "Amazon", "Nile"),
    ("the insects that make honey are {}", "bees", "wasps"),
    ("the gas that we must breathe to live is {}", "oxygen", "nitrogen"),
)

ANTONYMS = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("old", "young"), ("rich", "poor"),
    ("happy", "sad"), ("light", "dark"), ("hard", "soft"), ("wet", "dry"), ("full", "empty"), ("strong", "weak"),
    ("early", "late"), ("clean", "dirty"), ("open", "closed"), ("thick", "thin"), ("loud", "quiet"), ("sweet", "sour"),
)  # fmt: skip

ASSOCIATIONS = (
    ("salt", "pepper"), ("bread", "butter"), ("thunder", "lightning"), ("bride", "groom"), ("knife", "fork"),
    ("lock", "key"), ("needle", "thread"), ("cup", "saucer"), ("hammer", "nail"), ("table", "chair"), ("bow", "arrow"),
    ("king", "queen"), ("nurse", "doctor"), ("sun", "moon"), ("dog", "cat"), ("pen", "paper"), ("horse", "cart"),
    ("shoe", "sock"), ("brush", "paint"), ("lamp", "light"), ("spider", "web"), ("bee", "honey"), ("hen", "egg"),
    ("cow", "milk"),
)  # fmt: skip

CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Russia", "Moscow"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Cuba", "Havana"),
    ("Peru", "Lima"), ("Ireland", "Dublin"), ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Poland", "Warsaw"),
    ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Turkey", "Ankara"),
    ("Belgium", "Brussels"), ("Hungary", "Budapest"), ("Finland", "Helsinki"), ("Iraq", "Baghdad"), ("Iran", "Tehran"),
    ("Kenya", "Nairobi"),
)  # fmt: skip


def semantic_illusion(rng: random.Random, wording: int) -> Twins:
    """A familiar statement with an impostor in it, which sounds right; in the twin it is."""
    statement, truth, impostor = rng.choice(FACTS)
    story, said, wrong = (
        ("Say {order}: {s}.", ("true", "false"), "false"),
        ("Is it wrong that {s}, {order}?", ("yes", "no"), "yes"),
        ("Is it right that {s}, {order}?", ("yes", "no"), "no"),
    )[wording]
    order = " or ".join(said if rng.random() < 0.5 else said[::-1])
    conflict, twin = (story.format(s=statement.format(name), order=order) for name in (impostor, truth))
    lure = said[1] if wrong == said[0] else said[0]
    return Twins(conflict, twin, wrong, lure, lure, wrong)


def anchor(rng: random.Random, wording: int) -> Twins:
    """What comes to mind is right, or, in the conflict item, must be set aside."""
    if wording == 0:
        word, opposite = rng.sample(rng.choice(ANTONYMS), 2)
        conflict, twin = (f"What is the opposite of {what}{word}?" for what in ("the opposite of ", ""))
        return Twins(conflict, twin, word, opposite, opposite, word)
    pairs = ASSOCIATIONS if wording == 1 else CAPITALS
    (word, familiar), (_, other) = rng.sample(pairs, 2)
    conflict, twin = (
        (
            f"In this code {word} is paired with {other}. What is {word} paired with?",
            f"In most minds {word} has a partner. What is {word} paired with?",
        ),
        (
            f"Suppose {word} moved its capital to {other}. What is the capital of {word} then?",
            f"Suppose {word} left its capital as it is. What is the capital of {word} then?",
        ),
    )[wording - 1]
    return Twins(conflict, twin, other, familiar, familiar, other)
