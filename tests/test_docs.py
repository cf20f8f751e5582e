"""What documents say is so: links lead somewhere, code runs, commands parse, columns and tables agree."""

from __future__ import annotations

import ast
import csv
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from slow_tests import SLOW

import minilora
from minilora import cli
from minilora.kernels import microkernel
from minilora.memory import plan
from minilora.sweep.results import COLUMNS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
each_document = pytest.mark.parametrize("name", TEXT)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def prose(text):
    """The text without blocks of code and comments."""
    return re.sub(r"^```.*?^```|^    .*?$|<!--.*?-->", "", text, flags=re.M | re.S)


def slugs(text):
    """Anchors of the headings, as mkdocs and repository viewers make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s]+", "-", heading) for heading in plain}


@each_document
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", TEXT[name]):
        if target.startswith("https://"):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


PYTHON = {name for name, text in TEXT.items() if blocks(text, "python") and name != "README.md"}


@pytest.mark.parametrize("name", sorted(PYTHON))
def test_code_runs_and_prints_what_it_says(name, tmp_path):
    text = TEXT[name]
    script = tmp_path / "blocks.py"  # one file, and a process of its own: blocks may start others
    script.write_text("\n".join(blocks(text, "python")), encoding="utf-8")
    shutil.copy(ROOT / "docs" / "own_adapters.py", tmp_path)  # as docs/adapter.md says
    found = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    for shown in re.findall(r"^```python\n.*?^```\s*^```text\n(.*?)^```", text, re.M | re.S):
        assert shown in found.stdout


def commands():
    for name, text in TEXT.items():
        code = re.findall(
            r"^    ((?:.*&& )?minilora .*(?:\n    (?!minilora|pip|python|pytest).+)*)$", text, re.M
        )
        code += re.findall(r"`(minilora [^`|…]*)`", text)
        for line in code:
            for part in re.split(r"&& ", line):
                if re.match(r"minilora [a-z]", part):
                    yield pytest.param(part, id=f"{name}: {part[:60]}".replace("\n", " "))


@pytest.mark.parametrize("command", list(commands()))
def test_commands_parse(command, monkeypatch):
    import shlex

    import tyro

    class Parsed(Exception):
        pass

    parse = tyro.cli

    def only(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only)
    with pytest.raises(Parsed):
        cli.main(shlex.split(command.split("  #")[0])[1:])


def test_every_column_of_the_results_is_described_with_its_unit():
    section = TEXT["docs/sweep.md"].split("## The columns of results.csv")[1]
    described: dict[str, str] = {}
    for line in re.findall(r"^\| (`.*)$", section, re.M):
        names, unit, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        assert unit and meaning, line
        described |= dict.fromkeys(re.findall(r"`(\w+)`", names), unit)
    assert set(described) == set(COLUMNS)
    with open(ROOT / "benchmarks/results/demo/results.csv", encoding="utf-8", newline="") as file:
        assert set(next(csv.reader(file))) <= set(COLUMNS)


def rows(table):
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def quoted_tables():
    for name, text in TEXT.items():
        for kind, source, table in re.findall(r"<!-- (rows|cells) of (\S+) -->\n\n((?:\|.*\n)+)", text):
            yield pytest.param(kind, (ROOT / name).parent / source, table, id=f"{name}: {source}")


@pytest.mark.parametrize(("kind", "source", "table"), list(quoted_tables()))
def test_quoted_tables_say_what_their_source_says(kind, source, table):
    """rows: each row's cells stand in one row of the source; cells: each cell with a number stands there."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    known = [{cell.strip() for cell in line.split("|")} | {""} for line in lines]
    anywhere = set().union(*known)
    for row in rows(table)[2:]:
        if kind == "rows":
            assert any(set(row) <= cells for cells in known), row
        else:
            assert {cell for cell in row[1:] if re.search(r"\d", cell)} <= anywhere, row


@pytest.mark.skipif(not microkernel.AVAILABLE, reason="without vectors attention keeps its probabilities")
def test_the_memory_of_a_7b_model_is_what_the_planner_says():
    table = TEXT["docs/memory.md"].split("| LLaMA-7B |")[1].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip().replace(",", "") for cell in line.split("|")[2:-1]] for line in table)
    stated = {
        line.split("|")[1].strip(): [int(n or 0) for n in row] for line, row in zip(table, cells, strict=True)
    }
    weights = ("weights", "codes", "absmax", "nested", "code maps", "scales", "offsets")
    kinds = {
        "frozen and trained weights": weights,
        "adapters": ("adapters",),
        "gradients": ("gradients",),
        "optimizer": ("optimizer",),
        "kept by the forward pass": ("activations",),
    }
    for i, method in enumerate(("full", "lora", "qlora", "qalora")):
        planned = plan("llama-7b", method=method, r=64, batch_size=1, context=512)
        assert stated["trainable parameters"][i] == planned.trainable
        for name, found in kinds.items():
            assert stated[name][i] == sum(planned.by_kind().get(kind, 0) for kind in found), (method, name)


def test_names_in_the_where_table_are_in_their_files():
    table = TEXT["docs/learn.md"].split("## Where is …?")[1].split("\n\n")[1]
    found = re.findall(r"\]\(\.\./(minilora/\S+\.py)\) \| `([\w.]+)` \|", table)
    assert len(found) >= 8
    for path, name in found:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        for part in name.split("."):
            (node,) = (n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part)
            body = node.body


def test_every_notebook_is_listed():
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        assert f"(../{path.relative_to(ROOT).as_posix()})" in TEXT["docs/learn.md"], path.name


def test_the_list_of_files_has_a_line_for_each_module():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    listed = hooks["tree"]()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE)
        assert len(hooks["caption"](name)) > 10, name
        if name.name != "__init__.py":
            assert f"(../minilora/{name.as_posix()})" in listed


def test_every_name_at_the_top_is_there():
    for name in minilora.__all__:
        assert getattr(minilora, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        minilora.nothing  # noqa: B018
    code = (
        "import minilora; minilora.memory.plan; minilora.run_sweep; minilora.SweepConfig; minilora.RunConfig"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_version_one_date_one_list_of_papers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    date = re.search(r"^date-released: (\S+)$", citation, re.M)[1]
    assert project["version"] == minilora.__version__
    assert f"\nversion: {minilora.__version__}\n" in citation
    assert f"## {minilora.__version__} ({date})\n" in TEXT["CHANGELOG.md"]
    assert sorted(project["urls"].values()) == sorted(re.findall(r'url: "(.*?)"', citation))


def test_long_campaigns_are_tests_that_exist():
    for start in SLOW:
        file, name = start.split("[")[0].split("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), start
