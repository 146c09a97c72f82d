"""Items against solvers that read the question and work the answer out by brute force."""

import itertools
import re
from fractions import Fraction

import pytest

from jaxmech.behavior.dual_process.items import GENERATORS
from jaxmech.behavior.dual_process.prompts import INSTRUCTIONS, build_items, shared_tail
from tests.behavior.fake_tokenizer import FakeTokenizer


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def solve_bat_and_ball(q):
    total, difference = numbers(q)
    fits = [
        y
        for y in range(100)
        for x in range(100)
        if x + y == total and x == (y + difference if " more than " in q else difference)
    ]
    assert len(fits) == 1
    return str(fits[0])


def solve_machines(q):
    workers, made, minutes, *asked = numbers(q) if not q.startswith("It takes") else _printers(q)
    rate = Fraction(made, workers * minutes)
    team, want = asked
    return str(Fraction(want) / (rate * team))


def _printers(q):
    n, minutes, made, *rest = numbers(q)
    return [n, made, minutes, *(rest if len(rest) == 2 else [n, *rest])]


def solve_doubling(q):
    (days,) = numbers(q)
    size = [Fraction(2) ** t if "doubles" in q else Fraction(t) for t in range(days + 1)]
    return str(size.index(size[-1] / 2))


def solve_arithmetic(q):
    total = numbers(q)[0]
    for verb, n in re.findall(r"(Add|Get|Subtract|Lose) (\d+)", q):
        total += int(n) if verb in ("Add", "Get") else -int(n)
    return str(total)


def solve_ratio_bias(q):
    shares = {
        letter: Fraction(*numbers(part)[:2]) for letter, part in re.findall(r"(?:Bowl|Urn|Tray) ([AB])([^.]*)", q)
    }
    assert len(shares) == 2 and shares["A"] != shares["B"]
    return max(shares, key=shares.get)


def solve_base_rate(q):
    counts = {job: int(n) for n, job in re.findall(r"(\d+) (?:are |describe )?(?:a )?([a-z]+?)s?\b", q)}
    counts = {job: n for job, n in counts.items() if job not in ("people", "file")}
    assert len(counts) == 2 and sum(counts.values()) == 100, counts
    return max(counts, key=counts.get)


