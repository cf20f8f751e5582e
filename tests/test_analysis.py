"""Rank made visible: spectra and subspace similarity, against what is known in closed form; the figure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.report.analysis import (
    effective_rank,
    learned,
    plot_rank,
    plot_rank_of_runs,
    plot_similarity,
    plot_spectra,
    random_subspace_similarity,
    spectrum,
    subspace_similarity,
)

EPS = np.finfo(np.float64).eps


def orthogonal(n, rng):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def test_the_spectrum_of_a_product_is_what_went_in(rng):
    values = np.array([5.0, 2.0, 1.0, 0.5])
    delta = orthogonal(6, rng)[:, :4] * values @ orthogonal(8, rng)[:4]
    found, rank = spectrum(delta)
    np.testing.assert_allclose(found[:4], values, rtol=100 * EPS)
    np.testing.assert_allclose(found[4:], 0, atol=100 * EPS * 5)
    share = values / values.sum()
    assert rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)


@given(st.integers(1, 9), st.integers(0, 5), st.floats(1e-6, 1e6))
def test_n_equal_singular_values_have_effective_rank_n(n, zeros, size):
    assert effective_rank([size] * n + [0.0] * zeros) == pytest.approx(n, rel=1e-12)


def test_the_zero_matrix_has_effective_rank_zero():
    values, rank = spectrum(np.zeros((3, 4)))
    assert rank == 0 and values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("r", [1, 2, 5])
def test_an_adapter_of_rank_r_has_at_most_effective_rank_r(r, rng):
    delta = rng.standard_normal((20, r)) @ rng.standard_normal((r, 16))
    assert effective_rank(spectrum(delta)[0]) <= r * (1 + 1e-9)


def test_a_subspace_lies_in_itself_however_its_basis_is_mixed(rng):
    a = rng.standard_normal((4, 12))
    phi = subspace_similarity(a, rng.standard_normal((4, 4)) @ a)
    assert phi[3, 3] == pytest.approx(1, abs=1e-12)
    assert subspace_similarity(a, 3 * a) == pytest.approx(
        np.minimum.outer(range(1, 5), range(1, 5)) / np.minimum.outer(range(1, 5), range(1, 5)), abs=1e-12
    )


def test_orthogonal_subspaces_share_nothing(rng):
    q = orthogonal(10, rng)
    np.testing.assert_allclose(subspace_similarity(q[:3], q[3:8]), 0, atol=100 * EPS)


def test_similarity_is_the_papers_formula(rng):
    a1, a2 = rng.standard_normal((3, 9)), rng.standard_normal((5, 9))
    phi = subspace_similarity(a1, a2)
    v1, v2 = (np.linalg.svd(a)[2] for a in (a1, a2))
    for i in range(1, 4):
        for j in range(1, 6):
            assert phi[i - 1, j - 1] == pytest.approx(
                np.linalg.norm(v1[:i] @ v2[:j].T) ** 2 / min(i, j), rel=1e-12
            )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_similarity_lies_between_0_and_1_and_is_symmetric(r1, r2, seed):
    rng = np.random.default_rng(seed)
    a1, a2 = rng.standard_normal((r1, 8)), rng.standard_normal((r2, 8))
    phi = subspace_similarity(a1, a2)
    assert phi.shape == (r1, r2) and phi.min() >= 0 and phi.max() <= 1 + 1e-12
    np.testing.assert_allclose(phi, subspace_similarity(a2, a1).T, rtol=1e-9, atol=1e-12)


def test_chance_is_the_share_of_space_that_the_larger_subspace_fills(rng):
    phi = random_subspace_similarity(3, 6, 48, rng, repeats=400)
    larger = np.maximum.outer(range(1, 4), range(1, 7))
    # One draw's φ(i, j) spreads by less than its mean; 400 draws bring that to 1/20 of it, and three of those
    # are allowed.
    np.testing.assert_allclose(phi, larger / 48, rtol=0.15 * np.sqrt(2))


def test_the_random_control_follows_its_generator():
    one, two = (random_subspace_similarity(2, 2, 8, np.random.default_rng(5), repeats=3) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("a1", "a2", "hint"),
    [
        (np.ones((2, 4)), np.ones((2, 5)), "width 5 differs from a1's 4"),
        (np.ones((6, 4)), np.ones((2, 4)), "not its transpose"),
        (np.ones(4), np.ones((2, 4)), "not a matrix"),
        (np.ones((2, 4)), np.array([[1.0, np.nan, 0, 0]]), r"a2\[0, 1\]"),
    ],
)
def test_bad_matrices_are_refused_by_name(a1, a2, hint):
    with pytest.raises(ValueError, match=hint):
        subspace_similarity(a1, a2)


def test_spectra_show_each_update_without_rounding_noise(rng):
    low = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 10))
    ax = plot_spectra({"full": rng.standard_normal((12, 10)), "LoRA r=2": low, "nothing": np.zeros((12, 10))})
    assert [len(line.get_xdata()) for line in ax.lines] == [10, 2, 0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[1] == f"LoRA r=2 (effective rank {spectrum(low)[1]:.1f})" and "0.0" in labels[2]
    ax.figure.canvas.draw()


def test_the_heat_map_has_a_fixed_scale(rng):
    ax = plot_similarity(np.full((2, 3), 0.25), labels=("left", "below"), title="title")
    (image,) = ax.images
    assert image.get_clim() == (0, 1) and image.get_array().shape == (2, 3)
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == ("left", "below", "title")
    assert {text.get_text() for text in ax.texts} == {"0.25"}


def test_the_figure_has_spectra_two_comparisons_and_a_control(rng):
    a8, a64, again = (rng.standard_normal((r, 64)) for r in (8, 32, 32))
    figure = plot_rank({"full": rng.standard_normal((64, 64))}, (a8, a64), (a64, again), rng)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "Spectrum of the update"
    assert [title.removeprefix("φ(i, j) ") for title in titles[1:4]] == [
        "between two ranks",
        "between two seeds",
        "between random matrices (control)",
    ]
    assert [ax.images[0].get_array().shape for ax in figure.axes[1:4]] == [(8, 32), (32, 32), (32, 32)]
    figure.canvas.draw()


# what runs have learnt, from the files that they keep


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Keep the runs of a tiny sweep: full fine-tuning, and LoRA at two ranks and with two seeds."""
    from minilora.sweep.runner import SweepConfig, expand, run_sweep

    out = tmp_path_factory.mktemp("kept")
    shared = {"task": "python", "steps": 2, "batch_size": 2, "n_eval": 2}
    one_seed = SweepConfig({"method": ("full", "lora"), "r": (1, 4), "seed": 0} | shared)
    runs = expand(one_seed) + expand(SweepConfig({"method": "lora", "r": 4, "seed": 1} | shared))
    return out, run_sweep(runs, out, progress=False)


