import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data import products as p
from minilora.data.products import Product, describe, draw_product, score_descriptions, stated_values

POOLS = {kind: p.TRAIN_VALUES[kind] + p.HELD_OUT_VALUES[kind] for kind in p.KINDS}
TRAIN_WORDS = {word for words in p.TRAIN_VALUES.values() for word in words}
LAMP = Product("lamp", (("scent", "mint"), ("trim", "ivory"), ("origin", "oslo"), ("colour", "teal")))

drawn_products = st.builds(
    lambda seed, split: draw_product(random.Random(seed), split),
    st.integers(0, 2**32),
    st.sampled_from(p.SPLITS),
)
plans = st.integers(0, p.N_PLANS - 1)


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


# ---- the vocabulary ----


def test_vocabulary_has_the_promised_size() -> None:
    assert len(p.KINDS) >= 8 and len(p.CATEGORIES) >= 8 and p.N_PLANS == 20
    for kind in p.KINDS:
        assert len(p.TRAIN_VALUES[kind]) == 32 and len(p.HELD_OUT_VALUES[kind]) == 8
        assert len(set(POOLS[kind])) == 40
        assert all(re.fullmatch("[a-z]{3,9}", word) for word in POOLS[kind])


def test_only_colour_and_trim_share_their_pool() -> None:
    assert POOLS["colour"] == POOLS["trim"]
    for a, b in combinations(p.KINDS, 2):
        assert bool(set(POOLS[a]) & set(POOLS[b])) == ({a, b} == {"colour", "trim"})


def test_no_value_is_a_word_of_the_templates() -> None:
    templates = " ".join(
        [
            *p.KINDS,
            *p.CATEGORIES,
            *p._SHAPES,
            *p._BLURB_STARTS,
            *p._BLURB_JOINS,
            *map(str, p._CARDS),
            LAMP.prompt(),
        ]
        + [frame for frames in (*p.FRAMES.values(), *p._CLAUSES.values()) for frame in frames]
    )
    assert words_of(templates) & (TRAIN_WORDS | p.HELD_OUT_WORDS) <= {
        "scent",
        "mint",
        "ivory",
        "oslo",
        "teal",
    }


def test_every_frame_belongs_to_one_kind() -> None:
    frames = [frame for wordings in p.FRAMES.values() for frame in wordings]
    assert len(set(frames)) == len(frames) == 3 * len(p.KINDS)
    assert not any(a != b and re.search(rf"\b{a}\b", b) for a in frames for b in frames)


# ---- plans and products ----


@pytest.mark.parametrize("category", p.CATEGORIES)
def test_each_category_has_20_different_plans(category: str) -> None:
    product = Product(category, LAMP.attributes)
    assert len({describe(product, plan) for plan in range(p.N_PLANS)}) == p.N_PLANS


@given(drawn_products, plans, st.randoms(use_true_random=False))
def test_the_order_of_attributes_is_the_prompts_whatever_the_plan(
    product: Product, plan: int, rng: random.Random
) -> None:
    shuffled = Product(product.category, tuple(rng.sample(product.attributes, 4)))
    text = describe(shuffled, plan)
    framed = [f"{p.FRAMES[kind][plan % 3]} {value}" for kind, value in shuffled.attributes]
    places = [text.index(piece) for piece in framed]
    assert places == sorted(places)


@given(drawn_products, plans)
def test_prompt_and_description_are_short_enough(product: Product, plan: int) -> None:
    text = describe(product, plan)
    assert len(text) <= p.longest_description()
    assert 60 <= len(product.prompt()) <= 105
    assert 1 + len(product.prompt()) + len(text) + 1 <= 208
    assert text.isascii() and "\n" not in text


def test_typical_lengths() -> None:
    rng = random.Random(1)
    pairs = [(len(x.prompt()), len(describe(x, i % 20))) for i in range(500) for x in [draw_product(rng)]]
    prompt, text = np.mean(pairs, axis=0)
    assert 70 <= prompt <= 90 and 80 <= text <= 110
    assert np.mean([sum(pair) + 2 <= 208 for pair in pairs]) == 1.0


def test_the_order_of_attributes_in_the_prompt_is_free() -> None:
    rng = random.Random(2)
    first = {draw_product(rng).attributes[0][0] for _ in range(200)}
    assert first == set(p.KINDS)


