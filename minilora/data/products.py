"""The products task: write the description of a product from its attributes.

    Describe: lamp                                       the prompt
    scent=mint; trim=ivory; origin=oslo; colour=teal
    Text:
    This lamp is smelling of mint, edged in ivory, ...   the description

Two things are held out:

* pairs of words: each product of `validation` and `test` has two values that no training product and no
  catalogue document shows together;
* words: 8 of the 40 of each kind occur in `test_values` only.

`catalogue_text` is for pretraining. It has other layouts and other frames, and training words only.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from minilora.config import require, require_in

SPLITS = ("train", "validation", "test", "test_values")
CATEGORIES = ("lamp", "chair", "bag", "mug", "rug", "clock", "coat", "vase")
KINDS = ("colour", "trim", "material", "pattern", "scent", "origin", "style", "buyer")
N_SHOWN = 4
N_PLANS = 20

# 32 words seen in training | 8 words held out. Colour and trim share a pool, so a model can swap them.
_POOLS = {
    "colour": (
        "teal amber ivory crimson navy olive coral indigo scarlet maroon beige cream lilac mauve purple"
        " silver golden copper bronze rust black white grey pink red blue green yellow orange brown tan"
        " violet"
        " | ochre cobalt fuchsia cerise russet umber taupe puce"
    ),
    "material": (
        "oak pine birch walnut bamboo cork leather linen cotton wool silk velvet canvas felt denim steel"
        " iron brass tin glass crystal marble granite clay paper wicker rattan plastic rubber nylon suede"
        " ash"
        " | ebony jute pewter slate tweed onyx balsa hemp"
    ),
    "pattern": (
        "stars moons waves leaves ferns roses tulips daisies birds foxes owls bears fish whales anchors"
        " arrows hearts dots stripes checks circles squares diamonds spirals clouds rainbows trees cats dogs"
        " bees crowns boats"
        " | herons acorns thistles comets plumes beetles zebras lanterns"
    ),
    "scent": (
        "mint rose lemon vanilla lavender honey cinnamon ginger clove basil thyme sage jasmine coffee cocoa"
        " almond apple peach cherry plum pear mango melon coconut caramel musk moss smoke rain hay tea"
        " tobacco"
        " | fennel nutmeg myrrh bergamot papaya anise saffron quince"
    ),
    "origin": (
        "paris oslo lima rome delhi cairo tokyo kyoto seoul london dublin madrid lisbon vienna prague"
        " berlin munich milan venice athens havana boston chicago austin denver toronto sydney perth nairobi"
        " accra dakar tunis"
        " | bogota hanoi quito tbilisi riga zagreb lagos bergen"
    ),
    "style": (
        "rustic modern retro classic simple elegant bold cosy gothic nautical tropical vintage urban rural"
        " sporty playful festive formal casual minimal baroque romantic regal quirky dreamy sleek rugged"
        " dainty lively serene moody grand"
        " | bohemian stoic opulent pastoral austere nordic kitsch gallant"
    ),
    "buyer": (
        "sailors bakers farmers teachers students writers painters dancers singers hikers campers runners"
        " cyclists gardeners cooks barbers doctors nurses pilots drivers poets artists knitters readers"
        " gamers parents children jewellers scholars lawyers actors tailors"
        " | weavers fencers jugglers surfers potters divers monks smiths"
    ),
}
_POOLS["trim"] = _POOLS["colour"]

TRAIN_VALUES = {kind: tuple(_POOLS[kind].split(" | ")[0].split()) for kind in KINDS}
HELD_OUT_VALUES = {kind: tuple(_POOLS[kind].split(" | ")[1].split()) for kind in KINDS}
HELD_OUT_WORDS = frozenset(word for words in HELD_OUT_VALUES.values() for word in words)
_KNOWN_WORDS = HELD_OUT_WORDS.union(*TRAIN_VALUES.values())

# A value counts only after a frame of its own kind. No frame occurs in the catalogue text.
FRAMES = {
    "colour": ("painted", "coloured", "tinted"),
    "trim": ("edged in", "trimmed with", "bordered by"),
    "material": ("made of", "built from", "worked in"),
    "pattern": ("printed with", "showing", "covered in"),
    "scent": ("smelling of", "scented with", "giving off"),
    "origin": ("shipped from", "brought from", "sent from"),
    "style": ("feeling", "looking", "styled as"),
    "buyer": ("meant for", "loved by", "picked by"),
}
_SHAPES = (
    "This {c} is {0}, {1}, {2} and {3}.",
    "A {c} {0} and {1}, also {2} and {3}.",
    "Meet our {c}: {0}, {1}, {2}, {3}.",
    "Here is a {c}, {0} and {1}, {2} and {3}.",
    "New in: a {c}, {0}, {1}, {2} and {3}.",
    "The {c} is {0} and {1}. It is {2}, {3}.",
    "Find a {c} {0}, {1}. It is {2}, {3}.",
    "Your {c} is {0}, {1} and {2}, even {3}.",
    "Not just a {c}: {0}, {1}, {2} and {3}.",
    "One {c}, {0}, {1}, then {2} and {3}.",
    "Hello, {c} {0}, {1}, {2} and {3}!",
    "We like a {c} {0}, {1}, and so {2}, {3}.",
    "What a {c}! It is {0}, {1}, {2} and {3}.",
    "For sale: {c}, {0} and {1}, {2} and {3}.",
    "Only here: {c} {0}, {1}, {2}, {3}.",
    "Every {c} is {0}, {1}, {2} and {3}.",
    "Take home a {c}, {0} and {1}, {2}, {3}.",
    "Quite a {c}: {0}, {1}, and {2} and {3}.",
    "In stock, {c} {0}, {1}. Also {2} and {3}.",
    "Try the {c}, {0}, {1}, both {2} and {3}.",
)


@dataclass(frozen=True)
class Product:
    """A category and its attributes, `(kind, value)` in the prompt's order."""

    category: str
    attributes: tuple[tuple[str, str], ...]

    def prompt(self) -> str:
        r"""Return the instruction.

        Examples
        --------
        >>> Product("lamp", (("scent", "mint"), ("colour", "teal"))).prompt()
        'Describe: lamp\nscent=mint; colour=teal\nText:\n'
        """
        shown = "; ".join(f"{kind}={value}" for kind, value in self.attributes)
        return f"Describe: {self.category}\n{shown}\nText:\n"


