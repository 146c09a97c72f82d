"""How the numbers were made: settings, versions, exclusions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxmech.report.blocks import (
    Section,
    Table,
    Text,
)
from jaxmech.report.formats import number
from jaxmech.report.verdict import MET
from jaxmech.study.demo import count_right
from jaxmech.study.folder import RunFolder


def section(
    folder: RunFolder, results: Mapping[str, Any], manifest: Mapping[str, Any], statement: Sequence[str]
) -> Section:
    """Every parameter, version, hash, second and exclusion."""
    environment = manifest["environment"]
    stages = [
        [name, number(record["seconds"], 1), number(record.get("peak_gb"), 2), str(record["key"])]
        for name, record in manifest["stages"].items()
    ]
    instrument = instrument_table(manifest)
    packages = [[name, str(version)] for name, version in environment["packages"].items()]
    packages = [
        ["python", environment["python"]],
        ["platform", environment["platform"]],
        ["devices", ", ".join(environment["devices"])],
        *packages,
    ]
    unused = "words" if manifest["config"]["behavior"] == "altruism" else "bank"
    used = {key: value for key, value in manifest["config"].items() if key != unused}
    settings = [[key, written(value)] for key, value in settings_of(used)]
    blocks: list[Any] = [
        Text(statement),
        *([instrument] if instrument else []),
        Table("Every parameter of the study.", ("parameter", "value"), settings, folded=True),
    ]
    blocks.append(
        Table(
            "Stages: seconds, the process's peak memory so far in GB, and the hash of all that each depends on.",
            ("stage", "seconds", "peak GB", "hash"),
            stages,
        )
    )
    blocks.append(Table("Versions and devices.", ("what", "version"), packages, folded=True))
    blocks.append(exclusions(folder, results["behavior"]["excluded_pairs"]))
    total = sum(record["seconds"] for record in manifest["stages"].values())
    lead = f"Study {manifest['study']}: {number(total, 0)} seconds of computation, seed {manifest['config']['seed']}."
    return Section("methods", "Methods", lead, blocks)


def instrument_table(manifest: Mapping[str, Any]) -> Table | None:
    """What the same stages said of models whose truth is known, before this study."""
    if not (scores := manifest.get("instrument")):
        return None
    rows = [
        [name, claim.replace("behavior", "behaviour").replace("_", " "), said["said"], said["true"],
         MET[said["said"] == said["true"]]]
        for name, score in scores.items()
        for claim, said in score["claims"].items()
    ]  # fmt: skip
    right, _ = count_right(scores)
    caption = (
        "The instrument: the same stages, with the settings of configs/organism.yaml, on small models whose altruism "
        "is wired by hand, run before this one. "
        f"{right} of {len(rows)} answers are right."
    )
    return Table(caption, ("model", "claim", "said", "true", ""), rows)


def written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(" / ".join(map(str, e)) if isinstance(e, list | tuple) else str(e) for e in value)
    return "not set" if value is None or value == {} else str(value)


def settings_of(config: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with the name that an override gives it."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from settings_of(value, f"{section}{key}.")
        else:
            yield section + key, value


def exclusions(folder: RunFolder, count: int) -> Table:
    """Pairs left out, by reason."""
    caption = f"Prompt pairs left out by the checks after tokenisation: {count}."
    if count and folder.has_table("behavior", "exclusions"):
        table = folder.table("behavior", "exclusions")
        if "reason" in table:
            by = table["reason"].value_counts()
            return Table(caption, ("reason", "pairs"), [[str(reason), str(n)] for reason, n in by.items()])
    return Table(caption, ("reason", "pairs"), [["any", str(count)]])
