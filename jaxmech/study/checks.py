"""What can be known of a study before its first stage: refused here, rather than after minutes in a later one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxmech.activations.text import require_source
from jaxmech.behavior.altruism.dictator import build_bank
from jaxmech.behavior.altruism.games import GAMES, game_prompts
from jaxmech.behavior.arithmetic import one_digit_sums
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.io.settings import renamed
from jaxmech.models.load import DTYPES
from jaxmech.models.outline import Outline, outline
from jaxmech.sae.formats import load_sae, places
from jaxmech.study.config import StudyConfig
from jaxmech.study.context import bank_config
from jaxmech.study.run import plan
from jaxmech.study.stages.dictionaries import require_fit
from jaxmech.study.stages.text import HELD_OUT

_SHARES = ("rule_q", "rule_sign", "rule_auroc", "rule_fires", "rule_density", "rule_half_splits")


def check_study(config: StudyConfig, until: str | None = None) -> None:
    """Checks all that the stages still to be run will ask for; a finished study is asked nothing. Loads no weights.

    Args:
      until: the last stage that is to be run, as `run_study` takes it.

    Raises:
      ValueError: names the configuration's key, what was expected and what came.
    """
    stages = {name for name, state in plan(config, until) if state != "kept"}
    if not stages:
        return
    _check_folder(config.run_dir)
    for name in _SHARES:
        if getattr(config, name) > 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(config, name)}")
    bank_config(config)
    if "dual_process" in stages:
        with renamed({"per_generator": "items_per_generator"}):
            build_items(config.items_per_generator, seed=config.seed)
    if "steering" in stages:
        one_digit_sums(config.arithmetic_items)
    if "text" in stages:
        with renamed({"path": "text_file", "text": "text_file, text_dataset"}):
            require_source(config.text_file, config.text_dataset)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {config.dtype!r}")
    with renamed({"name_or_path": "model"}):
        model = outline(config.model)
    if "dictionaries" in stages:
        _check_layers(config, model)
    _check_prompts(config, model, stages)


def _check_folder(run_dir: str) -> None:
    """The folder may be written to, or made. Nothing is."""
    path = Path(run_dir)
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"run_dir: cannot write to {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"run_dir: cannot write to {path}: no permission to write to {there}")


def _check_layers(config: StudyConfig, model: Outline) -> None:
    """Dictionaries are there and of this model, or can be trained at the layers asked for."""
    layers, last = config.sae_layers, model.config.n_layers - 1
    if layers is not None and (wrong := [layer for layer in layers if not 0 <= layer <= last]):
        raise ValueError(f"sae_layers: {config.model} has layers 0..{last}, got {', '.join(map(str, wrong))}")
    if not config.sae_path:
        return
    with _about("sae_path"):
        found = places.layers_there(config.sae_path, layers)
        if wrong := [layer for layer in found if layer is not None and layer > last]:
            raise ValueError(
                f"sae_path: {config.sae_path} holds dictionaries of layer {', '.join(map(str, wrong))}; "
                f"{config.model} has layers 0..{last}"
            )
        if Path(config.sae_path).expanduser().exists():
            first = load_sae(config.sae_path, layer=found[0])
            require_fit(config.sae_path, first.config, config.model, model.config)


@contextlib.contextmanager
def _about(key: str) -> Iterator[None]:
    """Lets errors that name a file or an argument begin with the configuration's key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(key) else f"{key}: {error}") from error


def _check_prompts(config: StudyConfig, model: Outline, stages: set[str]) -> None:
    """Every prompt can be written with this tokenizer, and there is text enough for a batch of the training."""
    tokenizer = model.tokenizer()
    bank = build_bank(bank_config(config), tokenizer).prompts
    if "games" in stages:
        with renamed({"families": "game_families"}):
            for game in GAMES.values():
                game_prompts(game, families=config.game_families, seed=config.seed, tokenizer=tokenizer)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    longest = model.config.max_positions if model.config.learned_positions else None
    if longest and "text" in stages and config.text_length > longest:
        raise ValueError(f"text_length: {config.model} reads at most {longest} tokens, got {config.text_length}")
    if longest and (most := max(map(length, bank["prefix"] + bank["query"]))) >= longest:
        raise ValueError(f"examples: the longest prompt has {most} tokens, and {config.model} reads at most {longest}")
    if "dictionaries" in stages and not config.sae_path:
        held = max(1, round(HELD_OUT * config.text_count))
        development = bank[bank["split"] == "development"]
        most = (config.text_count - held) * config.text_length + sum(
            map(length, development["prefix"] + development["query"])
        )
        if config.sae_batch > most:
            raise ValueError(
                f"sae_batch: a batch of {config.sae_batch} activations is more than the text has, at most {most}; "
                "raise text_count or text_length, or lower sae_batch"
            )
