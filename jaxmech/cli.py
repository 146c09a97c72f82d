"""The `jaxmech` command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit("the jaxmech command needs the study extra: pip install 'jaxmech[study]'")
from rich.console import Console
from rich.text import Text

from jaxmech.io.interrupt import interruptible
from jaxmech.io.version import __version__

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Finds the features that carry a behaviour, and tests them."
)

ConfigPath = Annotated[Path, typer.Argument(help="A study's YAML file, or the name of one that comes with jaxmech.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that replace values of the file.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxmech {__version__}")
        raise typer.Exit


@app.callback()
def options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Shows the version and exits.")
    ] = False,
) -> None:
    """Options before a command."""


def _study(config: Path, overrides: list[str] | None) -> Any:
    from jaxmech.sae.training.run import TrainSettings
    from jaxmech.study.config import load_config

    return load_config(config, overrides or [], {"jaxmech train-sae": TrainSettings})


def _check(settings: Any, until: str | None = None) -> None:
    from jaxmech.study.checks import check_study

    check_study(settings, until)


def _command(name: str, config: Path, overrides: list[str] | None) -> str:
    """What the user would type."""
    return shlex.join(["jaxmech", name, str(config), *(overrides or [])])


def _stopped(name: str, config: Path, overrides: list[str] | None) -> str:
    return _resumed(_command(name, config, overrides))


def _resumed(command: str) -> str:
    return f"Stopped. Finished work is kept; to resume: {command}"


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage, such as fidelity.")] = None,
) -> None:
    """Runs a study; finished work is kept, and a killed run resumes."""
    settings = _study(config, overrides)
    _check(settings, until)
    from jaxmech.report import show, write_report
    from jaxmech.study.demo import check_instrument
    from jaxmech.study.run import run_study

    options = ["--until", until] if until else []
    with interruptible(_stopped("run", config, [*(overrides or []), *options])):
        if until:
            print(run_study(settings, until=until))
        else:
            if settings.instrument:
                check_instrument(settings, report=write_report)
            show(run_study(settings, report=write_report))


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Runs the study on models whose truth is known, under every switch, and shows what it said of them."""
    config = Path("organism")
    settings = _study(config, ["run_dir=runs/demo", *(overrides or [])])
    from rich.table import Table

    from jaxmech.report import write_report
    from jaxmech.study.demo import demo_rows, run_demo

    with interruptible(_resumed(shlex.join(["jaxmech", "demo", *(overrides or [])]))):
        rows = demo_rows(run_demo(settings, report=write_report))
    table = Table(*rows.columns)
    for row in rows.itertuples(index=False):
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else value for value in row))
    Console().print(table)


@app.command("train-sae")
def train_sae(
    config: Annotated[Path, typer.Argument(help="A training's YAML file, or the name of one that comes with jaxmech.")],
    overrides: Overrides = None,
) -> None:
    """Trains sparse autoencoders and measures them on held-out text; a killed run resumes."""
    from jaxmech.io.settings import load_settings
    from jaxmech.sae.training.run import TrainSettings, run_training, show
    from jaxmech.study.config import StudyConfig

    settings = load_settings(TrainSettings, config, overrides or [], {"jaxmech run": StudyConfig})
    with interruptible(_stopped("train-sae", config, overrides)):
        show(*run_training(settings))


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Shows which stages a run would compute, without running any or writing anything."""
    settings = _study(config, overrides)
    _check(settings)
    from jaxmech.study.run import plan as plan_study

    for name, state in plan_study(settings):
        print(f"{name:14} {state}")


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Rewrites the report of a finished run."""
    from jaxmech.report import show, write_report
    from jaxmech.study.run import rewrite_report

    settings = _study(config, overrides)
    show(rewrite_report(settings, _command("run", config, overrides), report=write_report))


@app.command()
def models() -> None:
    """Lists models that come as packages, and whether they are installed."""
    from jaxmech.models.load import packaged_models

    for name, state in packaged_models():
        print(f"{name:24} {state}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A packaged name, a .gguf file, a folder or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; load_model opens it.")],
    dtype: str = "float32",
) -> None:
    """Converts a model and writes it to a folder."""
    from jaxmech.models.load import load_model
    from jaxmech.models.saved import check_new, save_model

    check_new(destination)  # before a large model is fetched and converted
    with interruptible("Stopped; nothing was written."):
        print(f"written to {save_model(load_model(source, dtype=dtype), destination)}")


def main() -> None:
    """Entry point: bad input exits with its message alone and code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
