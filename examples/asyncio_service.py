"""An asyncio service that has a pool do its work: the loop goes on answering while the workers compute.

A client sends ``photo top left`` in a line; the service cuts that window out of one of the two photographs that ship
inside scikit-learn, finds its main colours by k-means in a worker, and answers with them. ``await pool.submit()`` is
all there is to it: a result is awaitable, a window that takes too long is given up (``timeout=``), and an error in a
worker is the answer to that request alone.

    python examples/asyncio_service.py [processes]
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

import torch
from sklearn.datasets import load_sample_images

import tpool

WINDOW = 128  # pixels
COLOURS = 4
REQUESTS = 40
CLIENTS = 6


def prepare() -> None:
    """Load the photographs, once in each worker."""
    torch.set_num_threads(1)
    state = tpool.get_worker_info().state
    state.photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]


def main_colours(photo: int, top: int, left: int) -> list[list[int]]:
    """The colours around which those of a window gather, the commonest first: red, green, blue."""
    photos = tpool.get_worker_info().state.photos
    window = photos[photo][top : top + WINDOW, left : left + WINDOW]
    if window.shape[:2] != (WINDOW, WINDOW):
        raise ValueError(f"the window at {top}, {left} leaves the photo")
    pixels = window.reshape(-1, 3).float()
    centres = pixels[:: len(pixels) // COLOURS][:COLOURS].clone()
    for _ in range(20):
        nearest = torch.cdist(pixels, centres).argmin(1)
        for number in range(COLOURS):
            mine = pixels[nearest == number]
            if len(mine):
                centres[number] = mine.mean(0)
    order = torch.bincount(nearest, minlength=COLOURS).argsort(descending=True)
    return centres[order].int().tolist()


async def serve(pool: tpool.Pool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one client, line by line."""
    while line := await reader.readline():
        try:
            answer = await pool.submit(main_colours, *map(int, line.split()))
        except (TypeError, ValueError) as error:  # of this request; TaskTimeoutError would be another to catch
            answer = f"error: {error}"
        writer.write(f"{answer}\n".encode())
        await writer.drain()
    writer.close()


async def ask(port: int, requests: list[str]) -> list[tuple[float, str]]:
    """A client: asks one thing after the other; gives seconds and answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for request in requests:
        start = time.perf_counter()
        writer.write(f"{request}\n".encode())
        answers.append(((await reader.readline()).decode().strip(), time.perf_counter() - start))
    writer.close()
    await writer.wait_closed()
    return [(seconds, answer) for answer, seconds in answers]


async def measure_lag(lags: list[float]) -> None:
    """How late the loop is with a timer of 5 ms: what everybody else in it feels."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.005)
        lags.append(time.perf_counter() - start - 0.005)


async def main(processes: int) -> None:
    """Serve some clients, and print what they felt."""
    windows = random.Random(0)
    requests = [f"{windows.randrange(2)} {windows.randrange(299)} {windows.randrange(512)}" for _ in range(REQUESTS)]
    with tpool.Pool(processes, prepare, timeout=30) as pool:
        await pool.submit(main_colours, 0, 0, 0)  # the first call pays for starting the workers
        server = await asyncio.start_server(lambda r, w: serve(pool, r, w), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        lags: list[float] = []
        watch = asyncio.create_task(measure_lag(lags))
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(port, requests[number::CLIENTS]) for number in range(CLIENTS)))
        seconds = time.perf_counter() - start
        watch.cancel()
        felt = sorted(waited for part in answers for waited, _ in part)
        print(f"{len(felt)} requests of {CLIENTS} clients in {seconds:.2f} s, {processes} workers")
        print(f"a request: {1e3 * felt[len(felt) // 2]:.1f} ms in the middle, {1e3 * felt[-1]:.1f} ms at most")
        print(f"the loop was {1e3 * max(lags):.1f} ms late at most")
        ((_, colours), (_, refused)) = await ask(port, ["0 100 200", "0 5000 0"])
        print(f"main colours of a window of the first photo: {colours}")
        print(f"a window that is not there: {refused}")
        server.close()
        await server.wait_closed()


asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2))
