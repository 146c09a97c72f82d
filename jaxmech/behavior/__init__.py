"""What a behaviour is, the behaviours that come with jaxmech, and how custom ones are read."""

from jaxmech.behavior.altruism.altruism import altruism
from jaxmech.behavior.altruism.dictator import Bank, BankConfig, build_bank
from jaxmech.behavior.altruism.games import GAMES, Game, game_prompts
from jaxmech.behavior.behavior import Behavior, Control, Task, Words
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.behavior.parsing import parse_amount
from jaxmech.behavior.read import read_behavior
from jaxmech.behavior.rendering import Plain, Rendering

__all__ = [
    "GAMES",
    "Bank",
    "BankConfig",
    "Behavior",
    "Control",
    "Game",
    "Plain",
    "Rendering",
    "Task",
    "Words",
    "altruism",
    "build_bank",
    "build_items",
    "game_prompts",
    "parse_amount",
    "read_behavior",
]
