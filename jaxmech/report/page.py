"""Writes the page: verdict first, then each section, in one file that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from jaxmech.io.files import whole
from jaxmech.report import behavior, contrast, dual_process, fidelity, methods, patching, proximity, steering, transfer
from jaxmech.report.blocks import level
from jaxmech.report.formats import NBSP
from jaxmech.report.verdict import STAGES, cards
from jaxmech.report.words import Said
from jaxmech.study.folder import RunFolder

HERE = Path(__file__).parent

STATUS_WORDS = {
    "yes": "shown",
    "no": "not shown",
    "partly": "shown in part",
    "open": "left open",
    "withheld": "withheld",
}


def write_report(folder: RunFolder, manifest: Mapping[str, Any]) -> Path:
    """Writes `report.html` in the run folder, all or nothing.

    Args:
      folder: a run whose stages are all finished.
      manifest: see `jaxmech.study.run.finish`.

    Returns:
      The page's path.

    Raises:
      ValueError: a table is missing or was written by another version.
    """
    path = folder.path / "report.html"
    page = render(folder, manifest)
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(folder: RunFolder, manifest: Mapping[str, Any]) -> str:
    """The page as HTML."""
    config = manifest["config"]
    results = {stage: folder.results(stage) for stage in STAGES}
    said = Said.of(results)
    told = cards(results, config)
    claims, asides = told[:4], told[4:]
    parts = [
        behavior.section(folder, results, claims[0]),
        contrast.section(folder, results, config, claims[1]),
        dual_process.section(folder, results, config, asides[0]),
        patching.section(folder, results),
        proximity.section(folder, results, asides[1]),
        steering.section(folder, results),
        transfer.section(folder, results, config, claims[3]),
        fidelity.section(folder, asides[2]),
        methods.section(folder, results, manifest, statement(config, said)),
    ]
    for part in parts:
        level(part.blocks)
    instrument = methods.instrument_table(manifest)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=unbroken,
    )
    return environment.get_template("template.html.j2").render(
        config=config,
        said=said,
        title=said.name[:1].upper() + said.name[1:],
        instrument=instrument and instrument.caption,
        claims=claims,
        asides=asides,
        status_words=STATUS_WORDS,
        sections=parts,
        style=Markup((HERE / "style.css").read_text()),
        plotly=Markup(get_plotlyjs()),
        script=Markup((HERE / "figures.js.j2").read_text()),
    )


def unbroken(value: Any) -> Any:
    """Keeps a number and its percent sign on one line, wherever text is put into the page."""
    return value.replace(" %", f"{NBSP}%") if isinstance(value, str) and not isinstance(value, Markup) else value


def statement(config: Mapping[str, Any], said: Said) -> Sequence[str]:
    """How to read the page, and whose method and model this is."""
    model = str(config["model"])
    terms = (
        "Gemma weights are provided under, and their use is subject to, the Gemma Terms of Use "
        "(ai.google.dev/gemma/terms)."
        if "gemma" in model.lower()
        else "The model's weights come under its own licence, which this report does not change."
    )
    return (
        *([said.about] if said.about else []),
        "A family is one set of prompts that share a wording; the family, not the prompt, is the unit of inference. "
        "Intervals are 95 %, "
        "Student's t over families. Features are chosen on selection families; behaviour, patching and steering are "
        "measured on test families that took no part in choosing features. Scores come from the "
        "exact distribution over all allowed answers; their total probability is given as valid mass.",
        "P-values of effects over families (Student's t), of classes' directness and of steering are two-sided; those "
        "of patching against random sets and directions, (1 + those at least as large) / (1 + their number), are "
        "one-sided: the side towards the donor. In other tasks an effect is one more draw from the normal distribution "
        "that random directions come from. What an effect is compared with has its norm at every layer.",
        "A question is answered yes only if all the conditions listed under it hold. One that fails is named in the "
        "answer. One that could not have been found, families differing as they do, leaves the answer open, with the "
        "smallest effect that would have been found in four of five such studies. Without a behaviour later answers "
        "are withheld and their numbers still shown.",
        f"Model: {model}. {terms}",
        "Every figure can be redrawn from the Parquet table named below it, under stages/ in the run folder.",
    )
