"""Counts over token sequences: what reports and `tuneloop data stats` show. It changes nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .base import DataReport, TokenSequence
from .cut import Cut


@dataclass(kw_only=True)
class Tally:
    """Counts sequences as they pass through."""

    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    bins: Counter[int] = field(default_factory=Counter)

    def __call__(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        for sequence in sequences:
            length = len(sequence.ids)
            self.sequences += 1
            self.tokens += length
            self.supervised += sum(sequence.supervised)
            self.longest = max(self.longest, length)
            self.bins[upper_bound(length)] += 1
            yield sequence

    def report(self, *, rows: int, cut: Cut, split: int) -> DataReport:
        """With what the cut did, and a sentence for everything that a person might not expect."""
        return DataReport(
            rows=rows,
            sequences=self.sequences,
            tokens=self.tokens,
            supervised_tokens=self.supervised,
            longest=self.longest,
            too_long=cut.too_long,
            truncated=cut.truncated,
            dropped=cut.dropped,
            too_long_places=tuple(cut.places),
            split_conversations=split,
            lengths=dict(sorted(self.bins.items())),
            notices=tuple(_notices(cut, split)),
        )


def upper_bound(length: int) -> int:
    """The bin of a length: up to 64, 128, 256 ... tokens."""
    bound = 64
    while bound < length:
        bound *= 2
    return bound


def _notices(cut: Cut, split: int) -> Iterator[str]:
    limit = cut.recipe.cutoff_len
    if cut.truncated:
        yield f"{cut.truncated} examples were cut to {limit} tokens."
    elif cut.dropped:
        yield f"{cut.dropped} examples are longer than {limit} tokens and were left out."
    if cut.empty:
        yield f"{cut.empty} examples were left out because nothing in them is to be learnt."
    if split:
        yield (
            f"{split} conversations are trained answer by answer, because the chat template shows earlier turns in "
            "another way once later ones follow."
        )
