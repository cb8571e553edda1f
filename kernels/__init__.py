"""Backends, one module each, found by name by `esm_fast.ops.registry`. Imported as `esm_fast.kernels`.

With the repository root on sys.path this also answers to `import kernels`, the name of a PyPI package that transformers
looks for. Importing it must work and it must have no __version__: then transformers does without that package.
"""
