"""Tables, findings and the page of a run folder, on invented rows."""

import re

import pytest
from study_rows import one_row, search_rows, study_rows

from minilora.report.findings import compare, findings
from minilora.report.labels import METRICS, variant_columns
from minilora.report.page import format_table, result_columns, write_report
from minilora.report.statistics import mean_interval
from minilora.tables import markdown_table


@pytest.fixture(scope="module")
def rows():
    return study_rows()


@pytest.fixture(scope="module")
def demo():
    settings = [("full", None, 32, None), ("lora", 2, 32, None), ("lora", 8, 32, None)]
    settings += [("qlora", 8, 4, "nf4"), ("qlora", 8, 2, "nf2"), ("qalora", 8, 4, "int4")]
    data = [one_row("products", *setting, seed, "demo") for setting in settings for seed in (0, 1)]
    return [*data, one_row("products", "base", None, 32, None, 0, "demo")]


def column(columns, title):
    return next(column.cells for column in columns if column.title == title)


def test_the_table_has_a_line_a_setting_and_means_over_seeds(demo):
    columns = result_columns(demo, "products")
    assert column(columns, "method") == [
        "base",
        "full fine-tuning",
        "LoRA",
        "LoRA",
        "QLoRA",
        "QLoRA",
        "QA-LoRA",
    ]
    assert column(columns, "weights") == ["float32", "float32", "float32", "float32", "nf4", "nf2", "int4"]
    assert column(columns, "r") == ["", "", "2", "8", "8", "8", "8"]
    assert column(columns, "seeds") == ["1", "2", "2", "2", "2", "2", "2"]
    runs = [row["loss"] for row in demo if (row["method"], row["r"]) == ("lora", 2)]
    assert column(columns, "loss")[2] == f"{sum(runs) / 2:.3f}"
    assert column(columns, "trainable")[2] == "36,000"


def test_an_interval_appears_from_three_seeds_on(demo, rows):
    assert not any("±" in cell for part in result_columns(demo, "products") for cell in part.cells)
    runs = [
        row["loss"]
        for row in rows
        if (row["method"], row["task"], row["stage"]) == ("full", "python", "study")
    ]
    interval = mean_interval([run / 0.6931471805599453 for run in runs])
    cell = column(result_columns(rows, "python"), "bpb")
    assert f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}" in cell


def test_any_setting_makes_another_line_and_older_rows_join_their_default():
    rows = [one_row("python", "lora", 8, 32, None, seed) for seed in (0, 1)]
    assert variant_columns([row | {"schedule": "cosine"} for row in rows[:1]] + rows[1:]) == ()
    assert variant_columns([rows[0] | {"schedule": "constant"}, rows[1]]) == ("schedule",)


def test_different_learning_rates_are_different_lines():
    data = [
        one_row("python", "lora", 8, 32, None, 0) | {"learning_rate": rate, "key": str(rate)}
        for rate in (1e-3, 1e-2)
    ]
    assert column(result_columns(data, "python"), "method") == ["LoRA lr=0.001", "LoRA lr=0.01"]


def test_the_terminal_table_is_aligned_and_fits(demo, rows):
    for data in (demo, rows):
        text = format_table(data)
        for block in text.split("\n\n"):
            lines = block.splitlines()[1:]
            assert len({len(line) for line in lines[1:]}) == 1 and len(lines[1]) <= 100
            assert lines[0].startswith("method") and "loss" in lines[0] or "bpb" in lines[0]


def test_failures_are_listed_and_an_empty_table_says_so():
    bad = one_row("products", "qlora", 8, 4, "nf4", 3) | {
        "status": "failed",
        "error": "NonFiniteError: loss is NaN at step 4",
    }
    text = format_table([bad])
    assert (
        "1 failed:" in text
        and "QLoRA nf4 r=8 lr=0.01 seed=3 products: NonFiniteError: loss is NaN at step 4" in text
    )
    assert format_table([]) == "no finished runs"


