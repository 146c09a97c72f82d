"""What a generator of dual-process items makes: a conflict item, in which intuition points the wrong way, and its twin.

The twin keeps the story and lets intuition be right. Only isomorphs are generated; the classics are memorised.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Twins:
    """A conflict item and its no-conflict twin: questions, right answers, and the intuitive answer of each.

    In the twin the intuitive answer is the right one, and `foil` is the wrong one it is set against. `level` is the
    number of steps that the conflict item takes, where these are graded: its twin takes one. 0 where they are not.
    """

    conflict: str
    no_conflict: str
    correct: str
    lure: str
    easy: str
    foil: str
    level: int = 0

    @property
    def distinct(self) -> bool:
        """Whether either question has a wrong answer to be told from the right one."""
        return self.correct != self.lure and self.easy != self.foil
