"""The README's promises that a machine can hold: its example runs, it is short, CI calls its commands."""

from __future__ import annotations

import re
from pathlib import Path

from test_imports import DAY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    shown = re.search(r"```python\n.*?```\s*```text\n(.*?)```", README, re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    assert printed[0] == shown.splitlines()[0]  # counts are exact; texts may differ between machines


def test_it_is_one_short_page():
    assert len(README.splitlines()) <= 150
    assert "<!--" not in README


def test_ci_calls_the_test_command_as_it_stands_here():
    command = re.search(r'test_command="(.*?)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert f"    {command}\n" in README


def test_papers_are_linked():
    for number in ("2106.09685", "2305.14314", "2309.14717"):
        assert f"https://arxiv.org/abs/{number}" in README


def test_the_days_reading_names_files_that_exist():
    section = README.split("## Read it")[1].split("\n- ")[0]
    paths = re.findall(r"\[([\w/]+)\]\(minilora/([\w/]+)\.py\)", section)
    assert tuple(path.replace("/", ".") for path, _ in paths) == DAY
    for name, path in paths:
        assert name == path and (ROOT / "minilora" / f"{path}.py").is_file(), path
