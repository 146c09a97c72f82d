"""A study's configuration: one YAML file in sections, checked against one dataclass; unknown keys are errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.behavior import Words
from jaxmech.behavior.read import is_table
from jaxmech.contrast.selection import Rule
from jaxmech.io.settings import Checked, load_settings
from jaxmech.sae.training.config import SAETrainConfig

_LARGEST_SEED = 2**31 - 8  # JAX, NumPy and pandas all have to take it
_BANK = BankConfig(selection=32, development=8, test=16, stakes=(10, 20))
_FEWEST_FAMILIES = 6


def _at_least(settings: object, **least: float) -> None:
    for name, value in least.items():
        if (got := getattr(settings, name)) < value:
            what = "a number that is not negative" if value == 0 else f"at least {value}"
            raise ValueError(f"{name}: expected {what}, got {got}")


def _enough_directions(settings: PatchingSettings | SteeringSettings | TransferSettings) -> None:
    if (count := settings.random_directions) < 2:
        raise ValueError(f"random_directions: a null needs at least 2 directions, got {count}")


def _ascending(name: str, values: Sequence[float]) -> None:
    if list(values) != sorted(set(values)) or 0.0 not in values or len(values) < 3:
        raise ValueError(f"{name}: expected at least three ascending numbers with 0 among them, got {list(values)}")


def _with_one(name: str, values: Sequence[float]) -> None:
    if not {-1.0, 1.0} <= set(values):
        raise ValueError(f"{name}: expected -1 and 1 among them, at which directions are compared, got {list(values)}")


@dataclasses.dataclass(frozen=True)
class StudyWords(Checked, Words):
    """How a behaviour of your own names things; `controls` says what each control rules out."""

    controls: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        for name, said in self.controls.items():
            if not isinstance(said, str):
                raise ValueError(f"controls.{name}: expected what it rules out, in words, got {said!r}")


@dataclasses.dataclass(frozen=True)
class GateSettings(Checked):
    """When a behaviour counts as one: its shift and the semantic part of it in percentage points, what controls may
    shift as a share of it, the valid answers' mass; answers sampled per prompt as a cross-check, 0 for none."""

    shift_pp: float = 10.0
    semantic_pp: float = 10.0
    control_ratio: float = 0.34
    mass: float = 0.8
    samples: int = 8

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, shift_pp=0, semantic_pp=0, control_ratio=0, mass=0, samples=0)
        if self.mass > 1:
            raise ValueError(f"mass: expected a probability from 0 to 1, got {self.mass}")


@dataclasses.dataclass(frozen=True)
class TextSettings(Checked):
    """What dictionaries are trained on: a file, a data set (of the hub, or pydoc-topics, which comes with Python), or
    else the model's own samples; its number of rows, and tokens per row."""

    file: str | None = None
    dataset: str | None = None
    count: int = 128
    length: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.file and self.dataset:
            raise ValueError(
                f"file, dataset: expected one of them, got {self.file} and {self.dataset}; set the other to null"
            )
        _at_least(self, count=2, length=2)


@dataclasses.dataclass(frozen=True)
class DictionarySettings(Checked):
    """Dictionaries to open (`path`: a folder, a hub id, a suite's short name), or how they are trained on the study's
    text; every layer where none are given. seeds: 1, or 2 for a second training that shows what hangs on the draw."""

    path: str | None = None
    layers: list[int] | None = None
    batch: int = 512
    epochs: int = 2
    buffer: int = 65536
    seeds: int = 2
    train: SAETrainConfig = SAETrainConfig(d_sae=4096, sparsity=32.0)

    def __post_init__(self):
        super().__post_init__()
        layers = self.layers
        if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < 0):
            raise ValueError(f"layers: expected distinct layers from 0 on, at least one, or null, got {layers}")
        _at_least(self, batch=1, epochs=1, buffer=0, seeds=1)
        if self.seeds > 2:
            raise ValueError(f"seeds: expected 1 or 2, got {self.seeds}")
        if len(self.train.sparsities) > 1:
            raise ValueError(f"train.sparsity: a study takes one set of dictionaries, got {self.train.sparsity}")


@dataclasses.dataclass(frozen=True)
class SelectionSettings(Checked):
    """By the rule, or the strongest by `budget`, a share of all features. permutations: sign flips over families, at
    least; relabelings: of families, in the whole rule's null, as many as there are if they are fewer; half_splits: of
    the families."""

    mode: str = "rule"
    budget: float = 0.00024
    permutations: int = 1000
    relabelings: int = 200
    half_splits: int = 20

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("rule", "budget"):
            raise ValueError(f"mode: expected one of rule, budget, got {self.mode!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected a share above 0, up to 1, got {self.budget}")
        _at_least(self, permutations=1, relabelings=1, half_splits=1)


@dataclasses.dataclass(frozen=True)
class FidelitySettings(Checked):
    """Rows of held-out text on which dictionaries' loss and the cost of steering are measured."""

    rows: int = 8

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, rows=1)


@dataclasses.dataclass(frozen=True)
class DualProcessSettings(Checked):
    """Items of each of eleven generators, and the index from which a feature belongs to a system."""

    items: int = 10
    cut: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, items=2, cut=0)
        if not self.cut < 1:
            raise ValueError(f"cut: expected less than 1, the index's largest value, got {self.cut}")


@dataclasses.dataclass(frozen=True)
class PatchingSettings(Checked):
    """Feature sets matched to the selection, in patching and in steering; random directions of the selection's norm;
    selected features, strongest first, that are patched one by one."""

    random_sets: int = 199
    random_directions: int = 99
    singles: int = 64

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, random_sets=1, singles=1)
        _enough_directions(self)


