"""A behaviour of one's own goes through the whole study with its own words, and no file of the package knows of it."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from jaxmech.behavior.behavior import Behavior, Control, Words, parse_choice, shared_prefix, split_of
from jaxmech.behavior.read import read_behavior
from jaxmech.io.settings import build
from jaxmech.report import write_report
from jaxmech.study import run as runner
from jaxmech.study.config import StudyConfig
from jaxmech.study.folder import RunFolder, read_json

PLACES = ("bakery", "harbor", "orchard", "garden", "clinic")
WORDS = {"plus": "quick", "minus": "slow", "varies": "pace", "outcome": "speed said", "tasks": "races"}
ANSWERS, SCORE = ["1", "5", "9"], [0.0, 0.5, 1.0]


def rows(neutral=True):
    """Five families, a pair each, and two controls that nobody has thought of: of ink and of tide."""
    said = {"plus": "generous", "minus": "selfish", "ink:plus": "tall", "ink:minus": "short", "tide:plus": "cheerful"}
    said |= {"tide:minus": "gloomy"} | ({"neutral": "kind"} if neutral else {})
    for place in PLACES:
        before = f"Q: How much does the {place} give?\nA: 5\n"
        for condition, word in said.items():
            text = f"{before}Q: How much does the {word} {place} give?\nA: "
            yield {"family": place, "condition": condition, "text": text, "answers": ANSWERS, "score": SCORE}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "paces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def own_study(small_study, file):
    given = {"behavior": str(file), "words": WORDS | {"controls": {"ink": "that it is ink"}}, "bank": {}}
    fields = {"model": "tiny", "run_dir": small_study.run_dir} | given
    sections = ("gate", "text", "dictionaries", "selection", "fidelity", "dual_process", "patching", "attribution")
    kept = {name: getattr(small_study, name) for name in (*sections, "proximity", "steering", "transfer")}
    few = {"dictionaries": {"train": {"kind": "topk"}}, "selection": {"budget": 0.02}}  # some fire at every token
    return build(StudyConfig, few, StudyConfig(**fields, **kept))


@pytest.mark.slow
def test_the_whole_study_in_its_own_words(own_study):
    path = runner.run_study(own_study, report=write_report)
    results, folder = read_json(path / "results.json"), RunFolder(path)
    words = results["behavior"]["words"]
    assert words["plus"] == "quick" and words["controls"]["ink"]["rules_out"] == "that it is ink"
    assert set(results["behavior"]["controls"]) == {"ink", "tide"} and results["behavior"]["families"] >= 2
    conditions = results["claims"]["behavior"]["conditions"]
    assert {"ink", "tide"} == {c["about"] for c in conditions if c["name"] == "small control"}
    assert np.isfinite(folder.table("contrast", "features")["control_d_z"]).any()
    assert results["selection"]["used"] and {"recovered_to_plus", "p_random"} <= set(results["patching"])
    assert results["steering"]["steered"] == ["neutral"] and results["transfer"] == {}
    page = (path / "report.html").read_text()
    text = re.sub(r"(?s)<(script|style).*?</\1>", "", page)
    assert "Quick or slow: which features" in text and "speed said" in text and "Paces in tiny" in page
    assert "towards quick" in text and "differ only in the pace" in text and "No other races were tried" in text
    for word in ("generous or", "selfish:", "Generous", "share given", r"\bstance", "dictator", "game", "2604.19260"):
        assert not re.search(word, text), word
    assert {state for _, state in runner.plan(own_study)} == {"kept"}


@pytest.mark.slow
def test_with_no_controls_no_neutral_prompts_no_shared_line_and_several_spellings(own_study, file):
    """What is steered is both poles then, by family, and no control is drawn that was not tried."""
    given = [row for row in rows(neutral=False) if ":" not in row["condition"]]
    for row in given:
        row |= {"text": row["text"].replace("\n", " "), "answers": ["1", ["5", "five"], "9"]}
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    path = runner.run_study(build(StudyConfig, {"words": {"controls": {}}}, own_study), report=write_report)
    results, folder = read_json(path / "results.json"), RunFolder(path)
    prompts = folder.table("behavior", "prompts")
    assert (prompts["prefix"] == "").all() and prompts["answers"].iloc[0][1].tolist() == ["5", "five"]
    assert results["steering"]["steered"] == ["plus", "minus"]
    assert results["steering"]["families"] == results["behavior"]["families"] == prompts["family"].nunique()
    assert "control-selected features" not in set(folder.table("patching", "bars")["name"])
    dose = folder.table("steering", "dose").set_index("alpha")
    assert dose.loc[0.0, "g"] == pytest.approx(prompts["g"].mean(), abs=1e-4)


def test_what_a_table_may_leave_out(file, tmp_path):
    made = read_behavior(str(file), words=Words(plus="quick"), rules_out={"tide": "that it is the tide"})
    prompts = made.prompts
    file.write_text(file.read_text().replace("How much", "How\u2028much"))  # no end of a line in JSON
    assert len(read_behavior(str(file)).prompts) == 35
    assert made.name == "paces" and made.controls["tide"] == Control("that it is the tide") and len(prompts) == 35
    assert set(prompts["split"]) >= {"selection", "test"} and (prompts["pair"] == 0).all() and prompts["id"].is_unique
    assert (prompts["prefix"] + prompts["query"] == [row["text"] for row in rows()]).all()
    assert prompts.groupby("family")["prefix"].nunique().eq(1).all() and prompts["prefix"].str.endswith("\n").all()
    table = prompts.assign(answers=prompts["answers"].map(json.dumps), score=prompts["score"].map(json.dumps))
    table.to_csv(tmp_path / "paces.csv", index=False)
    prompts.to_parquet(tmp_path / "paces.parquet")
    for suffix in ("csv", "parquet"):
        again = read_behavior(str(tmp_path / f"paces.{suffix}")).prompts
        assert (again["query"] == prompts["query"]).all() and list(again["score"].iloc[3]) == SCORE


def test_a_function_makes_one(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made_paces.py").write_text(
        "from jaxmech.behavior import read_behavior\n"
        f"def paces():\n    return read_behavior({str(file)!r})\n"
        "def nothing():\n    return 3\n"
    )
    assert isinstance(read_behavior("made_paces:paces"), Behavior)
    with pytest.raises(ValueError, match="made_paces:nothing returned int"):
        read_behavior("made_paces:nothing")
    for name in ("made_paces:none", "no_such_module:paces"):
        with pytest.raises(ValueError, match=f"behavior: {name} names no function"):
            read_behavior(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[3].pop("score"), "prompt .*: score: expected a number for each of 3 answers"),
        (lambda r: r[3].update(score=[0, 1]), "prompt bakery/ink:minus/0: score: expected a number for each of 3"),
        (lambda r: r[3].update(score=[0, 5, 10]), "score: expected numbers from 0 to 1, .*bring another scale"),
        (lambda r: r[3].update(answers=["1"]), "answers: expected at least two in a list"),
        (lambda r: r[3].update(condition="ink:upper"), "condition: expected plus, minus, neutral or a control's"),
        (lambda r: r[3].update(text=""), "text: expected a text that ends right before the answer"),
        (lambda r: r[3].update(split="train"), "split: expected one of selection, development, test"),
        (lambda r: [row.pop("family") for row in r], "the columns family are missing"),
        (lambda r: [row.update(pair=0) for row in r] and r.append(r[0]), "prompt bakery/plus/0: occurs twice"),
        (lambda r: [row.update(condition="plus") for row in r], "none has the condition minus"),
        (lambda r: r.pop(1), "family bakery, pair 0: expected a prompt of both plus and minus, got one"),
        (lambda r: r.pop(3), "family bakery, pair 0: expected a prompt of both ink:plus and ink:minus, got one"),
        (lambda r: r[3].update(pair=0), "pair: some rows have one and others none"),
        (
            lambda r: [row.update(id=str(i), pair=0) for i, row in enumerate(r)] and r.append(r[0] | {"id": "x"}),
            "twice",
        ),
        (lambda r: [row.update(split="test" if i else "selection") for i, row in enumerate(r)], "in several splits"),
        (lambda r: r.__delitem__(slice(7, None)), "split selection: expected at least two families .*got"),
        (lambda r: [row.update(messages=[]) for row in r], "messages need a model's chat template"),
        (lambda r: r.clear(), "are missing"),
    ],
)
def test_what_no_study_can_use_is_named(tmp_path, change, message):
    given, path = list(rows()), tmp_path / "some.jsonl"
    change(given)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    with pytest.raises(ValueError, match=message):
        read_behavior(str(path))


def test_other_mistakes_are_named(tmp_path, file, small_study):
    with pytest.raises(ValueError, match="behavior: no file at"):
        read_behavior(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="behavior: cannot read .*bad.jsonl"):
        read_behavior(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="controls: moon have no prompts in .*; it has ink, tide"):
        read_behavior(str(file), rules_out={"moon": "that it is the moon"})
    with pytest.raises(ValueError, match="^words: paces:make has its own"):
        StudyConfig("tiny", "x", behavior="paces:make", words=WORDS)
    with pytest.raises(ValueError, match="^words.controls.ink: expected what it rules out, in words, got 3"):
        build(StudyConfig, {"words": {"controls": {"ink": 3}}}, small_study)
    with pytest.raises(ValueError, match="bank: builds the prompts of altruism"):
        build(StudyConfig, {"behavior": str(file)}, small_study)


def test_a_family_keeps_its_split_whatever_others_there_are():
    names = [f"family {i}" for i in range(200)]
    alone, among = split_of(names[:60]), split_of(names)
    assert all(among[name] == split for name, split in alone.items())
    counts = pd.Series(among).value_counts()
    assert 80 < counts["selection"] < 120 and 60 < counts["test"] < 100 and 8 < counts["development"] < 35
    for seed in range(40):  # a few families are enough for either
        few = pd.Series(split_of([f"{seed} {i}" for i in range(5)])).value_counts()
        assert few["selection"] >= 2 and few["test"] >= 2


def test_what_prompts_share_is_lines():
    assert shared_prefix(["a\nb\nc", "a\nb\nd"]) == "a\nb\n" and shared_prefix(["ab", "ac"]) == ""
    assert shared_prefix(["a\nb", "a\nb"]) == "a\n" and shared_prefix(["a\n", "a\n"]) == ""
    assert shared_prefix(["a\nx", "b\nx"]) == ""


def test_a_sampled_answer_is_the_longest_allowed_one():
    row = {"answers": [" yes", [" no", " never"], " yes please"], "score": [1.0, 0.0, 0.5]}
    for text, want in ((" yes.", 1.0), ("yes please!", 0.5), ("never", 0.0), ("yesterday", None), ("", None)):
        assert parse_choice(row, text).score == want
    assert parse_choice(row, " so").reason == "no allowed answer"
