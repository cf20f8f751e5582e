"""Figures of a sweep, on invented rows: the data behind each, the drawings, and the same files on a rerun."""

import matplotlib
import numpy as np
import pytest
from study_rows import RANKS, one_row, search_rows, study_rows

from minilora.report.drawing import limits, new_figure, save_figure, spread
from minilora.report.labels import (
    METHOD_COLOURS,
    METRICS,
    deployed_metric,
    main_metrics,
    setting_name,
    task_of,
    variant_columns,
)
from minilora.report.plots import (
    plot_accuracy_against_memory,
    plot_against_rank,
    plot_deployed,
    plot_learning_rates,
    plot_memory,
    save_figures,
)
from minilora.report.series import MIB, accuracy_points, deployed_pairs, memory_bars, rank_curves, references
from minilora.report.statistics import mean_interval
from minilora.sweep.results import MEMORY_CLASSES


@pytest.fixture(scope="module")
def rows():
    return study_rows()


@pytest.fixture(scope="module")
def few():
    """One seed, one task, one run of each method: the least that draws."""
    settings = [
        ("full", None, 32, None),
        ("lora", 2, 32, None),
        ("lora", 8, 32, None),
        ("qlora", 8, 4, "nf4"),
        ("base", None, 32, None),
    ]
    return [one_row("products", *setting, seed=0) for setting in settings]


# the data behind


def test_a_rank_curve_is_the_mean_over_seeds(rows):
    curves = {curve["name"]: curve for curve in rank_curves(rows, "loss", "products")}
    assert list(curves) == [
        "LoRA",
        "QLoRA nf8",
        "QLoRA nf4",
        "QLoRA nf3",
        "QLoRA nf2",
        "QA-LoRA int8",
        "QA-LoRA int4",
        "QA-LoRA int3",
        "QA-LoRA int2",
    ]
    assert [point["r"] for point in curves["LoRA"]["points"]] == list(RANKS)
    assert [point["r"] for point in curves["QLoRA nf2"]["points"]] == [8]
    runs = [
        row["loss"]
        for row in rows
        if (row["task"], row["method"], row["r"], row["stage"]) == ("products", "lora", 4, "study")
    ]
    point = curves["LoRA"]["points"][2]
    assert len(runs) == 3 and sorted(point["values"]) == sorted(runs)
    assert (point["mean"], point["low"], point["high"]) == pytest.approx(mean_interval(runs))


def test_search_rows_and_failures_are_in_no_figure(rows):
    bad = one_row("products", "lora", 8, 32, None, seed=9) | {"status": "failed", "loss": 99.0}
    with_bad = rank_curves([*rows, bad], "loss", "products")
    assert with_bad == rank_curves([row for row in rows if row["stage"] != "search"], "loss", "products")


def test_references_have_no_rank(rows):
    found = {line["method"]: line for line in references(rows, "loss", "products")}
    assert set(found) == {"full", "subset", "base"}
    assert found["full"]["n"] == 3 and found["base"]["n"] == 1


def test_two_group_sizes_are_two_curves():
    data = [
        one_row("python", "qalora", r, 4, "int4", seed=0) | {"group_size": g, "key": f"{r} {g}"}
        for r in (2, 8)
        for g in (16, 32)
    ]
    assert variant_columns(data) == ("group_size",)
    assert [curve["name"] for curve in rank_curves(data, "bpb")] == ["QA-LoRA int4 g=16", "QA-LoRA int4 g=32"]


def test_memory_bars_are_the_rows_bytes(rows):
    bars = memory_bars(rows, "r", "products")
    assert [bar["group"] for bar in bars] == [0, 0] + [r for r in RANKS for _ in range(3)]
    full = bars[0]
    assert full["name"] == "full fine-tuning" and full["mib"]["bytes_gradients"] == pytest.approx(4e6 / MIB)
    assert list(full["mib"]) == list(MEMORY_CLASSES) and full["peak"] == 16.0
    by_bits = memory_bars(rows, "bits", "products")
    assert [bar["name"] for bar in by_bits] == [
        "full fine-tuning",
        "subset",
        "LoRA",
        "QLoRA nf8",
        "QA-LoRA int8",
        "QLoRA nf4",
        "QA-LoRA int4",
        "QLoRA nf3",
        "QA-LoRA int3",
        "QLoRA nf2",
        "QA-LoRA int2",
    ]
    weights = [bar["mib"]["bytes_weights"] for bar in by_bits if bar["method"] == "qlora"]
    assert weights == sorted(weights, reverse=True) and len(set(weights)) == 4


