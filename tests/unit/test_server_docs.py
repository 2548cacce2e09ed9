"""Golden lists of the HTTP surface, and the documentation's tables, which must say what the code says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from tuneloop.server.app import create_app
from tuneloop.server.keys import SCOPES
from tuneloop.server.metrics import Metrics
from tuneloop.server.metrics_collector import EngineCollector
from tuneloop.server.settings import Settings

from .conftest import AppFactory

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"\| `([^`]+)` \| (.*?) \|")

ROUTES = """
DELETE /v1/adapters/{name}
DELETE /v1/adapters/{name}/aliases/{alias}
DELETE /v1/adapters/{name}/versions/{version}
DELETE /v1/api_keys/{key_id}
DELETE /v1/models/{model_id}
GET /health
GET /metrics
GET /ready
GET /v1/adapters
GET /v1/adapters/{name}
GET /v1/adapters/{name}/aliases
GET /v1/adapters/{name}/aliases/{alias}
GET /v1/adapters/{name}/download
GET /v1/adapters/{name}/versions
GET /v1/adapters/{name}/versions/{version}
GET /v1/adapters/{name}/versions/{version}/download
GET /v1/api_keys
DELETE /v1/files/{file_id}
DELETE /v1/fine_tuning/checkpoints/{checkpoint}/permissions/{permission_id}
GET /v1/files
GET /v1/files/{file_id}
GET /v1/files/{file_id}/content
GET /v1/fine_tuning/checkpoints/{checkpoint}/permissions
GET /v1/fine_tuning/jobs
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events/stream
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/log
GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/metrics
POST /v1/files
POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions
POST /v1/fine_tuning/jobs
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause
POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume
GET /v1/models
GET /v1/models/{model_id}
GET /version
POST /detokenize
POST /tokenize
POST /v1/adapters
POST /v1/adapters/{name}/pin
POST /v1/adapters/{name}/rollback
POST /v1/adapters/{name}/unpin
POST /v1/api_keys
POST /v1/chat/completions
POST /v1/completions
POST /v1/load_lora_adapter
POST /v1/models/load
POST /v1/models/pin
POST /v1/models/unload
POST /v1/unload_lora_adapter
PUT /v1/adapters/{name}
PUT /v1/adapters/{name}/aliases/{alias}
"""
SCHEMA_ROUTES = {"GET /openapi.json", "GET /docs"}  # FastAPI's own

METRICS = """
http_requests tuneloop:adapter_e2e_request_latency_seconds tuneloop:adapter_generation_tokens
tuneloop:adapter_prompt_tokens tuneloop:adapter_requests tuneloop:adapter_residency
tuneloop:adapter_time_to_first_token_seconds tuneloop:engine_steps tuneloop:model_ready
tuneloop:model_resident_memory_bytes tuneloop:requests_in_flight tuneloop:trained_tokens tuneloop:tuning_jobs
vllm:e2e_request_latency_seconds
vllm:generation_tokens vllm:inter_token_latency_seconds vllm:kv_cache_usage_perc vllm:lora_requests_info
vllm:num_preemptions vllm:num_requests_running vllm:num_requests_waiting vllm:prefix_cache_hits
vllm:prefix_cache_queries vllm:prompt_tokens vllm:prompt_tokens_cached vllm:request_generation_tokens
vllm:request_prompt_tokens vllm:request_queue_time_seconds vllm:request_success
vllm:request_time_per_output_token_seconds vllm:time_to_first_token_seconds
"""


def table(name: str) -> dict[str, str]:
    """First and second column of a page's rows whose first column is code."""
    rows = [ROW.match(line) for line in (DOCS / name).read_text().splitlines()]
    found = [(row[1], row[2]) for row in rows if row is not None]
    assert len(found) == len(dict(found)), f"docs/{name} has a line twice"
    return dict(found)


def routes() -> set[str]:
    schema = create_app(Settings()).openapi()
    return {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}


def metrics() -> Iterator[Metric]:
    metrics = Metrics()
    metrics.registry.register(EngineCollector(list, list))
    return (family for family in metrics.registry.collect() if not family.name.startswith("process_"))


def test_routes_are_fixed() -> None:
    assert routes() == set(ROUTES.strip().splitlines())


def test_every_route_is_documented() -> None:
    documented = {key for key in table("http.md") if " /" in key}
    assert documented == routes() | SCHEMA_ROUTES


def test_metric_names_are_fixed() -> None:
    assert sorted(family.name for family in metrics()) == METRICS.split()


def test_every_metric_is_documented() -> None:
    named = {family.name + ("_total" if family.type == "counter" else ""): family.type for family in metrics()}
    assert table("metrics.md") == named


def shown(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == ():
        return ""
    if isinstance(value, ByteSize):
        value = value.human_readable().replace(".0", "")
    if isinstance(value, Path):
        value = f"~/{value.relative_to(Path.home())}"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_every_setting_is_documented() -> None:
    text = (DOCS / "settings.md").read_text()
    rows = [f"| `{name}` | {shown(field)} | {field.description} |" for name, field in Settings.model_fields.items()]
    assert [row for row in rows if row not in text] == []
    assert set(table("settings.md")) == set(Settings.model_fields)


async def test_every_route_wants_the_documented_scope(app_factory: AppFactory) -> None:
    async with app_factory(api_key="root") as running:
        secrets = {scope: (await running.services.keys.create(scope, scopes=[scope]))[0] for scope in SCOPES}
        for endpoint, scopes in table("http.md").items():
            if " /" not in endpoint:
                continue
            method, path = endpoint.split()
            path = re.sub(r"\{version\}", "1", path)
            path = re.sub(r"\{\w+\}", "nothing", path)
            allowed = set(SCOPES) if scopes == "-" else {*scopes.split(", "), "admin"}
            for scope, secret in secrets.items():
                headers = {"Authorization": f"Bearer {secret}"}
                response = await running.client.request(method, path, headers=headers)
                assert (response.status_code == 403) is (scope not in allowed), (endpoint, scope, response.text)
            anonymous = await running.client.request(method, path)
            assert (anonymous.status_code == 401) is (scopes != "-"), (endpoint, anonymous.text)


@pytest.mark.parametrize("module", ["tuneloop.server", "tuneloop.server.app", "tuneloop.server.run"])
def test_the_server_does_not_import_what_is_heavy(module: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'vllm', 'accelerate'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