@dataclasses.dataclass(frozen=True)
class AttributionSettings(Checked):
    """Top and random features patched one by one; points on the path of integrated gradients."""

    audited: int = 200
    steps: int = 10

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, audited=1, steps=1)


@dataclasses.dataclass(frozen=True)
class ProximitySettings(Checked):
    """Features whose direct share is measured one by one."""

    features: int = 32

    def __post_init__(self):
        super().__post_init__()
        _at_least(self, features=1)


@dataclasses.dataclass(frozen=True)
class SteeringSettings(Checked):
    """Coefficients, 1 being one gap between the poles; random directions of the same norm; one-digit sums on which
    steering may not change the accuracy; whether other ways of steering are compared (add, multiply, windows of layers,
    more tokens)."""

    alphas: list[float] = dataclasses.field(default_factory=lambda: [step / 2 for step in range(-8, 9)])
    random_directions: int = 99
    sums: int = 33
    ways: bool = True

    def __post_init__(self):
        super().__post_init__()
        _ascending("alphas", self.alphas)
        _with_one("alphas", self.alphas)
        _at_least(self, sums=1)
        _enough_directions(self)


@dataclasses.dataclass(frozen=True)
class TransferSettings(Checked):
    """Other tasks: the names of those to try (all by default), families of each, coefficients, random directions."""

    tasks: list[str] | None = None
    families: int = 6
    alphas: list[float] = dataclasses.field(default_factory=lambda: [-1.0, 0.0, 1.0])
    random_directions: int = 20

    def __post_init__(self):
        super().__post_init__()
        _ascending("alphas", self.alphas)
        _at_least(self, families=1)
        _enough_directions(self)
        _with_one("alphas", self.alphas)


@dataclasses.dataclass(frozen=True)
class StudyConfig(Checked):
    """Every parameter of a study, in sections; in Python a section may be a dictionary.

    `configs/quickstart.yaml` explains most. instrument: names of `demo.SWITCHES`, models whose truth is known, which
    `jaxmech run` studies first. behavior: "altruism", whose prompts `bank` builds; a file of prompts, or
    `module:function`, see `jaxmech.behavior.read`, whose words are in `words`.
    """

    model: str
    run_dir: str
    dtype: str = "float32"
    seed: int = 0
    batch: int = 16
    instrument: list[str] = dataclasses.field(default_factory=list)
    behavior: str = "altruism"
    words: StudyWords = StudyWords()
    bank: BankConfig = _BANK
    gate: GateSettings = GateSettings()
    text: TextSettings = TextSettings()
    dictionaries: DictionarySettings = DictionarySettings()
    fidelity: FidelitySettings = FidelitySettings()
    rule: Rule = Rule()
    selection: SelectionSettings = SelectionSettings()
    dual_process: DualProcessSettings = DualProcessSettings()
    patching: PatchingSettings = PatchingSettings()
    attribution: AttributionSettings = AttributionSettings()
    proximity: ProximitySettings = ProximitySettings()
    steering: SteeringSettings = SteeringSettings()
    transfer: TransferSettings = TransferSettings()

    MOVED = {
        **{f"{split}_families": f"bank.{split}" for split in ("selection", "development", "test")},
        **{name: f"bank.{name}" for name in ("pairs", "examples", "stakes", "stance_words", "heldout_words")},
        "samples": "gate.samples", "gate_shift_pp": "gate.shift_pp", "gate_placebo_ratio": "gate.control_ratio",
        "sae_features": "dictionaries.train.d_sae",
        **{f"sae_{name}": f"dictionaries.{name}" for name in ("path", "layers", "batch", "epochs", "buffer")},
        **{f"sae_{name}": f"dictionaries.train.{name}" for name in ("kind", "sparsity", "steps", "lr")},
        **{f"text_{name}": f"text.{name}" for name in ("file", "dataset", "count", "length")},
        **{f"rule_{name}": f"rule.{name}" for name in ("q", "d_z", "sign", "auroc", "fires", "density")},
        "rule_placebo_ratio": "rule.control_ratio", "rule_half_splits": "rule.half_splits",
        "selection": "selection.mode", "budget_share": "selection.budget",
        **{name: f"selection.{name}" for name in ("half_splits", "permutations", "relabelings")},
        "items_per_generator": "dual_process.items", "index_cut": "dual_process.cut",
        "random_sets": "patching.random_sets", "audit_features": "attribution.audited",
        "attribution_steps": "attribution.steps", "proximity_features": "proximity.features",
        "alphas": "steering.alphas", "random_directions": "steering.random_directions",
        "text_check": "fidelity.rows", "arithmetic_items": "steering.sums",
        "game_families": "transfer.families", "game_alphas": "transfer.alphas",
        "game_directions": "transfer.random_directions",
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ValueError(f"seed: expected a whole number from 0 to {_LARGEST_SEED}, got {self.seed}")
        _at_least(self, batch=1)
        for name in ("model", "run_dir", "behavior"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, got ''")
        if self.behavior != "altruism" and self.bank not in (_BANK, BankConfig()):
            raise ValueError(f"bank: builds the prompts of altruism, but {self.behavior} has its own")
        if not is_table(self.behavior) and self.words != StudyWords():
            raise ValueError(f"words: {self.behavior} has its own; this section is for a file of prompts")
        for name in ("selection", "test") if self.behavior == "altruism" else ():
            if (got := getattr(self.bank, name)) < _FEWEST_FAMILIES:
                raise ValueError(
                    f"bank.{name}: families are the unit of inference, at least {_FEWEST_FAMILIES} are needed, "
                    f"got {got}"
                )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), others: Mapping[str, type] | None = None
) -> StudyConfig:
    """Reads a study's YAML file and applies `section.key=value` overrides; takes and raises as `load_settings`."""
    return load_settings(StudyConfig, path, overrides, others)
