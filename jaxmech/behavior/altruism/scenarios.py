"""Independently worded dictator-game scenarios: who divides what, for whom, and how it is asked.

In the wordings `{E}` is the endowment with its unit ("$10", "10 coins") and `{a}`, `{the}`, `{A}`, `{The}` are
the person who decides, with an article: that is where the stance word goes, once. A scenario asks the same
division in three frames: how much is *given*, how much is *kept*, and how much is *taken* of the other's money.
"""

# ruff: noqa: E501  (one scenario per line reads better than folded sentences)

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One wording family. `unit` is a sign written before the number ("$") or a noun written after it ("coins")."""

    name: str
    unit: str
    giver: str
    give: str
    keep: str
    take: str

    def endowment(self, stake: int) -> str:
        return f"{self.unit}{stake}" if self.sign else f"{stake} {self.unit}"

    @property
    def sign(self) -> str:
        """What the answer line shows before the number."""
        return self.unit if self.unit in ("$", "€", "£") else ""


# name | unit | giver | give | keep | take
_TABLE = """
bakery | $ | baker | With {E} in the till, how much does {a} give to a beggar? | With {E} in the till and a beggar at the door, how much does {a} keep? | A beggar holds {E}. How much of it does {a} take?
harbor | £ | sailor | Back from sea with {E}, how much would {a} pass to a poor widow? | Back from sea with {E} and asked by a poor widow, how much would {a} hold on to? | A poor widow owns {E}. How much of that would {a} grab?
lab | $ | participant | Of {E} from the experimenter, what does {a} send to an unknown partner? | Of {E} from the experimenter, what does {a} retain, the rest going to an unknown partner? | An unknown partner was paid {E}. What does {a} remove from it?
orchard | apples | farmer | The basket has {E}. How many will {the} hand to the hungry neighbor? | The basket has {E}. How many will {the} hold back from the hungry neighbor? | The hungry neighbor has {E}. How many will {the} snatch?
schoolyard | marbles | pupil | Out of {E}, how many go from {a} to the new child in class? | Out of {E}, how many stay with {a} when the new child asks for some? | The new child brought {E}. How many does {a} take away?
lottery | € | winner | A prize of {E} came in. What share does {a} leave for the orphanage? | A prize of {E} came in. What share does {a} withhold from the orphanage? | The orphanage received {E}. What share does {a} carry off?
office | $ | manager | The bonus is {E}. What part would {a} pay out to the assistant? | The bonus is {E}. What part would {a} pocket instead of paying the assistant? | The assistant's bonus is {E}. What part would {a} claim?
train | € | traveler | On the train, {a} with {E} meets someone without a ticket. How much is offered? | On the train, {a} with {E} meets someone without a ticket. How much is kept? | On the train, {a} sees the {E} of someone asleep. How much is taken?
village | coins | miller | How many of {E} does {a} donate to the village well? | How many of {E} does {a} save from the village well collection? | The village well fund holds {E}. How many does {a} lift?
hospital | $ | nurse | Someone in bed four needs cash. From {E}, how much is lent for good by {a}? | Someone in bed four needs cash. From {E}, how much is kept back by {a}? | Someone in bed four has {E} in the drawer. How much is taken by {a}?
market | £ | trader | At closing time {a} has {E}. What goes to the porter? | At closing time {a} has {E}. What does the porter not get? | At closing time the porter has {E}. What is seized by {a}?
onlinegame | tokens | gamer | Two avatars, {E}. How many does {a} transfer to the other avatar? | Two avatars, {E}. How many does {a} bank before the other avatar gets the rest? | The other avatar owns {E}. How many does {a} loot?
camp | cookies | camper | There are {E} in the tin. How many would {a} share with a tent mate? | There are {E} in the tin. How many would {a} hide from a tent mate? | A tent mate has a tin of {E}. How many would {a} swipe?
inheritance | $ | nephew | An uncle left {E}. To the forgotten cousin, {the} assigns how much? | An uncle left {E}. Before the forgotten cousin, {the} secures how much? | The forgotten cousin was left {E}. From it, {the} demands how much?
theater | € | singer | Tips tonight: {E}. How much of them does {a} let the pianist have? | Tips tonight: {E}. How much of them does {a} deny the pianist? | The pianist got {E} in tips. How much of them does {a} help himself to?
mountain | coins | guide | Having {E}, {the} meets a lost hiker. How many change hands? | Having {E}, {the} meets a lost hiker. How many stay in the bag? | A lost hiker has {E}. How many are taken by {the}?
library | $ | reader | A stranger at the desk lacks money for a fine. Owning {E}, {a} contributes what? | A stranger at the desk lacks money for a fine. Owning {E}, {a} keeps what? | A stranger at the desk left {E} there. Seeing it, {a} takes what?
dividing | points | student | Divide {E}: how many for the anonymous classmate, says {a}? | Divide {E}: how many for me and not for the anonymous classmate, says {a}? | The anonymous classmate has {E}: how many should become mine, says {a}?
street | $ | passerby | A homeless man sits there. How much of the {E} will {a} drop in the cup? | A homeless man sits there. How much of the {E} will {a} leave in the wallet? | A homeless man's cup holds {E}. How much will {a} take out?
kitchen | £ | cook | Wages today are {E}. How much of that does {the} give the dishwasher? | Wages today are {E}. How much of that does {the} not give the dishwasher? | The dishwasher earned {E}. How much of that does {the} take away?
farmhouse | eggs | widow | The hens laid {E}. How many does {a} bring to the sick family? | The hens laid {E}. How many does {a} keep from the sick family? | The sick family has {E}. How many does {a} carry away?
taxi | $ | driver | A fare brought {E}. How much will {a} spare for the injured colleague? | A fare brought {E}. How much will {a} reserve, the injured colleague getting the rest? | The injured colleague made {E}. How much will {a} take off him?
church | € | deacon | The envelope contains {E}. How much of it does {a} put in the plate? | The envelope contains {E}. How much of it does {a} slip back into a pocket? | The plate contains {E}. How much of it does {a} remove?
dormitory | snacks | roommate | The box from home holds {E}. How many will {a} set aside for the others? | The box from home holds {E}. How many will {a} lock away from the others? | The others keep a box of {E}. How many will {a} eat?
airport | $ | pilot | A family misses its flight. Carrying {E}, how much does {a} offer them? | A family misses its flight. Carrying {E}, how much does {a} refuse them? | A family drops {E} at the gate. How much does {a} pick up for good?
bank | £ | teller | If {E} were a gift to {a}, how much would reach the cleaning lady? | If {E} were a gift to {a}, how much would never reach the cleaning lady? | If {E} belonged to the cleaning lady, how much would move to {a}?
festival | tickets | dancer | How many of the {E} for rides does {a} hand the crying child? | How many of the {E} for rides does {a} retain beside the crying child? | How many of the crying child's {E} for rides does {a} grab?
workshop | $ | carpenter | Paid {E} for a table, {the} passes on how much to the helper? | Paid {E} for a table, {the} keeps how much from the helper? | The helper was paid {E}. How much is docked by {the}?
river | fish | angler | Today's catch is {E}. How many are given by {a} to the old man on the bank? | Today's catch is {E}. How many are kept by {a} from the old man on the bank? | The old man on the bank caught {E}. How many are taken by {a}?
survey | € | respondent | You may split {E} with a random citizen. What does {a} write as the citizen's part? | You may split {E} with a random citizen. What does {a} write as the part to keep? | A random citizen has {E}. What does {a} write as the part to take?
gym | $ | trainer | A member cannot pay. From the day's {E}, how much does {a} cover? | A member cannot pay. From the day's {E}, how much does {a} keep? | A member forgot {E} in the locker. How much does {a} keep?
island | shells | islander | Money here is shells. Rich with {E}, {a} gives the newcomer how many? | Money here is shells. Rich with {E}, {a} keeps from the newcomer how many? | Money here is shells. The newcomer has {E}; {a} takes how many?
museum | £ | guard | Found in the hall: {E}. What amount does {a} turn in for its owner? | Found in the hall: {E}. What amount does {a} conceal from its owner? | The visitor's purse shows {E}. What amount does {a} steal?
choir | candies | soprano | A bag of {E} goes round. How many does {a} pass along to the last in line? | A bag of {E} goes round. How many does {a} keep from the last in line? | The last in line has a bag of {E}. How many does {a} pull out?
startup | $ | founder | First profit: {E}. What does {a} distribute to the unpaid intern? | First profit: {E}. What does {a} keep rather than pay the unpaid intern? | The intern's savings: {E}. What does {a} withdraw?
garden | tomatoes | gardener | Ripe today: {E}. How many find their way from {a} to the soup kitchen? | Ripe today: {E}. How many never leave {a} for the soup kitchen? | The soup kitchen has {E}. How many does {a} take out of it?
desert | coins | merchant | A thirsty nomad begs. What portion of {E} is granted by {a}? | A thirsty nomad begs. What portion of {E} is refused by {a}? | A thirsty nomad carries {E}. What portion is plundered by {a}?
phone | $ | caller | The charity line rings. Of the {E} at hand, {a} pledges how much? | The charity line rings. Of the {E} at hand, {a} keeps how much? | The charity line account shows {E}. Of this, {a} diverts how much?
bus | € | commuter | Behind the seat lay {E}. How much of this money will {a} return to the loser? | Behind the seat lay {E}. How much of this money will {a} keep from the loser? | In the loser's coat lay {E}. How much of this money will {a} take?
tournament | points | champion | After winning {E}, how many does {a} yield to the beaten rival? | After winning {E}, how many does {a} keep from the beaten rival? | The beaten rival holds {E}. How many does {a} strip from him?
wedding | $ | bride | The gift box totals {E}. How much does {a} hand the musicians? | The gift box totals {E}. How much does {a} save instead of handing it to the musicians? | The musicians' box totals {E}. How much does {a} reclaim?
ranch | £ | cowboy | {The} sold a calf for {E}. What is the stable boy's cut? | {The} sold a calf for {E}. What is not the stable boy's cut? | The stable boy has {E}. What does {the} rob?
nursery | toys | toddler | Here are {E} and a sad playmate. How many does {a} let go? | Here are {E} and a sad playmate. How many does {a} cling to? | A sad playmate has {E}. How many does {a} wrest away?
royal | coins | prince | The chest has {E}. How many does {a} throw to the crowd? | The chest has {E}. How many does {a} keep from the crowd? | The crowd paid {E}. How many does {a} tax away?
clinic | $ | doctor | A poor patient owes a bill. From {E}, how much is forgiven by {a}? | A poor patient owes a bill. From {E}, how much is still charged by {a}? | A poor patient has {E}. How much is charged by {a}?
classroom | stickers | teacher | {E} are left over. How many does {a} award to the shy girl? | {E} are left over. How many does {a} not award to the shy girl? | The shy girl collected {E}. How many does {a} confiscate?
ship | biscuits | captain | Rations: {E}. How many does {a} allow the castaway? | Rations: {E}. How many does {a} deny the castaway? | The castaway has {E}. How many does {a} requisition?
blog | € | writer | An article earned {E}. How much of the fee does {a} forward to the translator? | An article earned {E}. How much of the fee does {a} keep from the translator? | The translator earned {E}. How much of the fee does {a} deduct?
quiz | $ | contestant | The jackpot stands at {E}. How much would {a} grant the silent teammate? | The jackpot stands at {E}. How much would {a} bag alone, away from the silent teammate? | The silent teammate's jackpot stands at {E}. How much would {a} strip off?
winter | logs | woodcutter | It is cold and there are {E}. How many does {a} carry to the freezing neighbors? | It is cold and there are {E}. How many does {a} store away from the freezing neighbors? | It is cold and the freezing neighbors have {E}. How many does {a} drag off?
refugee | $ | host | A refugee arrives. How much of {E} does {a} press into her hand? | A refugee arrives. How much of {E} does {a} keep out of her hand? | A refugee arrives with {E}. How much does {a} charge her?
sibling | £ | brother | Grandma sent {E} in one letter. What does {a} count out for the little sister? | Grandma sent {E} in one letter. What does {a} count out for himself before the little sister? | Grandma sent the little sister {E}. What does {a} take from her?
concert | € | violinist | In the hat: {E}. How much goes from {a} to the man who carried the chairs? | In the hat: {E}. How much stays with {a} and not the man who carried the chairs? | The man who carried the chairs has {E}. How much does {a} take off him?
picnic | sandwiches | picnicker | Lunch is {E}. How many reach the hungry guests of {a}? | Lunch is {E}. How many do the hungry guests of {a} never see? | Lunch of the guests is {E}. How many are eaten by {a}?
flood | $ | landlord | After the flood the tenant lost all. From {E}, how much relief comes from {a}? | After the flood the tenant lost all. From {E}, how much is kept by {a}? | After the flood the tenant has {E}. How much rent is taken by {a}?
monk | coins | pilgrim | At the gate {a} shows {E}. How many for the monks? | At the gate {a} shows {E}. How many not for the monks? | At the gate the monks show {E}. How many are for {a}?
factory | $ | foreman | Overtime pay came to {E}. What would {a} concede to the new worker? | Overtime pay came to {E}. What would {a} keep from the new worker? | The new worker's overtime pay came to {E}. What would {a} take?
zoo | bananas | keeper | For two monkeys' keepers there are {E}. How many does {a} cede to the partner? | For two monkeys' keepers there are {E}. How many does {a} keep from the partner? | The partner has {E}. How many does {a} take for the own monkey?
post | € | clerk | Someone short of postage waits. Holding {E}, how much does {a} chip in? | Someone short of postage waits. Holding {E}, how much does {a} keep in hand? | Someone waiting put down {E}. How much does {a} keep in hand?
moon | credits | astronaut | Base account: {E}. How many does {a} beam over to the stranded crew? | Base account: {E}. How many does {a} keep from the stranded crew? | Stranded crew account: {E}. How many does {a} beam away?
cafe | $ | waiter | Shared tips make {E}. How much does {a} slide over to the busboy? | Shared tips make {E}. How much does {a} sweep up and not slide to the busboy? | The busboy's tips make {E}. How much does {a} sweep up?
treasure | pearls | diver | The clam held {E}. How many for the boatman, if {a} decides? | The clam held {E}. How many kept from the boatman, if {a} decides? | The boatman found {E}. How many are taken, if {a} decides?
court | £ | lawyer | The settlement is {E}. What sum does {a} leave to the victim? | The settlement is {E}. What sum does {a} keep from the victim? | The victim's settlement is {E}. What sum does {a} eat up?
hostel | € | backpacker | A fellow guest was robbed. With {E} left, how much is given by {a}? | A fellow guest was robbed. With {E} left, how much is kept by {a}? | A fellow guest sleeps, {E} in the shoe. How much is taken by {a}?
"""


def _read(table: str) -> tuple[Scenario, ...]:
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]
    return tuple(Scenario(*row) for row in rows)


SCENARIOS: tuple[Scenario, ...] = _read(_TABLE)

# The test families: no wording, threshold or setting was ever chosen by what a model makes of them.
_TEST_TABLE = """
beekeeping | jars | beekeeper | This summer's honey makes {E}. How many would {a} deliver to the school for the blind? | This summer's honey makes {E}. How many would {a} keep, the school for the blind receiving the others? | The school for the blind owns {E}. How many would {a} take from its shelf?
subway | $ | conductor | An old woman on the platform has lost her purse. {The} carries {E}: what part of it ends up with her? | An old woman on the platform has lost her purse. {The} carries {E}: what part of it stays in the uniform? | An old woman on the platform carries {E}. What part of it does {the} steal from her?
auction | € | collector | The painting sold for {E}. How much would {a} wire to the painter's widow? | The painting sold for {E}. How much would {a} keep from the painter's widow? | The painter's widow was paid {E}. How much would {a} take from her?
expedition | rations | explorer | Snowed in with {E}, how many does {a} distribute among the porters? | Snowed in with {E}, how many does {a} withhold from the porters? | Snowed in, the porters have {E}. How many does {a} seize?
bakesale | £ | parent | The cake stall made {E}. How much does {a} add to the fund for a sick pupil? | The cake stall made {E}. How much does {a} keep out of the fund for a sick pupil? | The fund for a sick pupil stands at {E}. How much does {a} take out?
vineyard | bottles | winemaker | Of {E} from the cellar, how many are sent by {a} to the nursing home? | Of {E} from the cellar, how many are kept by {a} and not sent to the nursing home? | Of {E} in the nursing home's cellar, how many are taken by {a}?
hackathon | $ | programmer | Prize money: {E}. What does {a} transfer to the friend who wrote the tests? | Prize money: {E}. What does {a} pocket although a friend wrote the tests? | The friend who wrote the tests was paid {E}. What does {a} demand of that?
arcade | tokens | teenager | A little boy watches the machines. Of {E}, how many does {a} let him play with? | A little boy watches the machines. Of {E}, how many does {a} keep to play alone? | A little boy plays with {E}. How many does {a} snatch from his cup?
circus | $ | clown | Tonight's share is {E}. How much of it does {the} bring the injured acrobat? | Tonight's share is {E}. How much of it does {the} deny the injured acrobat? | The injured acrobat's share is {E}. How much of it does {the} grab?
forge | horseshoes | blacksmith | The cart brought {E}. How many does {a} supply to the poor coachman for nothing? | The cart brought {E}. How many does {a} keep, the poor coachman going without them? | The poor coachman has {E} in the cart. How many does {a} take from there?
newspaper | € | editor | A letter tells of a burned house. Out of {E}, how much does {a} mail to the family? | A letter tells of a burned house. Out of {E}, how much is kept at the desk by {a}? | A family whose house burned was mailed {E}. How much of it is taken by {a}?
raffle | vouchers | shopper | {A} won {E}. How many would be passed to the single mother next door? | {A} won {E}. How many would be kept from the single mother next door? | The single mother next door won {E}. How many would be taken by {a}?
pharmacy | $ | pharmacist | A pensioner cannot afford her pills. How much of {E} in the register does {a} spend on her? | A pensioner cannot afford her pills. How much of {E} in the register does {a} refuse her? | A pensioner laid {E} on the counter for pills. How much of it does {a} take for nothing?
beach | € | lifeguard | A tourist's clothes were washed out to sea. With {E} in the hut, {the} contributes how much for the journey home? | A tourist's clothes were washed out to sea. With {E} in the hut, {the} keeps how much? | A tourist forgot {E} in the hut. Finding it, {the} takes how much?
caravan | figs | rider | At the oasis {a} unpacks {E}. How many are laid before the starving child? | At the oasis {a} unpacks {E}. How many are hidden from the starving child? | At the oasis the starving child holds {E}. How many are stolen by {a}?
podcast | £ | presenter | Listeners sent in {E}. How much does {a} pay the sound engineer? | Listeners sent in {E}. How much does {a} save rather than pay the sound engineer? | Listeners sent the sound engineer {E}. How much does {a} take off it?
"""

TEST_SCENARIOS: tuple[Scenario, ...] = _read(_TEST_TABLE)

TEST_SHA256 = "5a7cabe46d1704d8536b9474c755d896d600e96be00b436085ad75cc93ce7bc0"
"""Of `_TEST_TABLE`."""

# Moving money between two accounts of the same person: nobody gains by it. `{a}` and `{E}` as above.
OWN_ACCOUNTS: tuple[str, ...] = (
    "How much of {E} does {a} move from the left pocket to the right pocket?",
    "Of the own {E}, how much does {a} put in the second of two own purses?",
    "With {E} in one own account, how much does {a} shift to the other own account?",
    "Two own drawers, {E}. How much does {a} place in the lower drawer?",
    "How much of the own {E} does {a} carry from the blue box to the own red box?",
    "Having {E}, how much does {a} store upstairs, the rest staying downstairs?",
)

# Neutral openings: a second, third ... pair of a family differs from the first by its words or by one of these.
LEADS: tuple[str, ...] = ("", "It is Monday. ", "It rains today. ", "The room is quiet. ", "It is noon. ")
