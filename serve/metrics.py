"""What Prometheus reads at `/metrics`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .generation import Generation
from .record import Record
from .worker import Registry

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)


class Metrics:
    """The figures of one server.

    Args:
        workers: by name, whose state is read when somebody asks.
    """

    def __init__(self, workers: Registry) -> None:
        self._registry = registry = CollectorRegistry()
        of_model = {"labelnames": ["model"], "registry": registry}
        self._requests = Counter(
            "iceformer_requests", "Requests by route and status.", ["route", "status", "model"], registry=registry
        )
        self._prompt = Counter("iceformer_prompt_tokens", "Tokens of prompts that were read.", **of_model)
        self._cached = Counter(
            "iceformer_cached_tokens", "Tokens of prompts that earlier prompts had left.", **of_model
        )
        self._written = Counter("iceformer_generated_tokens", "Tokens that were written.", **of_model)
        self._encoded = Counter("iceformer_encoded_tokens", "Tokens of texts that were encoded.", **of_model)
        self._first = Histogram(
            "iceformer_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_SECONDS,
            **of_model,
        )
        self._each = Histogram(
            "iceformer_time_per_output_token_seconds",
            "Mean time of the tokens of a text behind its first.",
            buckets=_TOKEN_SECONDS,
            **of_model,
        )
        self._whole = Histogram(
            "iceformer_request_seconds", "From the arrival of a request to its end.", buckets=_SECONDS, **of_model
        )
        self.open = Gauge("iceformer_open_requests", "Requests that are being answered.", registry=registry)
        registry.register(_Workers(workers))

    def note(self, record: Record) -> None:
        """Counts a request that has ended."""
        model = record.model or ""
        self._requests.labels(record.route, str(record.status), model).inc()
        if record.model is not None:
            self._whole.labels(model).observe(record.seconds)

    def note_generation(self, model: str, generation: Generation) -> None:
        """Counts what was read and written of a request, whole or not."""
        for text in generation.texts:
            self._prompt.labels(model).inc(text.progress.done - text.progress.cached)
            self._cached.labels(model).inc(text.progress.cached)
            self._written.labels(model).inc(text.written)
            if text.written:
                self._first.labels(model).observe(text.first - generation.submitted)
            if text.written > 1:
                self._each.labels(model).observe((text.last - text.first) / (text.written - 1))

    def note_encoded(self, model: str, tokens: int) -> None:
        """Counts tokens of texts that were encoded."""
        self._encoded.labels(model).inc(tokens)

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self._registry)


class _Workers(Collector):
    """The state of each artifact now."""

    def __init__(self, workers: Registry) -> None:
        self._workers = workers

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One gauge after the other."""
        gauges = {
            "iceformer_ready": ("Whether the artifact is loaded.", lambda worker: worker.ready),
            "iceformer_waiting_prompts": ("Prompts that wait to be read.", lambda worker: worker.queued),
            "iceformer_running_texts": ("Texts that have a slot.", lambda worker: worker.running),
            "iceformer_prefix_cache_bytes": ("Memory of earlier prompts.", lambda worker: worker.prefix_bytes),
        }
        for name, (text, read) in gauges.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for worker in self._workers.values():
                family.add_metric([worker.name], float(read(worker)))
            yield family
