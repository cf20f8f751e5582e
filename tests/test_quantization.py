"""What a weight loses in few bits: errors against loops, bytes, intervals, figures and the study."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import GQA, FakeTask, make_model

from minilora.claims import quantization_study as quantization
from minilora.config import ConfigError, QuantConfig
from minilora.data.tasks import make_task
from minilora.data.tokenizer import PAD
from minilora.formats.bitsandbytes import to_arrays
from minilora.quant.gptq import Hessian, gptq
from minilora.quant.model import quantize_model
from minilora.quant.weights import CodebookWeight, quantize_weight
from minilora.report import quantization_plots
from minilora.report.drawing import new_figure, save_figure
from minilora.report.quantization_tables import format_model_losses, format_weight_errors
from minilora.report.statistics import mean_interval
from minilora.sweep import weight_errors
from minilora.sweep.results import ResultsError
from minilora.training.evaluation import evaluate

W = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((50, 64)) * np.linspace(0.1, 2, 64)  # inputs that differ in size
CONFIGS = [
    QuantConfig("nf4"),
    QuantConfig("nf4", block_size=32, double_quant=False),
    QuantConfig("fp4"),
    QuantConfig("nf2"),
    QuantConfig("int4", group_size=16),
    QuantConfig("int2", fit="mse"),
    QuantConfig("int3", quantizer="hqq"),
    QuantConfig("int3", offset_dtype="zero"),
    QuantConfig("int4", quantizer="gptq"),
    QuantConfig("nf3", quantizer="gptq"),
]


def hessian(x):
    h = Hessian(x.shape[1])
    h.add(x)
    return h.value()


# one weight


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.quant_type} {config.quantizer} {config.fit}"
)
def test_errors_are_those_of_a_loop(config):
    (row,) = quantization.weight_errors(W, [config], hessian(X))
    left = (
        gptq(W, hessian(X), config)[0] if config.quantizer == "gptq" else quantize_weight(W, config)
    ).dense()
    errors = [float(W[i, j]) - float(left[i, j]) for i in range(6) for j in range(64)]
    weights = [float(W[i, j]) for i in range(6) for j in range(64)]
    relative = math.sqrt(sum(e * e for e in errors) / sum(v * v for v in weights))
    lost = total = 0.0
    for n in range(50):
        for i in range(6):
            lost += sum(X[n, j] * (float(W[i, j]) - float(left[i, j])) for j in range(64)) ** 2
            total += sum(X[n, j] * float(W[i, j]) for j in range(64)) ** 2
    expected = {
        "mean_abs": sum(map(abs, errors)) / 384,
        "rms": math.sqrt(sum(e * e for e in errors) / 384),
        "max_abs": max(map(abs, errors)),
        "relative": relative,
        "snr_db": 20 * math.log10(1 / relative),
        "output_error": math.sqrt(lost / total),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert row["quant_type"] == config.quant_type and row["quantizer"] == config.quantizer
    assert (row["group_size"] is None) != (row["block_size"] is None)


def test_bits_are_those_of_the_real_arrays():
    rows = quantization.weight_errors(W, CONFIGS[:5])
    assert [row["bits_per_weight"] for row in rows[1:]] == [
        4 + 32 / 32,
        4 + (8 * 6 + 64) / 384,
        2 + (8 * 6 + 64) / 384,
        4 + 32 / 16,
    ]
    for row, config in zip(rows[:3], CONFIGS, strict=False):
        weight = quantize_weight(W, config)
        stored = sum(
            a.nbytes for name, a in to_arrays("w", weight).items() if not name.endswith(("__nf4", "__fp4"))
        )
        assert row["file_bits_per_weight"] == 8 * stored / W.size
    assert (
        rows[3]["file_bits_per_weight"] is None and rows[4]["file_bits_per_weight"] is None
    )  # nf2, int4: not bitsandbytes'
    assert all(row["output_error"] is None for row in rows)


def test_a_weight_that_is_exact_loses_nothing():
    exact = np.tile(np.arange(16, dtype=np.float32), (2, 2))
    for w in (exact, np.zeros((2, 32), np.float32)):
        (row,) = quantization.weight_errors(w, [QuantConfig("int4")], np.eye(32))
        assert row["relative"] == row["max_abs"] == row["output_error"] == 0 and row["snr_db"] == math.inf
        assert "–" in format_weight_errors([row])


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ConfigError, match="calibration_hessian"):
        quantization.weight_errors(W, [QuantConfig("int4", quantizer="gptq")])
    with pytest.raises(ConfigError, match=r"calibration_hessian.shape=\(3, 3\)"):
        quantization.weight_errors(W, [QuantConfig()], np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        quantization.weight_errors(W * np.float32(np.nan), [QuantConfig()])


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_files_formula_is_that_of_real_arrays(block_size, double_quant):
    for n in (1, 63, 64, 65, 4097, 21_953, 22_017, 70_001):
        weight = CodebookWeight.quantize(np.ones((1, n), np.float32), "nf4", block_size, double_quant)
        stored = sum(a.nbytes for name, a in to_arrays("w", weight).items() if "quant_state" not in name)
        assert weight_errors.file_bytes(n, block_size, double_quant) == stored


def test_double_quantization_pays_from_the_crossover_on():
    n = weight_errors.crossover(64)
    assert abs(n - 21_960) < 64  # the limit 1024/(4 − 1 − 4/256) blocks, in whole blocks
    assert weight_errors.file_bytes(n, 64) < weight_errors.file_bytes(n, 64, False)
    assert all(weight_errors.file_bytes(m, 64) >= weight_errors.file_bytes(m, 64, False) for m in range(1, n))


def test_bits_against_block_size_follow_the_paper():
    for row in weight_errors.size_rows():
        b, n = row.get("block_size"), row["weights"]
        if b is not None:  # 4 + 32/b; 4 + 8/b + 32/(256 b) and one offset for the tensor
            expected = 4 + 8 / b + 32 / n + 32 * -(-n // b // 256) / n if row["double_quant"] else 4 + 32 / b
            assert row["bits_per_weight"] == pytest.approx(expected)


def test_levels_lie_where_codes_decode():
    data = weight_errors.level_data(W, QuantConfig("nf4", block_size=32))
    for i, block in enumerate(W.reshape(-1, 32)):
        assert data["values"].reshape(-1, 32)[i] == pytest.approx(block / max(abs(v) for v in block))
    assert (
        data["levels"].size == 16 and weight_errors.level_data(W, QuantConfig("fp4"))["levels"].size == 15
    )  # two zeros
    config = QuantConfig("int2", group_size=16)
    data, weight = weight_errors.level_data(W, config), quantize_weight(W, config)
    codes = np.abs(data["values"][:, None] - data["levels"]).argmin(axis=1)  # the nearest level's
    assert (codes == weight.unpacked().reshape(-1)).mean() > 0.99  # but for ties and roundings
    assert data["relative"] == quantization.weight_errors(W, [config])[0]["relative"]


def test_block_errors_are_those_of_a_loop():
    w = W.reshape(-1)[:150].reshape(3, 50)  # the last of three blocks has 22
    for config, size in ((QuantConfig("nf4"), 64), (QuantConfig("int4", group_size=25), 25)):
        data, left = weight_errors.block_errors(w, config), quantize_weight(w, config).dense().reshape(-1)
        flat = w.reshape(-1).tolist()
        for i, first in enumerate(range(0, 150, size)):
            block = range(first, min(first + size, 150))
            assert data["absmax"][i] == pytest.approx(max(abs(flat[j]) for j in block))
            mean = sum((flat[j] - float(left[j])) ** 2 for j in block) / len(block)
            assert data["rms"][i] == pytest.approx(math.sqrt(mean))
        assert len(data["rms"]) == i + 1


# a whole model

FEW = [QuantConfig("int2", group_size=4, quantizer=quantizer) for quantizer in ("rtn", "hqq", "gptq")]
FEW += [QuantConfig("int2", group_size=4, fit="mse")]


@pytest.fixture(scope="module")
def case():
    model, task = make_model(replace(GQA, hidden_size=16), dtype=np.float32), FakeTask(n_train=40)
    return model, quantization.calibration_of(task, 8), task.eval_batches("test", 2)


@pytest.fixture(scope="module")
def table(case):
    return quantization.model_table(*case, FEW)


def test_losses_are_those_of_the_quantized_models(case, table):
    model, pick, batches = case
    base = evaluate(model, batches)["loss"]
    assert (
        table[0]["loss"] == pytest.approx(base) and table[0]["bits"] == 32 and table[0]["quantizer"] is None
    )
    for row, config in zip(table[1:], FEW, strict=True):
        seeds = (0, 1, 2) if config.quantizer == "gptq" else (0,)
        data = [pick(np.random.default_rng(seed)) if config.quantizer == "gptq" else () for seed in seeds]
        losses = [evaluate(quantize_model(model, config, ids), batches)["loss"] for ids in data]
        assert row["losses"] == pytest.approx(losses) and row["seeds"] == len(seeds)
        interval = mean_interval(losses)
        assert row["loss"] == pytest.approx(interval.mean)
        assert row["loss_half"] == (pytest.approx(interval.high - interval.mean) if len(seeds) > 1 else None)
        assert row["above"] == pytest.approx(row["loss"] - base)
        assert row["effective_bits"] == 2 + 32 / 4


def test_the_improvement_is_paired_over_batches_and_seeds(case, table):
    model, pick, batches = case
    counts = [int(batch.mask.sum()) for batch in batches]
    rounded = [evaluate(quantize_model(model, FEW[0]), [batch])["loss"] for batch in batches]
    samples = [quantize_model(model, FEW[2], pick(np.random.default_rng(seed))) for seed in range(3)]
    found = [[evaluate(changed, [batch])["loss"] for batch in batches] for changed in samples]
    row, n, total = table[3], len(batches), sum(counts)
    by_seed = [
        sum((a - b) * c for a, b, c in zip(rounded, one, counts, strict=True)) / total for one in found
    ]
    over_seeds = mean_interval(by_seed)
    assert row["improvement"] == pytest.approx(over_seeds.mean)
    assert row["improvement_seeds_half"] == pytest.approx(over_seeds.high - over_seeds.mean)
    by_batch = [sum(rounded[i] - one[i] for one in found) / 3 * counts[i] for i in range(n)]  # nats
    residuals = [n * (by_batch[i] - over_seeds.mean * counts[i]) / total for i in range(n)]
    half = mean_interval(residuals)
    assert row["improvement_half"] == pytest.approx(half.high - half.mean)
    assert "improvement" not in table[1] and "verdict" not in table[1]  # rounding itself
    assert all(row["verdict"] in ("better", "worse", "unclear") for row in table[2:])


def test_threads_change_no_digit(case, table):
    two = quantization.model_table(*case, FEW, threads=2)
    assert [{**row, "seconds": 0} for row in two] == [{**row, "seconds": 0} for row in table]


def test_rounding_is_measured_even_where_it_is_not_asked_for(case):
    (_, row) = quantization.model_table(*case, FEW[2:3], seeds=(5,))
    assert (
        row["improvement"] is not None
        and row["improvement_seeds_half"] is None
        and row["verdict"] == "no interval"
    )
    with pytest.raises(ConfigError, match="eval_batches"):
        quantization.model_table(case[0], case[1], [], FEW)


@pytest.mark.parametrize(
    ("improvement", "batches", "seeds", "verdict"),
    [
        (0.3, 0.1, 0.2, "better"),
        (0.3, 0.4, 0.2, "unclear"),
        (0.3, 0.1, 0.4, "unclear"),
        (-0.3, 0.1, 0.2, "worse"),
        (0.3, None, 0.1, "no interval"),
        (0.3, 0.1, None, "no interval"),
    ],
)
def test_only_a_difference_beyond_both_halves_counts(improvement, batches, seeds, verdict):
    row = {
        "improvement": improvement,
        "improvement_half": batches,
        "improvement_seeds_half": seeds,
        "quantizer": "gptq",
    }
    assert quantization._verdict(row) == verdict


def test_a_paired_interval_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(50, 150, size=16)
        interval = quantization.paired_over_batches(counts * rng.normal(0.1, 0.05, 16), counts)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.92 <= hits / 400 <= 0.98  # 0.95 ± 2.7 standard deviations of a share of 400


def test_calibration_is_distinct_training_text_without_padding():
    task = make_task("products", n_train=30)
    pick = quantization.calibration_of(task, 10)
    first, again, other = (pick(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert len(first) == 10 and all(ids.shape[0] == 1 and (ids != PAD).all() for ids in first)
    assert len({ids.tobytes() for ids in first}) == 10
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert {ids.tobytes() for ids in first} != {ids.tobytes() for ids in other}
    assert len(quantization.calibration_of(task, 100)(np.random.default_rng(0))) == 30


# tables


def test_tables_line_up_and_name_their_rows(table):
    text = format_weight_errors(quantization.weight_errors(W, CONFIGS, hessian(X)))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(CONFIGS)
    for name in (
        "nf4 double-quantized, rtn",
        "int2, rtn mse",
        "int3, hqq",
        "int3, rtn, zero offsets",
        "int4, gptq",
    ):
        assert f"| {name} " in text
    model = format_model_losses(table)
    assert (
        len({len(line) for line in model.splitlines()}) == 1 and "| float32 " in model and "better" in model
    )


def test_findings_name_what_does_not_beat_rounding():
    row = quantization.settings(QuantConfig("int4", quantizer="gptq"))
    row |= {
        "loss": 1.0,
        "improvement": 0.01,
        "verdict": "unclear",
        "above": -0.002,
        "above_half": 0.003,
        "loss_half": 0.004,
    }
    text = "\n".join(quantization.findings([row]))
    unclear = "no difference from plain rounding beyond the intervals"
    assert f"**Rounding not beaten**: {unclear}: int4, gptq (+0.0100)." in text
    assert (
        "Below the loss of full precision: int4, gptq (-0.0020 ± 0.0030 over batches, ± 0.0040 over seeds)."
        in text
    )
    assert "Less loss than plain rounding, beyond both intervals: none." in text


def test_gptq_is_counted_against_rounding_of_the_same_storage():
    rows = quantization.weight_errors(
        W, [CONFIGS[8], replace(CONFIGS[8], quantizer="rtn"), CONFIGS[9]], hessian(X)
    )
    assert quantization.gptq_against_rtn(rows) == (1, 1, 1)  # the nf3 has no partner


# figures


@pytest.fixture(scope="module")
def weight_rows():
    return quantization.weight_errors(
        W, [config for config in quantization.weight_configs(64) if config.block_size <= 128], hessian(X)
    )


def test_levels_are_lines_over_a_histogram():
    data = weight_errors.level_data(W, QuantConfig("nf3"))
    ax = quantization_plots.plot_levels(data)
    (lines,) = ax.collections
    assert [segment[0, 0] for segment in lines.get_segments()] == pytest.approx(data["levels"].tolist())
    assert sum(patch.get_height() * patch.get_width() for patch in ax.patches) == pytest.approx(1)
    assert "nf3" in ax.get_title(loc="left") and "absmax" in ax.get_xlabel()


def test_blocks_are_dots_and_no_dot_is_outside():
    panels = [
        weight_errors.block_errors(W, QuantConfig(kind, group_size=16)) for kind in ("nf4", "int2", "int4")
    ]
    figure = quantization_plots.draw_blocks(panels)
    for ax, data in zip(figure.axes, panels, strict=False):
        assert ax.lines[0].get_ydata().tolist() == data["rms"].tolist()
        assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > data["rms"].max()
    assert not figure.axes[3].axison


def test_each_type_and_quantizer_has_its_line(weight_rows):
    ax = quantization_plots.plot_errors(weight_rows, known=quantization_plots.WEIGHT_SERIES)
    lines = {(line.get_color(), line.get_marker()): line for line in ax.lines}
    assert len(lines) == 5 * 3 + 1  # rtn, hqq, gptq of int, rtn and gptq of nf at 2, 3 and 4 bits, and fp4
    chosen = [
        row
        for row in weight_rows
        if (row["quant_type"], row["quantizer"], row["fit"]) == ("int3", "gptq", "minmax")
    ]
    line = lines[quantization_plots.GPTQ.colour, "^"]
    assert (
        sorted(line.get_ydata()) == sorted(row["relative"] for row in chosen) and len(chosen) == 3
    )  # groups of 16, 32, 64
    assert ax.get_yscale() == "log" and "‖W − Ŵ‖" in ax.get_ylabel()
    assert len(quantization_plots.plot_errors(weight_rows).lines) == 8 * 3 + 1  # the fits too
    with pytest.raises(ResultsError, match="Hessian"):
        quantization_plots.plot_errors(
            [row | {"output_error": None} for row in weight_rows], error="output_error"
        )


def test_rows_of_no_known_series_are_drawn_too():
    rows = quantization.weight_errors(
        W, [QuantConfig("fp4", quantizer="gptq"), QuantConfig("int4", fit="hqq")], hessian(X)
    )
    names = [series.name for series in quantization_plots.series_of(rows, quantization_plots.SERIES)]
    assert names == ["fp, gptq", "int, rtn hqq"] and len(quantization_plots.plot_errors(rows).lines) == 2


def test_the_crossover_is_where_it_was_computed():
    rows = weight_errors.size_rows()
    ax = quantization_plots.plot_file_bits(rows, weight_errors.crossover())
    plain, double, line = ax.lines
    assert (
        line.get_xdata()[0] == weight_errors.crossover()
        and f"{weight_errors.crossover():,}" in ax.texts[0].get_text()
    )
    pays = np.array(double.get_ydata()) < np.array(plain.get_ydata())
    assert (pays == (np.array(plain.get_xdata()) >= weight_errors.crossover())).all()
    bits = quantization_plots.plot_memory_bits(rows)
    assert bits.lines[0].get_ydata()[1] == 4.5 and bits.lines[1].get_ydata()[1] == pytest.approx(
        4.127, abs=5e-4
    )


def test_losses_have_intervals_seeds_and_the_full_precision(table):
    ax = quantization_plots.plot_losses(table)
    assert len(ax.containers) == 3  # rtn, hqq and gptq; mse is another figure's
    dots = [line for line in ax.lines if line.get_markersize() < 3]
    assert len(dots) == 1 and len(dots[0].get_ydata()) == 3
    assert ax.texts[0].get_text() == f"full precision: {table[0]['loss']:.3f}"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2 bits"]
    with pytest.raises(ResultsError, match="model_table"):
        quantization_plots.plot_losses(table[:1])


def test_figures_are_drawn_on_given_axes_and_the_same_again(tmp_path):
    ax = new_figure(3, 2).add_subplot()
    rows = quantization.weight_errors(W, CONFIGS[:1], hessian(X))
    assert quantization_plots.plot_errors(rows, ax) is ax
    one, two = (save_figure(ax.figure, tmp_path / name, ["png"])[0].read_bytes() for name in "ab")
    assert one == two and one.startswith(b"\x89PNG")
    paths = quantization_plots.write_weight_figures(W, rows, tmp_path / "w")
    assert [path.name for path in paths] == ["levels.png", "blocks.png", "errors.png", "bytes.png"]
    assert all(p.is_file() for p in paths)


# the study


def test_the_study_writes_rows_a_page_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        quantization,
        "weight_configs",
        lambda _: [QuantConfig("nf4"), QuantConfig("int4"), QuantConfig("int4", quantizer="gptq")],
    )
    study = quantization.QuantizationStudy(
        tasks=("products",),
        configs=(QuantConfig("int2"), QuantConfig("int2", quantizer="gptq"), QuantConfig("nf2")),
        weight="layers.0.self_attn.q_proj",
        seeds=(0, 1),
        sequences=2,
        n_eval=2,
        eval_batch_size=1,
    )
    rows = quantization.quantization_study(tmp_path, study, threads=1, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "quantization.jsonl",
        "README.md",
        "levels.png",
        "blocks.png",
        "errors.png",
        "bytes.png",
        "loss.png",
    }
    lines = (tmp_path / "quantization.jsonl").read_text(encoding="utf-8").splitlines()
    read = [json.loads(line) for line in lines]
    assert read == rows and {row["part"] for row in read} == {"weight", "model", "size"}
    for row in read:
        assert (
            row["machine"]
            and row["numpy_version"]
            and "quantization_study" in row["command"]
            and row["base_sha256"]
        )
    losses = [row for row in read if row["part"] == "model"]
    assert len(losses) == 4 and all(row["corpus_sha256"] and row["split"] == "test" for row in losses)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "### products" in page
        and "22,017" in page
        and all(f"({name}.png)" in page for name in quantization.FIGURES)
    )
    assert page.count("|\n| int2, gptq") == 1 and "Of 1 settings" in page