def test_no_trained_setting_beats_the_front(rows):
    points = accuracy_points(rows, "recall", "products", "training_mib")
    front = [point for point in points if "front" in point]
    trained = [point for point in points if point["method"] not in ("base", "quantized_base")]
    assert [point["front"] for point in sorted(front, key=lambda point: point["cost"])] == list(
        range(1, len(front) + 1)
    )
    for point in front:
        assert not [p for p in trained if p["cost"] < point["cost"] and p["mean"] >= point["mean"]]
    assert not [point for point in points if point["method"] == "quantized_base" and "front" in point]


def test_deployed_points_take_the_deployed_metric(rows):
    own = {point["name"]: point for point in accuracy_points(rows, "loss", "products", "effective_bits")}
    deployed = {
        point["name"]: point for point in accuracy_points(rows, "loss", "products", "deployed_effective_bits")
    }
    assert deployed["QLoRA nf2 r=8"]["mean"] > own["QLoRA nf2 r=8"]["mean"] + 0.5
    assert deployed["full fine-tuning"] == own["full fine-tuning"] | {
        "front": deployed["full fine-tuning"]["front"]
    }
    assert set(deployed) == set(own)


def test_pairs_are_of_one_rank_and_one_setting(rows):
    pairs = deployed_pairs(rows, "loss", "products")
    assert {pair["r"] for pair in pairs} == {8}
    assert {(pair["method"], pair["bits"]) for pair in pairs} == {("lora", 32)} | {
        (m, b) for m in ("qlora", "qalora") for b in (2, 3, 4, 8)
    }
    for pair in pairs:
        lost = pair["deployed"]["mean"] - pair["adapter"]["mean"]
        assert lost == pytest.approx(0, abs=1e-12) if pair["method"] != "qlora" else lost > 0


@pytest.mark.parametrize(("call", "name"), [(memory_bars, "against"), (accuracy_points, "cost")])
def test_unknown_axes_are_refused_by_name(few, call, name):
    with pytest.raises(ValueError, match=f"{name}='speed': choose one of"):
        call(few, **{name: "speed"})


def test_a_task_must_be_named_when_there_are_two(rows):
    assert task_of([{"task": "python"}], None) == "python"
    with pytest.raises(ValueError, match="choose one of those in the rows: products, python"):
        rank_curves(rows)


def test_what_is_reported_follows_the_task(rows):
    assert [metric.column for metric in main_metrics(rows, "products")] == ["loss", "recall"]
    assert [metric.column for metric in main_metrics(rows, "python")] == ["bpb"]
    assert [metric.column for metric in main_metrics([{"task": "text", "loss": 1.0}], "text")] == ["loss"]


def test_the_deployed_metric_is_the_last_that_was_measured():
    row = {"task": "products", "loss": 1.0, "recall": 0.5, "deployed_loss": 1.1}
    assert deployed_metric([row], "products").column == "loss"
    assert deployed_metric([row | {"deployed_recall": 0.4}], "products").column == "recall"


def test_numbers_are_written_with_their_unit():
    assert METRICS["recall"].text(0.9512) == "95.1 %" and METRICS["loss"].text(0.3) == "0.300"
    assert METRICS["loss"].text(-0.01, signed=True) == "-0.010" and METRICS["loss"].text(None) == "–"


def test_names_of_settings():
    row = {"method": "qalora", "bits": 2, "quant_type": "int2", "r": 8, "group_size": 16}
    assert setting_name(row, ("group_size",), rank=True) == "QA-LoRA int2 r=8 g=16"


# where labels go


def test_labels_keep_their_distance_and_their_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.uniform(-0.1, 1.1, size=rng.integers(1, 9)).tolist()
        placed = spread(wanted, 0.06)
        order = np.argsort(wanted, kind="stable")
        assert np.all(np.diff(np.array(placed)[order]) >= 0.06 - 1e-12)
        assert min(placed) >= -1e-12 and max(placed) <= 1 + 1e-12
    assert spread([0.2, 0.8], 0.06) == pytest.approx([0.2, 0.8])


def test_a_far_line_does_not_squash_the_curves():
    low, high = limits([0.3, 0.5], [0.25, 9.0])
    assert low < 0.25 and 0.5 < high < 1


# drawing


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_rank_figure_has_a_line_and_a_label_for_each_curve(rows):
    ax = plot_against_rank(rows, metric="loss", task="products")
    colours = [
        line.get_color()
        for line in ax.lines
        if len(line.get_xdata()) == len(RANKS) and line.get_linewidth() > 1
    ]
    assert colours == [METHOD_COLOURS[name] for name in ("lora", "qlora", "qalora")]
    assert {"LoRA", "QLoRA nf4", "QA-LoRA int4", "full fine-tuning", "subset"} <= set(texts(ax))
    assert "base: 2.600 ↑" in texts(ax)  # far outside: named at the edge
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [str(r) for r in RANKS]
    assert ax.get_xscale() == "log" and "nats per token" in ax.get_ylabel()


