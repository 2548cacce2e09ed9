"""Turns rows into the sequences that are trained on, many rows at a time, and counts what became of them."""

from collections.abc import Iterable, Iterator
from itertools import islice

from ...engines.tokenizer import ChatTokenizer
from ..methods import method_for
from ..recipe.recipe import Recipe
from .base import DataReport, Row, TokenSequence
from .checks import DataError
from .cut import Cut
from .render import Renderer
from .stats import Tally

_CHUNK = 256  # rows: enough to encode on all cores, few enough to keep
_MAX_PROBLEMS = 20


class Tokenise:
    """One pass over rows. Rows that the template refuses are left out and collected in `problems`, until `check`."""

    def __init__(self, tokenizer: ChatTokenizer, recipe: Recipe) -> None:
        self.problems: list[DataError] = []
        self._recipe = recipe
        self._method = method_for(recipe.stage)
        self._render = Renderer(tokenizer, recipe)
        self._cut = Cut(recipe=recipe)
        self._tally = Tally()
        self._rows = 0

    def __call__(self, rows: Iterable[Row], *, chunk: int = _CHUNK) -> Iterator[TokenSequence]:
        """The sequences in the rows' order, those that `cutoff` leaves out not among them."""
        rows = iter(rows)
        while held := list(islice(rows, chunk)):
            self._rows += len(held)
            for sequences in self._sequences(held):
                yield from self._tally(self._cut(sequences))
            if len(self.problems) >= _MAX_PROBLEMS:
                return

    def check(self) -> None:
        """Raises the first problem, or InvalidInput if rows are too long and nobody said what to do with them."""
        if self.problems:
            raise self.problems[0]
        self._cut.check()

    def report(self) -> DataReport:
        return self._tally.report(rows=self._rows, cut=self._cut, split=self._render.split_conversations)

    def _sequences(self, rows: list[Row]) -> list[list[TokenSequence]]:
        try:
            for row in rows:
                self._method.check_row(row)
            return self._method.sequences(rows, self._render, self._recipe)
        except DataError as error:
            if len(rows) > 1:
                return [sequences for row in rows for sequences in self._sequences([row])]
            self.problems.append(error)
            return []
