"""Run notebooks from top to bottom and store their outputs: python notebooks/execute.py [NAME ...]

It needs `pip install nbclient ipykernel ipywidgets`. On a machine without an accelerator the outputs are of the
stand-ins, as those in the repository are. tests/test_notebooks.py runs all code cells without it, and checks that
stored outputs are of the cells that are there.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def digest(notebook: dict) -> str:
    """Of the sources of all code cells, in order."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def tidy(output: dict) -> dict:
    """An output as a reader sees it: of a progress bar the last state, and nothing that only the kernel knew."""
    if "text" in output:
        lines = "".join(output["text"]).split("\n")
        output["text"] = "\n".join(re.sub(r"^.*\r(?=.)", "", line.rstrip("\r")) for line in lines)
    return output


def execute(path: Path) -> None:
    """Run a notebook in a kernel and a directory of its own, and write its outputs into the file."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as directory:
        options = {"record_timing": False, "coalesce_streams": True}
        NotebookClient(notebook, resources={"metadata": {"path": directory}}, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(output) for output in cell.outputs]
    notebook.metadata["executed"] = digest(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb"))
    for name in names:
        print(name, flush=True)
        execute(HERE / f"{name}.ipynb")
