"""Training of sparse autoencoders: six kinds, every layer and several sparsities in one compiled program."""

from jaxmech.sae.training.config import KINDS, SAETrainConfig
from jaxmech.sae.training.loop import train_saes

__all__ = ["KINDS", "SAETrainConfig", "train_saes"]
