"""The verdict in the terminal: the same claims as the page's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from jaxmech.report.methods import instrument_table
from jaxmech.report.verdict import STAGES, ClaimCard, cards
from jaxmech.study.folder import RunFolder, read_json

COLOURS = {"yes": "green", "no": "red", "partly": "yellow", "open": "yellow", "withheld": "dim"}


def print_summary(claims: Sequence[ClaimCard], console: Console) -> None:
    """Prints each claim: its mark, the question, the answer, the sentence with its numbers, and the conditions."""
    for claim in claims:
        style = COLOURS[claim.status]
        console.print(
            Text.assemble((f"{claim.mark} ", f"bold {style}"), (claim.title, "bold"), "  ", (claim.answer, style))
        )
        console.print(Padding(Text(claim.sentence), (0, 0, 0, 2)), highlight=False)
        for fact in claim.facts:
            console.print(Padding(Text(f"{fact.mark or ' '} {fact.label}: {fact.text}"), (0, 0, 0, 4)), highlight=False)
        console.print()


def show(path: str | Path, console: Console | None = None) -> None:
    """Prints the verdict of a finished run, and where its page is.

    Raises:
      ValueError: the folder holds no finished run.
    """
    path, console = Path(path), console or Console()
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} holds no finished run (no manifest.json); start it with: jaxmech run CONFIG")
    folder = RunFolder(path)
    results = {stage: folder.results(stage) for stage in STAGES}
    manifest = read_json(path / "manifest.json")
    console.print()
    print_summary(cards(results, manifest["config"]), console)
    if instrument := instrument_table(manifest):
        console.print(instrument.caption)
    console.print(Text.assemble("Report: ", (str(path / "report.html"), "bold")), soft_wrap=True)
