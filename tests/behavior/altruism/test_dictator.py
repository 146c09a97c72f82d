"""The prompt bank: splits, balance, pair checks, and the message when nothing is left."""

import dataclasses
import hashlib
import re

import pytest

from jaxmech.answers.trie import _spellings
from jaxmech.behavior.altruism import scenarios
from jaxmech.behavior.altruism.altruism import parse
from jaxmech.behavior.altruism.dictator import EXAMPLES, PAIRED, BankConfig, build_bank, stock_families
from jaxmech.behavior.altruism.scenarios import SCENARIOS, TEST_SCENARIOS
from jaxmech.behavior.behavior import SPLITS, poles
from tests.behavior.fake_tokenizer import FakeTokenizer

CONFIG = BankConfig(selection=3, development=2, test=3)
STOCK = (*SCENARIOS, *TEST_SCENARIOS)
PINNED_TEST = ["subway", "auction", "raffle"]
PINNED_DEVELOPMENT = ["lottery", "concert", "airport"]
EXAMPLE = re.compile(r"Q: (.*)\nA: [$€£]?(\d+)(?: \w+)?\n")


@pytest.fixture(scope="module")
def bank():
    return build_bank(CONFIG, FakeTokenizer())


def test_scenarios_are_distinct_and_name_the_person_once():
    assert len(SCENARIOS) >= 56 and len(TEST_SCENARIOS) == 16
    for frame in ("give", "keep", "take"):
        assert len({getattr(s, frame) for s in STOCK}) == len(STOCK)
        for s in STOCK:
            wording = getattr(s, frame)
            assert sum(wording.count(slot) for slot in ("{a}", "{the}", "{A}", "{The}")) == 1, wording
            assert wording.count("{E}") == 1 and wording.endswith("?"), wording


def test_the_test_families_are_locked():
    digest = hashlib.sha256(scenarios._TEST_TABLE.encode()).hexdigest()
    assert digest == scenarios.TEST_SHA256, (
        "the text of the test families has changed. Before any result on them was seen: set TEST_SHA256 to the new "
        "digest. After one was, they may not be reworded: move them to the table of selection and development "
        "families, write fresh ones and lock those, since a wording chosen by its result proves nothing"
    )


def test_splits_are_disjoint_and_depend_on_no_setting():
    stock = stock_families()
    assert sorted(sum(stock.values(), [])) == sorted(s.name for s in STOCK)
    assert set(stock["test"]) == {s.name for s in TEST_SCENARIOS}
    small = build_bank(dataclasses.replace(CONFIG, stakes=(20,)), FakeTokenizer(), seed=5).prompts
    large = build_bank(dataclasses.replace(CONFIG, selection=9, test=7), FakeTokenizer()).prompts
    for split in SPLITS:
        few, many = (set(p[p["split"] == split].scenario) for p in (small, large))
        assert few <= many <= set(stock[split])
    # Pinned: a change of the cut would let development families into the test split.
    assert stock["test"][:3] == PINNED_TEST and stock["development"][:3] == PINNED_DEVELOPMENT


def test_counts_and_conditions(bank):
    p = bank.prompts
    assert bank.exclusions.empty and p.id.is_unique
    assert p[p.frame == "give"].groupby("split").family.nunique().to_dict() == {
        "development": 2,
        "selection": 3,
        "test": 3,
    }
    for condition in poles():
        assert (p[p.condition == condition].groupby("family").size() == CONFIG.pairs).all()
    selection = {c for name in (None, *EXAMPLES, "placebo", "valence", "number") for c in poles(name)} | {"neutral"}
    assert set(p[p.split == "selection"].condition) == selection
    for _, family in p[p.condition == "placebo:plus"].groupby("family"):
        assert list(family.word) == [word for word, _ in CONFIG.placebo_words] and list(family.pair) == [0, 1, 2]
    neutral = {"neutral", "own_accounts:neutral", "keep:neutral", "take:neutral"}
    everything = {c for name in (None, *PAIRED) for c in poles(name)} | neutral
    assert set(p[p.split == "test"].condition) == everything
    assert set(p[p.split == "development"].condition) == everything - set(poles("heldout"))


