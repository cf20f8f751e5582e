"""Tables: what is flush right, that they line up, that no cell breaks them; figures have one saver."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

import minilora
from minilora.tables import html_table, markdown_table, text_table

HEADS = ["method", "weights", "loss ± half", "seeds", ""]
ROWS = [["LoRA", "float32", "0.31 ± 0.02", "3", "better"], ["QLoRA", "nf4", "–", "**12**", ""]]


def test_numbers_are_flush_right_and_words_flush_left():
    assert text_table(HEADS, ROWS).splitlines() == [
        "method  weights  loss ± half   seeds",
        "--------------------------------------------",
        "LoRA    float32  0.31 ± 0.02       3  better",
        "QLoRA   nf4                –  **12**",
    ]


def test_a_word_among_numbers_does_not_turn_the_column():
    lines = text_table(["lr 0.1"], [["0.300"], ["0.3125"], ["failed"]]).splitlines()
    assert lines[2:] == [" 0.300", "0.3125", "failed"]


def test_markdown_lines_up_and_keeps_bars_within_their_cell():
    lines = markdown_table(["norm", "n"], [["|x|", "1"], ["‖x‖", "10"]]).splitlines()
    assert (
        len({len(line) for line in lines}) == 1 and lines[1].startswith("|:--") and lines[1].endswith("-:|")
    )
    assert lines[2].startswith(r"| \|x\| ")


def test_html_is_well_formed_and_escaped():
    table = ElementTree.fromstring(html_table("a < b", ["<q>"], [["x & y"]]))
    assert table.find("caption").text == "a < b" and table.find(".//th").text == "<q>"
    assert table.find(".//td").text == "x & y"


@pytest.mark.parametrize("draw", [text_table, markdown_table, lambda *table: html_table("none", *table)])
def test_a_table_without_rows_has_its_heads(draw):
    assert "method" in draw(HEADS, [])


def test_tables_and_figures_are_written_in_one_place():
    root = Path(minilora.__file__).parents[1]
    sources = [*(root / "minilora").rglob("*.py"), *(root / "benchmarks").glob("*.py")]
    text = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in sources}
    assert [name for name, code in text.items() if ".savefig(" in code] == ["minilora/report/drawing.py"]
    assert [name for name, code in text.items() if "--:" in code] == ["minilora/tables.py"]
    assert [name for name, code in text.items() if "<table" in code] == ["minilora/tables.py"]
