"""The study on organisms under every switch, and how what it says compares with what is true of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from jaxmech.io.progress import console
from jaxmech.study.config import StudyConfig, load_config
from jaxmech.study.effects import pairs_of
from jaxmech.study.folder import RunFolder, read_json, write_json
from jaxmech.study.organisms import organism_of
from jaxmech.study.run import INSTRUMENT, run_study

SWITCHES: dict[str, str] = {
    "altruist": "",
    "no stance": "stance=false",
    "valence": "valence=3",
    "mapping": "mapping=true",
    "hidden": "hidden=true",
    "motor only": "motor_only=true",
    "no transfer": "transfers=false",
    "no System 1": "s1_path=0",
    "no System 2": "s2_path=0",
    "solves nothing": "solves=false",
}
"""Name -> the switches of an organism."""

NOT_SAID = "n/a"


def run_demo(
    config: StudyConfig, *, report: Callable[..., Path] | None = None, switches: Mapping[str, str] = SWITCHES
) -> dict[str, dict[str, Any]]:
    """Runs the study on an organism under each switch, in a folder of its own, and scores it.

    All run in one process and have the same shapes, so that programs are compiled once for all.

    Args:
      config: of the study; its model is replaced, and its run_dir holds the folders.
      report: as `run_study` takes it.

    Returns:
      Name -> `score_run`, which each folder's results.json has as `truth`.

    Raises:
      ValueError: from a study.
    """
    scores = {}
    for name, switch in switches.items():
        console().print(f"organism: {name}", highlight=False)
        folder = Path(config.run_dir) / name.replace(" ", "_")
        study = dataclasses.replace(config, model=f"organism:{switch}".rstrip(":"), run_dir=str(folder))
        run_study(study, report=report)
        results = read_json(folder / "results.json")
        scores[name] = score_run(study, RunFolder(folder, create=False), results)
        write_json(folder / "results.json", results | {"truth": scores[name]})
    return scores


def check_instrument(config: StudyConfig, *, report: Callable[..., Path] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the study on the organisms that `config.instrument` names, with the study's seed, in its run folder.

    What it said of them goes into the folder's `instrument.json`, and from there into the study's results and page.

    Args:
      report: as `run_study` takes it.

    Returns:
      As `run_demo`.

    Raises:
      ValueError: an organism that does not exist, or from a study.
    """
    require_switches(config.instrument)
    folder = Path(config.run_dir) / "instrument"
    organism = load_config("organism", [f"seed={config.seed}", f"run_dir={folder}"])
    scores = run_demo(organism, report=report, switches={name: SWITCHES[name] for name in config.instrument})
    write_json(Path(config.run_dir) / INSTRUMENT, scores)
    right, asked = count_right(scores)
    console().print(f"The instrument, where the truth is known: {right} of {asked} answers right", highlight=False)
    return scores


def require_switches(names: Sequence[str]) -> None:
    """Refuses organisms that do not exist, or are named twice."""
    if (unknown := sorted(set(names) - set(SWITCHES))) or len(set(names)) < len(names):
        said = f"unknown {', '.join(unknown)}" if unknown else "one of them twice"
        raise ValueError(f"instrument: expected some of {', '.join(SWITCHES)}, got {said}")


def count_right(scores: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """How many claims' answers equal the truth, of how many."""
    answers = [answer for score in scores.values() for answer in score["claims"].values()]
    return sum(answer["said"] == answer["true"] for answer in answers), len(answers)


def score_run(config: StudyConfig, folder: RunFolder, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished study of an organism found, beside what is true.

    Returns:
      precision: of the features that were selected and found to be causal one by one, the share that is; recall: of the
      causal features, the share that was selected and found so; classes_f1: of System 1 and 2 among selected causal
      features; gap_pp and direct_share, each {found, true}; claims: name -> {said, true}, said being "n/a" where the
      results have no such claim. NaN where there is nothing to compare.
    """
    truth = organism_of(config).truth
    gap = truth["gap_pp"]
    alone = folder.table("patching", "singles")
    by_rule = results["selection"]["mode"] == "rule"
    found = set(pairs_of(alone[~alone["passenger"].astype(bool)])) if by_rule else set()
    planted = {(row["layer"], row["feature"]): row for row in truth["causal"]}
    later = [pair for pair, row in planted.items() if row["class"] == "s2" and pair in found]
    known = folder.table("proximity", "features").set_index(["layer", "feature"])
    known = known.loc[[pair for pair in later if pair in known.index]]
    claims = results.get("claims", {})
    told = truth["claims"]["dual_process"] != "cannot be told"  # by a model that solves nothing
    return {
        "precision": _share(len(found & set(planted)), len(found)),
        "recall": _share(len(found & set(planted)), len(planted)),
        "classes_f1": _f1(folder.table("dual_process", "classes"), planted) if told else float("nan"),
        "gap_pp": {"found": results["behavior"]["shift_pp"], "true": gap},
        "direct_share": {
            "found": float(known["direct"].sum() / known["total"].sum()) if len(known) else None,
            "true": truth["direct_share"],
        },
        "claims": {
            name: {"said": claims.get(name, {}).get("answer", NOT_SAID), "true": true}
            for name, true in truth["claims"].items()
        },
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _f1(classes: pd.DataFrame, planted: Mapping[tuple[int, int], Mapping[str, Any]]) -> float:
    """F1 of being of System 1 or 2 and of the right one, over the selected causal features."""
    said = dict(zip(pairs_of(classes), classes["class"], strict=True))
    true = {pair: row["class"] for pair, row in planted.items() if pair in said}
    named = {pair: name for pair, name in said.items() if pair in true and name in ("s1", "s2")}
    right = sum(true[pair] == name for pair, name in named.items())
    return _share(2 * right, len(named) + sum(name is not None for name in true.values()))


def demo_rows(scores: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per organism: per claim what was said, with ✓, or ✗ and what is true; precision and recall."""
    rows = []
    for name, score in scores.items():
        claims = {claim: _compared(**answers) for claim, answers in score["claims"].items()}
        rows.append({"organism": name} | claims | {part: score[part] for part in ("precision", "recall")})
    return pd.DataFrame(rows)


def _compared(said: str, true: str) -> str:
    if said == NOT_SAID:
        return f"{said} (is: {true})"
    return f"✓ {said}" if said == true else f"✗ {said} (is: {true})"
