"""The pools that are compared, as one table: name on the command line ─► how to make its adapter.

An adapter's module imports its library when the adapter is made, so a library that is not there is a reason to skip
one pool and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.peers import executors, loader, others, pools
from benchmarks.peers.base import Peer

PEERS: dict[str, Callable[[], Peer]] = {
    "tpool": pools.Tpool,
    "tpool-copy": pools.TpoolCopy,
    "tpool-ray": pools.TpoolRay,
    "torch": pools.TorchFileDescriptor,
    "torch-fs": pools.TorchFileSystem,
    "multiprocessing": pools.Multiprocessing,
    "futures": executors.Futures,
    "loky": executors.Loky,
    "joblib": others.Joblib,
    "mpire": others.Mpire,
    "pebble": executors.Pebble,
    "billiard": pools.Billiard,
    "ray": pools.Ray,
    "dataloader": loader.Loader,
}
