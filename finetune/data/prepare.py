"""The first phase of a run: reads, checks and tokenises its data. It imports no torch and knows no model.

data/train, data/eval   token stores, each complete or absent
data/prepared.json      what `auto` became, and the reports; written last
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

from ...storage.errors import InvalidInput
from ..recipe.recipe import Recipe
from ..run_folder import RunFolder

_PREPARED = "prepared.json"


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
