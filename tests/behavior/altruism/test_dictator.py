"""The prompt bank: splits, balance, pair checks, and the message when nothing is left."""

import dataclasses
import re

import pytest

from jaxmech.behavior.altruism.dictator import PAIRED, BankConfig, build_bank, stock_families
from jaxmech.behavior.altruism.scenarios import SCENARIOS
from jaxmech.behavior.behavior import SPLITS, poles
from tests.behavior.fake_tokenizer import FakeTokenizer

CONFIG = BankConfig(selection=3, development=2, test=3)
PINNED_TEST = ["choir", "refugee", "flood"]
PINNED_DEVELOPMENT = ["lottery", "concert", "airport"]
EXAMPLE = re.compile(r"Q: (.*)\nA: [$€£]?(\d+)(?: \w+)?\n")


@pytest.fixture(scope="module")
def bank():
    return build_bank(CONFIG, FakeTokenizer())


def test_scenarios_are_distinct_and_name_the_person_once():
    assert len(SCENARIOS) >= 56
    for frame in ("give", "keep", "take"):
        assert len({getattr(s, frame) for s in SCENARIOS}) == len(SCENARIOS)
        for s in SCENARIOS:
            wording = getattr(s, frame)
            assert sum(wording.count(slot) for slot in ("{a}", "{the}", "{A}", "{The}")) == 1, wording
            assert wording.count("{E}") == 1 and wording.endswith("?"), wording


def test_splits_are_disjoint_and_depend_on_no_setting():
    stock = stock_families()
    assert sorted(sum(stock.values(), [])) == sorted(s.name for s in SCENARIOS)
    small = build_bank(dataclasses.replace(CONFIG, stakes=(20,)), FakeTokenizer(), seed=5).prompts
    large = build_bank(dataclasses.replace(CONFIG, selection=9, test=7), FakeTokenizer()).prompts
    for split in SPLITS:
        few, many = (set(p[p["split"] == split].scenario) for p in (small, large))
        assert few <= many <= set(stock[split])
    # Pinned: a change of the cut would let development families into the test split.
    assert stock["test"][:-4:-1] == PINNED_TEST and stock["development"][:3] == PINNED_DEVELOPMENT


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
    assert set(p[p.split == "selection"].condition) == {*poles(), *poles("placebo"), "neutral"}
    neutral = {"neutral", "own_accounts:neutral", "keep:neutral", "take:neutral"}
    everything = {c for name in (None, *PAIRED) for c in poles(name)} | neutral
    assert set(p[p.split == "test"].condition) == everything
    assert set(p[p.split == "development"].condition) == everything - set(poles("heldout"))


def test_prefix_is_shared_balanced_and_in_other_words(bank):
    asked = {w for pair in (*CONFIG.stance_words, *CONFIG.heldout_words) for w in pair}
    for _, family in bank.prompts.groupby("family"):
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


def test_the_seed_shuffles_and_nothing_else(bank):
    assert build_bank(CONFIG, FakeTokenizer()).prompts.equals(bank.prompts)
    other = build_bank(CONFIG, FakeTokenizer(), seed=1).prompts
    assert list(other.id) == list(bank.prompts.id) and (other.prefix != bank.prompts.prefix).any()


def test_a_bad_pair_is_counted_and_the_rest_kept():
    bank = build_bank(CONFIG, FakeTokenizer({"ruthless": 2}))
    gone = bank.exclusions
    assert set(gone.words) == {"compassionate/ruthless"} and gone.reason.str.startswith("unequal length").all()
    assert len(gone) == 8 and set(bank.prompts[bank.prompts.condition == "plus"].pair) == {0}


def test_stance_words_that_all_fail_are_an_error_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"stance_words: .*'generous' 1 tokens / 'selfish' 2 tokens.*choose other words"
    ):
        build_bank(dataclasses.replace(CONFIG, stance_words=(("generous", "selfish"),)), FakeTokenizer({"selfish": 2}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": 21}, "test: expected 0 to 20"),
        ({"pairs": 11}, "pairs: expected 1 to 10"),
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
