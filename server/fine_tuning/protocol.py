"""The request bodies of the fine-tuning endpoints: OpenAI's fields, and `tuning` for ours. Wire types only."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ...storage.errors import InvalidInput
from ..generation.fields import Int
from .wire import AutoFloat, AutoInt, Wire

MAX_SEED = 2**32 - 1  # numpy's
MAX_PRIORITY = 1000
MAX_PROJECTS = 100
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
TrackerType = Literal["wandb", "tensorboard", "mlflow", "swanlab"]


class Hyperparameters(Wire):
    """OpenAI's three; everything else is in `tuning`."""

    inside = "hyperparameters"

    batch_size: AutoInt = None
    learning_rate_multiplier: AutoFloat = None
    n_epochs: AutoInt = None


class SupervisedHyperparameters(Hyperparameters):
    inside = "method.supervised.hyperparameters"


class Supervised(Wire):
    inside = "method.supervised"

    hyperparameters: SupervisedHyperparameters | None = None


class Method(Wire):
    """`type` decides; the settings of other types beside it are refused. Which types there are: `methods.py`."""

    inside = "method"

    type: str = Field(min_length=1)
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Tracker(Wire):
    """Where a tracker files the run: a W&B project, an MLflow experiment, a SwanLab project."""

    inside = "integrations.settings"

    project: Text | None = None
    entity: Text | None = None
    name: Text | None = None
    tags: Annotated[list[Text], Field(max_length=64)] | None = None


class Integration(Wire):
    """A tracker by `type`, its settings under its own name. OpenAI knows `wandb`; the others are ours."""

    inside = "integrations"

    type: TrackerType
    wandb: Tracker | None = None
    tensorboard: Tracker | None = None
    mlflow: Tracker | None = None
    swanlab: Tracker | None = None

    @model_validator(mode="after")
    def _settings_belong_to_type(self) -> Self:
        for name in ("wandb", "tensorboard", "mlflow", "swanlab"):
            if name != self.type and getattr(self, name) is not None:
                raise InvalidInput(
                    f"The integration of type '{self.type}' has settings for '{name}'; give each tracker an "
                    "integration of its own.",
                    param=f"integrations.{name}",
                )
        return self


class CreateJobRequest(Wire):
    """POST /v1/fine_tuning/jobs. The keys of `tuning` are those of recipes (docs/recipe.md), and `priority`."""

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = Field(default=None, min_length=1)
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: str | None = None
    seed: Annotated[Int, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    tuning: dict[str, Any] | None = None

    @field_validator("suffix")
    @classmethod
    def _suffix_fits_names(cls, value: str | None) -> str | None:
        if value is not None and (not _SUFFIX.fullmatch(value) or ".." in value):
            raise ValueError("it must be 1 to 64 letters, digits, '.', '_' and '-', without '..'")
        return value

    @field_validator("integrations")
    @classmethod
    def _each_tracker_once(cls, value: list[Integration] | None) -> list[Integration] | None:
        types = [integration.type for integration in value or ()]
        if len(types) != len(set(types)):
            raise ValueError("it names a tracker twice; give each one once")
        return value


class GrantRequest(Wire):
    """POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions."""

    project_ids: Annotated[list[Text], Field(min_length=1, max_length=MAX_PROJECTS)]
