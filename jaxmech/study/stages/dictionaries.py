"""Stage dictionaries: opens the study's sparse autoencoders, or trains them, all layers in one program."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pandas as pd

from jaxmech.activations.stream import ActivationStream, BatchStream
from jaxmech.io.version import __version__
from jaxmech.models.config import ModelConfig
from jaxmech.sae.formats import save_saes
from jaxmech.sae.module import SAE, SAEConfig
from jaxmech.sae.training import train_saes
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome, digest
from jaxmech.study.keys import source


def run(ctx: Context) -> Outcome:
    """Trains and saves them in SAELens' format, `saes/` of the stage and `saes_again/` of a second seed; a killed
    training resumes from its checkpoint."""
    given, training = ctx.config.dictionaries, ctx.folder.path / "training"
    if given.path:
        saes = ctx.saes
        require_fit(given.path, saes.config, ctx.lm.name, ctx.lm.config)
        return Outcome(describe(saes) | {"trained": False})
    stream = text_stream(ctx)
    saes, history = train(ctx, stream, training, "saes")
    folders = {"saes": training / "saes"}
    if given.seeds > 1:
        again = "saes_again"
        train(ctx, stream.reordered(ctx.key(f"dictionaries.order.{again}")), training, again)
        folders[again] = training / again
    results = describe(saes) | {
        "trained": True, "steps": given.train.steps, "tokens": stream.tokens_seen, "seeds": given.seeds
    }  # fmt: skip
    return Outcome(results, {"training": history}, folders=folders, done_with=(training,))


def text_stream(ctx: Context) -> ActivationStream:
    """The activations of the study's text."""
    lm, given, text = ctx.lm, ctx.config.dictionaries, ctx.folder.arrays("text")
    layers = range(lm.config.n_layers) if given.layers is None else given.layers
    return ActivationStream(
        lm.config,
        lm.params,
        text["tokens"],
        mask=text["mask"],
        layers=tuple(layers),
        batch_size=given.batch,
        buffer_tokens=given.buffer,
        epochs=given.epochs,
        key=ctx.key("dictionaries.order.saes"),
        model=lm.name,
    )


def train(ctx: Context, stream: BatchStream, training: Path, name: str) -> tuple[SAE, pd.DataFrame]:
    """Trains dictionaries and saves them as `training/name`; a key of their own, by the name.

    Returns:
      The dictionaries and their history.
    """
    given = ctx.config.dictionaries
    # A killed training loses at most an eighth of its steps.
    often = max(1, given.train.steps // 8)
    asked = dataclasses.replace(given.train, checkpoint_every=min(given.train.checkpoint_every, often))
    # A folder named by what defines the training: a killed one of another is neither resumed nor in the way.
    made_of = digest(dataclasses.asdict(asked), stream.fingerprint(), __version__, source("dictionaries"))
    key = ctx.key(f"dictionaries.training.{name}")
    (saes,), history = train_saes(asked, stream, key=key, checkpoint_dir=training / made_of)
    shutil.rmtree(training / name, ignore_errors=True)
    save_saes(saes, training / name)
    return saes, history


def require_fit(path: str, saes: SAEConfig, name: str, model: ModelConfig) -> None:
    """Refuses dictionaries that a study of this model cannot steer with.

    Raises:
      ValueError: another width, layers or site than the model's, or rows that are not directions.
    """
    wrong = [layer for layer in saes.layers if layer >= model.n_layers]
    if saes.d_in != model.d_model or wrong:
        raise ValueError(
            f"dictionaries.path: {path} holds dictionaries of width {saes.d_in} for layers {saes.layers}"
            f"; {name} has width {model.d_model} and layers 0..{model.n_layers - 1}"
        )
    if saes.site != "resid_post":
        raise ValueError(f"dictionaries.path: {path} holds dictionaries of {saes.site}; a study steers resid_post")
    if saes.needs_input:
        raise ValueError(
            f"dictionaries.path: {path} normalises each token by itself ({saes.normalize}), so its decoder rows"
            " have no fixed length in the residual stream, which a study needs to steer"
        )


def describe(saes: SAE) -> dict:
    config = saes.config
    return {
        "layers": list(config.layers), "features_per_layer": config.d_sae, "site": config.site,
        "activation": config.activation, "source": config.source,
    }  # fmt: skip
