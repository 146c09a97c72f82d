"""The dictator-game prompt bank: families of minimal pairs that differ in one stance word, and their controls.

A *family* is one independently worded scenario (`scenarios.py`) in one frame. Its prompts about one stake share a
prefix, worked examples with both stances in other words than the queries', so that a base model answers with an amount.
Such examples also teach which words go with large amounts. So the same pairs are built twice more, behind examples that
teach the reverse ("flipped") and behind examples of a player without any stance ("unstanced").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from jaxmech.behavior import behavior
from jaxmech.behavior.altruism.forms import FORMS, put
from jaxmech.behavior.altruism.scenarios import LEADS, OWN_ACCOUNTS, SCENARIOS, TEST_SCENARIOS, Scenario
from jaxmech.behavior.prompts import (
    allowed_amounts,
    check_boundary,
    differ_elsewhere,
    digest,
    memoized,
    rng,
    tokenize,
)
from jaxmech.behavior.rendering import PLAIN, Rendering
from jaxmech.io.reprs import short_repr
from jaxmech.io.settings import Checked

Words = tuple[str, str]

_SALT = "jaxmech dictator families 1"

EXAMPLES = ("flipped", "unstanced")
"""Controls that ask what the behaviour's own pairs ask, after other worked examples."""
PAIRED = (*EXAMPLES, "heldout", "placebo", "valence", "number", "other", "own_accounts")
"""Controls with two poles; those of `own_accounts` have prompts without a stance too."""
CONTROLS = (*PAIRED, "neutral", "own_accounts_neutral", "keep", "take")
COLUMNS = (*behavior.COLUMNS, "scenario", "word", "frame", "stake", "form")


class Bank(NamedTuple):
    """prompts: one row per prompt; exclusions: one row per pair that failed, and why."""

    prompts: pd.DataFrame
    exclusions: pd.DataFrame

    def __repr__(self) -> str:
        return short_repr(self)


