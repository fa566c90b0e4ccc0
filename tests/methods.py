"""The start methods, as tests are run under them."""

from __future__ import annotations

import pytest

__all__ = ["METHODS", "SELDOM_SPAWN", "seldom_spawned"]

METHODS = ["forkserver", "fork", "spawn"]

# Workers that are spawned take seconds to start and then run the same code: once started, seldom is enough.
SELDOM_SPAWN = ["forkserver", "fork", pytest.param("spawn", marks=pytest.mark.slow)]
seldom_spawned = pytest.mark.parametrize("method", SELDOM_SPAWN)
