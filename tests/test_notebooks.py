"""Each committed notebook runs from top to bottom, as committed, without errors or warnings."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def outputs(notebook, kind):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if o.output_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_in_order_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "execute the notebook from top to bottom before committing it"
    assert not outputs(notebook, "error")
    assert not [o for o in outputs(notebook, "stream") if o.name == "stderr"]
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"(/home/|/root/|/work/|/tmp/|[A-Z]:\\\\Users)", path.read_text(encoding="utf-8"))


# The test session turns warnings into errors; the kernel is another process with its own policy.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_the_same_text(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(fresh, timeout=120, kernel_name="python3", coalesce_streams=True, resources=where).execute()
    assert not [o for o in outputs(fresh, "stream") if o.name == "stderr"]
    assert len(outputs(fresh, "stream")) == len(outputs(committed, "stream"))
    assert len(outputs(fresh, "display_data")) == len(outputs(committed, "display_data")) >= 1