@dataclasses.dataclass(frozen=True)
class BankConfig(Checked):
    """What to build.

    Attributes:
      selection, development, test: families in each split (54, 10 and 16 are in stock).
      pairs: generous/selfish pairs per family. The pairs of a split, family by family, take `stance_words` in turn, and
        within a family another opening sentence each time that the words repeat.
      stakes: endowments; the pairs of a split take them in turn too, one further each time that the words repeat.
      forms: of `forms.FORMS`, where a stance is put and who is asked; the pairs of a split get them evenly, at random.
        Worked examples have their pair's form.
      examples: worked examples in a prefix, even.
      generous_tenths, selfish_tenths: answers given in worked examples of either stance, in tenths of the stake.
      stance_words: (generous, selfish) words of the queries; heldout_words: others, for families of the test split.
      example_words: (generous, selfish) words of the worked examples; may share no word with the two above.
      decoys: (word, tenths given) of further worked examples in which a pleasant word gives little and an unpleasant
        one much. Without them a small model reads the examples as "nice words give": cheerful/gloomy then moves it
        more than generous/selfish does.
      intensifier: put before every such word, here and in the controls; may be empty.
      placebo_words: word pairs that say nothing about giving; every family gets all.
      valence_words: a (pleasant, unpleasant) pair.
      stance_frames: frames in which stance pairs are built ("give", "keep", "take"); "keep" and "take" get their own
        worked examples, hence their own family.
      selection_controls, controls: which of `CONTROLS` to build for families of the selection split, and of the other
        two. "heldout" is built in the test split only; "keep" and "take" are prompts without stance in those frames.
    """

    selection: int = 16
    development: int = 4
    test: int = 8
    pairs: int = 2
    stakes: tuple[int, ...] = (10,)
    forms: tuple[str, ...] = ("word",)
    examples: int = 8
    generous_tenths: tuple[int, ...] = (8, 9)
    selfish_tenths: tuple[int, ...] = (0, 1)
    stance_words: tuple[Words, ...] = (
        ("generous", "selfish"), ("compassionate", "ruthless"), ("benevolent", "grasping"), ("humane", "callous"),
        ("selfless", "mercenary"), ("giving", "hoarding"),
    )  # fmt: skip
    heldout_words: tuple[Words, ...] = (("charitable", "greedy"),)
    example_words: tuple[Words, ...] = (
        ("kind", "stingy"), ("caring", "mean"), ("noble", "cold"), ("helpful", "cruel"), ("warm", "miserly"),
        ("loving", "nasty"),
    )  # fmt: skip
    decoys: tuple[tuple[str, int], ...] = (("joyful", 0), ("sad", 9))
    intensifier: str = "very"
    placebo_words: tuple[Words, ...] = (("tall", "short"), ("left-handed", "right-handed"), ("morning", "evening"))
    valence_words: Words = ("cheerful", "gloomy")
    stance_frames: tuple[str, ...] = ("give",)
    selection_controls: tuple[str, ...] = (*EXAMPLES, "placebo", "valence", "number", "neutral")
    controls: tuple[str, ...] = CONTROLS

    def __post_init__(self):
        super().__post_init__()
        stock = {split: len(names) for split, names in stock_families().items()}
        for split in behavior.SPLITS:
            if not 0 <= getattr(self, split) <= stock[split]:
                raise ValueError(
                    f"{split}: expected 0 to {stock[split]} families, got {getattr(self, split)}; the stock of "
                    f"scenarios is split once and for all, add scenarios to have more"
                )
        limit = len(self.stance_words) * len(LEADS)
        if not 1 <= self.pairs <= limit:
            raise ValueError(f"pairs: expected 1 to {limit} (stance words x openings), got {self.pairs}")
        if self.examples < 2 or self.examples % 2:
            raise ValueError(f"examples: expected an even number from 2, got {self.examples}: stances are balanced")
        shown = {name: getattr(self, name) for name in ("generous_tenths", "selfish_tenths")}
        if self.decoys:
            shown["decoys"] = tuple(tenths for _, tenths in self.decoys)
        for name, levels in shown.items():
            if not levels or not all(0 <= level <= 10 for level in levels):
                raise ValueError(f"{name}: expected tenths of the stake from 0 to 10, got {levels}")
        for stake in self.stakes or (0,):
            allowed_amounts(stake)
        if twice := sorted({stake for stake in self.stakes if self.stakes.count(stake) > 1}):
            raise ValueError(f"stakes: {twice[0]} occurs twice; families get the stakes evenly, list each once")
        self._check_words()
        if not self.forms or len(set(self.forms)) < len(self.forms):
            raise ValueError(f"forms: expected one or more of {', '.join(FORMS)}, each once; got {list(self.forms)}")
        self._check_choices("forms", FORMS)
        self._check_choices("stance_frames", ("give", "keep", "take"))
        self._check_choices("selection_controls", CONTROLS)
        self._check_choices("controls", CONTROLS)

    def _check_words(self):
        for name in ("stance_words", "example_words", "placebo_words"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one pair of words, got none")
        pairs = [*self.stance_words, *self.heldout_words]
        if twice := sorted({w for pair in pairs for w in pair if sum(w in words for words in pairs) > 1}):
            raise ValueError(f"stance_words, heldout_words: {', '.join(twice)} occur in more than one pair")
        asked = {w for pair in (*self.stance_words, *self.heldout_words, self.valence_words) for w in pair}
        shown = {w for pair in self.example_words for w in pair} | {w for w, _ in self.decoys}
        if shared := sorted(asked & shown):
            raise ValueError(
                f"example_words, decoys: {', '.join(shared)} also occur in the queries (stance_words, heldout_words, "
                "valence_words), which would let the model copy an answer; use other words in the worked examples"
            )

    def _check_choices(self, name: str, allowed: tuple[str, ...]) -> None:
        unknown = [value for value in getattr(self, name) if value not in allowed]
        if unknown:
            raise ValueError(f"{name}: expected some of {', '.join(allowed)}; got {', '.join(unknown)}")


def stock_families() -> dict[str, list[str]]:
    """Scenario names by split, in hash order. Depends on the scenarios only, not on settings.

    The cut is fixed, whatever a study asks for: a development family never becomes a test family.
    """
    names, test = (
        sorted((s.name for s in scenarios), key=lambda name: digest(_SALT, name))
        for scenarios in (SCENARIOS, TEST_SCENARIOS)
    )
    return {"selection": names[30:] + names[:20], "development": names[20:30], "test": test}


def build_bank(config: BankConfig, tokenizer: Any, *, seed: int = 0, rendering: Rendering = PLAIN) -> Bank:
    """Builds every prompt and checks it after tokenisation.

    Args:
      tokenizer: called as `tokenizer(text, add_special_tokens=False).input_ids`.
      seed: shuffles worked examples and deals stakes and words; it never moves a family to another split.
      rendering: questions and answers as plain text by default.

    Returns:
      Bank. `prompts` has the columns of a behaviour, see `jaxmech.behavior.behavior`: `answers` are the allowed
      amounts and `score` what each of them gives, as a share of the stake; and scenario, word (of the stance or the
      control), frame, stake and form. `exclusions` has family, split, pair, condition, words, reason.

    Raises:
      ValueError: no pair of some of `stance_words` passes the check.
    """
    scenarios, tokenizer = {s.name: s for s in (*SCENARIOS, *TEST_SCENARIOS)}, memoized(tokenizer)
    rows, failures = [], []
    for split in behavior.SPLITS:
        names = stock_families()[split][: getattr(config, split)]
        for index, name in enumerate(names):
            for family in _families(config, scenarios[name], split, index, seed, rendering):
                for group in family.groups():
                    reason, checked = _check(tokenizer, group)
                    rows += checked
                    if reason:
                        failures.append(_failure(group, reason))
    bank = Bank(pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(failures, columns=behavior.EXCLUDED))
    _refuse_unusable_words(config, bank, tokenizer)
    return bank


@dataclasses.dataclass(frozen=True)
class _Family:
    """One scenario in one frame, with what has been dealt to it; `first` is its first pair's number in the split."""

    config: BankConfig
    scenario: Scenario
    split: str
    frame: str
    first: int
    own: str
    stanced: bool
    controls: tuple[str, ...]
    seed: int
    rendering: Rendering

    @property
    def name(self) -> str:
        return self.scenario.name if self.frame == "give" else f"{self.scenario.name}.{self.frame}"

    def words(self, pair: int) -> Words:
        return self.config.stance_words[(self.first + pair) % len(self.config.stance_words)]

    def stake(self, pair: int) -> int:
        """A control's pair has the stake of the behaviour's own pair of that number."""
        number, stakes = self.first + pair % self.config.pairs, self.config.stakes
        return stakes[(number + number // len(self.config.stance_words)) % len(stakes)]

    def form(self, pair: int) -> str:
        """A control's pair has the form of the behaviour's own pair of that number."""
        number, forms = self.first + pair % self.config.pairs, self.config.forms
        dealt = rng(self.seed, self.split, "forms", number // len(forms)).sample(forms, len(forms))
        return dealt[number % len(forms)]

    def ask(self, pair: int, stance: str = "", *, after: str = "", lead: str = "", wording: str | None = None) -> str:
        wording = wording or getattr(self.scenario, self.frame)
        question = put(self.form(pair), wording, self.scenario.giver, stance and self.intense(stance), after)
        return lead + question.format(E=self.scenario.endowment(self.stake(pair)))

    @property
    def lead(self) -> str:
        return f" {self.scenario.sign}"

    def intense(self, word: str) -> str:
        return f"{self.config.intensifier} {word}".strip()

    def prefix(self, pair: int, control: str | None = None) -> str:
        """Worked examples about the pair's stake: half of either stance, and the decoys, in words and order drawn for
        this family; for `EXAMPLES` the same ones, turned round or without stance and decoys."""
        config, random = self.config, rng(self.seed, self.name, "prefix")
        half, dealt = config.examples // 2, [] if control == "unstanced" else list(config.decoys)
        for side, tenths in enumerate((config.generous_tenths, config.selfish_tenths)):
            words = [both[side] for both in config.example_words]
            words = (random.sample(words, len(words)) * half)[:half]
            dealt += zip(words, (tenths * half)[:half], strict=True)
        random.shuffle(dealt)
        if control == "unstanced":
            dealt = [("", tenths) for _, tenths in dealt]
        elif control == "flipped":
            shown = [tenths for _, tenths in dealt]
            dealt = [(word, min(shown) + max(shown) - tenths) for word, tenths in dealt]
        stake, unit = self.stake(pair), "" if self.scenario.sign else f" {self.scenario.unit}"
        given = [(word, round(stake * tenths / 10)) for word, tenths in dealt]
        solved = [(self.ask(pair, w), f"{a if self.frame == 'give' else stake - a}{unit}") for w, a in given]
        return self.rendering.examples(solved, self.lead)

    def groups(self) -> Iterator[list[dict]]:
        """Pairs (two rows) and single prompts (one row), still unchecked."""
        for control, pair, asked in self._asked():
            conditions = behavior.poles(control) if control is None or len(asked) == 2 else (control,)
            prefix = self.prefix(pair, control)
            yield [
                self._row(prefix, condition, pair, word, question)
                for condition, (word, question) in zip(conditions, asked, strict=True)
            ]

    def _asked(self) -> Iterator[tuple[str | None, int, list[tuple[str, str]]]]:
        """(control, pair, [(word, question) of plus and minus]), or (condition, 0, [("", question)])."""
        config = self.config
        if self.stanced:
            yield from self._own(None)
        if self.frame in self.controls or (self.frame == "give" and "neutral" in self.controls):
            yield "neutral" if self.frame == "give" else f"{self.frame}:neutral", 0, [("", self.ask(0))]
        if self.frame != "give":
            return
        for control in EXAMPLES:
            if control in self.controls:
                yield from self._own(control)
        several = {"heldout": config.heldout_words if self.split == "test" else (), "placebo": config.placebo_words}
        for control, words in several.items():
            for pair, both in enumerate(words if control in self.controls else ()):
                yield control, pair, [(w, self.ask(pair, w)) for w in both]
        simple = {
            "valence": [(w, self.ask(0, w)) for w in config.valence_words],
            "number": [(w, self.ask(0, after=f"who likes {self.intense(w)} numbers")) for w in ("large", "small")],
            "other": [(w, self.ask(0, lead=f"The judge is {self.intense(w)}. ")) for w in self.words(0)],
            "own_accounts": [(w, self.ask(0, w, wording=self.own)) for w in self.words(0)],
            "own_accounts_neutral": [("", self.ask(0, wording=self.own))],
        }
        for control, asked in simple.items():
            if control in self.controls:
                yield control if len(asked) == 2 else "own_accounts:neutral", 0, asked

    def _own(self, control: str | None) -> Iterator[tuple[str | None, int, list[tuple[str, str]]]]:
        """The behaviour's own pairs; a control may ask the same after other worked examples."""
        for pair in range(self.config.pairs):
            lead = LEADS[pair // len(self.config.stance_words)]
            yield control, pair, [(w, self.ask(pair, w, lead=lead)) for w in self.words(pair)]

    def _row(self, prefix: str, condition: str, pair: int, word: str, question: str) -> dict:
        stake, reverse = self.stake(pair), self.frame != "give"
        amounts = allowed_amounts(stake)
        return {
            "id": f"{self.name}/{condition}/{pair}", "family": self.name, "split": self.split, "pair": pair,
            "condition": condition, "prefix": prefix, "query": self.rendering.query(question, self.lead),
            "answers": [str(a) for a in amounts],
            "score": [(stake - a if reverse else a) / stake for a in amounts],
            "scenario": self.scenario.name, "word": word,
            "frame": "own_accounts" if condition.startswith("own_accounts") else self.frame, "stake": stake,
            "form": self.form(pair),
        }  # fmt: skip


def _families(
    config: BankConfig, scenario: Scenario, split: str, index: int, seed: int, rendering: Rendering
) -> Iterator[_Family]:
    """The give family of a scenario, then those of its other frames that the configuration asks for."""
    controls = config.selection_controls if split == "selection" else config.controls
    # Dealt in turn, from an offset given by the seed, so that a split has all words and stakes equally often.
    first, own = (digest(seed, split, what) + index for what in ("pairs", "own"))
    for frame in ("give", "keep", "take"):
        stanced = frame in config.stance_frames
        if frame == "give" or stanced or frame in controls:
            yield _Family(
                config, scenario, split, frame, first=config.pairs * first, own=OWN_ACCOUNTS[own % len(OWN_ACCOUNTS)],
                stanced=stanced, controls=controls, seed=seed, rendering=rendering,
            )  # fmt: skip


def _check(tokenizer: Any, group: list[dict]) -> tuple[str, list[dict]]:
    """("", rows), or (reason, [])."""
    checked = [check_boundary(tokenizer, row["prefix"], row["query"], row["answers"]) for row in group]
    for boundary in checked:
        if boundary.reason:
            return boundary.reason, []
    if len(group) == 1:
        return "", group
    longest = max(len(tokenize(tokenizer, " " + row["word"])) for row in group)
    # One more than the words have: the article before them may change from "a" to "an".
    reason = differ_elsewhere(checked[0].ids, checked[1].ids, longest + 1)
    return reason, [] if reason else group


def _failure(group: list[dict], reason: str) -> dict:
    first = group[0]
    return {
        "family": first["family"], "split": first["split"], "pair": first["pair"],
        "condition": "/".join(row["condition"] for row in group), "words": "/".join(row["word"] for row in group),
        "reason": reason,
    }  # fmt: skip


def _refuse_unusable_words(config: BankConfig, bank: Bank, tokenizer: Any) -> None:
    stanced = bank.prompts[bank.prompts.condition.isin(behavior.poles())]
    tried = bank.exclusions.condition.eq("/".join(behavior.poles())).any()
    if len(stanced) or not tried:
        return
    lengths = "; ".join(
        " / ".join(f"'{w}' {len(tokenize(tokenizer, ' ' + w))} tokens" for w in pair) for pair in config.stance_words
    )
    first = bank.exclusions.iloc[0]
    raise ValueError(
        f"stance_words: expected pairs of words with equally many tokens in this model's tokenizer, got {lengths} "
        f"(in family {first['family']}: {first['reason']}). No generous/selfish pair is left: choose other words, such "
        "as generous / selfish"
    )
