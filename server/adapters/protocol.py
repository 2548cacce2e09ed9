"""Wire types of the adapter endpoints, and how the store's types become them. Times are seconds since the epoch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...adapters.base import Adapter, AdapterVersion, Alias


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)


class CreateRequest(_Request):
    """POST /v1/adapters with JSON. Without `base` it is taken from the adapter's own configuration where that fits."""

    name: str = Field(min_length=1)
    base: str | None = Field(default=None, min_length=1)
    source: str = Field(min_length=1)


class ReplaceRequest(_Request):
    """PUT /v1/adapters/{name} with JSON."""

    base: str | None = Field(default=None, min_length=1)
    source: str = Field(min_length=1)


class AliasRequest(_Request):
    """Exactly one of the two: all traffic to one version, or shares between several."""

    version: int | None = Field(default=None, ge=1)
    weights: dict[int, float] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> "AliasRequest":
        if (self.version is None) == (self.weights is None):
            raise ValueError('give either "version": 3, or "weights": {"3": 0.9, "4": 0.1}')
        return self

    def resolved(self) -> dict[int, float]:
        """Weights, whichever way they were given."""
        return self.weights if self.weights is not None else {self.version or 0: 1.0}


class RollbackRequest(_Request):
    alias: str = "default"


class LoadLoraRequest(BaseModel):
    """vLLM's body of /v1/load_lora_adapter; as there, fields that are not known are let pass."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoraRequest(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


class AliasCard(BaseModel):
    """`version` is null where the traffic is split."""

    object: Literal["adapter.alias"] = "adapter.alias"
    adapter: str
    alias: str
    version: int | None
    weights: dict[int, float]
    updated_at: int


class VersionCard(BaseModel):
    """One immutable version; `id` can be used as a model name."""

    object: Literal["adapter.version"] = "adapter.version"
    id: str
    adapter: str
    version: int
    base: str
    digest: str
    rank: int
    alpha: float
    targets: list[str]
    use_dora: bool
    use_rslora: bool
    size_bytes: int
    origin: str
    source: str | None
    metrics: dict[str, Any]
    created_at: int


class AdapterCard(BaseModel):
    """An adapter; `version` is what the bare name means now, null where its traffic is split."""

    object: Literal["adapter"] = "adapter"
    id: str
    name: str
    base: str
    pinned: bool
    version: int | None
    versions: list[int]
    aliases: dict[str, dict[int, float]]
    rank: int  # of the newest version, as all below
    digest: str
    size_bytes: int
    created_at: int
    updated_at: int


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterCard]


class VersionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VersionCard]


class AliasList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AliasCard]


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool = True


def adapter_card(adapter: Adapter) -> AdapterCard:
    newest = adapter.versions[-1]
    return AdapterCard(
        id=adapter.name,
        name=adapter.name,
        base=adapter.base,
        pinned=adapter.pinned,
        version=_single(dict(adapter.default_weights)),
        versions=[version.version for version in adapter.versions],
        aliases={alias.alias: dict(alias.weights) for alias in adapter.aliases},
        rank=newest.rank,
        digest=newest.digest,
        size_bytes=newest.size_bytes,
        created_at=int(adapter.created_at.timestamp()),
        updated_at=int(max(alias.updated_at for alias in adapter.aliases).timestamp()),
    )


def version_card(version: AdapterVersion) -> VersionCard:
    return VersionCard(
        id=version.ref,
        adapter=version.name,
        version=version.version,
        base=version.base,
        digest=version.digest,
        rank=version.rank,
        alpha=version.alpha,
        targets=list(version.targets),
        use_dora=version.use_dora,
        use_rslora=version.use_rslora,
        size_bytes=version.size_bytes,
        origin=version.origin,
        source=version.source,
        metrics=dict(version.metrics),
        created_at=int(version.created_at.timestamp()),
    )


def alias_card(alias: Alias) -> AliasCard:
    weights = dict(alias.weights)
    return AliasCard(
        adapter=alias.adapter,
        alias=alias.alias,
        version=_single(weights),
        weights=weights,
        updated_at=int(alias.updated_at.timestamp()),
    )


def _single(weights: dict[int, float]) -> int | None:
    return next(iter(weights)) if len(weights) == 1 else None
