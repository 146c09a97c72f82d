"""The help topics that come with Python: English text about a subject of its own, without a download."""

from __future__ import annotations

import importlib.util

import numpy as np

NAME = "pydoc-topics"


def file() -> str | None:
    """The file that holds them; None where Python comes without."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    return None if spec is None else spec.origin


def texts() -> list[str]:
    """All topics in an order of their own: neighbours in the alphabet are alike.

    Raises:
      ValueError: this Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ValueError(f"dataset: {NAME} comes with Python, but not with this one; give another") from error
    names = sorted(topics)
    return [topics[names[i]] for i in np.random.default_rng(0).permutation(len(names))]
