"""Dictionaries on disk, in every format of the field, and the one canonical form they become."""

from jaxmech.sae.formats.saelens import load_sae, load_saes, save_sae, save_saes

__all__ = ["load_sae", "load_saes", "save_sae", "save_saes"]
