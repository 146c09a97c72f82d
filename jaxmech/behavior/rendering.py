"""How a question, and worked examples before it, are put to a model: used by everything that writes prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Rendering(Protocol):
    """Writes prompts as text. What `examples` returns may be shared by many queries and is computed once."""

    def query(self, question: str, lead: str = "") -> str:
        """What is asked, ending right before the answer; `lead` is what the answer begins with, such as " $"."""
        ...

    def examples(self, solved: Sequence[tuple[str, str]], lead: str = "") -> str:
        """Questions with their answers, to be put before queries with the same `lead`."""
        ...


class Plain(NamedTuple):
    """Questions and answers as lines of text: for base models, which follow the examples that they are shown."""

    ask: str = "Q: "
    answer: str = "\nA:"

    def query(self, question: str, lead: str = "") -> str:
        return f"{self.ask}{question}{self.answer}{lead}"

    def examples(self, solved: Sequence[tuple[str, str]], lead: str = "") -> str:
        return "".join(f"{self.query(question, lead)}{answer}\n" for question, answer in solved)


PLAIN = Plain()
