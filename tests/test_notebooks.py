"""Every notebook runs top to bottom, with a stand-in for its model, and its stored outputs are of its cells."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

RUN = """
import gc, json, re, sys
import jax
import matplotlib.pyplot as plt
import rlhf_jax.runs.run

rlhf_jax.runs.run.write_beside = lambda directory: ""  # as in the other tests: a report takes longer than a stand-in
for path in sys.argv[1:]:
    namespace, before = {"__name__": "__main__"}, len(jax.live_arrays())
    for number, cell in enumerate(json.load(open(path, encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            source = re.sub("^( *)[%!].*", r"\\1raise SystemExit", "".join(cell["source"]), flags=re.M)
            exec(compile(source, f"{path} cell {number}", "exec"), namespace)
    namespace.clear()
    plt.close("all")
    gc.collect()
    print("arrays left:", len(jax.live_arrays()) - before)
"""
"""Code cells in order, in one namespace; lines for IPython, which install the package, would end the process."""

spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def code_of(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_of_the_cells_that_are_there_and_without_errors(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert notebook["metadata"]["executed"] == execute.digest(notebook), f"run notebooks/execute.py {path.stem}"
    cells = code_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(base64.b64decode(picture)[:4] == b"\x89PNG" for picture in pictures)
    assert not re.search(r"/(home|root|tmp|opt)/|\r", json.dumps([output.get("text") for output in outputs]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_what_its_outputs_are_of_and_the_installation(path):
    first, second = json.loads(path.read_text(encoding="utf-8"))["cells"][:2]
    assert re.search(r"outputs that are stored here are( those)? of", " ".join("".join(first["source"]).split()))
    assert re.search(r'^REPOSITORY = "".*\nif REPOSITORY:\n    %pip install ', "".join(second["source"]))


@pytest.mark.slow
def test_notebooks_run_top_to_bottom_and_leave_nothing_on_the_devices(tmp_path):
    # One process and one directory for all, so that they share what is imported, compiled and trained; one device.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST, "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", RUN, *map(str, NOTEBOOKS)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.findall("arrays left: (.*)", done.stdout) == ["0"] * len(NOTEBOOKS)
