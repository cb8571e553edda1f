"""Backends, one module each, found by name by `esm_fast.ops.registry`. Imported as `esm_fast.kernels`."""

if __name__ == "kernels":  # the repository root on sys.path would shadow the PyPI package of that name
    raise ImportError("these are esm_fast's kernels: import esm_fast.kernels (and run pytest, not python -m pytest)")