def test_markdown_has_a_cell_a_column(demo):
    columns = result_columns(demo, "products")
    rows = list(zip(*(part.cells for part in columns), strict=True))
    lines = markdown_table([part.title for part in columns], rows).splitlines()
    assert len(lines) == 2 + 7 and {line.count("|") for line in lines} == {len(columns) + 1}
    assert re.fullmatch(r"\|:-+\|:-+(\|-+:)+\|", lines[1])


@pytest.mark.parametrize("use", [format_table, lambda rows: write_report(rows, "unused")])
def test_two_corpora_are_never_in_one_table(demo, use):
    with pytest.raises(ValueError, match="products-corpus.*another"):
        use([*demo, one_row("products", "lora", 8, 32, None, 5) | {"corpus_sha256": "another"}])


def test_findings_say_what_is_clear_and_what_is_noise(rows):
    said = findings(rows)
    assert [(task, metric.column) for task, metric in said] == [
        ("products", "loss"),
        ("products", "recall"),
        ("python", "bpb"),
    ]
    recall, bpb = said["products", METRICS["recall"]], said["python", METRICS["bpb"]]
    bits = next(line for line in recall if line.startswith("QLoRA r=8, from 3 to 2 bits"))
    assert re.search(r"-\d+\.\d points \[-\d+\.\d, -\d+\.\d\], clear", bits)
    exact = next(line for line in recall if line.startswith("QA-LoRA int4 r=8, deployed"))
    assert exact.endswith("no difference in the digits shown.")
    assert any(line.startswith("LoRA, from r = 1 to r = 64") for line in bpb)


def pair(differences):
    a = [{"seed": seed, "loss": 1.0 + difference} for seed, difference in enumerate(differences)]
    return compare(a, [{"seed": seed, "loss": 1.0} for seed in range(len(a))], METRICS["loss"])


def test_a_difference_is_clear_only_outside_the_noise():
    assert pair([0.10, 0.11, 0.12]) == "+0.110 [+0.085, +0.135], clear"
    assert pair([0.10, -0.11, 0.12]).endswith("not told apart from the noise between seeds")
    assert pair([0.10, 0.11]) == "+0.105 (2 seeds, no interval)"
    assert pair([1e-9, 2e-9, 1e-9]) == "no difference in the digits shown"


def test_the_page_has_results_figures_and_provenance(demo, tmp_path):
    bad = one_row("products", "subset", None, 32, None, 0, "demo") | {
        "status": "failed",
        "error": "ConfigError: no such module",
    }
    path = write_report([*demo, bad], tmp_path, "A demonstration", "What this is.", command="minilora sweep")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "README.md" and text.startswith("# A demonstration\n\nWhat this is.\n")
    assert "One or two seeds: differences may be noise" in text
    for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (tmp_path / name).is_file()
    assert {"rank.png", "memory.png", "accuracy_memory.png", "deployed.png"} <= set(
        re.findall(r"\(([^)]*\.png)\)", text)
    )
    assert "rank_visible_products: task 'products' needs LoRA at two ranks and with two seeds" in text
    assert "ConfigError: no such module" in text and "`minilora sweep`" in text and "products-corpus" in text
    assert str(tmp_path) not in text


def test_the_search_is_reported_and_its_edges_flagged(demo, tmp_path):
    text = write_report([*demo, *search_rows("products")], tmp_path).read_text(encoding="utf-8")
    assert "| products | LoRA | 0.996 | 0.600 | 0.382 | **0.300** | 0.368 |" in re.sub(" +", " ", text)
    flags = re.findall(r"\*\*On the edge of the grid:\*\* ([^\n]*)", text)
    assert flags == ["subset on products chose 0.03, the greatest value tried; a better one may lie outside."]


def test_a_page_without_any_finished_run(tmp_path):
    bad = one_row("products", "lora", 8, 32, None, 0) | {"status": "failed", "error": "boom"}
    text = write_report([bad], tmp_path).read_text(encoding="utf-8")
    assert "1 failed" in text and "boom" in text
