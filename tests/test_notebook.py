"""The notebook of the examples, executed by a real Jupyter kernel with the stop button pressed where it says so."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from support import run_script

NOTEBOOK = Path(__file__).parent.parent / "examples" / "pool_in_a_notebook.ipynb"
DRIVER = Path(__file__).parent / "notebook_driver.py"
SECONDS = 240


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of all cells; kernels start slowly, so all tests look at the same run."""
    folder = tmp_path_factory.mktemp("jupyter")
    env = {"JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": None}
    ran = run_script(DRIVER.read_text(), SECONDS, env, [str(NOTEBOOK)], grace=10.0).expect_success()
    return json.loads(ran.stdout.partition("FOUND ")[2])


def test_functions_of_cells_and_redefined_ones(found):
    cells = found["cells"]
    assert "70 tiles; the sharpest is number 13" in cells["define"]["text"]
    assert cells["redefine"]["text"] == "all changed: True\nas computed here: True\n"
    assert cells["class"]["text"].startswith("of this class: True\nbrightest: Tile(19, ")


def test_the_pool_shows_itself(found):
    first, last = found["cells"]["open"], found["cells"]["end"]
    assert first["text"] == "<tpool.Pool state=RUN pool_size=2 busy=0 done=0>"
    assert first["html"].count("<tr>") == last["html"].count("<tr>") == 3
    assert "<tpool.Pool state=RUN pool_size=2 busy=0 done=" in last["text"]
    assert last["text"] != first["text"]


def test_a_bar_as_a_widget_and_without(found):
    assert found["bars"] == [70]
    assert "70 tiles, sharpness now 0.00" in found["cells"]["progress"]["text"]
    assert "map(abs): 100%" in found["bar without widgets"]
    assert "7/7" in found["bar without widgets"]


def test_the_stop_button(found):
    assert found["cells"]["interrupt"]["text"] == "1 of 8 done; press stop\ninterrupted\n"
    # At least: on a busy machine the end of one worker's answer may come with the next one's.
    assert found["cells"]["report"]["text"].count(" in nap\n") >= 2
    assert "the same values: True" in found["cells"]["usable"]["text"]
    assert "press stop" not in found["cells"]["usable"]["text"], "what was interrupted shows no more progress"


def test_await_and_batches(found):
    assert found["cells"]["await"]["text"] == "one call: True\nsharp tiles seen: 20\n"
    assert found["cells"]["batches"]["text"] == "(70, 4) as computed here: True\n"


def test_no_worker_outlives_its_kernel(found):
    assert (found["workers"], found["gone after the restart"]) == (2, True)
    assert (found["workers again"], found["gone after the kill"]) == (2, True)


def test_no_outputs_are_kept():
    """They differ from run to run, and would fill the history with noise."""
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
