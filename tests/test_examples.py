"""The examples run, without a guard and without a word on stderr, and what they print is so."""

from __future__ import annotations

import re
from difflib import unified_diff
from pathlib import Path

from support import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 120


def run(name: str) -> str:
    """What an example prints."""
    # ResourceWarning: a pool, socket or file left open must not pass unseen.
    options = ("-W", "error::ResourceWarning")
    ran = run_script((EXAMPLES / name).read_text(), SECONDS, args=["2"], options=options).expect_success()
    assert ran.stderr == ""
    return ran.stdout


def accuracies(out: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (\d\.\d+)", out)]


def test_quickstart():
    out = run("quickstart.py")
    assert out.count("images/s") == 3
    assert "both agree with the serial result" in out


def test_stream_into_training():
    out = run("stream_into_training.py")
    assert [line[:10] for line in out.splitlines()[1:5]] == ["prepared f", "DataLoader", "pool.imap,", "pool.imap,"]
    found = accuracies(out)
    assert len(found) == 4
    assert min(found) > 0.8


def test_batch_inference():
    found = accuracies(run("batch_inference.py"))
    assert found[0] == found[1] < found[2]
    assert found[2] > 0.7


def test_hogwild():
    untrained, alone, together = accuracies(run("hogwild.py"))
    assert untrained < 0.3
    assert min(alone, together) > 0.85


def test_an_asyncio_service():
    out = run("asyncio_service.py")
    assert out.startswith("40 requests of 6 clients in ")
    assert "a window that is not there: error: the window at 5000, 0 leaves the photo" in out
    assert "main colours of a window of the first photo: [[" in out


def test_a_swapped_program_gives_the_same():
    before, after = run("swap_before.py").splitlines(), run("swap_after.py").splitlines()
    assert before[::2] == after[::2]
    assert min(accuracies("".join(before))) > 0.95
    texts = [
        (EXAMPLES / f"swap_{name}.py").read_text().partition('"""\n\n')[2].splitlines() for name in ("before", "after")
    ]
    changes = [line for line in unified_diff(*texts, n=0, lineterm="") if line[0] in "+-" and line[1:].strip()]
    assert changes[2:] == ["-from torch.multiprocessing import Pool", "+from tpool import Pool"]