def test_prefix_is_shared_balanced_and_in_other_words(bank):
    asked = {w for pair in (*CONFIG.stance_words, *CONFIG.heldout_words) for w in pair}
    usual = bank.prompts[~bank.prompts.condition.isin([pole for name in EXAMPLES for pole in poles(name)])]
    for _, family in usual.groupby("family"):
        assert family.prefix.nunique() == 1
        examples = EXAMPLE.findall(family.prefix.iloc[0])
        assert len(examples) == CONFIG.examples + len(CONFIG.decoys)
        row, shares = family.iloc[0], {}
        for question, number in examples:
            words = set(re.findall(r"[a-z-]+", question))
            assert not words & asked
            share = int(number) / row.stake
            side = [i for pair in CONFIG.example_words for i in (0, 1) if pair[i] in words]
            shares.setdefault(side[0] if side else "decoy", []).append(share if row.frame == "give" else 1 - share)
        assert len(shares[0]) == len(shares[1]) == CONFIG.examples // 2
        assert set(map(lambda x: round(x, 6), shares[0])) == {0.8, 0.9}
        assert set(map(lambda x: round(x, 6), shares[1])) == {0.0, 0.1}
        assert sorted(round(x, 6) for x in shares["decoy"]) == [0.0, 0.9]


def by_condition(prompts, condition):
    return prompts[prompts.condition == condition].set_index(["family", "pair"])


@pytest.mark.parametrize("control", EXAMPLES)
@pytest.mark.parametrize("pole", [0, 1])
def test_the_same_pairs_are_asked_after_other_examples(bank, control, pole):
    own, again = (by_condition(bank.prompts, poles(name)[pole]) for name in (None, control))
    same = ["query", "word", "split", "stake", "frame", "answers", "score"]
    assert again[same].equals(own[same])
    for usual, other in zip(own.prefix, again.prefix, strict=True):
        shown, changed = EXAMPLE.findall(usual), EXAMPLE.findall(other)
        if control == "flipped":
            assert [question for question, _ in changed] == [question for question, _ in shown]
            assert [int(a) for _, a in changed] == [9 - int(a) for _, a in shown]
        else:
            assert len({question for question, _ in changed}) == 1 and not re.search(r"\bvery\b", other)
            assert sorted(int(a) for _, a in changed) == [0, 0, 1, 1, 8, 8, 9, 9]


def test_words_and_stakes_are_crossed_with_families():
    config = BankConfig(selection=12, development=0, test=0, stakes=(10, 200), selection_controls=("placebo",))
    p = build_bank(config, FakeTokenizer()).prompts
    plus = p[p.condition == "plus"]
    assert plus.groupby("word").size().to_dict() == {word: 4 for word, _ in config.stance_words}
    assert (plus.groupby(["word", "stake"]).size() == 2).all() and plus.groupby("family").stake.nunique().eq(2).all()
    for (_, stake), part in p.groupby(["family", "stake"]):
        assert part.prefix.nunique() == 1
        numbers = set(re.findall(r"\d+", part.prefix.iloc[0] + "".join(part["query"])))
        assert numbers == {str(round(stake * tenths / 10)) for tenths in (0, 1, 8, 9)} | {str(stake)}
        assert set(part.pair) in ({0, 2}, {1})  # a control's third pair has the first one's stake


def test_every_word_in_every_family_and_leads_when_they_repeat():
    config = BankConfig(selection=0, development=0, test=2, pairs=8, controls=())
    plus = build_bank(config, FakeTokenizer()).prompts.query("condition == 'plus'")
    for _, family in plus.groupby("family"):
        assert set(family.word) == {word for word, _ in config.stance_words}
        assert list(family["query"].str.contains("It is Monday.")) == [False] * 6 + [True] * 2
    assert plus["query"].is_unique


