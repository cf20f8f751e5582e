"""The README's promises that a machine can hold: its example runs, its files exist, its commands are the ones that CI calls."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    shown = re.search(r"```python\n.*?```\s*```text\n(.*?)```", README, re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    assert printed[0] == shown.splitlines()[0]  # counts are exact; texts and losses may differ between machines


def test_every_file_that_it_links_or_lists_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = re.search(r"    minilora/\n(.*?)\n\n", README, re.S).group(1)
    for name in re.findall(r"^      (\S+)", tree, re.M):
        assert (ROOT / "minilora" / name).exists(), name
    captioned = set(re.findall(r"^      (\S+)  ", tree, re.M))
    ours = {str(path.relative_to(ROOT / "minilora")) for path in (ROOT / "minilora").rglob("*.py")}
    assert {name for name in ours if not name.endswith("__init__.py")} <= captioned
    for name in re.findall(r"^    (\S+)/", tree, re.M):
        assert (ROOT / name).is_dir(), name


def test_placeholders_are_filled():
    assert "<!--" not in README


def test_ci_calls_the_test_command_as_it_stands_here():
    command = re.search(r'test_command="(.*?)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert f"    {command}\n" in README
