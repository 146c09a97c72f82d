"""Items against solvers that read the question and work the answer out by brute force."""

import itertools
import re
from fractions import Fraction

import pytest

from jaxmech.behavior.dual_process.items import GENERATORS
from jaxmech.behavior.dual_process.prompts import INSTRUCTIONS, build_items


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
        "flowers roses birds sparrows fish sharks dogs terriers trees oaks cars taxis fruits apples insects ants metals"
    ).split()
    subject = lambda s: "iron bars" if s.startswith("iron bars") else s.split()[0]  # noqa: E731
    rules = [(subject(s), re.sub(r"^(be|are) ", "", s[len(subject(s)) :].strip())) for s in premises]
    assert len(rules) == 3 and all(s in (*nouns, "iron bars") for s, _ in rules), rules
    terms = sorted({t for rule in rules for t in rule})
    holds = lambda world, rule: not world[rule[0]] or world[rule[1]]  # noqa: E731
    worlds = [dict(zip(terms, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(terms))]
    return "yes" if all(holds(w, rules[2]) for w in worlds if holds(w, rules[0]) and holds(w, rules[1])) else "no"


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
    assert build_items().item.nunique() >= 64 and items.generator.nunique() >= 5
    assert items[items.condition == "conflict"]["query"].is_unique
    assert items.groupby(["item", "arm"]).size().eq(2).all() and items.id.is_unique
    assert items.groupby("generator").prefix.nunique().eq(1).all()


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