def test_amounts_of_four_digits_may_have_commas():
    config, tokenizer = BankConfig(selection=0, development=0, test=1, stakes=(2000,), controls=()), FakeTokenizer()
    answers = build_bank(config, tokenizer).prompts.answers.iloc[0]
    tokenizer.unk_token_id = None
    read = _spellings(tokenizer, answers)
    assert read[:5] == [("0",), ("200",), ("400",), ("600",), ("800",)]
    assert read[5:] == [(f"{n}00", f"{n[:-1]},{n[-1]}00") for n in ("10", "12", "14", "16", "18", "20")]


def test_pairs_differ_in_their_span_only(bank):
    tokenizer = FakeTokenizer()
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    for control in (None, *PAIRED):
        pairs = bank.prompts[bank.prompts.condition.isin(poles(control))].groupby(["family", "pair"])
        assert len(pairs)
        for _, pair in pairs:
            a, b = map(ids, pair["query"])
            differ = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
            longest = max(len(ids(" " + word)) for word in pair["word"])
            assert 0 < len(differ) <= differ[-1] + 1 - differ[0] <= longest + 1


def test_scores_are_what_the_other_side_gets(bank):
    for row in bank.prompts.itertuples():
        assert row.answers == [str(a) for a in range(0, 11)] and row.stake == 10
        assert row.score == [(10 - a if row.frame in ("keep", "take") else a) / 10 for a in range(0, 11)]
        assert row.frame in row.condition or row.frame in ("give", "own_accounts")
        assert row.query.startswith("Q: ") and row.query.rstrip("$€£").endswith("\nA: ")


@pytest.mark.parametrize("frame, share", [("give", 0.3), ("own_accounts", 0.3), ("keep", 0.7), ("take", 0.7)])
def test_a_sampled_answer_is_worth_what_the_other_side_gets(frame, share):
    assert parse({"stake": 10, "frame": frame}, " $3\nQ: ").score == pytest.approx(share)


def test_the_seed_shuffles_and_nothing_else(bank):
    assert build_bank(CONFIG, FakeTokenizer()).prompts.equals(bank.prompts)
    other = build_bank(CONFIG, FakeTokenizer(), seed=1).prompts
    assert list(other.id) == list(bank.prompts.id) and (other.prefix != bank.prompts.prefix).any()


def test_a_bad_pair_is_counted_and_the_rest_kept():
    whole, bank = (build_bank(CONFIG, FakeTokenizer(splits)) for splits in ({}, {"ruthless": 2}))
    gone, lost = bank.exclusions, whole.prompts[whole.prompts.word.isin(["compassionate", "ruthless"])]
    assert set(gone.words) == {"compassionate/ruthless"} and gone.reason.str.startswith("unequal length").all()
    assert len(gone) == len(lost) / 2 > 0 and set(bank.prompts.id) == set(whole.prompts.id) - set(lost.id)


def test_stance_words_that_all_fail_are_an_error_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"stance_words: .*'generous' 1 tokens / 'selfish' 2 tokens.*choose other words"
    ):
        build_bank(dataclasses.replace(CONFIG, stance_words=(("generous", "selfish"),)), FakeTokenizer({"selfish": 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": 17}, "test: expected 0 to 16"),
        ({"pairs": 31}, "pairs: expected 1 to 30"),
        ({"examples": 7}, "examples: expected an even number"),
        ({"stakes": (25,)}, "stake: expected a multiple of 10"),
        ({"stakes": ()}, "stake"),
        ({"stance_words": (("kind", "mean"),)}, "example_words, decoys: kind, mean"),
        ({"controls": ("placebos",)}, "controls: .* got placebos"),
        ({"generous_tenths": (11,)}, "generous_tenths"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_stanced_frames_and_small_stakes():
    config = dataclasses.replace(CONFIG, stance_frames=("give", "take"), stakes=(7,), selection_controls=())
    p = build_bank(config, FakeTokenizer()).prompts
    taken = p[(p.frame == "take") & (p.split == "selection")]
    assert set(taken.condition) == set(poles()) and (taken.family == taken.scenario + ".take").all()
    assert p.answers.map(len).eq(8).all()
