"""What an operator sees: Prometheus metrics, and logs as lines of JSON. Neither names a user."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from stca_jax.serving.server.worker import Worker

_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """Counters and histograms of one process."""

    def __init__(self) -> None:
        """Of a registry of its own, so that several servers fit into a process."""
        self.registry = CollectorRegistry()
        self._stages = Histogram(
            "stca_stage_seconds", "Time of a request by stage: queue, score, call, error.",
            ["stage"], buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._requests = Histogram(
            "stca_request_seconds", "Time of a request, body read to answer made.",
            ["operation"], buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._answers = Counter(
            "stca_requests", "Requests by operation and status.", ["operation", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._reloads = Counter(
            "stca_reloads", "Attempts to go on with another export.", ["result"],
            registry=self.registry,
        )  # fmt: skip

    def stage(self, name: str, seconds: float) -> None:
        """One task of the worker."""
        self._stages.labels(name).observe(seconds)

    def answered(self, operation: str, status: int, seconds: float) -> None:
        """One request."""
        self._answers.labels(operation, str(status)).inc()
        self._requests.labels(operation).observe(seconds)

    def reloaded(self, result: str) -> None:
        """How an attempt ended: "succeeded" or "failed"."""
        self._reloads.labels(result).inc()

    def watch(self, worker: Worker) -> None:
        """Reads the state of a worker at each scrape."""
        self.registry.register(_State(worker))

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges of a worker and its cache."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        """Prometheus' protocol."""
        scorer = self._worker.scorer
        users, num_bytes = scorer.cached
        counts = scorer.counts
        for name, text, value in (
            ("stca_queue_length", "Tasks that wait.", self._worker.num_waiting),
            ("stca_cached_users", "Users in the cache.", users),
            ("stca_cached_bytes", "Bytes that they take.", num_bytes),
            ("stca_cache_hits", "Users found, since the model was loaded.", counts.hits),
            ("stca_cache_misses", "Users read from the store.", counts.misses),
            ("stca_cache_evictions", "Users dropped for room.", counts.evictions),
        ):
            yield GaugeMetricFamily(name, text, value)
        info = scorer.model.info
        yield InfoMetricFamily(
            "stca_model",
            "The export that serves.",
            {"version": info.version, "step": str(info.values.get("step", ""))},
        )


def merge(texts: Mapping[str, str], own: Iterable[Metric]) -> bytes:
    """Metrics of several processes as one text, each sample with the label `worker`.

    Args:
      texts: Of each worker, by its name.
      own: Metrics beside them.
    """
    merged: dict[str, Metric] = {}
    for worker, text in texts.items():
        for found in text_string_to_metric_families(text):
            family = merged.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                labels = {**sample.labels, "worker": worker}
                family.add_sample(sample.name, labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families([*own, *merged.values()]))
    return generate_latest(registry)


class _Families(Collector):
    """Metrics that are there already."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Prometheus' protocol."""
        return self._families


class JsonLines(logging.Formatter):
    """A log record as one line: time, level, message, and what `extra={"fields": …}` gives."""

    def __init__(self, **always: str):
        """Fields that every line has."""
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        """Logging's protocol."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **self._always,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
