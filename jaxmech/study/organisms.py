"""A study of an organism: `model: organism` or `organism:switch=value,...` stands for a constructed model.

It is built for the study's own prompts, kept in the cache by its content, and opened as any other model and its
dictionaries are: no stage sees how it was wired.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache
from typing import TYPE_CHECKING

from jaxmech.io.settings import build, renamed
from jaxmech.study.config import StudyConfig

if TYPE_CHECKING:
    from jaxmech.organism import Organism
    from jaxmech.organism.wiring import Wiring

NAME = "organism"


def with_organism(config: StudyConfig) -> StudyConfig:
    """The configuration with paths in place of an organism's name; any other as it is.

    Raises:
      ValueError: an unknown switch, a value that it cannot take, or dictionaries besides the organism's own.
    """
    if not _is_organism(config.model):
        return config
    if config.dictionaries.path:
        raise ValueError(f"dictionaries.path: an organism has its own, got {config.dictionaries.path}")
    model, saes = _kept(*_parts(config))
    return dataclasses.replace(
        config, model=model, dictionaries=dataclasses.replace(config.dictionaries, path=saes)
    )  # fmt: skip


def organism_of(config: StudyConfig) -> Organism:
    """The organism that a configuration names, the study's seed being its own; raises as `with_organism`."""
    return _built(*_parts(config))


def _is_organism(model: str) -> bool:
    return model.partition(":")[0] == NAME


def _parts(config: StudyConfig) -> tuple:
    """What an organism is made of, hashable."""
    bank, items, wordings = config.bank, config.dual_process.items, config.transfer.families
    return _wiring(config.model, config.seed), bank, items, wordings


def _wiring(model: str, seed: int) -> Wiring:
    import yaml

    from jaxmech.organism.wiring import Wiring

    said = model.partition(":")[2]
    pairs = [pair.partition("=") for pair in said.split(",") if pair]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"model: switches are written {NAME}:switch=value,..., got {', '.join(bad)}")
    given = {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
    if "seed" in given:
        raise ValueError("model: an organism's seed is the study's own, the key seed")
    with renamed({name: f"model: {name}" for name in given}):
        return build(Wiring, given | {"seed": seed})


@cache
def _built(wiring, bank, items, wordings) -> Organism:
    from jaxmech.organism import build_organism

    return build_organism(wiring, bank, items=items, wordings=wordings)


@cache
def _kept(*parts) -> tuple[str, str]:
    """The folders of a model and its dictionaries, written where there are none of this content."""
    import jax
    import numpy as np

    from jaxmech.models.load import cache_dir
    from jaxmech.models.saved import MANIFEST, save_model
    from jaxmech.sae.formats import save_saes

    made = _built(*parts)
    digest = hashlib.sha256(repr(sorted(made.lm.tokenizer.get_vocab().items())).encode())
    for leaf in jax.tree.leaves((made.lm.params, made.saes.params)):
        digest.update(np.asarray(leaf).tobytes())
    folder = cache_dir() / "organisms" / digest.hexdigest()[:16]
    if not (folder / "saes" / "done").is_file():
        if not (folder / "model" / MANIFEST).is_file():
            save_model(made.lm, folder / "model")
        save_saes(made.saes, folder / "saes")
        (folder / "saes" / "done").touch()
    return str(folder / "model"), str(folder / "saes")
