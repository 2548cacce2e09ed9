"""Counts what requests do, under vLLM's metric names where vLLM has one. It knows nothing of routes or engines.

`model` is always the served name of the base model (vLLM's label `model_name`); requests of an adapter count there too,
and once more under `tuneloop:adapter_*` with the adapter's name and version. What engines count themselves (running
and waiting rows, KV and prefix cache, residency) is read at scrape time by `metrics_collector.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

from ..adapters.base import AdapterVersion

Finish = Literal["stop", "length", "abort", "error"]

_MODEL = ["model_name"]
_ADAPTER = ["model_name", "adapter", "version"]
_TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_LATENCY = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_ADAPTER_LATENCY = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60)  # few: there may be a thousand adapters


@dataclass(frozen=True, kw_only=True)
class RequestTimings:
    """Seconds of one finished request. None: the phase was not reached or is not known."""

    e2e_seconds: float
    queue_seconds: float | None = None  # from arrival until the engine took it up
    first_token_seconds: float | None = None  # from arrival


TUNING_STATES = ("validating", "queued", "running", "pausing", "paused", "publishing")


class Metrics:
    """One registry per app, so that tests and several apps in one process never share counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the `_created` series double the size of a scrape and nobody reads them
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._http = counter("http_requests", "Answered HTTP requests.", ["method", "handler", "status"])
        self._in_flight = gauge("tuneloop:requests_in_flight", "Requests being answered.", _MODEL)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of finished requests.", _MODEL)
        self._cached = counter("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", _MODEL)
        self._generated = counter("vllm:generation_tokens", "Generated tokens of finished requests.", _MODEL)
        self._success = counter("vllm:request_success", "Finished requests.", [*_MODEL, "finished_reason"])
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _MODEL, _TTFT)
        self._gap = histogram("vllm:inter_token_latency_seconds", "Time between two tokens of a row.", _MODEL, _TOKEN)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end of the answer.", _MODEL, _LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "Time spent waiting to run.", _MODEL, _LATENCY)
        self._prompt_len = histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", _MODEL, _COUNT)
        self._output_len = histogram("vllm:request_generation_tokens", "Generated tokens a request.", _MODEL, _COUNT)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens of a request.", _MODEL, _TOKEN
        )

        self._a_prompt = counter("tuneloop:adapter_prompt_tokens", "Prompt tokens of finished requests.", _ADAPTER)
        self._a_generated = counter("tuneloop:adapter_generation_tokens", "Tokens generated.", _ADAPTER)
        self._a_requests = counter("tuneloop:adapter_requests", "Finished requests.", [*_ADAPTER, "finished_reason"])
        self._a_ttft = histogram(
            "tuneloop:adapter_time_to_first_token_seconds", "Arrival to first token.", _ADAPTER, _ADAPTER_LATENCY
        )
        self._a_e2e = histogram(
            "tuneloop:adapter_e2e_request_latency_seconds", "Arrival to end.", _ADAPTER, _ADAPTER_LATENCY
        )

        self._trained_tokens = counter("tuneloop:trained_tokens", "Tokens of jobs that succeeded.", [])
        self._jobs = gauge("tuneloop:tuning_jobs", "Fine-tuning jobs that have not ended.", ["state"])

    def count_trained_tokens(self, tokens: int) -> None:
        """A fine-tuning job has succeeded."""
        self._trained_tokens.inc(tokens)

    def watch_tuning_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Ask `counts` at every scrape how many jobs are in which state."""
        for state in TUNING_STATES:
            self._jobs.labels(state).set_function(partial(_count, counts, state))

    def http_request(self, method: str, handler: str, status: int) -> None:
        """One answered request; `handler` is the route's pattern, so that names in paths make no new series."""
        self._http.labels(method, handler, f"{status // 100}xx").inc()

    def request_started(self, model: str, adapter: AdapterVersion | None) -> None:
        """A generation request arrived; exactly one `request_finished` must follow."""
        self._in_flight.labels(model).inc()

    def first_token(self, model: str, adapter: AdapterVersion | None, seconds: float) -> None:
        """The first token came `seconds` after the request."""
        self._ttft.labels(model).observe(seconds)
        if adapter is not None:
            self._a_ttft.labels(*_labels(model, adapter)).observe(seconds)

    def token_gap(self, model: str, adapter: AdapterVersion | None, seconds: float) -> None:
        """A further token came `seconds` after the row's previous one."""
        self._gap.labels(model).observe(seconds)

    def request_finished(
        self,
        model: str,
        adapter: AdapterVersion | None,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        finish_reason: Finish,
        timings: RequestTimings,
    ) -> None:
        """A request ended, for whatever reason: `abort` is a client that left, `error` anything that raised."""
        self._in_flight.labels(model).dec()
        self._prompt.labels(model).inc(prompt_tokens)
        self._cached.labels(model).inc(cached_tokens)
        self._generated.labels(model).inc(completion_tokens)
        self._success.labels(model, finish_reason).inc()
        self._e2e.labels(model).observe(timings.e2e_seconds)
        self._prompt_len.labels(model).observe(prompt_tokens)
        self._output_len.labels(model).observe(completion_tokens)
        if timings.queue_seconds is not None:
            self._queue.labels(model).observe(timings.queue_seconds)
        if timings.first_token_seconds is not None and completion_tokens > 1:
            decode = timings.e2e_seconds - timings.first_token_seconds
            self._per_token.labels(model).observe(decode / (completion_tokens - 1))
        if adapter is not None:
            labels = _labels(model, adapter)
            self._a_prompt.labels(*labels).inc(prompt_tokens)
            self._a_generated.labels(*labels).inc(completion_tokens)
            self._a_requests.labels(*labels, finish_reason).inc()
            self._a_e2e.labels(*labels).observe(timings.e2e_seconds)

    def forget_adapter(self, name: str) -> None:
        """Drop a deleted adapter's series, or a server that sees many come and go would only grow."""
        for metric in (self._a_prompt, self._a_generated, self._a_requests, self._a_ttft, self._a_e2e):
            metric.remove_by_labels({"adapter": name})

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        return generate_latest(self.registry)


def _count(counts: Callable[[], Mapping[str, int]], state: str) -> float:
    return counts().get(state, 0)


def _labels(model: str, adapter: AdapterVersion) -> tuple[str, str, str]:
    return model, adapter.name, str(adapter.version)
