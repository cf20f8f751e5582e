"""The README's promises that a machine can hold: its example runs, its files exist, its commands are the ones
that CI calls."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minilora.kernels.microkernel import AVAILABLE
from minilora.memory import plan

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_prints_what_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    shown = re.search(r"```python\n.*?```\s*```text\n(.*?)```", README, re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(shown.splitlines())
    assert (
        printed[0] == shown.splitlines()[0]
    )  # counts are exact; texts and losses may differ between machines


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


@pytest.mark.skipif(not AVAILABLE, reason="without vectors attention keeps its probabilities")
def test_the_memory_of_a_7b_model_is_what_the_planner_says():
    table = README.split("| LLaMA-7B, ")[1].split("\n\n")[0].splitlines()[2:]
    cells = ([cell.strip().replace(",", "") for cell in line.split("|")[2:-1]] for line in table)
    stated = {
        line.split("|")[1].strip(): [int(n or 0) for n in row] for line, row in zip(table, cells, strict=True)
    }
    kinds = {
        "frozen and trained weights": (
            "weights",
            "codes",
            "absmax",
            "nested",
            "code maps",
            "scales",
            "offsets",
        ),
        "adapters": ("adapters",),
        "gradients": ("gradients",),
        "optimizer (AdamW, float32)": ("optimizer",),
        "kept by the forward pass": ("activations",),
    }
    for i, method in enumerate(("full", "lora", "qlora", "qalora")):
        planned = plan("llama-7b", method=method, r=64, batch_size=1, context=512)
        assert stated["trainable parameters"][i] == planned.trainable
        for name, found in kinds.items():
            assert stated[name][i] == sum(planned.by_kind().get(kind, 0) for kind in found), (method, name)


def test_placeholders_are_filled():
    assert "<!--" not in README


def test_ci_calls_the_test_command_as_it_stands_here():
    command = re.search(r'test_command="(.*?)"', (ROOT / ".ci" / "run").read_text(encoding="utf-8")).group(1)
    assert f"    {command}\n" in README
