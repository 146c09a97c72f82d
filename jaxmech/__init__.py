"""jaxmech: finds the features of a language model that carry a behaviour, and tests them by intervention.

import jaxmech as jm
lm = jm.load_model("gemma-3-270m")
tokens, mask = jm.encode_prompts(lm, ["Q: A generous player has $10. How much does the player give?\nA: $"])
out = jm.forward(lm.config, lm.params, tokens, mask=mask, taps=("resid_post",))
dist = jm.choice_distribution(lm, ["..."], [str(a) for a in range(11)])
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmech import contrast
from jaxmech.activations.saved import load_activations, save_activations
from jaxmech.activations.stream import ActivationStream
from jaxmech.answers.prompts import Prompts, make_prompts
from jaxmech.answers.score import Choices, choice_distribution, score
from jaxmech.interventions import attribution, controls, edits, patching, proximity, screens, steering
from jaxmech.interventions.sweep import sweep
from jaxmech.io.progress import show_progress
from jaxmech.io.tpu import quiet_without_chips
from jaxmech.io.version import __version__ as __version__
from jaxmech.models.chat import encode_chat
from jaxmech.models.decoder import Tap, forward
from jaxmech.models.generate import generate
from jaxmech.models.language_model import LanguageModel
from jaxmech.models.load import load_model
from jaxmech.models.saved import save_model
from jaxmech.models.sharding import make_mesh, shard_batch
from jaxmech.models.text import encode_prompts
from jaxmech.sae import collect
from jaxmech.sae.formats import load_sae, load_saes, save_sae, save_saes
from jaxmech.sae.module import SAE, SAEConfig

if TYPE_CHECKING:
    from jaxmech import behavior
    from jaxmech.sae.check import check_sae
    from jaxmech.sae.evaluate import evaluate_saes, loss_recovered
    from jaxmech.sae.training import SAETrainConfig, train_saes

quiet_without_chips()

_WITH_TABLES = {
    "behavior": "jaxmech.behavior",
    "check_sae": "jaxmech.sae.check",
    "evaluate_saes": "jaxmech.sae.evaluate",
    "loss_recovered": "jaxmech.sae.evaluate",
    "SAETrainConfig": "jaxmech.sae.training",
    "train_saes": "jaxmech.sae.training",
}
"""What needs the extra `study` (pandas and others), and is imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _WITH_TABLES:
        raise AttributeError(f"module 'jaxmech' has no attribute {name!r}")
    try:
        module = importlib.import_module(_WITH_TABLES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxmech"):
            raise
        raise ModuleNotFoundError(
            f"jaxmech.{name} needs {error.name}; install what studies need: pip install 'jaxmech[study]'",
            name=error.name,
        ) from error
    return module if _WITH_TABLES[name].endswith(f".{name}") else getattr(module, name)


__all__ = [
    "ActivationStream",
    "Choices",
    "LanguageModel",
    "Prompts",
    "SAE",
    "SAEConfig",
    "SAETrainConfig",
    "Tap",
    "attribution",
    "behavior",
    "check_sae",
    "choice_distribution",
    "collect",
    "contrast",
    "controls",
    "edits",
    "encode_chat",
    "encode_prompts",
    "evaluate_saes",
    "forward",
    "generate",
    "load_activations",
    "load_model",
    "load_sae",
    "load_saes",
    "loss_recovered",
    "make_mesh",
    "make_prompts",
    "patching",
    "proximity",
    "save_activations",
    "save_model",
    "save_sae",
    "save_saes",
    "score",
    "screens",
    "shard_batch",
    "show_progress",
    "steering",
    "sweep",
    "train_saes",
]