def solve_syllogism(q):
    """Every assignment of the three properties to one individual: valid when no assignment is a counterexample."""
    text = re.sub(r"^Suppose all|^All", "", q.split(", yes or no?")[0]).replace(" Does it follow that all ", "|")
    text = text.replace(". Must all ", "|").replace(" Must all ", "|").replace(" then ", " ")
    text = re.sub(r"\. All | and all ", "|", text).replace(".", "").replace("|", " | ")
    premises = [part.strip() for part in text.split("|")]
    nouns = (
        "flowers roses tulips daisies birds sparrows owls geese fish sharks trout eels dogs terriers poodles beagles "
        "trees oaks pines elms cars taxis limousines jeeps fruits apples plums figs insects ants wasps beetles metals"
    ).split()
    pairs = ("iron bars", "steel rods", "copper pipes")
    subject = lambda s: next((p for p in pairs if s.startswith(p)), s.split()[0])  # noqa: E731
    rules = [(subject(s), re.sub(r"^(be|are) ", "", s[len(subject(s)) :].strip())) for s in premises]
    assert len(rules) == 3 and all(s in (*nouns, *pairs) for s, _ in rules), rules
    terms = sorted({t for rule in rules for t in rule})
    holds = lambda world, rule: not world[rule[0]] or world[rule[1]]  # noqa: E731
    worlds = [dict(zip(terms, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(terms))]
    return "yes" if all(holds(w, rules[2]) for w in worlds if holds(w, rules[0]) and holds(w, rules[1])) else "no"


def solve_conjunction(q):
    """Whatever the person is like, one statement is at least as likely as the same and another."""
    said = re.search(r"A, (.*?), or B, (.*)\?", q).groups()
    events = [set(re.sub(r"^(that )?\w+ ", "", part).split(" and ")) for part in said]
    assert events[0] < events[1] or events[1] < events[0]
    return "A" if events[0] < events[1] else "B"


def solve_framing(q):
    """Who or what is left, of a total."""
    total = numbers(q)[0]
    kept = {}
    for letter, part in re.findall(r"(?:plan|offer) ([AB]) ([^.?]*\d[^.?]*)\.", q):
        (n,) = numbers(part)
        assert bool(re.search("live|keep|saved", part)) != bool(re.search("die|lose|cut", part))
        kept[letter] = n if re.search("live|keep|saved", part) else total - n
    assert len(kept) == 2 and kept["A"] != kept["B"] and 0 < min(kept.values()) <= max(kept.values()) < total
    return max(kept, key=kept.get)


TRUE = {
    "two of each animal": "Noah", "Red Sea": "Moses", "Romeo": "Shakespeare", "Oliver": "Dickens",
    "Mona Lisa": "Leonardo", "Moonlight": "Beethoven", "Magic Flute": "Mozart", "relativity": "Einstein",
    "apples fall": "Newton", "species": "Darwin", "on the Moon": "Armstrong", "in space": "Gagarin",
    "Waterloo": "Napoleon", "1492": "Columbus", "first president": "Washington", "mermaid": "Andersen",
    "coffin": "Snow White", "slipper": "Cinderella", "beanstalk": "Jack", "nose": "Pinocchio",
    "Sherwood": "Robin Hood", "sword": "King Arthur", "largest ocean": "Pacific", "between Europe": "Atlantic",
    "largest planet": "Jupiter", "rings": "Saturn", "Egypt": "Nile", "Brazil": "Amazon", "honey": "bees",
    "breathe": "oxygen",
}  # fmt: skip


def solve_semantic_illusion(q):
    (name,) = [name for part, name in TRUE.items() if part in q]
    right = re.search(rf"\b{name}\b", q) is not None
    if q.startswith("Say "):
        return "true" if right else "false"
    return "yes" if right == q.startswith("Is it right") else "no"


OPPOSITES = (
    "hot cold big small tall short fast slow old young rich poor happy sad light dark hard soft wet dry full empty "
    "strong weak early late clean dirty open closed thick thin loud quiet sweet sour"
).split()
GOES_WITH = dict(
    pair.split("-")
    for pair in (
        "salt-pepper bread-butter thunder-lightning bride-groom knife-fork lock-key needle-thread cup-saucer "
        "hammer-nail table-chair bow-arrow king-queen nurse-doctor sun-moon dog-cat pen-paper horse-cart shoe-sock "
        "brush-paint lamp-light spider-web bee-honey hen-egg cow-milk France-Paris Italy-Rome Spain-Madrid "
        "Germany-Berlin Russia-Moscow Japan-Tokyo China-Beijing Egypt-Cairo Greece-Athens Cuba-Havana Peru-Lima "
        "Ireland-Dublin Austria-Vienna Portugal-Lisbon Poland-Warsaw Norway-Oslo Sweden-Stockholm Turkey-Ankara "
        "Belgium-Brussels Hungary-Budapest Finland-Helsinki Iraq-Baghdad Iran-Tehran Kenya-Nairobi"
    ).split()
)


def solve_anchor(q):
    if turns := q.count("opposite of"):
        word = q.rstrip("?").split()[-1]
        for _ in range(turns):
            word = OPPOSITES[OPPOSITES.index(word) ^ 1]
        return word
    if stated := re.search(r"(?:is paired with|its capital to) (\w+)\.", q):
        return stated[1]
    return GOES_WITH[re.search(r"What is (\w+) paired|capital of (\w+) then", q).group(1, 2)[" capital of " in q]]


@pytest.fixture(scope="module")
def items():
    return build_items(per_generator=24, seed=3)


def question(query):
    return re.fullmatch(r"Q: (.*)\nA: ?", query)[1]


@pytest.mark.parametrize("generator", [g.name for g in GENERATORS])
def test_solver_agrees(items, generator):
    solve = globals()[f"solve_{generator}"]
    rows = items[(items.generator == generator) & (items.arm == "demand")]
    assert len(rows) == 48
    for row in rows.itertuples():
        assert solve(question(row.query)) == row.correct, row.query
        assert (row.lure == row.correct) == (row.condition == "no_conflict"), row.query


def test_enough_items_from_enough_generators(items):
    assert build_items().item.nunique() >= 64 and items.generator.nunique() == 11
    assert items[items.condition == "conflict"]["query"].is_unique
    assert items.groupby(["item", "arm"]).size().eq(2).all() and items.id.is_unique
    assert items.groupby("generator").prefix.nunique().eq(1).all()


def test_every_generator_has_64_distinct_items():
    table = build_items(per_generator=64)
    demand = table[table.arm == "demand"]
    distinct = demand.groupby(["generator", "condition"]).text.nunique()
    assert len(distinct) == 22 and (distinct == 64).all()


def test_a_twin_of_machines_differs_in_the_team_alone(items):
    """And is not the harder one: its answer stands in the question, as the lure of the conflict item does."""
    for _, pair in items[(items.generator == "machines") & (items.arm == "demand")].groupby("item"):
        conflict, twin = pair.set_index("condition").loc[["conflict", "no_conflict"]].itertuples()
        n, *_, asked = numbers(twin.query)
        assert conflict.query.replace(f"do {asked} ", f"do the same {n} ") == twin.query
        assert twin.correct == conflict.lure == str(asked) and conflict.digits == twin.digits


def test_arithmetic_is_graded_and_otherwise_alike(items):
    graded = items[(items.generator == "arithmetic") & (items.arm == "demand")]
    assert set(graded.level) == {1, 2, 3, 4, 5} and (items[items.generator != "arithmetic"].level == 0).all()
    for row in graded.itertuples():
        steps = [int(n) for n in re.findall(r"(?:Add|Get|Subtract|Lose) (\d+)", row.query)]
        assert len(steps) == 5 and sum(n > 0 for n in steps) == row.level
    assert (graded.groupby("item").words.nunique() == 1).all()
    assert (graded[graded.condition == "no_conflict"].level == 1).all()


def test_the_tokens_read_are_those_after_the_instruction(items):
    tokenizer = FakeTokenizer()
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    tokens = [ids(query) for query in items["query"]]
    tail = shared_tail(items, tokens)
    for row, read, query in zip(items.itertuples(), tail, tokens, strict=True):
        if row.arm == "demand":
            assert read == len(query)
        else:
            said = next(said for pair in INSTRUCTIONS for said in pair if said in row.query)
            assert read == len(ids("." + row.query.split(said)[1]))  # both instructions end in a full stop


def test_instructions_of_a_pair_are_equally_long():
    assert all(len(think.split()) == len(instinct.split()) for think, instinct in INSTRUCTIONS)


def test_worked_examples_are_right(items):
    for question_, answer in {e for g in GENERATORS if g.numeric for e in g.examples}:
        left, word, right = re.fullmatch(r"What is (\d+) (plus|minus|times) (\d+)\?", question_).groups()
        signed = {"plus": int(left) + int(right), "minus": int(left) - int(right), "times": int(left) * int(right)}
        assert str(signed[word]) == answer


def test_instruction_arm_shares_everything_behind_the_instruction(items):
    assert len(INSTRUCTIONS) >= 6
    for _, pair in items[items.arm == "instruction"].groupby("item"):
        think, instinct = pair.set_index("condition").loc[["think", "instinct"], "query"]
        wordings = [w for w in INSTRUCTIONS if w[0] in think and w[1] in instinct]
        assert len(wordings) == 1
        assert think.replace(wordings[0][0], "") == instinct.replace(wordings[0][1], "")
        conflict = items[(items["item"] == pair["item"].iloc[0]) & (items.condition == "conflict")].iloc[0]
        assert think.endswith(conflict["query"].removeprefix("Q: ")) and pair.correct.eq(conflict.correct).all()


def test_answers_and_covariates(items):
    for row in items.itertuples():
        right, wrong = row.answers
        assert right.strip() == row.correct and wrong != right and row.score == [1.0, 0.0]
        if row.condition != "no_conflict":
            assert wrong.strip() == row.lure
        assert row.digits == sum(c.isdigit() for c in row.query) and row.text == row.prefix + row.query
    # Where options are offered, conflict does not tell which of them is right.
    offered = items[(items.option != 0) & (items.condition == "conflict")]
    for _, rows in offered.groupby("generator"):
        assert abs(rows.option.mean()) < 0.7


def test_deterministic_and_seeded():
    assert build_items(per_generator=4, seed=1).equals(build_items(per_generator=4, seed=1))
    assert not build_items(per_generator=4, seed=1).text.equals(build_items(per_generator=4, seed=2).text)
    with pytest.raises(ValueError, match="per_generator"):
        build_items(per_generator=0)
    with pytest.raises(ValueError, match="distinct items, got 2000"):
        build_items(per_generator=2000)
