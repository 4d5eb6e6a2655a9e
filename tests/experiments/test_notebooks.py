"""Every notebook runs from top to bottom at tiny size, and its .py and .ipynb agree."""

import os
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
  jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
  monkeypatch.setenv("MINICPM_JAX_NOTEBOOK", "tiny")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[2])]))
  notebook = jupytext.read(path)
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
  ).execute()
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  assert not [o for o in outputs if o.output_type == "error"]
  assert any("image/png" in o.get("data", {}) for o in outputs), "no picture was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_script_and_notebook_agree(path):
  jupytext = pytest.importorskip("jupytext")
  script, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
  cells = [[(c.cell_type, c.source) for c in n.cells] for n in (script, notebook)]
  assert cells[0] == cells[1], f"run `make notebooks` after editing {path.name}"
