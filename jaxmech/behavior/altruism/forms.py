"""Where a stance is put, and who is asked: one wording in three forms."""

from __future__ import annotations

import re

from jaxmech.behavior.prompts import person

FORMS = ("word", "sentence", "you")
"""word: in the question itself, "How much does a generous baker give?"; sentence: in a sentence before it, "This is a
generous baker. How much does the baker give?"; you: "You are a generous baker. How much do you give?"."""

_WHO = r"\{(?:a|the|A|The)\}"
_VERBS = {
    "assigns": "assign", "carries": "carry", "contributes": "contribute", "decides": "decide", "demands": "demand",
    "diverts": "divert", "gives": "give", "has": "have", "keeps": "keep", "meets": "meet", "passes": "pass",
    "pledges": "pledge", "secures": "secure", "sees": "see", "shows": "show", "takes": "take", "unpacks": "unpack",
}  # fmt: skip
"""What who decides does, in the wordings of `scenarios.py` that do not say "does" first."""


def put(form: str, wording: str, noun: str, stance: str = "", after: str = "") -> str:
    """The question of a wording, its endowment `{E}` still to be filled in.

    Args:
      form: one of `FORMS`.
      noun: who decides, such as "baker"; stance goes before it, and after goes after it.
    """
    who = person(noun, stance, after)
    if form == "word":
        return wording.format(E="{E}", **who)
    if form == "sentence":
        the = {
            name: f"{article} {noun}" for name, article in (("a", "the"), ("the", "the"), ("A", "The"), ("The", "The"))
        }
        return f"This is {who['a']}. " + wording.format(E="{E}", **the)
    return f"You are {who['a']}. " + in_second_person(wording)


def in_second_person(wording: str) -> str:
    """The same question, put to who decides."""
    text = re.sub(rf"\b(do|say)(?:es|s) ({_WHO})", r"\1 \2", wording)
    verb = re.compile(rf"({_WHO}(?: with {{E}})?) ({'|'.join(_VERBS)})\b")
    text = verb.sub(lambda found: f"{found[1]} {_VERBS[found[2]]}", text)
    text = text.replace("{A}", "You").replace("{The}", "You").replace("{a}", "you").replace("{the}", "you")
    text = text.replace("himself", "yourself").replace("the own", "your own")
    return re.sub(r"\bthe (\w+ \w+) of you\b", r"your \1", text)
