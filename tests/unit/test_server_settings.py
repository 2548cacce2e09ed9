"""Settings: layers, units, refusals, and the documentation's table."""

from dataclasses import fields
from pathlib import Path

import pytest
from tuneloop.engines.transformers.config import TransformersConfig
from tuneloop.server.settings import Settings
from tuneloop.server.settings_sources import load_settings
from tuneloop.storage.errors import InvalidInput

GOLDEN = (
    "host port home models engine api_key adapter_roots database_url storage_url hub_token cors_origins max_body_bytes "
    "max_upload_bytes max_file_bytes max_adapter_bytes request_timeout_seconds grace_seconds memory_budget_bytes "
    "model_idle_seconds "
    "trust_request_chat_template log_format log_level tuning_devices tuning_threads tuning_nice device dtype "
    "weights threads max_model_len max_num_seqs "
    "max_num_batched_tokens max_waiting kv_cache_bytes enable_prefix_caching prefix_cache_bytes max_loras "
    "max_lora_rank adapter_cpu_bytes trust_remote_code"
)


def test_names_are_fixed() -> None:
    assert list(Settings.model_fields) == GOLDEN.split()


def test_every_knob_of_the_engine_is_a_setting_with_its_default() -> None:
    assert {field.name for field in fields(TransformersConfig)} <= set(GOLDEN.split())
    assert Settings().transformers_config() == TransformersConfig()


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "tuneloop.yaml"
    config.write_text("port: 1\nhost: a\nmax_num_seqs: 3\nmodels: [x, y=z]\n")
    environ = {"TUNELOOP_CONFIG": str(config), "TUNELOOP_PORT": "2", "TUNELOOP_HOST": "b"}
    settings = load_settings(environ=environ, port=3, host=None)
    assert (settings.port, settings.host, settings.max_num_seqs, settings.models) == (3, "b", 3, ("x", "y=z"))


def test_sizes_lists_and_folders_are_read_from_text() -> None:
    environ = {
        "TUNELOOP_KV_CACHE_BYTES": "2GiB",
        "TUNELOOP_MODELS": "smollm2-135m, big=/models/big",
        "TUNELOOP_ADAPTER_ROOTS": "/a:/b,/c",
        "TUNELOOP_CORS_ORIGINS": "",
    }
    settings = load_settings(environ=environ)
    assert settings.kv_cache_bytes == 2 * 1024**3
    assert type(settings.transformers_config().kv_cache_bytes) is int
    assert settings.models == ("smollm2-135m", "big=/models/big")
    assert settings.adapter_roots == (Path("/a"), Path("/b"), Path("/c"))
    assert settings.cors_origins == ()


def test_zero_seconds_means_no_timeout() -> None:
    assert load_settings(environ={"TUNELOOP_REQUEST_TIMEOUT_SECONDS": "0"}).request_timeout_seconds is None
    assert load_settings(environ={}).request_timeout_seconds == 600


def test_variables_of_the_client_are_not_ours() -> None:
    assert load_settings(environ={"TUNELOOP_URL": "http://elsewhere:8000"}) == Settings()


def test_kubernetes_service_links_are_not_ours() -> None:
    environ = {
        "TUNELOOP_PORT": "tcp://10.0.0.1:8000",
        "TUNELOOP_SERVICE_HOST": "10.0.0.1",
        "TUNELOOP_SERVICE_PORT_HTTP": "8000",
        "TUNELOOP_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load_settings(environ=environ).port == 8000


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({"TUNELOOP_PROT": "1"}, {}, "'TUNELOOP_PROT' in the environment is not known. Did you mean 'port'?"),
        ({}, {"max_num_seq": 1}, "'max_num_seq' given as a flag is not known. Did you mean 'max_num_seqs'?"),
        ({"TUNELOOP_XYZZY_QQQ": "1"}, {}, "docs/settings.md lists the known ones."),
        ({"TUNELOOP_PORT": "many"}, {}, "The setting 'port' in the environment is wrong"),
        ({}, {"kv_cache_bytes": "2 apples"}, "The setting 'kv_cache_bytes' given as a flag is wrong"),
        ({}, {"config": "/does/not/exist.yaml"}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_refused_by_name(environ: dict[str, str], flags: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_settings(environ=environ, **flags)  # type: ignore[arg-type]
    assert message in caught.value.message


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "1: 2"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InvalidInput) as caught:
        load_settings(tmp_path / "c.yaml", environ={})
    assert "c.yaml" in caught.value.message


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(load_settings(environ={"TUNELOOP_API_KEY": "hush", "TUNELOOP_HUB_TOKEN": "hush"}))
    with pytest.raises(InvalidInput) as caught:
        load_settings(environ={}, api_key=["hush"])
    assert "hush" not in caught.value.message


def test_places_follow_the_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.resolved_database_url == f"sqlite:///{tmp_path}/tuneloop.db"
    assert settings.resolved_storage_url == f"{tmp_path}/blobs"


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_loopback(host: str, local: bool) -> None:
    assert Settings(host=host).is_loopback is local
