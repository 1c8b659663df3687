"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NEEDS_TEACHER = {"01_quickstart", "03_align", "04_distill"}
SMALL = {
    "01_quickstart": """
        LENGTH, WRITTEN_DOCUMENTS, ALIGN_STEPS, DISTILL_STEPS = 256, 6, 3, 2
        MEASURED_WINDOWS, CONTEXT, JUDGED_DOCUMENTS = 1, 256, 2
    """,
    "04_distill": "LENGTH, ALIGN_STEPS, STEPS, CONTEXT = 128, 3, 3, 256",
    "05_ablations": "SEEDS, ALIGN_STEPS, DISTILL_STEPS, MIXERS = 2, 6, 3, 'hybrid/4,window/4'",
}
"""What a test puts in place of the numbers in a notebook's cell tagged "parameters": every cell
runs, with less text and fewer steps than a reader gets. 03_align runs as it is: it shows that the
error falls, which a handful of short rows does not settle."""

by_notebook = pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.real] if p.stem in NEEDS_TEACHER else [])
        for p in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)


@pytest.mark.slow
@by_notebook
def test_notebook_runs(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    for place, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            smaller = textwrap.dedent(SMALL[path.stem])
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(smaller))
            break
    # The kernel is another process: it finds the package where this one does.
    paths = [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=environment)
    images = [o for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    assert any({"image/png", "image/svg+xml"} & set(o["data"]) for o in images)


@by_notebook
def test_notebook_is_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len(cells) > 10
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