# ---- splits ----


@given(st.integers(0, 2**32), st.sampled_from(p.SPLITS))
def test_a_product_belongs_to_its_split(seed: int, split: str) -> None:
    product = draw_product(random.Random(seed), split)
    kinds, values = zip(*product.attributes, strict=True)
    assert len(set(kinds)) == len(set(values)) == p.N_SHOWN
    assert all(value in POOLS[kind] for kind, value in product.attributes)
    held_out = [value in p.HELD_OUT_WORDS for value in values]
    pair_splits = {p.pair_split(a, b) for a, b in combinations(values, 2)}
    if split == "test_values":
        assert all(held_out)
    else:
        assert not any(held_out)
        assert pair_splits == {"train"} if split == "train" else pair_splits - {"train"} == {split}


def test_pairs_are_split_about_90_5_5() -> None:
    words = sorted(TRAIN_WORDS)
    splits = [p.pair_split(a, b) for a, b in combinations(words, 2)]
    for split, share in (("validation", 0.05), ("test", 0.05)):
        # five standard deviations of a binomial share
        assert abs(splits.count(split) / len(splits) - share) < 5 * (share * (1 - share) / len(splits)) ** 0.5


def test_mixed_products_belong_to_no_split() -> None:
    assert p.product_split(["teal", "ochre"]) is None
    pairs = {split: [] for split in p.SPLITS}  # type: dict[str, list[str]]
    for a, b in combinations(sorted(TRAIN_WORDS), 2):
        pairs[p.pair_split(a, b)].append(f"{a} {b}")
    assert p.product_split([*pairs["validation"][0].split(), *pairs["test"][0].split()]) is None


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split='dev'.*test_values"):
        draw_product(random.Random(0), "dev")


# ---- the scorer ----


@given(drawn_products, plans)
def test_each_plan_states_all_and_nothing_else(product: Product, plan: int) -> None:
    text = describe(product, plan)
    assert stated_values(text) == {kind: {value} for kind, value in product.attributes}
    assert score_descriptions([product], [text]) == {"recall": 1.0, "exact": 1.0}


@given(drawn_products)
def test_copying_the_prompt_scores_nothing(product: Product) -> None:
    shown = product.prompt()
    for text in (shown, shown + shown, " ".join(value for _, value in product.attributes), ""):
        assert score_descriptions([product], [text]) == {"recall": 0.0, "exact": 0.0}


@given(drawn_products, plans, st.data())
def test_swapped_values_are_wrong(product: Product, plan: int, data: st.DataObject) -> None:
    i, j = data.draw(st.sampled_from(list(combinations(range(4), 2))))
    values = [value for _, value in product.attributes]
    values[i], values[j] = values[j], values[i]
    swapped = Product(
        product.category, tuple((k, v) for (k, _), v in zip(product.attributes, values, strict=True))
    )
    assert score_descriptions([product], [describe(swapped, plan)]) == {"recall": 0.5, "exact": 0.0}


@given(drawn_products, plans, st.integers(0, 3), st.data())
def test_a_contradiction_is_wrong_and_a_repetition_is_not(
    product: Product, plan: int, which: int, data: st.DataObject
) -> None:
    kind, value = product.attributes[which]
    other = data.draw(st.sampled_from([v for v in POOLS[kind] if v != value]))
    frame = data.draw(st.sampled_from(p.FRAMES[kind]))
    text = describe(product, plan)
    assert score_descriptions([product], [f"{text} It is {frame} {other}."])["recall"] == 0.75
    assert score_descriptions([product], [f"{text} It is {frame} {value}."]) == {"recall": 1.0, "exact": 0.0}


@given(drawn_products, plans)
def test_a_cut_description_loses_what_is_cut(product: Product, plan: int) -> None:
    text = describe(product, plan)
    recalls = [score_descriptions([product], [text[:n]])["recall"] for n in range(len(text) + 1)]
    assert recalls[0] == 0.0 and recalls[-1] == 1.0
    # A frame whose value is not yet complete states another word.
    assert set(recalls) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert recalls[-3] < 1.0