def test_single_runs_are_visible_and_intervals_need_three_seeds(rows):
    def dots_and_bars(seeds):
        ax = plot_against_rank([row for row in rows if row["seed"] in seeds], metric="loss", task="products")
        dots = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() < 3]
        return sum(len(line.get_ydata()) for line in dots), len(ax.containers)

    settings = len(RANKS) * 3 + 6
    assert dots_and_bars({0}) == (0, 0)
    assert dots_and_bars({0, 1}) == (2 * settings, 0)
    assert dots_and_bars({0, 1, 2}) == (3 * settings, settings)


@pytest.mark.parametrize("against", ["r", "bits"])
def test_memory_bars_stack_up_to_their_total(rows, against):
    ax = plot_memory(rows, against=against, task="products")
    bars = memory_bars(rows, against, "products")
    tops = {}
    for bar in (patch for container in ax.containers for patch in container):
        place = round(bar.get_x(), 6)
        tops[place] = max(tops.get(place, 0), bar.get_y() + bar.get_height())
    assert [tops[place] for place in sorted(tops)] == pytest.approx(
        [sum(bar["mib"].values()) for bar in bars]
    )
    assert "MiB" in ax.get_ylabel()
    assert len(ax.get_legend().get_texts()) == len(MEMORY_CLASSES) + 1
    (peaks,) = [c for c in ax.collections if c.get_label() == "peak of a step, measured"]
    assert [segment[0][1] for segment in peaks.get_segments()] == pytest.approx([bar["peak"] for bar in bars])


def test_accuracy_figure_names_the_front_and_what_lies_outside(rows):
    ax = plot_accuracy_against_memory(rows, metric="loss", task="products", cost="training_mib")
    note = ax.texts[-1].get_text()
    front = [point for point in accuracy_points(rows, "loss", "products", "training_mib") if "front" in point]
    assert all(f"{point['front']}  {point['name']}" in note for point in front)
    assert "Outside: quantized base" in note and "2.600 to 2.850" in note


def test_deployed_figure_has_a_pair_for_each_setting(rows):
    ax = plot_deployed(rows, metric="loss", task="products")
    hollow = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 9
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "2 bits",
        "3 bits",
        "4 bits",
        "8 bits",
        "float32",
    ]


def test_search_figure_rings_the_choice(rows):
    ax = plot_learning_rates(rows, task="products")
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert rings == [1e-3, 3e-2, 1e-2, 1e-2, 1e-2]


@pytest.mark.parametrize(
    "plot", [plot_against_rank, plot_memory, plot_accuracy_against_memory, plot_deployed]
)
def test_each_figure_draws_on_given_axes_without_pyplot(few, plot):
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert plot(few, ax) is ax
    ax.figure.canvas.draw()
    assert ax.get_ylabel() and ax.get_legend() is not None


@pytest.mark.parametrize(
    ("plot", "hint"),
    [
        (plot_against_rank, "no finished lora"),
        (plot_memory, "no finished training run"),
        (plot_deployed, "deployed_loss"),
        (plot_learning_rates, "learning-rate search"),
        (plot_accuracy_against_memory, "no finished run has both"),
    ],
)
def test_missing_rows_are_a_clear_error(plot, hint):
    with pytest.raises(ValueError, match=hint):
        plot([{"task": "products", "method": "base", "status": "success", "bits": 32, "r": None}])


# files


def test_every_figure_is_written_as_png_and_svg(few, tmp_path):
    made = save_figures([*few, *search_rows("products")], tmp_path)
    names = ("rank", "memory", "accuracy_memory", "deployed", "learning_rate")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert len(made.paths) == 10 and not made.skipped
    for path in made.paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_files_are_the_same_on_a_rerun_and_settings_stay(few, tmp_path):
    settings = {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}
    one, two = (
        save_figure(plot_against_rank(few, new_figure().add_subplot()).figure, tmp_path / name)
        for name in "ab"
    )
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    assert {name: matplotlib.rcParams[name] for name in settings} == settings


def test_figures_without_rows_are_skipped_with_the_reason(tmp_path):
    made = save_figures([one_row("products", "full", None, 32, None, seed=0)], tmp_path)
    assert {path.stem for path in made.paths} == {"memory", "accuracy_memory"}
    assert "no finished lora" in made.skipped["rank: products: held-out loss against rank"]
    assert save_figures([], tmp_path / "empty").paths == []
