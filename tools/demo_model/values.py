"""The values that users of the generated dialogues tell: names, places, numbers, favourite things, lists.

Everything exists in two disjoint halves: TRAIN is what the model learns from, HELD_OUT what it is judged by.
Words are split by hand; made-up names and numbers, which are practically endless, by a checksum.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from enum import Enum
from random import Random


class Split(Enum):
    """Which half of the wordings or of the values a dialogue draws from."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True)
class Pool:
    """Alternatives in two disjoint halves."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, train: str, held_out: str) -> Pool:
        """Both halves written with bars between the alternatives, which keeps long lists readable."""
        return cls(tuple(train.split("|")), tuple(held_out.split("|")))

    def __getitem__(self, split: Split) -> tuple[str, ...]:
        return self.train if split is Split.TRAIN else self.held_out


NAMES = Pool.of(
    "Anna|Ben|Clara|David|Emma|Felix|Greta|Hugo|Ida|Jonas|Karin|Leo|Maria|Nils|Olga|Paul|Rosa|Simon|Tina|"
    "Victor|Wanda|Alice|Bruno|Cecil|Diana|Edgar|Fiona|George|Helen|Ivan|Julia|Kevin|Laura|Martin|Nora|Oscar|"
    "Petra|Quentin|Rita|Steven|Teresa|Ulrich|Vera|Walter|Yvonne|Amir|Bella|Carlos|Dolores|Elena|Farid|Gina|"
    "Hassan|Irene|Jamal|Kenji|Lucia|Mehmet|Nadia|Omar|Priya|Rafael|Sana|Tariq|Uma|Yuki|Zoe|Biscuit|Pepper|"
    "Shadow|Ginger|Rocky|Luna|Simba",
    "Miso|Tobias|Agnes|Bertram|Carmen|Dieter|Esther|Franco|Gloria|Harald|Ingrid|Joachim|Katja|Lorenzo|"
    "Mathilda|Norbert|Ophelia|Patrick|Ramona|Sebastian|Thelma|Urban|Valerie|Wilhelm|Xenia|Yannick|Zelda|"
    "Akira|Bilal|Chiara|Dmitri|Eleni|Fatima|Gustavo|Hiroshi|Imran|Jasmin|Kofi|Leila|Magnus|Noor|Olivier|"
    "Pablo|Ravi|Sofia|Tomas|Viggo|Whiskers|Muffin|Noodle|Pickles|Bandit|Waffles",
)
PLACES = Pool.of(
    "London|Paris|Berlin|Madrid|Rome|Vienna|Prague|Lisbon|Dublin|Athens|Oslo|Helsinki|Warsaw|Cairo|Lagos|"
    "Nairobi|Tokyo|Seoul|Beijing|Delhi|Mumbai|Sydney|Toronto|Chicago|Boston|Denver|Lima|Bogota|Quito|Havana|"
    "Munich|Hamburg|Milan|Naples|Seville|Porto|Lyon|Ghent|Utrecht|Geneva|Krakow|Riga|Bergen|Leeds|Bristol|"
    "Cardiff|Kyoto|Hanoi|Perth",
    "Amsterdam|Brussels|Copenhagen|Stockholm|Budapest|Zagreb|Tallinn|Valencia|Marseille|Florence|Salzburg|"
    "Leipzig|Antwerp|Glasgow|Osaka|Manila|Jakarta|Nagoya|Accra|Tunis|Casablanca|Montreal|Seattle|Houston|"
    "Santiago|Montevideo",
)
WORDS = {
    "colour": Pool.of(
        "red|blue|green|yellow|purple|brown|white|black|grey|pink|silver|gold|scarlet|ivory|indigo|olive|"
        "navy|violet",
        "teal|orange|crimson|turquoise|magenta|amber|lilac|beige",
    ),
    "food": Pool.of(
        "pizza|pasta|curry|soup|salad|rice|bread|cheese|pancakes|dumplings|noodles|stew|tacos|omelette|"
        "risotto|fish",
        "lasagne|sushi|goulash|paella|burritos|porridge|ravioli|couscous",
    ),
    "drink": Pool.of(
        "tea|coffee|water|milk|cocoa|cider|juice|wine|beer|cola|tonic|punch",
        "lemonade|espresso|kefir|ginger ale|buttermilk|mead",
    ),
    "animal": Pool.of(
        "lion|tiger|bear|wolf|fox|otter|eagle|owl|whale|dolphin|panda|zebra|camel|goat|swan|beaver|lynx|seal",
        "penguin|giraffe|badger|walrus|falcon|hedgehog|koala|moose",
    ),
    "fruit": Pool.of(
        "apple|pear|plum|cherry|peach|grape|banana|mango|melon|lemon|kiwi|fig|date|lime|papaya|quince",
        "apricot|pineapple|nectarine|raspberry|pomegranate|tangerine",
    ),
    "sport": Pool.of(
        "tennis|football|hockey|rowing|golf|chess|boxing|sailing|cycling|swimming|climbing|judo|rugby|skiing",
        "badminton|volleyball|fencing|archery|curling|handball",
    ),
    "flower": Pool.of(
        "rose|tulip|lily|daisy|iris|poppy|lotus|violet|aster|peony|jasmine|clover",
        "orchid|sunflower|dahlia|magnolia|lavender|marigold",
    ),
    "instrument": Pool.of(
        "piano|guitar|violin|flute|drums|cello|harp|trumpet|organ|banjo|tuba|oboe",
        "clarinet|saxophone|accordion|trombone|mandolin|bassoon",
    ),
    "month": Pool.of(
        "January|February|March|April|May|June|August|September|November", "July|October|December"
    ),
    "item": Pool.of(
        "apples|rice|tea|soap|candles|paper|nails|a lamp|a tent|a map|socks|boots|gloves|a book|pens|glue|"
        "salt|sugar|flour|eggs|butter|honey|rope|matches|a knife|plates|cups|a ladder|a broom|paint|seeds|"
        "a hat|a scarf|towels|a torch|batteries|a clock|pillows|onions|carrots|beans|garlic|olives|nuts|"
        "stamps|envelopes",
        "potatoes|mushrooms|vinegar|sunscreen|a kettle|a compass|blankets|toothpaste|a hammer|shampoo|"
        "raisins|spinach|crackers|a camera|sandals|an umbrella",
    ),
}
PEOPLE = (
    "sister|brother|cousin|aunt|uncle|daughter|son|neighbour|boss|teacher|dentist|doctor|landlord|roommate|"
    "colleague|coach|nephew|niece|grandmother|grandfather|best friend|mother|father|partner|barber|lawyer"
)
PETS = "cat|dog|horse|parrot|rabbit|hamster|goldfish|turtle|pony|kitten|puppy|canary|goat|donkey"
THINGS = "boat|company|school|band|hotel|team|favourite cafe|project|robot|car|garden gnome|ship"
EVENTS = "meeting|wedding|next holiday|party|exam|concert|job interview|conference|course|family reunion"
NUMBERED = (
    "locker code|room number|door code|flight number|seat number|badge number|ticket number|customer number|"
    "bus number|house number|phone extension|alarm code|order number|bike lock code|parking spot|"
    "library card number|safe code"
)
COUNTED = "books|plants|chairs|records|hats|paintings|cameras|spoons|bicycles|postcards"
LISTS = (
    "shopping list|packing list|wish list|to-do list|gift list|tool list|camping list|kitchen list|"
    "moving list"
)

_POOLS = (NAMES, PLACES, *WORDS.values())
_SUBJECTS = (PEOPLE, PETS, THINGS, EVENTS, NUMBERED, COUNTED, LISTS)
_LEARNED = " ".join((*(value for pool in _POOLS for value in pool.train), *_SUBJECTS))
_STOCK = sorted({word for word in re.findall(r"[a-z]+", _LEARNED.lower()) if len(word) > 2})
_REAL = {value for pool in _POOLS for value in pool.train + pool.held_out}
_ONSETS = "||||||b|br|c|ch|d|dr|f|fl|g|gr|h|j|k|l|m|n|p|pr|qu|r|s|sh|st|t|th|tr|v|w|x|y|z|bl|cl|sk".split("|")
_VOWELS = "a|e|i|o|u|a|e|i|o|ai|ea|ee|io|ou|y".split("|")
_CODAS = "|||n|r|l|s|t|m|x|nd|rk|ck|sh|th|ll|ss|p|d|g".split("|")
_TOWN_ENDINGS = "ton|ford|burg|ville|dale|stad|port|mouth|wick|heim".split("|")
_TOWN_OPENINGS = "New|Port|San|Old|Upper|Saint".split("|")


def split_of(value: str) -> Split:
    """The half that a made-up name or a number belongs to, for good."""
    return Split.HELD_OUT if zlib.crc32(value.encode()) % 5 == 0 else Split.TRAIN


def spliced_word(rng: Random) -> str:
    """The head of one learned word on the tail of another: a word that means nothing, of ordinary pieces."""
    head, tail = rng.choice(_STOCK), rng.choice(_STOCK)
    return head[: rng.randint(1, 5)] + tail[-rng.randint(1, 5) :]


def _syllables(rng: Random) -> str:
    parts = (
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 2, 3)))
    )
    word = "".join(parts)[:10]
    return word if len(word) > 2 else word + rng.choice("nrlst")


def _made_up(rng: Random, split: Split, ending: str = "") -> str:
    while True:
        word = (spliced_word(rng) if rng.random() < 0.3 else _syllables(rng)) + ending
        if split_of(word) is split and word.capitalize() not in _REAL:
            return word.capitalize()


def _number(rng: Random, split: Split, low: int, high: int) -> str:
    while split_of(number := str(rng.randint(low, high))) is not split:
        pass
    return number


def _word(rng: Random, kind: str, split: Split) -> str:
    """A word of the pool; so that any word can be copied, half of training's are meaningless ones."""
    if split is Split.TRAIN and rng.random() < 0.5:
        made_up = _syllables(rng) if rng.random() < 0.4 else spliced_word(rng)
        word = rng.choice(("", "a ")) * (kind == "item") + made_up
        if word not in _REAL:
            return word
    return rng.choice(WORDS[kind][split])


