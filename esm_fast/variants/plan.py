"""Which rows of which contexts a job needs: each context once, whoever asks for it; then the job on a model."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..alphabet import CLS, EOS, MASK, TOKENS
from .compute import log_probs_of
from .windows import Rule, Span, View, Whole

_INDEX = {token: index for index, token in enumerate(TOKENS)}
_NONE = 255  # no token


class Protein:
    """A protein, or a variant of one, as the model gets it."""

    def __init__(self, text: str, rule: Rule):
        self.text, self.rule = text, rule
        self.ids = np.array([CLS, *(_INDEX[residue] for residue in text), EOS], dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.text)

    def context(self, span: Span, masks: tuple[int, ...] = ()) -> bytes:
        """The tokens of a span, with the residues of these indices masked."""
        ids = self.ids[span.start : span.end].copy()
        for at in masks:
            if span.start <= at + 1 < span.end:
                ids[at + 1 - span.start] = MASK
        data = ids.tobytes()
        return bytes([CLS]) + data + bytes([EOS]) if span.wrapped else data


class Plan:
    """Collects what is wanted; `run` computes it. Sinks keep their order, so nothing depends on that of the batches."""

    def __init__(self):
        self._numbers: dict[bytes, int] = {}
        self._last: tuple = ()  # the context that was asked for last, and its number
        self.sinks: list[Sums | Rows] = []
        self.tokens = 0  # what the model has to compute

    def context(self, protein: Protein, span: Span, masks: tuple[int, ...]) -> int:
        """The number of a context; the same for the same tokens."""
        key = (protein, span, masks)
        if self._last[:1] != (key,):
            data = protein.context(span, masks)
            if data not in self._numbers:
                self._numbers[data] = len(self._numbers)
                self.tokens += len(data)
            self._last = key, self._numbers[data]
        return self._last[1]

    def sums(self, count: int) -> "Sums":
        """A new sink for `count` sums."""
        self.sinks.append(Sums(self, count))
        return self.sinks[-1]

    def rows(self, count: int) -> "Rows":
        """A new sink for `count` rows."""
        self.sinks.append(Rows(self, count))
        return self.sinks[-1]

    def run(
        self,
        model,
        batch_tokens: int,
        on_batch: Callable[[int], None] = lambda tokens: None,
        known: "Known | None" = None,
    ) -> list[np.ndarray]:
        """The result of each sink, on this model. known: what earlier plans computed on it; this one adds to it."""
        contexts = list(self._numbers)
        routes = [_Route(sink, len(contexts)) for sink in self.sinks]
        for number, rows, log_probs in _log_probs(model, contexts, _Wanted(routes), batch_tokens, on_batch, known):
            for route in routes:
                route.take(number, rows, log_probs)
        return [route.result() for route in routes]


def _log_probs(
    model, contexts: list[bytes], wanted: "_Wanted", batch_tokens: int, on_batch: Callable, known: "Known | None"
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of a context, the rows wanted of it, their log-probabilities), computed where they are not known."""
    left = list(range(len(contexts)))
    if known is not None and len(known):
        left = []
        for number, context in enumerate(contexts):
            if (found := known.get(context, rows := wanted[number])) is None:
                left.append(number)
            else:
                yield number, rows, found
    computed = log_probs_of(model, _Some(contexts, left), _Some(wanted, left), batch_tokens, on_batch)
    for place, log_probs in computed:
        number = left[place]
        rows = wanted[number]
        if known is not None:
            known.put(contexts[number], rows, log_probs)
        yield number, rows, log_probs


class Known:
    """What a model gave for contexts that were computed lately, for plans that want them again: bounded in rows.

    A row does not depend on the batch it was computed in, so it is the same whether it is computed again or taken.
    """

    ROWS = 1 << 17  # of 33 numbers: 35 MB

    def __init__(self):
        self._found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # the oldest first
        self._rows = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(self, context: bytes, rows: np.ndarray) -> np.ndarray | None:
        """The log-probabilities at these rows, ascending, where all of them are known."""
        have, values = self._found.get(_digest(context), (rows[:0], None))
        place = np.searchsorted(have, rows)
        if place[-1] >= len(have) or (have[place] != rows).any():
            return None
        return values[place]

    def put(self, context: bytes, rows: np.ndarray, log_probs: np.ndarray) -> None:
        key = _digest(context)
        self._drop(key)
        self._found[key] = rows, log_probs.copy()  # not a part of its batch, which would stay with it
        self._rows += len(rows)
        while self._rows > self.ROWS and len(self._found) > 1:
            self._drop(next(iter(self._found)))

    def _drop(self, key: bytes) -> None:
        rows, _ = self._found.pop(key, ((), None))
        self._rows -= len(rows)


def _digest(context: bytes) -> bytes:
    return hashlib.blake2b(context, digest_size=16).digest()


