"""tpool: the process pool for PyTorch.

The whole ``multiprocessing.Pool`` API; tensors travel by handle through warm shared memory, and nothing hangs when a
worker dies.

>>> import tpool
>>> with tpool.Pool(2) as pool:
...     pool.map(abs, [-1, -2, 3])
[1, 2, 3]
"""

from tpool.errors import (
    DecodeError,
    MaybeEncodingError,
    PlatformError,
    PoolEndedError,
    PoolTerminatedError,
    ProtocolError,
    RemoteTraceback,
    SharedMemoryExhausted,
    TaskCancelledError,
    TaskTimeoutError,
    TpoolError,
    TransportError,
    UnsupportedTensorError,
    WorkerLostError,
    WorkerStartError,
)
from tpool.executor import PoolExecutor
from tpool.futures import AsyncResult
from tpool.local.identity import WorkerInfo, get_worker_info
from tpool.map_result import MapResult
from tpool.pool import Pool
from tpool.progress import Progress
from tpool.ray.spec import RayEngine
from tpool.stats import PoolStats, WorkerStats
from tpool.streams import IMapIterator
from tpool.tensors.held import Reference
from tpool.timeline.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "AsyncResult",
    "DecodeError",
    "IMapIterator",
    "MapResult",
    "MaybeEncodingError",
    "PlatformError",
    "Pool",
    "PoolEndedError",
    "PoolExecutor",
    "PoolStats",
    "PoolTerminatedError",
    "Progress",
    "ProtocolError",
    "RayEngine",
    "Reference",
    "RemoteTraceback",
    "SharedMemoryExhausted",
    "TaskCancelledError",
    "TaskTimeoutError",
    "Timeline",
    "TpoolError",
    "TransportError",
    "UnsupportedTensorError",
    "WorkerInfo",
    "WorkerLostError",
    "WorkerStartError",
    "WorkerStats",
    "get_worker_info",
]