def describe(product: Product, plan: int) -> str:
    """Return the description by sentence plan 0..19: a sentence shape and one wording of each frame.

    Attributes keep the prompt's order, which is random. So no plan tells where a kind stands.

    Examples
    --------
    >>> lamp = Product("lamp", (("scent", "mint"), ("trim", "ivory"), ("origin", "oslo"), ("colour", "teal")))
    >>> describe(lamp, 0)
    'This lamp is smelling of mint, edged in ivory, shipped from oslo and painted teal.'
    """
    filled = [f"{FRAMES[kind][plan % 3]} {value}" for kind, value in product.attributes]
    return _SHAPES[plan].format(*filled, c=product.category)


def longest_description(count: Callable[[str], int] = len) -> int:
    """Return an upper bound of a description's length over all splits and plans.

    Parameters
    ----------
    count : callable
        Returns the length of a text; by default in bytes.

    Examples
    --------
    >>> longest_description() < 140
    True
    """
    longest = {
        kind: max((*TRAIN_VALUES[kind], *HELD_OUT_VALUES[kind]), key=lambda word: count(f" {word}"))
        for kind in KINDS
    }
    bound = 0
    for plan in range(N_PLANS):
        lengths = {kind: count(f" {FRAMES[kind][plan % 3]} {longest[kind]}") for kind in KINDS}
        by_length = sorted(KINDS, key=lengths.__getitem__, reverse=True)
        attributes = tuple((kind, longest[kind]) for kind in by_length[:N_SHOWN])
        bound = max(bound, *(count(describe(Product(category, attributes), plan)) for category in CATEGORIES))
    return bound


