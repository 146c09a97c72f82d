"""How each game is put into words: `{who}` acts.

In games of amounts `{E}` is the stake and `{pot}` the largest amount, both with "$". `{options}` are the words or the
lettered options to choose from, in the order of the family; a lettered one reads own/other. What else a wording may
name is in the game's `details`.
"""

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
        "With {E} and a partner who perhaps repays, how much does {who} risk?",
    ),
    "ultimatum_responder": (
        "Of {pot}, {who} is offered {offer}; a refusal leaves both with nothing. Does {who} {options}?",
        "The proposer wants {rest} of {pot}, with {offer} for {who}, who can veto the deal for both. Does {who} {options}?",
        "It is {offer} out of {pot} for {who}, or nothing for anybody. Does {who} {options}?",
        "A stranger splits {pot} and grants {offer} to {who}. A no costs both everything. Will {who} {options}?",
        "Take it or leave it, says the other bargainer: {offer} of {pot}. Will {who} {options}?",
        "The offer to {who} is {offer}, the rest of {pot} stays with Tom, and no deal means no money. Would {who} {options}?",
    ),
    "prisoners_dilemma": (
        "Both cooperate: {R} each. Both defect: {P} each. A lone defector gets {T}, a lone cooperator {S}. Does {who} {options}?",
        "A lone defector earns {T} and leaves the other {S}; two defectors earn {P} each, two cooperators {R} each. Does {who} {options}?",
        "Each can cooperate, which costs {cost} and hands the other {benefit}, or defect, which does nothing. Will {who} {options}?",
        "Defecting alone pays {T}, cooperating alone {S}, defecting together {P}, cooperating together {R}. Will {who} {options}?",
        "Two strangers move at once: {R} each for cooperating, {P} each for defecting, {T} to {S} for a defector against a cooperator. Would {who} {options}?",
        "To defect saves {cost}, to cooperate brings the unknown partner {benefit}. They meet once. Would {who} {options}?",
    ),
    "third_party_punishment": (
        "Tom kept {kept} of {total} and gave a stranger {given}. {who} has {E}, each dollar spent costs Tom three. How much does {who} spend?",
        "{who} saw that Tom passed on {given} of {total}. A fine for Tom is three times what {who} pays from {E}. How much does {who} pay?",
        "The dictator shared {given} out of {total}. A witness, {who}, may burn three of his dollars for each of {E}. How much does {who} use?",
        "Of {total}, the other player got {given}. With {E}, how much does the onlooker {who} spend on a threefold penalty?",
        "The split was {kept} to {given}. {who}, who is not involved, can buy punishment at one to three with {E}. How much is spent?",
        "{who} holds {E} and hears of a split, {kept} and {given}. A dollar from {who} removes three from the one who split. How much is it?",
    ),
    "gift_exchange": (
        "The firm pays {who} a wage of {wage}. Effort goes from 0.1 to 1.0 and profits the firm. What effort does {who} choose?",
        "Hired for {wage}, {who} picks an effort between 0.1 (least) and 1.0 (most). Which effort is picked?",
        "After receiving {wage} from the employer, {who} may work at 0.1 up to 1.0. What is the effort?",
        "An employer offered {wage} and {who} signed. On a scale from 0.1 to 1.0, how hard does {who} work?",
        "Nobody can check how {who}, who is paid {wage}, works. Which level from 0.1 to 1.0 is it?",
        "{who} earns {wage} whatever the work done. From 0.1 to 1.0, what is the effort of {who}?",
    ),
    "svo_slider": (
        "Points for oneself/points for a stranger: {options}. Which letter does {who} choose?",
        "An unknown partner gets the second number, {who} the first: {options}. Which option does {who} mark?",
        "One line counts, own points before the slash and the other person's after it: {options}. Which line does {who} pick?",
        "Of these splits (self/other), {options}, which one does {who} prefer?",
        "The slider stops at {options}, for self/other. Where does {who} leave it?",
        "A second person is paid what stands behind the slash: {options}. What does {who} decide?",
    ),
    "charness_rabin": (
        "Money for oneself/money for the other: {options}. Which letter does {who} choose?",
        "{who} decides for both players, own payoff first, the other's second: {options}. Which option is it?",
        "Another participant is paid the second number, {who} the first: {options}. Which option does {who} mark?",
        "Two allocations (self/other), {options}. Which of them does {who} prefer?",
        "Role B belongs to {who}. Pay of B/pay of A: {options}. What does {who} select?",
        "Either {options}, as own/other's earnings. Which one does {who} pick?",
    ),
    "modified_dictator": (
        "{who} divides {E} tokens, worth {hold} each to {who} and {give} each to the other. How many does {who} pass?",
        "With {E} tokens, worth {hold} each when held and {give} each when passed, how many does {who} pass on?",
        "A stranger earns {give} for each token from {who}, who earns {hold} for each of the rest. Of {E} tokens, how many go to the stranger?",
        "Every token is {hold} for {who} or {give} for the other participant. How many of {E} tokens does the participant get?",
        "{who} splits {E} tokens. Holding one brings {hold}, giving one brings the partner {give}. How many are given?",
        "Tokens: {E}. Own value {hold} each, value to someone unknown {give} each. How many does {who} send?",
    ),
}
