"""Executes the notebook of the examples in a real Jupyter kernel; run as a program, prints what came as JSON.

python tests/notebook_driver.py NOTEBOOK

A program of its own, because the sockets of Jupyter's client stay open for the life of a process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

DEADLINE = 120
WHO = """
while not all(worker.pid for worker in pool.stats().workers):
    pass  # they are started in the background
print("PIDS", *(worker.pid for worker in pool.stats().workers))
"""
BAR = "import tpool\nwith tpool.Pool(1) as pool:\n    pool.map(abs, range(7), progress=True)"
NAP = "    time.sleep(seconds)"
HIDE_WIDGETS = "import sys\nsys.modules['ipywidgets'] = None"


class Client(NotebookClient):
    """Presses the stop button in the cell of that tag, once the first task of its map is done and two workers nap."""

    naps: Path  # each worker that naps leaves a file in this folder

    async def press(self) -> None:
        """What has not begun is dropped when the button is pressed, so that comes first."""
        end = time.monotonic() + DEADLINE
        while len(list(self.naps.iterdir())) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        await self.km.interrupt_kernel()

    def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
        found = super().output(outs, msg, display_id, cell_index)
        cell = self.nb.cells[cell_index]
        if "interrupt" in cell.metadata.get("tags", []) and "1 of 8 done" in text_of(cell):
            cell.metadata["tags"] = []
            self.pressed = asyncio.ensure_future(self.press())
        return found


def text_of(cell: Any) -> str:
    """All that a cell has printed or shown, as text."""
    parts = [part.get("text", "") or part.get("data", {}).get("text/plain", "") for part in cell.outputs]
    return "".join(parts)


def html_of(cell: Any) -> str:
    """What a cell shows as HTML."""
    return "".join(part.get("data", {}).get("text/html", "") for part in cell.outputs)


async def ask(client: Client, source: str) -> str:
    """What one more cell prints."""
    cell = nbformat.v4.new_code_cell(source)
    client.nb.cells.append(cell)
    await client.async_execute_cell(cell, len(client.nb.cells) - 1)
    return text_of(cell)


async def who(client: Client) -> list[int]:
    """Ids of the workers' processes."""
    return [int(pid) for pid in (await ask(client, WHO)).partition("PIDS")[2].split()]


def gone(pids: list[int]) -> bool:
    """Whether these processes end within the deadline."""
    end = time.monotonic() + DEADLINE
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


async def execute(path: str, naps: Path) -> dict[str, Any]:
    """The notebook from its first cell to its last, and again to its second after a restart of the kernel."""
    notebook = nbformat.read(path, 4)
    # Not TCP: nobody else on the machine should be able to send code.
    client = Client(notebook, timeout=DEADLINE, config=Config({"AsyncKernelManager": {"transport": "ipc"}}))
    client.naps = naps
    assert any(NAP in cell.source for cell in notebook.cells), "the cell to interrupt naps in another way"
    for cell in notebook.cells:
        cell.source = cell.source.replace(NAP, f"    seconds and open(f'{naps}/{{os.getpid()}}', 'x').close()\n{NAP}")
    found: dict[str, Any] = {}
    async with client.async_setup_kernel():
        for number, cell in enumerate(list(notebook.cells)):
            await client.async_execute_cell(cell, number)
        found["cells"] = {
            cell.id: {"text": text_of(cell), "html": html_of(cell)}
            for cell in notebook.cells
            if cell.cell_type == "code"
        }
        found["bars"] = [
            state["value"] for state in client.widget_state.values() if state["_model_name"] == "FloatProgressModel"
        ]
        workers = await who(client)
        await client.km.restart_kernel()
        found["workers"] = len(workers)
        found["gone after the restart"] = gone(workers)
        await client.kc.wait_for_ready(DEADLINE)
        found["bar without widgets"] = await ask(client, f"{HIDE_WIDGETS}\n{BAR}")
        opening = next(cell for cell in notebook.cells if cell.id == "open")
        await ask(client, opening.source)
        workers = await who(client)
        found["workers again"] = len(workers)
        await client.km.shutdown_kernel(now=True)  # SIGKILL: it has no time to say goodbye
        found["gone after the kill"] = gone(workers)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as naps:
        print("FOUND", json.dumps(asyncio.run(execute(str(Path(sys.argv[1]).resolve()), Path(naps)))))
