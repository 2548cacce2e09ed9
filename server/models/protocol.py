"""Wire types of the models endpoints: OpenAI's model object with vLLM's `root`, `parent` and `max_model_len`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelStatusCard(BaseModel):
    """How a base model is doing. Sizes in bytes, `last_used` in seconds since the epoch."""

    state: str
    reason: str | None
    pinned: bool
    in_flight: int
    last_used: float | None
    running: int = 0
    waiting: int = 0
    resident_memory_bytes: int = 0
    device: str | None = None
    dtype: str | None = None
    kernel: str | None = None
    load_seconds: float | None = None
    pid: int | None = None


class ModelCard(BaseModel):
    """A base model (`parent` is null) or an adapter (`parent` is its base). `root` is where its weights came from."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tuneloop"
    root: str
    parent: str | None = None
    max_model_len: int | None = None
    status: ModelStatusCard | None = None  # base models only


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    model: str = Field(min_length=1)


class LoadRequest(_Request):
    """`source` makes a new model known under the name `model`; without it the name must be known already."""

    source: str | None = None
    pinned: bool | None = None


class UnloadRequest(_Request):
    pass


class PinRequest(_Request):
    pinned: bool = True
