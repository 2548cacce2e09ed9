"""Decides what becomes of sequences that are longer than the recipe allows. Nothing is cut in silence."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from .base import TokenSequence

_NAMED = 10


@dataclass(kw_only=True)
class Cut:
    """Applies `cutoff_len` and `cutoff`, and counts what it did."""

    recipe: Recipe
    too_long: int = 0
    truncated: int = 0
    dropped: int = 0
    empty: int = 0  # left without anything to learn
    longest_seen: int = 0
    places: list[str] = field(default_factory=list)

    def __call__(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """The sequences to train on. With `cutoff: refuse` the too long ones are left out until `check` is asked."""
        limit = self.recipe.cutoff_len
        for sequence in sequences:
            length = len(sequence.ids)
            self.longest_seen = max(self.longest_seen, length)
            kept = sequence
            if length > limit:
                self.too_long += 1
                if len(self.places) < _NAMED:
                    self.places.append(f"{sequence.place} ({length} tokens)")
                if self.recipe.cutoff != "truncate":
                    self.dropped += 1
                    continue
                self.truncated += 1
                kept = TokenSequence(
                    ids=sequence.ids[:limit], supervised=sequence.supervised[:limit], place=sequence.place
                )
            if not any(kept.supervised):
                self.empty += 1
                continue
            yield kept

    def check(self) -> None:
        """Raises InvalidInput if there were too long sequences and nobody has said what to do with them."""
        if not self.too_long or self.recipe.cutoff != "refuse":
            return
        more = f" and {self.too_long - len(self.places)} more" if self.too_long > len(self.places) else ""
        counted = "1 example is" if self.too_long == 1 else f"{self.too_long} examples are"
        raise InvalidInput(
            f"{counted} longer than cutoff_len, which is {self.recipe.cutoff_len} tokens: "
            f"{'; '.join(self.places)}{more}. Set cutoff: drop to leave them out, cutoff: truncate to keep their "
            f"beginning, or cutoff_len to at least {self.longest_seen}.",
            param="cutoff_len",
            code="example_too_long",
        )
