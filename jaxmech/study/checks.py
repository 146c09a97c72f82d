"""Checks a study before its first stage, rather than let a later one fail after minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from jaxmech.activations.text import require_source
from jaxmech.behavior.altruism.altruism import games
from jaxmech.behavior.altruism.dictator import BankConfig
from jaxmech.behavior.arithmetic import one_digit_sums
from jaxmech.behavior.behavior import Behavior, spellings
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.behavior.prompts import check_boundary, memoized
from jaxmech.io.settings import renamed
from jaxmech.models.load import DTYPES
from jaxmech.models.outline import Outline, outline
from jaxmech.sae.formats import load_sae, places
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import open_behavior
from jaxmech.study.demo import require_switches
from jaxmech.study.organisms import with_organism
from jaxmech.study.run import plan
from jaxmech.study.stages.dictionaries import require_fit
from jaxmech.study.stages.text import HELD_OUT


def check_study(config: StudyConfig, until: str | None = None) -> None:
    """Checks all that the stages still to run will need; nothing for a finished study. Loads no weights.

    Args:
      until: the last stage to run, as `run_study` takes it.

    Raises:
      ValueError: names the configuration's key, what was expected and what came.
    """
    stages = {name for name, state in plan(config, until) if state != "kept"}
    if not stages:
        return
    require_switches(config.instrument)
    config = with_organism(config)
    _check_folder(config.run_dir)
    if "dual_process" in stages:
        with renamed({"per_generator": "dual_process.items"}):
            build_items(per_generator=config.dual_process.items, seed=config.seed)
    if "steering" in stages:
        with renamed({"items": "steering.sums"}):
            one_digit_sums(config.steering.sums)
    if "text" in stages:
        with renamed({"path": "text.file", "text": "text.file, text.dataset"}):
            require_source(config.text.file, config.text.dataset)
    if "transfer" in stages and config.behavior == "altruism":
        with renamed({"families": "transfer.families", "names": "transfer.tasks"}):
            games(config.transfer.families, None, names=config.transfer.tasks, seed=config.seed)
    own = None if config.behavior == "altruism" else _own_behavior(config)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    with renamed({"name_or_path": "model"}):
        model = outline(config.model)
    if "dictionaries" in stages:
        _check_layers(config, model)
    _check_prompts(config, model, stages, own)


def _own_behavior(config: StudyConfig) -> Behavior:
    with renamed({"controls": "words.controls"}):
        return open_behavior(config, None)


def _check_folder(run_dir: str) -> None:
    """Checks that the folder can be written to or made; does neither."""
    path = Path(run_dir)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ValueError(f"run_dir: cannot write to {path}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"run_dir: cannot write to {path}: no permission to write to {existing}")


def _check_layers(config: StudyConfig, model: Outline) -> None:
    """Checks that the dictionaries exist and fit this model, or can be trained at the layers asked for."""
    path, layers, last = config.dictionaries.path, config.dictionaries.layers, model.config.n_layers - 1
    if layers is not None and (wrong := [layer for layer in layers if not 0 <= layer <= last]):
        raise ValueError(f"dictionaries.layers: {config.model} has layers 0..{last}, got {', '.join(map(str, wrong))}")
    if not path:
        return
    with _about("dictionaries.path"):
        available = places.available_layers(path, layers)
        if wrong := [layer for layer in available if layer is not None and layer > last]:
            raise ValueError(
                f"{path} holds dictionaries of layer {', '.join(map(str, wrong))}; {config.model} has layers 0..{last}"
            )
        if Path(path).expanduser().exists():
            require_fit(path, load_sae(path, layer=available[0]).config, config.model, model.config)


@contextlib.contextmanager
def _about(key: str) -> Iterator[None]:
    """Lets errors that name a file or an argument begin with the configuration's key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f"{key}: {error}") from error


def _check_prompts(config: StudyConfig, model: Outline, stages: set[str], own: Behavior | None) -> None:
    """Checks that every prompt can be written with this tokenizer, and that the text fills a training batch."""
    tokenizer = model.tokenizer()
    if own:
        behavior, chosen = own, config.transfer.tasks or ()
        if unknown := [name for name in chosen if name not in own.transfer]:
            raise ValueError(f"transfer.tasks: {config.behavior} has no {', '.join(unknown)}; expected some of "
                             f"{', '.join(own.transfer) or 'none'}")  # fmt: skip
        for table in (own.prompts, *(task.prompts for task in own.transfer.values())):
            _check_written(table, memoized(tokenizer))
    else:
        bank = {f.name: f"bank.{f.name}" for f in dataclasses.fields(BankConfig)}
        with renamed({"families": "transfer.families", "names": "transfer.tasks"} | bank):
            behavior = open_behavior(config, tokenizer)
            if "transfer" in stages:
                games(config.transfer.families, tokenizer, names=config.transfer.tasks, seed=config.seed)
    prompts = behavior.prompts

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    longest = model.config.max_positions if model.config.learned_positions else None
    if longest and "text" in stages and config.text.length > longest:
        raise ValueError(f"text.length: {config.model} reads at most {longest} tokens, got {config.text.length}")
    if longest and (most := max(map(length, prompts["prefix"] + prompts["query"]))) >= longest:
        what = "bank.examples" if config.behavior == "altruism" else "behavior"
        raise ValueError(f"{what}: the longest prompt has {most} tokens, and {config.model} reads at most {longest}")
    if "dictionaries" in stages and not config.dictionaries.path:
        held = max(1, round(HELD_OUT * config.text.count))
        development = prompts[prompts["split"] == "development"]
        most = (config.text.count - held) * config.text.length + sum(
            map(length, development["prefix"] + development["query"])
        )
        if config.dictionaries.batch > most:
            raise ValueError(
                f"dictionaries.batch: a batch of {config.dictionaries.batch} activations is more than the text has, at "
                f"most {most}; raise text.count or text.length, or lower dictionaries.batch"
            )


def _check_written(table: pd.DataFrame, tokenizer: Any) -> None:
    """Refuses prompts whose tokens are not those of prefix, query and answer, one after the other."""
    for row in table.to_dict("records"):
        answers = [spelling for answer in row["answers"] for spelling in spellings(answer)]
        if reason := check_boundary(tokenizer, row["prefix"], row["query"], answers).reason:
            raise ValueError(f"behavior: prompt {row.get('id', row['family'])}: {reason}")
