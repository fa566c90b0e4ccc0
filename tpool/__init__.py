"""tpool: the process pool for PyTorch."""
