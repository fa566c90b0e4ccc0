"""Tensors and other objects as bytes, handles and shared memory; knows nothing of pools or processes."""