class _Some(Sequence):
    """Those of a sequence with these numbers."""

    def __init__(self, whole: Sequence, numbers: list[int]):
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int):
        return self._whole[self._numbers[place]]


class _Sink:
    """Requests for one row of a context each, in order."""

    def __init__(self, plan: Plan, count: int):
        self.plan, self.count = plan, count
        self.item, self.number, self.row, self.weight = array("q"), array("q"), array("q"), array("d")

    def __len__(self) -> int:
        return len(self.item)

    def _request(self, item: int, protein: Protein, masks: tuple[int, ...], view: View, weight: float) -> None:
        self.item.append(item)
        self.number.append(self.plan.context(protein, view.span, masks))
        self.row.append(view.row)
        self.weight.append(weight * view.weight)


class Sums(_Sink):
    """Per item, the sum of weight * (log p(plus) - log p(minus)) over its terms."""

    def __init__(self, plan: Plan, count: int):
        super().__init__(plan, count)
        self.plus, self.minus = array("B"), array("B")

    def add(
        self,
        item: int,
        protein: Protein,
        masks: tuple[int, ...],
        at: int,
        plus: str,
        minus: str = "",
        weight: float = 1.0,
    ) -> None:
        """The term of residue `at`: log p(plus) - log p(minus), or log p(plus) alone, over the views of the residue."""
        for view in protein.rule(at):
            self._request(item, protein, masks, view, weight)
            self.plus.append(_INDEX[plus])
            self.minus.append(_INDEX[minus] if minus else _NONE)

    def empty(self) -> np.ndarray:
        return np.zeros(len(self))

    def fill(self, values: np.ndarray, which: np.ndarray, log_probs: np.ndarray) -> None:
        plus, minus = _numbers(self.plus)[which], _numbers(self.minus)[which]
        rows = np.arange(len(which))
        subtracted = np.where(minus == _NONE, 0.0, log_probs[rows, np.where(minus == _NONE, 0, minus)])
        values[which] = log_probs[rows, plus] - subtracted

    def reduce(self, values: np.ndarray) -> np.ndarray:
        """(count,)"""
        weighted = values * _numbers(self.weight)
        return np.bincount(_numbers(self.item), weighted, self.count)  # adds in the order of the terms


class Rows(_Sink):
    """Per item, the weighted mean of the log-probabilities of its views."""

    def add(self, item: int, protein: Protein, masks: tuple[int, ...], at: int) -> None:
        for view in protein.rule(at):
            self._request(item, protein, masks, view, 1.0)

    def add_all(self, first: int, protein: Protein, masks: tuple[int, ...]) -> None:
        """All residues of a protein, under the same masks, as the items from `first` on."""
        residues = len(protein)
        if not isinstance(protein.rule, Whole):
            for at in range(residues):
                self.add(first + at, protein, masks, at)
            return
        number = self.plan.context(protein, protein.rule.span, masks)
        self.item.extend(range(first, first + residues))
        self.number.extend([number] * residues)
        self.row.extend(range(1, residues + 1))
        self.weight.extend([1.0] * residues)

    def empty(self) -> np.ndarray:
        return np.zeros((len(self), len(TOKENS)))

    def fill(self, values: np.ndarray, which: np.ndarray, log_probs: np.ndarray) -> None:
        values[which] = log_probs

    def reduce(self, values: np.ndarray) -> np.ndarray:
        """(count, 33)"""
        result = np.zeros((self.count, len(TOKENS)))
        np.add.at(result, _numbers(self.item), values * _numbers(self.weight)[:, None])
        return result


def _numbers(values: array) -> np.ndarray:
    return np.array(values, dtype=values.typecode)


class _Route:
    """A sink's requests, found by context, and their values on one model."""

    def __init__(self, sink: Sums | Rows, contexts: int):
        self.sink, self.values = sink, sink.empty()
        number, self.rows = _numbers(sink.number), _numbers(sink.row)
        self.order = np.argsort(number, kind="stable")
        self.ends = np.searchsorted(number, np.arange(contexts + 1), sorter=self.order)

    def of(self, number: int) -> np.ndarray:
        """The requests for rows of a context."""
        return self.order[self.ends[number] : self.ends[number + 1]]

    def take(self, number: int, rows: np.ndarray, log_probs: np.ndarray) -> None:
        """rows: ascending, what log_probs are of."""
        if len(which := self.of(number)):
            self.sink.fill(self.values, which, log_probs[np.searchsorted(rows, self.rows[which])])

    def result(self) -> np.ndarray:
        return self.sink.reduce(self.values)


class _Wanted(Sequence):
    """Per context the rows that any sink wants, ascending."""

    def __init__(self, routes: list[_Route]):
        self._routes = routes

    def __len__(self) -> int:
        return len(self._routes[0].ends) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return np.unique(np.concatenate([route.rows[route.of(number)] for route in self._routes]))
