"""What a run reads: a store, or several that share each step's tokens."""

import math
from collections.abc import Sequence

import numpy as np

from ..files.checksums import digest_of
from .batches import Steps
from .masking import Masker
from .order import Permuted
from .random import SOURCE, streams
from .recipe import Recipe, RecipeError
from .store import Store

# How an epoch's order is found, which a run keeps: small ones are sorted, as all were once (see `order`).
SORTED, COMPUTED = "sorted", "computed"
MANY = 4_000_000


class Source:
    """A store, its records step by step, and how they are masked. Each has epochs of its own.

    share: of the tokens of each step, and of each validation. number: 0 for the first; each has random numbers of its
    own.
    """

    def __init__(self, recipe: Recipe, store: Store, share: float = 1.0, number: int = 0):
        self.recipe, self.store, self.share = recipe, store, share
        self.seed = int(streams(recipe.seed, SOURCE, 0, [number])[0] >> np.uint64(1)) if number else recipe.seed
        limit = recipe.model.window_residues
        self.masker = Masker(store, recipe.masking, self.seed, limit)
        self.valid_masker = Masker(store, recipe.masking.for_validation(), self.seed, limit)
        if not store.info["counts"]["train"]:
            raise ValueError(f"{store.path} holds no records for training")
        if recipe.sampling == "clusters" and store.clusters is None:
            raise RecipeError(f"sampling is 'clusters', and {store.path} was prepared without --clusters")
        self.order = COMPUTED if recipe.sampling == "clusters" or len(store) > MANY else SORTED
        self.steps = self._steps()
        self.valid_records = self._valid_records()

    def keep_order(self, order: str) -> None:
        """Takes the kind of order that a run began with."""
        if order != self.order and self.recipe.sampling != "clusters":
            self.order = order
            self.steps = self._steps()

    def _steps(self) -> Steps | Permuted:
        recipe, store, tokens = self.recipe, self.store, max(1, round(self.recipe.step_tokens * self.share))
        if self.order == COMPUTED:
            by_cluster = recipe.sampling == "clusters"
            return Permuted(store, self.seed, tokens, self.masker.max_residues, by_cluster)
        records = store.records(valid=False)
        return Steps(records, self.masker.lengths(records), self.seed, tokens)

    def _valid_records(self) -> np.ndarray:
        """As many of the held-out records, always the same, as the recipe's number of tokens takes."""
        records = self.store.records(valid=True)
        limit = self.recipe.valid_tokens and max(1, round(self.recipe.valid_tokens * self.share))  # 0: all
        if limit and len(records):
            records = Steps(records, self.masker.lengths(records), self.seed, limit).of(0)
        return records


def sources_of(recipe: Recipe, stores: Store | Sequence[tuple[Store, float]]) -> list[Source]:
    """stores: one, or several with weights, numbers above 0. Raises ValueError, RecipeError."""
    stores = [(stores, 1.0)] if isinstance(stores, Store) else stores
    total = sum(weight for _, weight in stores)
    return [Source(recipe, store, weight / total, number) for number, (store, weight) in enumerate(stores)]


def require_filled(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raises RecipeError, before anything is trained, where a step of the run would have no sequence of any store."""
    if any(source.steps.least for source in sources):
        return
    for step in range(recipe.steps):
        if not any(len(source.steps.of(step)) for source in sources):
            most = max(sources, key=lambda source: source.share)
            # That many give each step one, whatever the order: an epoch is cut into equal steps, of half of it at
            # least, and no sequence is longer than a window.
            enough = math.ceil(2 * (most.masker.max_residues + 2) / most.share)
            raise RecipeError(
                f"step_tokens is {recipe.step_tokens:,}, and step {step + 1} has no sequence; "
                f"give a whole number from {enough:,}"
            )


def identity_of(sources: Sequence[Source]) -> str:
    """A checksum of everything that is read, and of what share each store has."""
    if len(sources) == 1:
        return sources[0].store.identity
    return digest_of([[source.store.identity, source.share] for source in sources])
