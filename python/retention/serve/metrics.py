"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from retention.serve.engine import Engine, Observer

_SECONDS_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SECONDS_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics(Observer):
    """A server's own, so that several may be in one process.

    Attributes:
        content_type: of what `page` gives.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        self._requests = Counter(
            "retention_requests",
            "Requests for text, by how they ended: finished, cancelled (by the client), failed, "
            "rejected (queue full or shutting down) or invalid.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("finished", "cancelled", "failed", "rejected", "invalid"):
            self._requests.labels(outcome)  # there from the start, at 0
        self._prompt_tokens = Counter(
            "retention_prompt_tokens",
            "Tokens of prompts read, without the last of each.",
            registry=self._registry,
        )
        self._generated_tokens = Counter(
            "retention_generated_tokens", "Tokens generated.", registry=self._registry
        )
        self._first = Histogram(
            "retention_time_to_first_token_seconds",
            "From a request to the first token of a choice, its wait for a slot included.",
            buckets=_SECONDS_TO_FIRST,
            registry=self._registry,
        )
        self._next = Histogram(
            "retention_time_per_output_token_seconds",
            "From one token of a choice to the next.",
            buckets=_SECONDS_A_TOKEN,
            registry=self._registry,
        )

    def watch(self, engine: Engine) -> None:
        """Has gauges of an engine's slots and queue."""
        for name, text, value in (
            ("slots", "Sequences that can run at once.", lambda: engine.slots),
            ("slots_in_use", "Sequences that run.", lambda: engine.slots_in_use),
            (
                "queue_length",
                "Sequences that wait for a slot.",
                lambda: max(0, engine.load - engine.slots_in_use),
            ),
        ):
            Gauge(f"retention_{name}", text, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        self._generated_tokens.inc()
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._generated_tokens.inc()
        self._next.observe(seconds)

    def read(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def ended(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()
