"""Numbers that several documents quote stand in `docs/numbers.toml`, which is compared with the results."""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FACTS = tomllib.loads((ROOT / "docs" / "numbers.toml").read_text(encoding="utf-8"))["fact"]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    )
}
UNITS = "%|ms|s|seconds|minutes|kB|MB|GB|KiB|MiB|GiB|times|bits per weight|bits per byte"


def number(text):
    return re.search(r"\d[\d,]*(?:\.\d+)?", text)[0].replace(",", "")


def measured(text):
    """Numbers with a unit in the prose of a document, outside code, tables and comments."""
    text = re.sub(r"^```.*?^```|^(?:    |\|).*?$|<!--.*?-->", "", text, flags=re.M | re.S)
    return {
        f"{n} {unit}" for n, unit in re.findall(rf"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?) ({UNITS})(?!\w)", text)
    }


def candidates(fact, source):
    """The numbers of which a fact's value may be a rounding."""
    if "quote" in fact:  # however a table is padded
        assert " ".join(fact["quote"].split()) in " ".join(source.split())
        return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", fact["quote"])]
    rows = [json.loads(line) for line in source.splitlines()]
    rows = [row for row in rows if all(row[name] == value for name, value in fact["rows"].items())]
    return [statistics.mean(row[fact["column"]] for row in rows) / fact["unit"]]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["what"])
def test_a_fact_is_what_its_source_says(fact):
    found = candidates(fact, (ROOT / fact["source"]).read_text(encoding="utf-8"))
    stated = number(fact["value"])
    digits = len(stated.partition(".")[2])
    assert any(f"{n:.{digits}f}" == stated for n in found), found


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["what"])
def test_documents_say_the_fact(fact):
    assert len(fact["said"]) >= 1
    for name, phrase in fact["said"].items():
        assert fact["value"] in phrase, "the phrase must hold the value"
        assert phrase in " ".join(DOCUMENTS[name].split()), f"{name} no longer says: {phrase}"


def test_numbers_in_several_documents_are_listed():
    places: dict[str, list[str]] = {}
    for name, text in DOCUMENTS.items():
        for value in measured(text):
            places.setdefault(value, []).append(name)
    known = {(fact["value"], name) for fact in FACTS for name in fact["said"]}
    missing = {(value, name) for value, names in places.items() if len(names) > 1 for name in names} - known
    assert not missing, "add these to docs/numbers.toml, or say them once"