def draw_value(rng: Random, kind: str, split: Split) -> str:
    """A value of this kind from this half."""
    if kind == "name":
        return rng.choice(NAMES[split]) if rng.random() < 0.25 else _made_up(rng, split)
    if kind == "place":
        style = rng.random()
        if style < 0.4:
            return rng.choice(PLACES[split])
        if style < 0.5:
            return f"{rng.choice(_TOWN_OPENINGS)} {_made_up(rng, split)}"
        return _made_up(rng, split, rng.choice(_TOWN_ENDINGS) if style < 0.7 else "")
    if kind == "number":
        num_digits = rng.choice((2, 3, 4, 4, 5, 6))
        return _number(rng, split, 10 ** (num_digits - 1), 10**num_digits - 1)
    if kind == "age":
        return _number(rng, split, 10, 99)
    if kind == "count":
        return _number(rng, split, 10, 999)
    if kind == "list":
        items: list[str] = []
        for _ in range(rng.choice((2, 3, 3, 4))):
            items = add_item(rng, items, split)
        return join_items(items)
    return _word(rng, kind, split)


def add_item(rng: Random, items: list[str], split: Split) -> list[str]:
    """The items and a new one."""
    while (item := _word(rng, "item", split)) in items:
        pass
    return [*items, item]


def join_items(items: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    return ", ".join(items[:-1]) + " and " + items[-1]


def split_items(listed: str) -> list[str]:
    """The inverse of `join_items`."""
    return listed.replace(" and ", ", ").split(", ")
