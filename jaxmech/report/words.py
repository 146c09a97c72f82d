"""What a study's behaviour calls things: its poles, its outcome, its controls and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmech.behavior.behavior import Control, Words, control_of
from jaxmech.report.formats import readable


@dataclasses.dataclass(frozen=True)
class Said(Words):
    """A behaviour's words, as stage behavior left them in the results."""

    name: str = ""
    controls: Mapping[str, Control] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Said:
        given = dict(results["behavior"]["words"])
        controls = {name: Control(**fields) for name, fields in given.pop("controls").items()}
        return cls(**given, controls=controls)

    @property
    def inside(self) -> str:
        """The setting within a sentence."""
        return self.setting[:1].lower() + self.setting[1:]

    def pole(self, pole: str) -> str:
        return {"plus": self.plus, "minus": self.minus}.get(pole, pole)

    def towards(self, direction: str) -> str:
        """ "to_plus" -> towards the name of plus."""
        return f"towards {self.pole(direction.removeprefix('to_'))}"

    def contrast(self, name: str) -> str:
        """A reader's name for a contrast: the behaviour's own, or a control."""
        if name == "poles":
            return self.varies[:1].upper() + self.varies[1:]
        control = self.controls.get(name)
        return control.label if control and control.label else readable(name)

    def condition(self, condition: str) -> str:
        """A reader's name for a condition of the prompts."""
        control, pole = control_of(condition)
        if control is None:
            word = self.pole(pole)
            return word[:1].upper() + word[1:]
        known = self.controls.get(control, Control())
        named = dict(zip(("plus", "minus"), known.poles, strict=True)).get(pole)
        return f"{self.contrast(control)}: {named}" if named else self.contrast(control)
