"""What an adapter is: immutable versions under a name, aliases that point to them. It knows no engine and no HTTP.

Terms: an *adapter* is a name with a base model and versions 1, 2, 3 ...; a *version* is content-addressed (digest of
its configuration and tensors) and never changes; an *alias* (`prod`) points to one version, or splits traffic between
several by weight. A request names `support` (the default version), `support@3` (a version), `support@prod` (an alias).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

DEFAULT_ALIAS = "default"  # the alias behind the bare name: an upload moves it, a rollback moves it back

Origin = Literal["upload", "path", "hub", "modelscope", "bucket", "job"]


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """A linear module of a base model: `weight` is [out_features, in_features]."""

    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """What an adapter may measure before it is refused (TooLarge)."""

    max_rank: int = 256
    max_bytes: int = 4 * 1024**3  # unpacked
    max_compressed_ratio: int = 200  # unpacked / packed of one archive


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What validation read from a PEFT folder, before any tensor reaches an engine."""

    digest: str  # "sha256:..." over the canonical configuration and the safetensors bytes
    peft_type: str  # always "LORA" today
    base_model_name: str | None  # base_model_name_or_path of adapter_config.json, as written there
    rank: int  # the largest of r and rank_pattern
    alpha: float
    targets: tuple[str, ...]  # the base's module names that the tensors touch
    use_dora: bool
    use_rslora: bool
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """One immutable version, as engines get it.

    `path` is a local folder that holds `adapter_config.json` and `adapter_model.safetensors` and nothing else;
    it exists for as long as the version does.
    """

    name: str
    version: int
    base: str  # the served name of its base model
    digest: str
    path: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_dora: bool
    use_rslora: bool
    size_bytes: int
    origin: Origin
    source: str | None  # the path, repository or bucket it came from
    metrics: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime

    @property
    def ref(self) -> str:
        """`name@version`: names this version for ever."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True)
class Alias:
    """`weights` maps version numbers to shares of the traffic; a plain alias has one entry of weight 1.0."""

    adapter: str
    alias: str
    weights: Mapping[int, float]
    updated_at: datetime


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A name with all its versions (newest last) and aliases (`default` among them)."""

    name: str
    base: str
    pinned: bool
    created_at: datetime
    versions: tuple[AdapterVersion, ...]
    aliases: tuple[Alias, ...]

    @property
    def default_weights(self) -> Mapping[int, float]:
        return next(a.weights for a in self.aliases if a.alias == DEFAULT_ALIAS)
