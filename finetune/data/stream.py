"""Sequences read as they are needed, for data that are too large to tokenise beforehand (`streaming: true`)."""

from collections.abc import Iterator

import numpy as np

from ...engines.tokenizer import ChatTokenizer
from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from ..run_folder import RunSpec
from .base import TokenSequence
from .read import read_rows
from .tokenise import Tokenise

_CHUNK = 32  # rows: a stream begins soon


def stream_sequences(spec: RunSpec, recipe: Recipe) -> Iterator[TokenSequence]:
    """Endless: pass after pass, shuffled within `buffer_size` rows. The same seed gives the same order.

    Raises DataError at a bad row, InvalidInput at one that is too long with `cutoff: refuse`, or if no row is fit.
    """
    tokenizer = ChatTokenizer.load(spec.model_path, trust_remote_code=recipe.trust_remote_code)
    seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
    epoch = 0
    while True:
        found = False
        for sequence in _shuffled(_once(spec, recipe, tokenizer), recipe.buffer_size, seed, epoch):
            found = True
            yield sequence
        if not found:
            raise InvalidInput("The data hold no example to learn from.", param="dataset")
        epoch += 1


def _once(spec: RunSpec, recipe: Recipe, tokenizer: ChatTokenizer) -> Iterator[TokenSequence]:
    tokenise = Tokenise(tokenizer, recipe)
    for sequence in tokenise(read_rows(spec, "train"), chunk=_CHUNK):
        tokenise.check()
        yield sequence
    tokenise.check()


def _shuffled(sequences: Iterator[TokenSequence], size: int, seed: int, epoch: int) -> Iterator[TokenSequence]:
    random = np.random.default_rng([seed, epoch])
    held: list[TokenSequence] = []
    for sequence in sequences:
        if len(held) < size:
            held.append(sequence)
            continue
        place = int(random.integers(len(held)))
        yield held[place]
        held[place] = sequence
    for place in random.permutation(len(held)):
        yield held[int(place)]
