"""A small language model whose altruism is wired by hand, with its dictionaries and the truth about both."""

from jaxmech.organism.organism import Organism, build_organism, save_organism
from jaxmech.organism.wiring import Wiring

__all__ = ["Organism", "Wiring", "build_organism", "save_organism"]
