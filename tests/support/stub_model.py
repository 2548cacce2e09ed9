"""A model without weights whose next token depends on its row's whole KV: wrong KV anywhere gives other tokens.

A token's key is its id and its value the salt of its row's adapter, so a row that reads another adapter's KV, a stale
block or a neighbour's slot says something else than `expected` does.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tuneloop.engines.transformers import residency
from tuneloop.engines.transformers.batch import Batch
from tuneloop.engines.transformers.executor import Executor
from tuneloop.engines.transformers.kv import KVShape, Lane
from tuneloop.engines.transformers.lora import PreparedAdapter
from tuneloop.engines.transformers.model import LoadedModel
from tuneloop.storage.errors import InvalidInput

STUB_VOCAB = 97
BROKEN_TOKEN = 96  # its KV is NaN
BYTES_PER_TOKEN = 8


def salt(digest: str | None) -> int:
    return 0 if digest is None else sum(digest.encode()) % 89 + 1


def _next(keys: Tensor, values: Tensor) -> int:
    at = torch.arange(len(keys), dtype=torch.float64)
    total = (keys.double() * ((at * 31 + 7) % 97) + values.double() * ((at * 17 + 3) % 89)).sum()
    return int(total) % (STUB_VOCAB - 1)


def expected(prompt: Sequence[int], count: int, digest: str | None = None) -> list[int]:
    """The `count` tokens that a row gives by itself."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next(torch.tensor(tokens), torch.full((len(tokens),), salt(digest))))
    return tokens[len(prompt) :]


@dataclass
class StubExecutor(Executor):
    """`slots` says which digest is in which device slot; `steps` remembers (prompt tokens, single tokens) a step."""

    adapters: "residency.AdapterResidency | None" = None
    steps: list[tuple[int, int]] = field(default_factory=list)

    def run(self, batch: Batch) -> Tensor:
        assert self.adapters is not None
        digests = {(r.slot.rank_class, r.slot.index): d for d, r in self.adapters._device.items()}
        owner: dict[int, str | None] = {}
        for start, stop, slot in batch.owners:
            digest = None if slot is None else digests[slot.rank_class, slot.index]
            owner.update(dict.fromkeys(range(start, stop), digest))
        places: list[tuple[Lane, int]] = [(None, 0)] * len(batch.input_ids)  # type: ignore[list-item]
        for span in batch.prefills:
            places[span.start : span.stop] = [(span.slot.lane, span.slot.index)] * (span.stop - span.start)
        for group in batch.decodes:
            for number, index in enumerate(group.slots.tolist()):
                assert index < group.top
                places[group.start + number] = (group.lane, index)
        self.steps.append((sum(s.stop - s.start for s in batch.prefills), sum(g.stop - g.start for g in batch.decodes)))
        for at, (token, position) in enumerate(zip(batch.input_ids.tolist(), batch.positions.tolist(), strict=True)):
            lane, index = places[at]
            broken = float("nan") if token == BROKEN_TOKEN else 0.0
            lane.layers[0].keys[index, 0, position, 0] = token + broken
            lane.layers[0].values[index, 0, position, 0] = salt(owner[at]) + broken
        logits = torch.zeros(len(batch.logits_at), STUB_VOCAB)
        for row, at in enumerate(batch.logits_at.tolist()):
            lane, index = places[at]
            length = int(batch.positions[at]) + 1
            keys, values = lane.layers[0].keys[index, 0], lane.layers[0].values[index, 0]
            if torch.isfinite(keys).all() and torch.isfinite(values).all():  # what is masked takes part as well
                logits[row, _next(keys[:length, 0], values[:length, 0])] = 10.0
            else:
                logits[row] = float("nan")
        return logits


def stub_model(max_model_len: int = 700) -> LoadedModel:
    return LoadedModel(
        executor=StubExecutor(),
        modules={},
        shapes=[KVShape(1, 1, 1)],
        device=torch.device("cpu"),
        dtype=torch.float32,
        vocab_size=STUB_VOCAB,
        max_model_len=max_model_len,
        eos_token_ids=frozenset({2}),
        kernel="stub",
        seconds=0.0,
    )


@dataclass
class Shelf:
    """Stands for the adapters on disk: which are slow (until `release`), which are broken, how large they are."""

    gates: dict[str, threading.Event] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    size: int = 10
    reads: list[str] = field(default_factory=list)

    def slow(self, digest: str) -> threading.Event:
        return self.gates.setdefault(digest, threading.Event())

    def prepare(self, path: Path, digest: str, *_: Any) -> PreparedAdapter:
        self.reads.append(digest)
        if digest in self.gates:
            assert self.gates[digest].wait(30)
        if digest in self.broken:
            raise InvalidInput(f"{digest} is broken.", param="adapter")
        return PreparedAdapter(digest, 8, {}, self.size)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    found = Shelf()
    monkeypatch.setattr(residency, "prepare", found.prepare)
    return found
