"""Stage dictionaries: opens the study's sparse autoencoders, or trains them, all layers in one program."""

from __future__ import annotations

import dataclasses
import shutil

import jax

from jaxmech.sae.formats import save_saes
from jaxmech.sae.stream import ActivationStream
from jaxmech.sae.training import train
from jaxmech.study.context import Context
from jaxmech.study.folder import Outcome, digest


def run(ctx: Context) -> Outcome:
    """Trains and saves them in SAELens' format under `saes/`; a killed training goes on from its last checkpoint."""
    c, lm = ctx.config, ctx.lm
    if c.sae_path:
        saes = ctx.saes
        wrong = [layer for layer in saes.config.layers if layer >= lm.config.n_layers]
        if saes.config.d_in != lm.config.d_model or wrong:
            raise ValueError(
                f"sae_path: {c.sae_path} holds dictionaries of width {saes.config.d_in} for layers {saes.config.layers}"
                f"; {lm.name} has width {lm.config.d_model} and layers 0..{lm.config.n_layers - 1}"
            )
        if saes.config.site != "resid_post":
            raise ValueError(
                f"sae_path: {c.sae_path} holds dictionaries of {saes.config.site}; a study steers resid_post"
            )
        if saes.config.needs_input:
            raise ValueError(
                f"sae_path: {c.sae_path} normalises each token by itself ({saes.config.normalize}), so that its decoder"
                " rows are no directions of a length in the residual stream; a study needs those to steer"
            )
        return Outcome(describe(saes) | {"trained": False})
    text = ctx.folder.arrays("text")
    layers = range(lm.config.n_layers) if c.sae_layers is None else c.sae_layers
    stream = ActivationStream(
        lm.config, lm.params, text["tokens"], text["mask"], layers=tuple(layers), batch_size=c.sae_batch,
        buffer_tokens=c.sae_buffer, epochs=c.sae_epochs, seed=c.seed, model=lm.name,
    )  # fmt: skip
    # A folder for each set of settings, so that a killed training of others is neither gone on with nor in the way.
    name = digest(dataclasses.asdict(c.training), stream.fingerprint())
    folder, training = ctx.folder.path / "saes", ctx.folder.path / "training"
    (saes,), history = train(c.training, stream, key=jax.random.key(c.seed), checkpoint_dir=training / name)
    shutil.rmtree(folder, ignore_errors=True)
    save_saes(saes, folder)
    shutil.rmtree(training)
    return Outcome(
        describe(saes) | {"trained": True, "steps": c.sae_steps, "tokens": stream.tokens_seen}, {"training": history}
    )


def describe(saes) -> dict:
    config = saes.config
    return {
        "layers": list(config.layers), "features_per_layer": config.d_sae, "site": config.site,
        "activation": config.activation, "source": config.source,
    }  # fmt: skip
