"""The domain: prompt families and minimal pairs, games, dual-process items, and parsing of sampled answers."""

from jaxmech.behavior.altruism.dictator import Bank, BankConfig, build_bank
from jaxmech.behavior.altruism.games import GAMES, Game, game_prompts
from jaxmech.behavior.dual_process.prompts import build_items
from jaxmech.behavior.parsing import count_invalid, parse_amount, parse_answers

__all__ = [
    "GAMES",
    "Bank",
    "BankConfig",
    "Game",
    "build_bank",
    "build_items",
    "count_invalid",
    "game_prompts",
    "parse_amount",
    "parse_answers",
]
