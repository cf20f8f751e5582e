"""Figures of planned memory: what their bars and areas are, that they are whole, and the same again."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection

from minilora.formats.files import FileError
from minilora.memory import PlanConfig, compare, plan
from minilora.memory.ledger import HELD, PASSING
from minilora.report import memory_plots
from minilora.report.drawing import new_figure
from minilora.report.memory_plots import (
    CLASS_COLOURS,
    POINTS,
    against,
    course,
    plot_course,
    plot_ledgers,
    save_memory_figures,
    unit,
)

SMALL = PlanConfig("tiny", "qlora", context=64, batch_size=2, gradient_checkpointing=True, logits_chunk=32)


def test_every_class_has_one_colour_in_the_order_of_the_ledger():
    assert tuple(CLASS_COLOURS) == (*HELD, *PASSING) and len(set(CLASS_COLOURS.values())) == len(
        CLASS_COLOURS
    )


def test_bars_are_the_classes_and_their_tops_the_peaks():
    ledgers = compare("tiny", ["full", "lora", "qalora"], context=64, batch_size=2).ledgers
    ax = plot_ledgers(ledgers)
    size, name = unit(min(x.peak for x in ledgers.values()))
    assert f"({name})" in ax.get_ylabel()
    for i, ledger in enumerate(ledgers.values()):
        drawn = {c.get_label(): c.patches[i] for c in ax.containers if c.patches[i].get_height()}
        assert {kind: round(bar.get_height() * size) for kind, bar in drawn.items()} == ledger.by_kind()
        assert all(
            matplotlib.colors.to_hex(bar.get_facecolor()).upper() == CLASS_COLOURS[kind]
            for kind, bar in drawn.items()
        )
        top = max(bar.get_y() + bar.get_height() for bar in drawn.values())
        assert top * size == pytest.approx(ledger.peak) and float(ax.texts[i].get_text()) == pytest.approx(
            top, rel=0.005
        )
        assert ax.lines[i].get_ydata()[0] * size == pytest.approx(ledger.bound(2))
        assert ax.get_ylim()[1] * size > ledger.bound(2)


def test_one_worker_alone_has_no_dash():
    assert not plot_ledgers({"a": plan("tiny", context=16, shards=1)}).lines


@pytest.mark.parametrize(
    "config",
    [SMALL, PlanConfig("tinyllama-1.1b", context=64), PlanConfig("tiny", "full", context=64)],
    ids=["checkpointed", "22 blocks", "full"],
)
def test_the_course_of_a_step_reaches_the_ledgers_peak(config):
    """A model's full depth, where the planner runs four blocks and counts the others."""
    ledger, found = plan(config), course(config)
    kinds = ledger.by_kind()
    objects = kinds.pop("objects")  # counted at the peak alone
    assert found.total.max() == ledger.peak - objects and len(found.moments) <= POINTS
    at = int(found.total.argmax())
    assert {kind: series[at] for kind, series in found.kinds.items() if series[at]} == kinds
    assert (np.diff(found.moments) > 0).all() and found.total.min() >= ledger.held
    names = [name for _, name in found.phases]
    assert names == ["forward", "head", "backward"] * ledger.shards
    starts = [start for start, _ in found.phases]
    assert starts == sorted(set(starts)) and found.end > starts[-1]


def test_the_area_is_drawn_and_the_peak_marked():
    found = course(SMALL)
    ax = plot_course(found)
    size, name = unit(found.total.max())
    areas = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert [c.get_label() for c in areas] == [kind for kind in CLASS_COLOURS if kind in found.kinds]
    (x,), (y,) = ax.lines[0].get_data()
    assert x == found.moments[found.total.argmax()] and y * size == pytest.approx(found.total.max())
    texts = [t.get_text() for t in ax.texts]
    assert texts[0].startswith("peak ") and texts[0].endswith(name) and texts.count("backward") == 2
    top = max(path.vertices[:, 1].max() for c in areas for path in c.get_paths())
    assert top * size == pytest.approx(found.total.max())


def test_each_axis_changes_one_thing():
    panels = list(against(SMALL).values())
    ranks, weights, contexts, batches = panels
    for configs, name in ((ranks, "r"), (contexts, "context"), (batches, "batch_size")):
        assert all(replace(c, **{name: getattr(SMALL, name)}) == SMALL for c in configs.values())
        values = [getattr(c, name) for c in configs.values()]
        assert [str(v) for v in values] == list(configs) and all(
            b == 2 * a for a, b in itertools.pairwise(values)
        )
    assert list(ranks) == ["1", "2", "4", "8", "16", "32", "64", "128"] and list(contexts)[-1] == "256"
    assert list(weights) == ["float32", "nf8", "nf4", "nf3", "nf2", "int8", "int4", "int3", "int2"]
    assert weights["nf4"] == SMALL and {c.context for c in weights.values()} == {64}
    assert all(c.quant_type == kind for kind, c in weights.items() if kind != "float32")
    full = against(PlanConfig("llama-7b", "full"))
    assert {c.method for c in next(iter(full.values())).values()} == {"lora"}  # full fine-tuning has no rank
    assert [list(p)[-1] for p in full.values()] == ["128", "int2", "2048", "32"]
    dora = list(against(PlanConfig("tiny", "lora", use_dora=True)).values())[1]
    assert not any(kind.startswith("int") for kind in dora)


def test_files_are_whole_and_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory_plots,
        "against",
        lambda c: {axis: dict(list(p.items())[-2:]) for axis, p in against(c).items()},
    )
    shape = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    settings = {"context": 16, "r": 4}
    paths = save_memory_figures(str(tmp_path / "config.json"), tmp_path / "a", "qlora", **settings)
    assert sorted(p.name for p in paths) == sorted(
        f"{n}.{s}" for n in ("methods", "against", "step") for s in ("png", "svg")
    )
    texts = {p.stem: "".join(p.read_text().split()) for p in paths if p.suffix == ".svg"}
    assert all(
        part in texts["methods"] for part in ("QA-LoRA", "fullfine-tuning", "activations", "r=4onall-linear")
    )
    assert all(part in texts["against"] for part in ("rankr(QLoRA)", "int2", "batch:sequences", "codes"))
    assert all(part in texts["step"] for part in ("forward", "head", "backward", "peak"))
    again = memory_plots._methods(compare(str(tmp_path / "config.json"), **settings).ledgers, tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths if p.stem == "methods"]


def test_no_label_leaves_the_figure_or_covers_another():
    bars = compare("tiny", ["full", "lora"], context=16, shards=1).ledgers
    for draw in (lambda ax: plot_course(course(SMALL), ax), lambda ax: plot_ledgers(bars, ax)):
        figure = new_figure(width=9.5)
        ax = draw(figure.add_subplot())
        canvas, frame = FigureCanvasAgg(figure), figure.bbox
        canvas.draw()
        renderer = canvas.get_renderer()
        low, high = ax.get_xlim()
        ticks = [
            t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high
        ]  # others are not drawn
        boxes = [
            t.get_window_extent(renderer)
            for t in [*ax.texts, *ticks, ax.xaxis.label, ax.yaxis.label]
            if t.get_text()
        ]
        assert all(
            box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            for box in boxes
        )
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        save_memory_figures("tiny", tmp_path / "file")
