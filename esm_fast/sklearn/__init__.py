"""For scikit-learn: embeddings as a transformer, and the layer that suits a task.

Needs scikit-learn: pip install 'esm_fast[sklearn]'.
"""

try:
    import sklearn  # noqa: F401
except ImportError:
    raise ImportError("esm_fast.sklearn needs scikit-learn: pip install 'esm_fast[sklearn]'") from None

from .best_layer import BestLayer, best_layer
from .embedder import EsmEmbedder

__all__ = ["BestLayer", "EsmEmbedder", "best_layer"]
