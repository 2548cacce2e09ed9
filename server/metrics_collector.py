"""Reads gauges and engine counters at scrape time. It only reads: statuses of models, the index of adapters."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..adapters.base import Adapter, AdapterVersion
from ..engines.base import EngineStats
from ..engines.registry import ModelStatus


class EngineCollector(Collector):
    """Everything that engines and the adapter index know already, so that nobody has to push it.

    `snapshot` reads them on the event loop that changes them; `collect` then formats, in whatever thread.
    """

    def __init__(
        self, statuses: Callable[[], Iterable[ModelStatus]], adapters: Callable[[], Iterable[Adapter]]
    ) -> None:
        self._read_statuses = statuses
        self._read_adapters = adapters
        self._statuses: Sequence[ModelStatus] = ()
        self._adapters: Sequence[Adapter] = ()

    def snapshot(self) -> None:
        """Remember how things are now; costs little."""
        self._statuses = list(self._read_statuses())
        self._adapters = list(self._read_adapters())

    def collect(self) -> Iterator[Metric]:
        statuses, adapters = self._statuses, self._adapters
        yield from _models(statuses)
        stats = {status.name: status.stats for status in statuses if status.stats is not None}
        yield from _engines(stats)
        yield _lora_info(stats, adapters)
        yield _residency(stats, adapters)


def _models(statuses: Sequence[ModelStatus]) -> Iterator[Metric]:
    ready = GaugeMetricFamily("tuneloop:model_ready", "1 if the base model can answer now.", labels=["model_name"])
    memory = GaugeMetricFamily(
        "tuneloop:model_resident_memory_bytes", "Memory of the model's worker.", labels=["model_name"]
    )
    for status in statuses:
        ready.add_metric([status.name], float(status.state == "ready"))
        memory.add_metric([status.name], status.stats.rss_bytes if status.stats is not None else 0)
    yield ready
    yield memory


def _engines(stats: dict[str, EngineStats]) -> Iterator[Metric]:
    gauges: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
        ("vllm:num_requests_running", "Rows in the running batch.", lambda s: s.running),
        ("vllm:num_requests_waiting", "Rows waiting to run.", lambda s: s.waiting),
        ("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1.", lambda s: s.kv_cache_usage),
    )
    counters: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
        ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_cache_queries),
        ("vllm:prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_cache_hits),
        ("vllm:num_preemptions", "Rows put back to free KV blocks.", lambda s: s.preemptions),
        ("tuneloop:engine_steps", "Steps of the batch since the worker started.", lambda s: s.steps),
    )
    for name, text, read in gauges:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        for model, values in stats.items():
            gauge.add_metric([model], read(values))
        yield gauge
    for name, text, read in counters:
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        for model, values in stats.items():
            counter.add_metric([model], read(values))
        yield counter


def _lora_info(stats: dict[str, EngineStats], adapters: Sequence[Adapter]) -> Metric:
    """As vLLM has it: names joined by commas in the labels, and the time as the value (the newest series counts)."""
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with running and waiting requests; the value is the time of the scrape.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    names = {v.digest: adapter.name for adapter in adapters for v in adapter.versions}
    now = time.time()

    def joined(digests: Iterable[str]) -> str:
        return ",".join(sorted({names[digest] for digest in digests if digest in names}))

    # Models with the same label values would be one series twice, which Prometheus refuses to read.
    series = {(str(s.max_loras), joined(s.running_adapters), joined(s.waiting_adapters)) for s in stats.values()}
    for labels in sorted(series):
        family.add_metric(list(labels), now)
    return family


def _residency(stats: dict[str, EngineStats], adapters: Sequence[Adapter]) -> Metric:
    family = GaugeMetricFamily(
        "tuneloop:adapter_residency",
        "1 in the fastest tier that holds the adapter version: device, cpu or disk.",
        labels=["model_name", "adapter", "version", "tier"],
    )
    tiers = {base: _tiers(values) for base, values in stats.items()}
    for version in _versions(adapters):
        tier = tiers.get(version.base, {}).get(version.digest, "disk")
        family.add_metric([version.base, version.name, str(version.version), tier], 1)
    return family


def _tiers(stats: EngineStats) -> dict[str, str]:
    return {**dict.fromkeys(stats.adapters_on_cpu, "cpu"), **dict.fromkeys(stats.adapters_on_device, "device")}


def _versions(adapters: Iterable[Adapter]) -> Iterator[AdapterVersion]:
    for adapter in adapters:
        yield from adapter.versions
