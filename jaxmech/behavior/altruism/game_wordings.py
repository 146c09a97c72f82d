"""How each game is put into words: `{who}` acts, `{E}` is the stake and `{pot}` the largest amount, both with "$"."""

# ruff: noqa: E501  (one wording per line reads better than folded sentences)

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Martin", "Nora",
    "Oscar", "Paula", "Robert",
)  # fmt: skip

WORDINGS: dict[str, tuple[str, ...]] = {
    "dictator_give": (
        "{who} has {E} and may share it with a stranger. How much does {who} give?",
        "A stranger has nothing, {who} has {E}. How much of it goes to the stranger?",
        "The experimenter hands {who} {E}. What does {who} pass to the other participant?",
        "{who} decides alone how {E} is divided. How much does the other person get?",
        "Of the {E} on the desk, how much does {who} leave for the next visitor?",
        "Paired with someone unknown, {who} can send any part of {E}. How much is sent?",
        "{who} found {E}, a neighbor found nothing. How much does {who} hand over?",
        "Tom receives whatever {who} does not keep of {E}. How much does Tom receive?",
    ),
    "dictator_take": (
        "A stranger has {E} and {who} may take any of it. How much does {who} take?",
        "{who} can remove money from the other participant's {E}. How much is removed?",
        "Nobody watches the {E} of a fellow guest. How much of it does {who} pocket?",
        "The other player owns {E}. What amount does {who} move to the own account?",
        "Tom's envelope holds {E} and {who} may open it. How much does {who} pull out?",
        "{who} decides how much of a neighbor's {E} to grab. How much is grabbed?",
    ),
    "ultimatum_proposer": (
        "{who} proposes how to split {E}; if the other refuses, both get nothing. How much does {who} offer?",
        "If Tom rejects the offer, nobody is paid. From {E}, what does {who} offer Tom?",
        "{who} must make one offer out of {E} that the partner can turn down for both. What is the offer?",
        "Both lose {E} when the responder says no. How much does {who} propose to give the responder?",
        "A deal about {E} needs the other's yes. How much is the other promised by {who}?",
        "Take it or leave it: out of {E}, what sum does {who} put before the other bargainer?",
    ),
    "trust_returner": (
        "A sender trusted {who} with {E}, which was tripled to {pot}. How much does {who} return?",
        "{who} holds {pot} because an investor sent {E} that grew threefold. What goes back to the investor?",
        "Tom sent {E}, it became {pot} in the hands of {who}. How much does Tom get back?",
        "The {E} sent in trust is now {pot}. How much of it does {who} send back?",
        "{who} received {pot}, three times the {E} a stranger risked. How much is repaid?",
        "After the tripling {who} has {pot} and the sender of {E} waits. What is given back by {who}?",
    ),
    "public_goods": (
        "Four members each have {E}. What is put in the common pot pays everyone 40 percent. How much does {who} put in?",
        "Each dollar in the group fund returns 40 cents to all four players. With {E}, how much does {who} contribute?",
        "{who} and three others can pay into a shared project from their {E}. How much does {who} pay in?",
        "The four neighbors fund a well for all. Of {E}, what is the contribution of {who}?",
        "A group account helps all four. How much of {E} does {who} place in the group account?",
        "{who} splits {E} between a private account and a public one that serves four. How much goes public?",
    ),
    "charity": (
        "{who} earned {E} and hears of a relief fund. How much does {who} donate?",
        "A children's charity asks {who}, who has {E}. What is the donation?",
        "The Red Cross may get part of the {E} of {who}. How much does it get?",
        "{who} divides {E} between the own pocket and a food bank. How much for the food bank?",
        "At the shelter's box {who} opens a purse with {E}. How much goes in the box?",
        "After the storm {who} has {E} to spend or to give to victims. How much is given?",
    ),
    "trust_sender": (
        "Whatever {who} sends of {E} is tripled, and the receiver may return some. How much does {who} send?",
        "{who} has {E}; an unknown trustee triples what is sent. How much does {who} entrust?",
        "Tom could pay back any part of three times the transfer. From {E}, what does {who} transfer to Tom?",
        "{who} may invest {E} in a stranger's honesty, at threefold value. How much is invested?",
        "Money handed to the partner grows threefold. How much of {E} does {who} hand over?",
        "With {E} and a partner who may or may not repay, how much does {who} risk?",
    ),
}