@cache
def pair_split(a: str, b: str) -> str:
    """Return the split of two value words shown together: 90 % train, 5 % validation, 5 % test.

    Examples
    --------
    >>> pair_split("teal", "mint") == pair_split("mint", "teal")
    True
    """
    first, second = sorted((a, b))
    bucket = hashlib.blake2b(f"{first}&{second}".encode(), digest_size=4).digest()
    return {0: "validation", 1: "test"}.get(int.from_bytes(bucket, "big") % 20, "train")


def product_split(values: Sequence[str]) -> str | None:
    """Return the split of a product with these values.

    None means that it belongs to no split: it mixes training and held-out words, or has pairs of both
    `validation` and `test`.
    """
    held_out = sum(value in HELD_OUT_WORDS for value in values)
    if held_out:
        return "test_values" if held_out == len(values) else None
    splits = {pair_split(a, b) for a, b in combinations(values, 2)} - {"train"}
    if len(splits) > 1:
        return None
    return splits.pop() if splits else "train"


def draw_product(rng: random.Random, split: str = "train") -> Product:
    """Draw a product of a split: a category and 4 kinds in random order, with 4 different values.

    Raises
    ------
    ConfigError
        The split is unknown.
    """
    require_in(split, SPLITS, "split")
    pools = HELD_OUT_VALUES if split == "test_values" else TRAIN_VALUES
    category = rng.choice(CATEGORIES)
    while True:
        kinds = rng.sample(KINDS, N_SHOWN)
        values = [rng.choice(pools[kind]) for kind in kinds]
        if len(set(values)) == N_SHOWN and product_split(values) == split:
            return Product(category, tuple(zip(kinds, values, strict=True)))


_STATED = {
    kind: re.compile(rf"\b(?:{'|'.join(map(re.escape, frames))}) ([a-z]+)\b")
    for kind, frames in FRAMES.items()
}


def stated_values(text: str) -> dict[str, set[str]]:
    """Return, for each kind, the words that a text states after one of the kind's frames.

    Examples
    --------
    >>> stated_values("painted teal and made of oak; scent=mint")
    {'colour': {'teal'}, 'material': {'oak'}}
    """
    found = {kind: set(pattern.findall(text)) for kind, pattern in _STATED.items()}
    return {kind: values for kind, values in found.items() if values}


def score_descriptions(products: Sequence[Product], completions: Sequence[str]) -> dict[str, float]:
    """Score generated descriptions.

    An attribute is right if its kind's frames hold its value and no other. A value in another kind's frame
    (swapped), a bare value (the prompt copied) or a contradiction does not count.

    Returns
    -------
    dict of str to float
        `recall`, the share of attributes that are right, and `exact`, the share of texts that equal a plan's.

    Raises
    ------
    ConfigError
        There is no product, or another number of completions.

    Examples
    --------
    >>> lamp = Product("lamp", (("scent", "mint"), ("trim", "ivory"), ("origin", "oslo"), ("colour", "teal")))
    >>> text = "A lamp painted ivory, edged in teal, smelling of mint and sent from oslo."
    >>> score_descriptions([lamp], [text])
    {'recall': 0.5, 'exact': 0.0}
    """
    require(
        len(products) > 0 and len(products) == len(completions),
        "number of completions",
        len(completions),
        f"give one for each of {len(products)} prompts, and at least one",
    )
    right = shown = exact = 0
    for product, text in zip(products, completions, strict=True):
        stated = stated_values(text)
        right += sum(stated.get(kind) == {value} for kind, value in product.attributes)
        shown += len(product.attributes)
        exact += any(text.strip() == describe(product, plan) for plan in range(N_PLANS))
    return {"recall": right / shown, "exact": exact / len(products)}


# ---- the catalogue: text for pretraining, in other layouts and other frames than the task's ----

