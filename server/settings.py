"""Every knob of the server, parsed once and frozen. It reads nothing itself: `settings_sources.py` does.

The descriptions below are the documentation: `docs/settings.md` holds the same table, and a test compares the two.
"""

import os
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from ..adapters.base import AdapterLimits
from ..engines.transformers.config import TransformersConfig, Weights

_ENGINE = TransformersConfig()
_LIMITS = AdapterLimits()


def _split(value: Any, separators: str = ",") -> Any:
    """Lists from the environment and flags: `a,b`. YAML gives real lists, which pass as they are."""
    if not isinstance(value, str):
        return value
    for separator in separators[1:]:
        value = value.replace(separator, separators[0])
    return [part.strip() for part in value.split(separators[0]) if part.strip()]


def _expand(path: Path) -> Path:
    return path.expanduser().absolute()


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Home = Annotated[Path, BeforeValidator(lambda value: _expand(Path(value)))]
Folders = Annotated[tuple[Home, ...], NoDecode, BeforeValidator(lambda value: _split(value, ",:"))]
Timeout = Annotated[float | None, Field(ge=0), AfterValidator(lambda value: value or None)]
Positive = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """All settings of one server. Made by `load_settings`; built directly in tests, which then read no environment."""

    model_config = SettingsConfigDict(
        env_prefix="TUNELOOP_", extra="forbid", frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    # The server
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    home: Home = Field(
        default_factory=lambda: _expand(Path("~/.tuneloop")),
        validate_default=True,
        description="Folder of the database, adapters and fetched models.",
    )
    models: Names = Field(
        default=(),
        description="Base models to load at start: `name`, `source` or `name=source`; empty: `smollm2-135m`.",
    )
    engine: Literal["auto", "transformers"] = Field(default="auto", description="Engine that runs base models.")
    api_key: SecretStr | None = Field(default=None, description="An admin key given from outside, for containers.")
    adapter_roots: Folders = Field(
        default=(),
        description="Folders from which adapters may be loaded by path, separated by `,` or `:`; empty: none.",
    )
    database_url: str | None = Field(
        default=None,
        description="Database: `sqlite:///path` or `postgresql://user@host/name`; empty: SQLite in the home.",
    )
    storage_url: str | None = Field(
        default=None,
        description="Blobs: a folder, or an fsspec URL as `s3://bucket/prefix`; empty: a folder in the home.",
    )
    hub_token: SecretStr | None = Field(default=None, description="Hugging Face token for private repositories.")
    cors_origins: Names = Field(
        default=(), description="Origins that browsers may call from, separated by `,`; `*`: all."
    )
    max_body_bytes: ByteSize = Field(
        default=ByteSize(16 * 1024**2), gt=0, description="Largest body of a JSON request."
    )
    max_upload_bytes: ByteSize = Field(
        default=ByteSize(2 * 1024**3), gt=0, description="Largest adapter upload, packed."
    )
    max_file_bytes: ByteSize = Field(default=ByteSize(8 * 1024**3), gt=0, description="Largest file of /v1/files.")
    max_adapter_bytes: ByteSize = Field(
        default=ByteSize(_LIMITS.max_bytes), gt=0, description="Largest adapter, unpacked; more is a zip bomb."
    )
    request_timeout_seconds: Timeout = Field(
        default=600, description="Seconds until a generation ends with 504; 0: never."
    )
    grace_seconds: float = Field(
        default=30, ge=0, description="Seconds that running requests get to finish after SIGTERM."
    )
    memory_budget_bytes: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Memory for all base models; the least recently used one leaves first. Empty: no limit.",
    )
    model_idle_seconds: Positive | None = Field(
        default=None, description="Seconds without a request until a base model is unloaded; empty: never."
    )
    trust_request_chat_template: bool = Field(
        default=False, description="Let requests bring their own chat template, a program that the server runs."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="Log lines for people or for machines; `auto`: console on a terminal, else JSON."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )

    # Fine-tuning
    tuning_devices: Names = Field(
        default=(),
        description="Devices for fine-tuning jobs, as torch names them, separated by `,`; empty: one job at a time, "
        "on the accelerator torch finds, else the CPU.",
    )
    tuning_threads: int | None = Field(
        default=None, ge=1, description="Compute threads of a trainer on a CPU; empty: half of the cores."
    )
    tuning_nice: int = Field(
        default=10, ge=0, le=19, description="How much trainers give way to other processes, 0 (not) to 19."
    )

    # The transformers engine, under the names of TransformersConfig
    device: str | None = Field(
        default=None, description="`cpu`, `cuda:0`, ...; empty: the accelerator torch finds, else CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default=_ENGINE.dtype, description="Number format of activations; `auto`: by device and checkpoint."
    )
    weights: Weights = Field(
        default=_ENGINE.weights, description="How a CPU keeps matrices; `int8` is never chosen by `auto`."
    )
    threads: int | None = Field(
        default=None, ge=1, description="Compute threads of a worker on a CPU; empty: all cores."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Tokens of prompt plus output; empty: the model's own."
    )
    max_num_seqs: int = Field(default=_ENGINE.max_num_seqs, ge=1, description="Rows in one batch.")
    max_num_batched_tokens: int = Field(
        default=_ENGINE.max_num_batched_tokens, ge=1, description="Prompt tokens prefilled in one step."
    )
    max_waiting: int = Field(
        default=_ENGINE.max_waiting, ge=0, description="Queued rows before requests are refused with 429."
    )
    kv_cache_bytes: ByteSize | None = Field(
        default=None, gt=0, description="Bound of the KV pool; empty: by free memory."
    )
    enable_prefix_caching: bool = Field(
        default=_ENGINE.enable_prefix_caching, description="Reuse KV of shared beginnings."
    )
    prefix_cache_bytes: ByteSize | None = Field(
        default=None, ge=0, description="Bound of KV kept for later requests; empty: by the KV pool."
    )
    max_loras: int = Field(default=_ENGINE.max_loras, ge=1, description="Adapters on the device at once, a model.")
    max_lora_rank: int = Field(
        default=_ENGINE.max_lora_rank, ge=1, description="Largest rank; adapters over it are refused."
    )
    adapter_cpu_bytes: ByteSize = Field(
        default=ByteSize(_ENGINE.adapter_cpu_bytes), ge=0, description="Prepared adapters kept in host memory, a model."
    )
    trust_remote_code: bool = Field(
        default=_ENGINE.trust_remote_code,
        description="Run Python code that comes with a checkpoint. Only for ones you trust.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # what is not given is a default: the one reader of the environment is load_settings

    @property
    def resolved_database_url(self) -> str:
        """The database that is used: the given one, or a SQLite file in the home."""
        return self.database_url or f"sqlite:///{self.home / 'tuneloop.db'}"

    @property
    def resolved_storage_url(self) -> str:
        """Where blobs are kept: the given place, or a folder in the home."""
        return self.storage_url or str(self.home / "blobs")

    @property
    def resolved_tuning_threads(self) -> int:
        """Compute threads of a trainer: those given, or half of the cores, so that serving keeps its latency."""
        return self.tuning_threads or max(1, (os.cpu_count() or 1) // 2)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def transformers_config(self) -> TransformersConfig:
        """The engine's own part, in the engine's own type."""
        return TransformersConfig(
            **{field.name: _plain(getattr(self, field.name)) for field in fields(TransformersConfig)}
        )

    def adapter_limits(self) -> AdapterLimits:
        """What an adapter may measure; the rank limit is the engine's, so that nothing is stored that cannot run."""
        return AdapterLimits(max_rank=self.max_lora_rank, max_bytes=int(self.max_adapter_bytes))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, ByteSize) else value
