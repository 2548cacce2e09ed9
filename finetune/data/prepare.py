"""The first phase of a run: reads, checks and tokenises its data. It imports no torch and knows no model.

    data/train, data/eval   token stores, each complete or absent
    data/prepared.json      what `auto` became, and the reports; written last

Tokenised data are kept by their content for later runs, where the spec names a cache.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...engines.tokenizer import ChatTokenizer
from ...storage.durable import write_atomic
from ...storage.errors import InvalidInput
from ..events import EventWriter, read_events
from ..recipe.recipe import Recipe
from ..recipe.resolve import resolve, total_steps
from ..run_folder import RunFolder, RunSpec
from .base import TokenSequence
from .checks import DataError
from .read import check_rows, content_digest, has_rows, read_rows
from .sources import Split
from .token_store import TokenStore
from .tokenise import Tokenise

_PREPARED = "prepared.json"
_VERSION = 3  # of how rows become sequences: tokenised data of another version are made anew
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_RENDER_KEYS = (
    "stage", "trust_remote_code", "cutoff_len", "cutoff", "train_on_prompt", "mask_history", "default_system",
    "enable_thinking",
)  # fmt: skip


class Prepared(BaseModel):
    """What the second phase goes by. `report` and `eval_report` are DataReports; `digest` is the training data's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe  # nothing is `auto` any more that the data decide
    report: dict[str, Any]
    eval_report: dict[str, Any] | None = None
    digest: str
    total_steps: int


def load_prepared(run: RunFolder) -> Prepared:
    """Raises InvalidInput if the first phase has not ended."""
    path = run.data / _PREPARED
    try:
        return Prepared.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InvalidInput(f"{path} is missing: the data of this run are not prepared; run that phase first.") from None


def prepare(run: RunFolder, events: EventWriter) -> Prepared:
    """Make the run's token stores and say what was found. A phase that was killed is completed by the next call.

    Raises DataError naming the first bad row (the others are messages in the log), InvalidInput for data that are too
    long or none.
    """
    spec = run.spec()
    if (run.data / _PREPARED).is_file():
        prepared = load_prepared(run)
    else:
        prepared = _prepare(run, spec, events)
        run.data.mkdir(parents=True, exist_ok=True)
        write_atomic(run.data / _PREPARED, prepared.model_dump_json(indent=1))
    if not any(event.kind == "prepared" for event in read_events(run.events)):
        _say(prepared, spec, events)
    return prepared


def _prepare(run: RunFolder, spec: RunSpec, events: EventWriter) -> Prepared:
    validates = has_rows(spec, "eval")
    splits: tuple[Split, ...] = ("train", "eval") if validates else ("train",)
    for split in splits:
        _check(spec, split, events)
    tokenizer = ChatTokenizer.load(spec.model_path, trust_remote_code=spec.recipe.trust_remote_code)
    evaluation = _store(run, spec, tokenizer, "eval", events) if validates else None
    eval_report = None if evaluation is None else dict(evaluation.notes)
    if spec.recipe.streaming:
        recipe = resolve(
            spec.recipe, spec.auto, sequences=spec.recipe.buffer_size, tokens=0,
            learning_rate_multiplier=spec.learning_rate_multiplier,
        )  # fmt: skip
        assert recipe.max_steps is not None, "checks.py demands it of streaming recipes"
        digest = content_digest(spec, "train")
        return Prepared(recipe=recipe, report={}, eval_report=eval_report, digest=digest, total_steps=recipe.max_steps)
    store = _store(run, spec, tokenizer, "train", events)
    if len(store) == 0:
        raise InvalidInput(
            "No example is left to learn from: every row is too long, or has nothing that is to be learnt.",
            param="training_file" if spec.train_files else "dataset",
        )
    recipe = resolve(
        spec.recipe,
        spec.auto,
        sequences=len(store),
        tokens=int(store.lengths.sum()),
        learning_rate_multiplier=spec.learning_rate_multiplier,
    )
    return Prepared(
        recipe=recipe,
        report=dict(store.notes),
        eval_report=eval_report,
        digest=store.digest,
        total_steps=total_steps(recipe, store.lengths),
    )


def _check(spec: RunSpec, split: Split, events: EventWriter) -> None:
    problems: list[DataError] = check_rows(spec, split)
    _tell(problems, events)
    if problems:
        raise problems[0]


def _tell(problems: list[DataError], events: EventWriter) -> None:
    """All problems but the first, which the run fails with."""
    for problem in problems[1:]:
        events.write("message", problem.message, level="error", line=problem.place.line)


def _store(run: RunFolder, spec: RunSpec, tokenizer: ChatTokenizer, split: Split, events: EventWriter) -> TokenStore:
    place = run.data / split
    if place.is_dir():
        return TokenStore.open(place)
    if spec.cache is None:
        return _write(place, spec, tokenizer, split, events)
    kept = spec.cache / _key(spec, split, tokenizer)
    store = TokenStore.open(kept) if kept.is_dir() else _write(kept, spec, tokenizer, split, events)
    return store.link_to(place)


def _write(place: Path, spec: RunSpec, tokenizer: ChatTokenizer, split: Split, events: EventWriter) -> TokenStore:
    tokenise = Tokenise(tokenizer, spec.recipe)

    def sequences() -> Iterator[TokenSequence]:
        yield from tokenise(read_rows(spec, split))
        _tell(tokenise.problems, events)
        tokenise.check()

    return TokenStore.write(place, sequences(), notes=lambda: asdict(tokenise.report()))


def _key(spec: RunSpec, split: Split, tokenizer: ChatTokenizer) -> str:
    """The same data, tokenizer and keys give the same sequences; templates that write the date, for a day."""
    digest = hashlib.sha256()
    templates = sorted((spec.model_path / "additional_chat_templates").glob("*.jinja"))
    for path in (*(spec.model_path / name for name in _TOKENIZER_FILES), *templates):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"-")
    dated = tokenizer.has_chat_template and "strftime_now" in tokenizer.chat_template()
    today = str(datetime.now().astimezone().date()) if dated else ""
    keys = {key: getattr(spec.recipe, key) for key in _RENDER_KEYS}
    digest.update(json.dumps([_VERSION, content_digest(spec, split), keys, today], sort_keys=True).encode())
    return digest.hexdigest()


def _say(prepared: Prepared, spec: RunSpec, events: EventWriter) -> None:
    report = prepared.report
    for notice in [*report.get("notices", ()), *(prepared.eval_report or {}).get("notices", ())]:
        events.write("message", notice, level="warn")
    chosen = {*spec.auto, *(("gradient_accumulation_steps",) if "per_device_train_batch_size" in spec.auto else ())}
    counts = ("rows", "sequences", "tokens", "supervised_tokens", "longest", "too_long", "dropped", "truncated")
    data: dict[str, Any] = {name: report[name] for name in counts if name in report}
    events.write(
        "prepared",
        "The data are read, checked and tokenised.",
        **data,
        eval_rows=(prepared.eval_report or {}).get("rows", 0),
        digest=prepared.digest,
        total_steps=prepared.total_steps,
        hyperparameters={key: getattr(prepared.recipe, key) for key in sorted(chosen)},
    )