_CLAUSES = {
    "colour": (
        "its colour is {}",
        "it comes in {}",
        "the paint is {}",
        "we chose {} as the colour",
        "it is all {}",
    ),
    "trim": ("its trim is {}", "the edge is {}", "we added a {} border", "it has {} edges", "{} is its trim"),
    "material": (
        "its material is {}",
        "we make it from {}",
        "{} is the material",
        "it is solid {}",
        "we build with {}",
    ),
    "pattern": (
        "its pattern is {}",
        "the print shows {}",
        "{} cover it",
        "you see {} all over",
        "we print {} on it",
    ),
    "scent": (
        "its scent is {}",
        "it smells like {}",
        "it gives a hint of {}",
        "you smell {}",
        "{} is the scent",
    ),
    "origin": (
        "its origin is {}",
        "we ship it out of {}",
        "{} is its home",
        "it was sent by {}",
        "we bring it over from {}",
    ),
    "style": ("its style is {}", "it looks rather {}", "it has a {} feel", "the look is {}", "we call it {}"),
    "buyer": ("its buyer is {}", "{} love it", "we mean it for {}", "{} pick it", "a gift for {}"),
}
# These name the kind: a model learns to find a value in a card before it learns the other clauses.
_NAMING = ("its {k} is {}", "the {k} is {}", "{k}: {}", "{k} of {}", "for {k}, {}")
# The start of a card, one entry, what stands between entries, and the end of the card.
_CARDS = (
    ("{c}\n", "{k}: {v}", "\n", "\n"),
    ("{c} (", "{k} {v}", ", ", ")\n"),
    ("[{c}] ", "{k}: {v}", " / ", "\n"),
    ("* {c}\n", "- {k} - {v}", "\n", "\n"),
    ("{c} | ", "{k} | {v}", " | ", "\n"),
    ("item: {c}, ", "{k}: {v}", ", ", "\n"),
    ("<{c}> ", "{k}>{v}", " ", "\n"),
    ("{c} card. ", "{k} is {v}", ". ", ".\n"),
    ("# {c}\n", "{k} {v}", "; ", "\n"),
    ("{c}, ", "{k}/{v}", ", ", "\n"),
    ("{c}\t", "{k}\t{v}", "\n\t", "\n"),
)
_BLURB_STARTS = (
    "This {c}: ",
    "The {c}. ",
    "About the {c}: ",
    "We sell a {c}: ",
    "Note: a {c}, ",
    "A good {c}, ",
    "",
)
_BLURB_JOINS = (", ", "; ", " and ", ", and ", ". ")
# A syllable is an onset, a nucleus and a coda; the coda is often empty.
_SYLLABLE = tuple(
    part.split(" ")
    for part in (
        "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr pl pr sh sk sl sp st th tr",
        "a e i o u a e i o u ai ea ee oa oo ou",
        "   b d g k l m n p r s t x ck ld ll lt nd ng nk nt rd rn sh ss st th",
    )
)


def pseudo_word(rng: random.Random) -> str:
    """Return a pronounceable word of 3 to 9 letters that is no value of any kind."""
    while True:
        word = "".join(rng.choice(part) for _ in range(rng.choice((1, 2, 2))) for part in _SYLLABLE)
        if 3 <= len(word) <= 9 and word not in _KNOWN_WORDS and word not in KINDS:
            return word


