"""transformers' EsmTokenizer with ESM-1b's vocabulary built in; see `hf`."""

import tempfile
from pathlib import Path

import transformers

from .. import hub
from ..alphabet import TOKENS

_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "token", "revision", "trust_remote_code"}


class EsmTokenizer(transformers.EsmTokenizer):
    """transformers' EsmTokenizer with ESM-1b's vocabulary built in: it needs no file and no network."""

    def __init__(self, vocab_file=None, **kwargs):
        if vocab_file is not None:
            super().__init__(vocab_file, **kwargs)
            return
        with tempfile.TemporaryDirectory() as folder:  # transformers reads it here and never again
            vocab_file = Path(folder) / "vocab.txt"
            vocab_file.write_text("\n".join(TOKENS))
            super().__init__(str(vocab_file), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers' method; for a published name of ESM-1b or ESM-1v, a checkpoint file, or a folder without
        vocabulary, the built-in one."""
        path = Path(pretrained_model_name_or_path).expanduser()
        built_in = path.is_file() and path.suffix != ".txt" or path.is_dir() and not (path / "vocab.txt").exists()
        if built_in or (not path.exists() and hub.is_published(pretrained_model_name_or_path)):
            options = {name: value for name, value in kwargs.items() if name not in _HUB_OPTIONS}
            return cls(*args, name_or_path=str(pretrained_model_name_or_path), **options)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
