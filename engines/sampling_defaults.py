"""The sampling settings that a checkpoint recommends in `generation_config.json`. It knows nothing of requests."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..storage.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Values for request fields that were left out; None where the checkpoint says nothing.

    These are the fields that vLLM takes from the file too; a checkpoint's `max_new_tokens` is left alone, because the
    default here is the rest of the context.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Parse the checkpoint's file, if it has one. Blocking. Raises InvalidInput for a file that is not valid JSON."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not valid JSON ({error}); fetch the checkpoint again.") from error
    return SamplingDefaults(
        temperature=config.get("temperature"),
        top_p=config.get("top_p"),
        top_k=config.get("top_k"),
        min_p=config.get("min_p"),
        repetition_penalty=config.get("repetition_penalty"),
    )
