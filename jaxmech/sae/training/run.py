"""`jaxmech train-sae`: a training from a configuration file, from the model's text to dictionaries measured and saved.

run_dir/
  saes/layer_*            in SAELens' format; saes/sparsity_<value>/layer_* where several were asked for
  evaluation.csv          fidelity on held-out text, a row per sparsity and layer
  metrics.csv             the history of the training; tensorboard/ its events, if asked for
  checkpoints/            the last two states; delete it when no longer needed
  text.safetensors        text sampled from the model
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmech.activations import text
from jaxmech.activations.stream import ActivationStream
from jaxmech.io.files import disk_errors, whole
from jaxmech.io.lock import sole_user
from jaxmech.io.progress import console
from jaxmech.io.settings import renamed
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from jaxmech.models.sharding import make_mesh
from jaxmech.sae.evaluate import evaluate_saes
from jaxmech.sae.formats import save_saes
from jaxmech.sae.training.config import SAETrainConfig
from jaxmech.sae.training.loop import checked_mesh, train_saes
from jaxmech.sae.training.metrics import event_writer

_REMEDY = "make room, or choose another run_dir"
_SHOWN = ("fvu", "cosine_centred", "l0", "dead")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(SAETrainConfig):
    """Every key of a training's configuration file: those of `SAETrainConfig`, and these.

    Attributes:
      model, dtype: as `load_model` takes them. run_dir: where everything is written.
      seed: for the sampled text, the order of activations, and the training.
      text_file, text_dataset: a file, or a data set (of the hub, or pydoc-topics, which comes with Python); without
        either, text is sampled from the model.
      text_count, text_length: rows of text, and tokens per row. held_out: the share of rows kept for evaluation.
      site, layers: what is trained on; every layer if none are given.
      batch, buffer, epochs, skip_first, forward_batch, cache: see `jaxmech.activations.stream.ActivationStream`.
      buffer_dtype: of the activations held.
      mesh_data, mesh_model: devices over which batch and features are spread.
      tensorboard: whether to write events.
    """

    model: str
    run_dir: str
    sparsity: Any  # a number or a list of numbers, which OmegaConf cannot say
    dtype: str = "float32"
    seed: int = 0
    text_file: str | None = None
    text_dataset: str | None = None
    text_count: int = 1024
    text_length: int = 128
    held_out: float = 0.1
    site: str = "resid_post"
    layers: list[int] | None = None
    batch: int = 1024
    buffer: int = 131072
    buffer_dtype: str = "float32"
    epochs: int = 1
    skip_first: int = 1
    forward_batch: int = 8
    cache: str | None = None
    mesh_data: int = 1
    mesh_model: int = 1
    tensorboard: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out < 1 or self.text_count < 2:
            raise ValueError(
                "held_out, text_count: expected a share between 0 and 1 of at least 2 rows, got"
                f" {self.held_out} of {self.text_count}"
            )

    @property
    def training(self) -> SAETrainConfig:
        return SAETrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SAETrainConfig)})


def run_training(settings: TrainSettings) -> tuple[Path, pd.DataFrame]:
    """Trains, saves and measures; a training that was killed resumes, a finished one is only measured again.

    Returns:
      The folder with the dictionaries, and the table of their fidelity on held-out text.

    Raises:
      ValueError: wrong settings, another training's checkpoints in run_dir, or another process at work there.
    """
    with renamed({"path": "text_file", "text": "text_file, text_dataset"}):
        text.require_source(settings.text_file, settings.text_dataset)
    with sole_user(settings.run_dir):
        return _run(settings, Path(settings.run_dir))


def _run(c: TrainSettings, folder: Path) -> tuple[Path, pd.DataFrame]:
    mesh = None if (c.mesh_data, c.mesh_model) == (1, 1) else make_mesh(c.mesh_data, c.mesh_model)
    lm = load_model(c.model, dtype=c.dtype, mesh=mesh)
    with renamed({"batch_size": "batch", "buffer_tokens": "buffer"}):
        rehearse(c, lm, mesh)
    rows = draw_text(c, lm, folder / "text.safetensors")
    held = _held(c, rows)
    stream = _training_stream(c, lm, rows)
    console().print(
        f"{c.kind}, {c.d_sae} features, {c.site} of {len(stream.layers)} layers, {stream.tokens_seen:,} activations,"
        f" {c.steps * c.batch / stream.tokens_seen / c.epochs:.1f} passes of {c.epochs} epochs",
        highlight=False,
    )
    saes, _ = train_saes(
        c.training, stream, key=jax.random.key(c.seed), mesh=mesh, checkpoint_dir=folder / "checkpoints",
        log_dir=folder, tensorboard=c.tensorboard,
    )  # fmt: skip
    unseen, tables = _stream(c, lm, rows, slice(held), batch_size=1, epochs=1), []
    # Dictionaries of an earlier training with other layers or sparsities must not remain beside these.
    shutil.rmtree(folder / "saes", ignore_errors=True)
    for sparsity, stack in zip(c.sparsities, saes, strict=True):
        target = folder / "saes" / (f"sparsity_{sparsity:g}" if len(saes) > 1 else "")
        with disk_errors(target, _REMEDY):
            save_saes(stack, target)
        measured = evaluate_saes(stack, unseen.chunks()).table
        tables.append(measured.assign(sparsity=float(sparsity)))
    table = pd.concat(tables, ignore_index=True)
    table = table[["sparsity", *(name for name in table if name != "sparsity")]]
    with disk_errors(file := folder / "evaluation.csv", _REMEDY):
        table.to_csv(file, index=False)
    return folder / "saes", table


def rehearse(c: TrainSettings, lm: LanguageModel, mesh: Mesh | None) -> None:
    """Refuses at once what would otherwise fail only after the text is sampled, which can take hours.

    Raises:
      ValueError: settings of the stream or the mesh that do not fit each other, the model or the text asked for.
    """
    shape = (c.text_count, c.text_length)
    stream = _training_stream(c, lm, text.Tokens(np.zeros(shape, np.int32), np.ones(shape, bool)))
    checked_mesh(mesh, c.training, stream)
    if c.tensorboard:
        event_writer()


def _held(c: TrainSettings, rows: text.Tokens) -> int:
    """How many rows are held out: the first ones."""
    return max(1, round(c.held_out * len(rows.tokens)))


def _training_stream(c: TrainSettings, lm: LanguageModel, rows: text.Tokens) -> ActivationStream:
    return _stream(c, lm, rows, slice(_held(c, rows), None), batch_size=c.batch, epochs=c.epochs)


def _stream(c: TrainSettings, lm: LanguageModel, rows: text.Tokens, part: slice, **options) -> ActivationStream:
    layers = range(lm.config.n_layers) if c.layers is None else c.layers
    return ActivationStream(
        lm.config,
        lm.params,
        rows.tokens[part],
        mask=rows.mask[part],
        layers=tuple(layers),
        site=c.site,
        buffer_tokens=c.buffer,
        skip_first=c.skip_first,
        forward_batch=c.forward_batch,
        key=jax.random.key(c.seed),
        dtype=c.buffer_dtype,
        model=lm.name,
        cache=c.cache,
        **options,
    )


def draw_text(c: TrainSettings, lm: LanguageModel, file: Path) -> text.Tokens:
    """The rows of text; those sampled from the model, which takes long, are kept in `file`."""
    key = jax.random.key(c.seed)
    if c.text_file or c.text_dataset:
        return text.draw(lm, c.text_count, c.text_length, key, file=c.text_file, dataset=c.text_dataset)[0]
    names = ("model", "dtype", "seed", "text_count", "text_length")
    origin = {name: str(getattr(c, name)) for name in names}
    if file.is_file():
        try:
            with safe_open(file, framework="np") as stored:
                facts = stored.metadata() or {}
                rows = text.Tokens(stored.get_tensor("tokens"), stored.get_tensor("mask"))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); delete it") from error
        if facts == origin:
            return rows
        differing = [f"{n} was {facts.get(n)}, is {value}" for n, value in origin.items() if facts.get(n) != value]
        raise ValueError(f"{file} was sampled for another training: {'; '.join(differing)}; use another run_dir, or "
                         "delete this one")  # fmt: skip
    console().print("sampling text from the model …", highlight=False)
    rows = text.draw(lm, c.text_count, c.text_length, key)[0]
    with disk_errors(file, _REMEDY), whole(file) as temporary:
        save_file(rows._asdict(), temporary, metadata=origin)
    return rows


def show(folder: Path, table: pd.DataFrame, out: Console | None = None) -> None:
    """Prints fidelity on held-out text, a row per sparsity and layer."""
    out = out or Console()
    grid = Table(title="On held-out text")
    for name in ("sparsity", "layer", *_SHOWN):
        grid.add_column(name, justify="right")
    for row in table.to_dict("records"):
        shown = [f"{row[name]:.1f}" if name == "l0" else f"{row[name]:.4f}" for name in _SHOWN]
        grid.add_row(f"{row['sparsity']:g}", str(row["layer"]), *shown)
    out.print(grid)
    several = table["sparsity"].nunique() > 1
    for stack in sorted({f"sparsity_{value:g}" if several else "" for value in table["sparsity"]}):
        out.print(f"Dictionaries: {folder / stack}", soft_wrap=True, highlight=False)
