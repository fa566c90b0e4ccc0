"""The same pool on a cluster: workers are actors of Ray. Importing this does not import Ray."""

from tpool.ray.spec import RayEngine

__all__ = ["RayEngine"]