def test_what_a_run_learnt_has_the_rank_of_its_adapter(kept):
    out, rows = kept
    for row in rows:
        delta, a = learned(out / "runs" / row["key"], "layers.3.self_attn.q_proj")
        values = spectrum(delta)[0]
        rank = int((values > values[0] * 1e-6).sum())
        if row["method"] == "lora":
            assert rank == row["r"] and a.shape == (row["r"], 128)
        else:
            assert rank > 4 and a is None


def test_rank_of_runs_draws_both_seeds_and_both_ranks(kept):
    figure = plot_rank_of_runs(kept[1], kept[0])
    labels = [text.get_text().split(" (")[0] for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["full fine-tuning", "LoRA r=1", "LoRA r=4"]
    assert [ax.images[0].get_array().shape for ax in figure.axes[1:4]] == [(1, 4), (4, 4), (4, 4)]


def test_rank_of_runs_says_what_is_missing(kept, tmp_path):
    with pytest.raises(ValueError, match="two ranks and with two seeds"):
        plot_rank_of_runs(kept[1], tmp_path)


def test_an_ambiguous_or_unknown_module_is_refused(kept):
    folder = kept[0] / "runs" / kept[1][0]["key"]
    with pytest.raises(ValueError, match="fits 4 modules; name one of .*layers.0"):
        learned(folder, "q_proj")
    with pytest.raises(ValueError, match="fits 0 modules"):
        learned(folder, "nonsense")