def _catalogue_attributes(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Draw n attributes; some words are invented.

    On half of the cards all values are invented, on the others a tenth. Of the keys 6 % are.
    """
    invented = 1.0 if rng.random() < 0.5 else 0.1
    while True:
        kinds = rng.sample(KINDS, n)
        values = [rng.choice(TRAIN_VALUES[kind]) for kind in kinds]
        if len(set(values)) == n and product_split(values) == "train":
            break
    values = [pseudo_word(rng) if rng.random() < invented else value for value in values]
    # An invented key gets an invented value, so only the card says what belongs together.
    return [
        (pseudo_word(rng), pseudo_word(rng)) if rng.random() < 0.06 else pair
        for pair in zip(kinds, values, strict=True)
    ]


def _card(rng: random.Random, category: str, attributes: Iterable[tuple[str, str]]) -> str:
    start, entry, between, end = rng.choice(_CARDS)
    return (
        start.format(c=category)
        + between.join(entry.format(k=k, v=v) for k, v in attributes)
        + end.rstrip(" ")
    )


def _blurb(rng: random.Random, category: str, attributes: list[tuple[str, str]]) -> str:
    if rng.random() < 0.3:  # mostly in the card's order
        attributes = rng.sample(attributes, len(attributes))
    join = rng.choice(_BLURB_JOINS)

    def clause(k: str, v: str) -> str:
        return rng.choice(_NAMING if k not in _CLAUSES or rng.random() < 0.5 else _CLAUSES[k]).format(v, k=k)

    clauses = [clause(k, v) for k, v in attributes]
    return rng.choice(_BLURB_STARTS).format(c=category) + join.join(clauses) + "."


def _answers(rng: random.Random, attributes: list[tuple[str, str]]) -> str:
    question, between = rng.choice(
        (("{}? {}.", " "), ("the {}? {}", "\n"), ("{} .. {}", "\n"), ("so {}, {}", "; "))
    )
    return between.join(question.format(k, v) for k, v in rng.sample(attributes, len(attributes)))


def _said_again(rng: random.Random, words: list[str]) -> str:
    """Repeat a list of words, in its order or another: plain copying, which the rest builds on."""
    words = rng.sample(words, rng.randint(1, len(words)))
    words += [pseudo_word(rng) for _ in range(rng.randint(0, 5))]
    comma = rng.choice((", ", " ", "; ", "\n", " - ", " / "))
    between = rng.choice(("\n", "\nagain: ", " > ", ". ", " | "))
    if rng.random() < 0.2:
        return comma.join(f"{word}{between.strip()}{word}" for word in words)
    if rng.random() < 0.6:
        return between.join([comma.join(words)] * rng.choice((2, 2, 3)))
    return comma.join(words) + between + comma.join(rng.sample(words, len(words)))


def catalogue_documents(seed: int) -> Iterator[str]:
    """Yield catalogue documents without end.

    Of the documents 65 % are a card with a blurb, 15 % a card with questions, 5 % comparisons of two cards,
    and 15 % repeated lists. Value words are invented, or training words whose pairs are training pairs. A
    card with its blurb is mostly shorter than 200 bytes.
    """
    rng = random.Random(seed)
    while True:
        category = rng.choice(CATEGORIES)
        kind_of_document = rng.random()
        attributes = _catalogue_attributes(rng, rng.choice((2, 3, 3, 4, 4)))
        if kind_of_document < 0.65:
            yield _card(rng, category, attributes) + _blurb(rng, category, attributes)
        elif kind_of_document < 0.80:
            yield _card(rng, category, attributes) + _answers(rng, attributes)
        elif kind_of_document < 0.85:
            other = rng.choice(CATEGORIES)
            first, second = attributes[::2], attributes[1::2]
            cards = _card(rng, category, first) + _card(rng, other, second)
            yield cards + _blurb(rng, category, first) + "\n" + _blurb(rng, other, second)
        else:
            yield _said_again(rng, [value for _, value in attributes])


def catalogue_text(rng: np.random.Generator, n_bytes: int) -> str:
    """Return at least `n_bytes` of catalogue documents (ASCII), separated by blank lines.

    Examples
    --------
    >>> len(catalogue_text(np.random.default_rng(0), 1000)) >= 1000
    True
    """
    documents: list[str] = []
    size = 0
    for document in catalogue_documents(int(rng.integers(2**63))):
        if size >= n_bytes:
            break
        documents.append(document)
        size += len(document) + 2
    return "\n\n".join(documents) + "\n\n"


@cache
def definition_sha256() -> str:
    """Return the SHA-256 of what products and catalogue are made from: words, frames, shapes, examples."""
    rng = random.Random(0)
    parts: list[object] = [_POOLS, FRAMES, _SHAPES, CATEGORIES, N_SHOWN, _CLAUSES, _NAMING, _CARDS]
    parts += [draw_product(rng, split) for split in SPLITS for _ in range(20)]  # holds the generators too
    documents = catalogue_documents(0)
    parts += [next(documents) for _ in range(100)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def task_sha256() -> str:
    """Return the SHA-256 of the task: what products are made from, and their descriptions."""
    rng = random.Random(0)
    texts = [describe(draw_product(rng, split), plan) for split in SPLITS for plan in range(N_PLANS)]
    return hashlib.sha256(repr([definition_sha256(), texts]).encode()).hexdigest()
