"""The `jaxmech` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Finds the features that carry a behaviour, and tests them."
)

ConfigPath = Annotated[Path, typer.Argument(help="A study's YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that replace values of the file.")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop behind this stage, such as fidelity.")] = None,
) -> None:
    """Runs a study; what is finished is kept, what was killed goes on."""
    from jaxmech.study.config import load_config
    from jaxmech.study.run import run_study

    settings = load_config(config, overrides or [])
    if until:
        print(run_study(settings, until=until))
        return
    from jaxmech.report import show, write_report

    show(run_study(settings, report=write_report))


@app.command("train-sae")
def train_sae(
    config: Annotated[
        Path, typer.Argument(help="A training's YAML file, such as configs/train-sae-gemma-3-270m.yaml.")
    ],
    overrides: Overrides = None,
) -> None:
    """Trains sparse autoencoders and measures them on held-out text; what was killed goes on."""
    from jaxmech.sae.training.run import TrainSettings, run_training, show
    from jaxmech.settings import load_settings

    show(*run_training(load_settings(TrainSettings, config, overrides or [])))


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Shows which stages a run would compute, without running any."""
    from jaxmech.study.config import load_config
    from jaxmech.study.run import plan as plan_study

    for name, state in plan_study(load_config(config, overrides or [])):
        print(f"{name:14} {state}")


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Writes the report of a finished run again."""
    from jaxmech.report import show, write_report
    from jaxmech.study.config import load_config
    from jaxmech.study.folder import RunFolder, read_json

    settings = load_config(config, overrides or [])
    folder = RunFolder(settings.run_dir)
    manifest = folder.path / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{folder.path} holds no finished run; start it with: jaxmech run {config}")
    write_report(folder, settings, read_json(manifest))
    show(folder.path)


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
    """Converts a model once and for all."""
    from jaxmech.models.load import check_new, load_model, save_model

    check_new(destination)  # before a large model is fetched and converted
    print(f"written to {save_model(load_model(source, dtype=dtype), destination)}")


def main() -> None:
    """Entry point: bad input ends with its message alone, exit code 1."""
    try:
        app()
    except ValueError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