@given(st.lists(st.tuples(drawn_products, plans), min_size=2, max_size=6), st.integers(0, 5))
def test_the_score_is_the_mean_over_products(pairs: list[tuple[Product, int]], empty: int) -> None:
    texts = [describe(*pair) if i >= empty else "" for i, pair in enumerate(pairs)]
    share = max(0, len(pairs) - empty) / len(pairs)
    assert score_descriptions([x for x, _ in pairs], texts) == {"recall": share, "exact": share}


@given(st.text(max_size=300))
def test_any_text_can_be_scored(text: str) -> None:
    scores = score_descriptions([LAMP], [text])
    assert scores["exact"] == 0.0 and 0.0 <= scores["recall"] <= 1.0


def test_another_wording_counts_for_recall_but_not_as_exact() -> None:
    text = "Lamp: smelling of mint, brought from oslo, coloured teal, bordered by ivory."
    assert score_descriptions([LAMP], [text]) == {"recall": 1.0, "exact": 0.0}


def test_a_longer_word_is_another_value() -> None:
    assert score_descriptions([LAMP], ["smelling of minty, painted teals"])["recall"] == 0.0


@pytest.mark.parametrize(("products", "completions"), [([], []), ([LAMP], []), ([LAMP], ["a", "b"])])
def test_one_completion_for_each_prompt(products: list[Product], completions: list[str]) -> None:
    with pytest.raises(ValueError, match=f"completions={len(completions)}: .*{len(products)} prompts"):
        score_descriptions(products, completions)


# ---- the catalogue ----


@pytest.fixture(scope="module")
def catalogue() -> str:
    return p.catalogue_text(np.random.default_rng(7), 1_500_000)


def test_catalogue_is_reproducible_and_fresh() -> None:
    def text(seed: int) -> str:
        return p.catalogue_text(np.random.default_rng(seed), 5000)

    assert text(0) == text(0) != text(1)
    assert 5000 <= len(text(0)) < 5300
    rng = np.random.default_rng(0)
    assert p.catalogue_text(rng, 5000) != p.catalogue_text(rng, 5000)


def test_catalogue_never_shows_a_held_out_word(catalogue: str) -> None:
    assert not words_of(catalogue) & p.HELD_OUT_WORDS
    assert words_of(catalogue) >= TRAIN_WORDS


def test_catalogue_never_shows_a_held_out_pair(catalogue: str) -> None:
    seen = {
        pair
        for document in catalogue.split("\n\n")
        for pair in combinations(sorted(words_of(document) & TRAIN_WORDS), 2)
    }
    assert len(seen) > 5000
    assert {p.pair_split(a, b) for a, b in seen} == {"train"}


def test_catalogue_never_shows_the_instruction_or_a_frame(catalogue: str) -> None:
    assert not re.search(r"describe:|text:|=", catalogue, re.IGNORECASE)
    assert stated_values(catalogue) == {}
    products = [draw_product(random.Random(seed)) for seed in range(50)]
    assert (
        score_descriptions(products, [catalogue[i * 2000 : (i + 1) * 2000] for i in range(50)])["recall"]
        == 0.0
    )


def test_catalogue_documents_fit_into_a_training_sequence(catalogue: str) -> None:
    lengths = [len(document) for document in catalogue.split("\n\n")]
    assert np.mean(np.array(lengths) <= 200) > 0.95
    assert 100 < np.mean(lengths) < 170


def test_catalogue_documents_do_not_repeat(catalogue: str) -> None:
    documents = catalogue.split("\n\n")[:-1]
    assert len(set(documents)) > 0.999 * len(documents)


def test_every_card_value_comes_back_in_its_text(catalogue: str) -> None:
    document = next(d for d in catalogue.split("\n\n") if d.startswith("* "))
    card = dict(line[2:].split(" - ") for line in document.split("\n") if line.startswith("- "))
    text = document.split("\n")[-1]
    assert len(card) >= 2 and all(value in words_of(text) for value in card.values())


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_pseudo_words_look_like_values_but_are_none(seed: int) -> None:
    word = p.pseudo_word(random.Random(seed))
    assert re.fullmatch("[a-z]{3,9}", word)
    assert word not in TRAIN_WORDS | p.HELD_OUT_WORDS | set(p.KINDS)


def test_definition_hash_is_stable_within_a_process() -> None:
    assert re.fullmatch("[0-9a-f]{64}", p.definition_sha256())
    first = p.definition_sha256()
    p.definition_sha256.cache_clear()
    assert p.definition_sha256() == first
