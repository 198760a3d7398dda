"""Metrics for Prometheus: what the worker sees by its own clock, and what the engine counts. Names are vLLM's where it has the same.

`engine.counters()` gives a dict. These names are shown as the metrics that the table says, all with the prefix `jaxmoe:`; one that is missing
is not shown. A number that the table doesn't have is shown as the gauge `jaxmoe:engine_NAME`.

Totals since the start (numbers, or where a label stands, a dict from its values to numbers):

    name                    label      metric
    preemptions             kind       num_preemptions_total              swap, recompute
    prefix_queries                     prefix_cache_queries_total         prompt tokens that were looked up
    prefix_hits                        prefix_cache_hits_total            prompt tokens that were found
    swap_bytes              direction  kv_swap_bytes_total                in, out
    computed_tokens         kind       computed_tokens_total              prompt, decode: real tokens that went through the model
    padded_tokens                      padded_tokens_total                places of batches that no token filled
    steps                              engine_steps_total
    layer_group_iterations             layer_group_iterations_total
    expert_hits                        expert_hits_total                  requests for experts that were on the device
    expert_misses                      expert_misses_total                requests for experts that were not
    expert_loads                       expert_loads_total                 experts that were copied to the device
    expert_bytes_h2d                   expert_bytes_h2d_total
    expert_stall_seconds               expert_stall_seconds_total
    expert_prefetch         outcome    expert_prefetch_total              useful, wasted
    expert_regret                      expert_regret_total                loads of decoding beyond the best policy's, if that is counted
    expert_best_loads                  expert_best_loads_total            loads that the best policy would have made of the same
    spec_drafts                        spec_decode_num_drafts_total
    spec_draft_tokens                  spec_decode_num_draft_tokens_total
    spec_accepted_tokens               spec_decode_num_accepted_tokens_total
    xla_compiles_after_warmup          xla_compiles_after_warmup_total

Now:

    running, waiting, swapped          num_requests_running, num_requests_waiting, num_requests_swapped
    pages                   state      kv_pages                           free, cached, held
    host_pages              state      kv_host_pages                      free, cached, held
    expert_slots                       expert_cache_slots                 experts that fit on the device
    kv_cache_usage is worked out:      kv_cache_usage_perc                held / all pages, 0 to 1

Histograms: {"bounds": [b0, b1, ...], "counts": [n0, n1, ..., n_over], "sum": x}, n_i observations of at most b_i and more than the one before:

    queue_seconds                      request_queue_time_seconds         from arrival to first admission
    distinct_experts                   distinct_experts_per_step          of one layer in one step
    step_tokens                        iteration_tokens_total             tokens of a step
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "jaxmoe:"

TOTALS = {
    "preemptions": ("num_preemptions", "kind", "Times that a sequence was put aside."),
    "prefix_queries": ("prefix_cache_queries", None, "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", None, "Prompt tokens found in the prefix cache."),
    "swap_bytes": ("kv_swap_bytes", "direction", "Bytes of keys and values moved between device and host."),
    "computed_tokens": ("computed_tokens", "kind", "Real tokens that went through the model."),
    "padded_tokens": ("padded_tokens", None, "Places of batches that no token filled."),
    "steps": ("engine_steps", None, "Steps of the engine."),
    "layer_group_iterations": ("layer_group_iterations", None, "Groups of layers that prompts went through."),
    "expert_hits": ("expert_hits", None, "Requests for experts that were on the device."),
    "expert_misses": ("expert_misses", None, "Requests for experts that were not on the device."),
    "expert_loads": ("expert_loads", None, "Experts copied to the device."),
    "expert_bytes_h2d": ("expert_bytes_h2d", None, "Bytes of experts copied to the device."),
    "expert_stall_seconds": ("expert_stall_seconds", None, "Seconds spent waiting for experts."),
    "expert_prefetch": ("expert_prefetch", "outcome", "Experts fetched ahead of need, by what came of it."),
    "expert_regret": ("expert_regret", None, "Expert loads of decoding beyond those of the best policy."),
    "expert_best_loads": ("expert_best_loads", None, "Expert loads that the best policy would have made of the same decoding."),
    "spec_drafts": ("spec_decode_num_drafts", None, "Drafts verified."),
    "spec_draft_tokens": ("spec_decode_num_draft_tokens", None, "Tokens drafted."),
    "spec_accepted_tokens": ("spec_decode_num_accepted_tokens", None, "Drafted tokens accepted."),
    "xla_compiles_after_warmup": ("xla_compiles_after_warmup", None, "Programs compiled after warm-up; 0 is right."),
}
GAUGES = {
    "running": ("num_requests_running", None, "Sequences with pages on the device."),
    "waiting": ("num_requests_waiting", None, "Sequences that wait to begin."),
    "swapped": ("num_requests_swapped", None, "Sequences put aside in host memory."),
    "pages": ("kv_pages", "state", "Pages of keys and values on the device."),
    "host_pages": ("kv_host_pages", "state", "Pages of keys and values in host memory."),
    "expert_slots": ("expert_cache_slots", None, "Experts that fit on the device."),
}
HISTOGRAMS = {
    "queue_seconds": ("request_queue_time_seconds", "From arrival to first admission, seconds."),
    "distinct_experts": ("distinct_experts_per_step", "Distinct experts of a layer in a step."),
    "step_tokens": ("iteration_tokens_total", "Tokens of a step."),
}
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
LENGTHS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Metrics:
    """The server's own counters and histograms, and a page with them and the engine's.

    Attributes:
        snapshot: the engine's counters as they were last asked for.
    """

    def __init__(self) -> None:
        self.snapshot: Mapping[str, Any] = {}
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_EngineCollector(lambda: self.snapshot))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST)
        self.between = histogram("inter_token_latency_seconds", "Between tokens; those that come together share the time since the last.", BETWEEN)
        self.per_token = histogram("request_time_per_output_token_seconds", "Mean time of a request's tokens after its first.", BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", WHOLE)
        self.gap = histogram("decode_gap_seconds", "Between two steps that gave a sequence tokens, undivided.", BETWEEN)
        self.step = histogram("engine_step_seconds", "A step of the engine.", BETWEEN)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self.answer_length = histogram("request_generation_tokens", "New tokens of a request.", LENGTHS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of sequences that gave their first token.")
        self.cached_tokens = counter("prompt_tokens_cached", "Of these, found in the cache.")
        self.new_tokens = counter("generation_tokens", "Tokens generated.")
        self.finished = counter("request_success", "Sequences that ended, by reason.", "finished_reason")
        self.aborted = counter("requests_aborted", "HTTP requests that the server or the client broke off, by reason.", "reason")
        self.engine_errors = counter("engine_errors", "Exceptions in a step of the engine.")
        self.http = counter("http_requests", "Answers, by path and status.", "path", "status")

    def page(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's counters, under their metric names."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]):
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        counters = self._snapshot()
        for name, value in counters.items():
            if name in TOTALS:
                metric, label, text = TOTALS[name]
                yield _family(CounterMetricFamily, metric, label, text, value)
            elif name in GAUGES:
                metric, label, text = GAUGES[name]
                yield _family(GaugeMetricFamily, metric, label, text, value)
            elif name in HISTOGRAMS:
                yield _histogram(*HISTOGRAMS[name], value)
            elif isinstance(value, int | float):
                yield _family(GaugeMetricFamily, "engine_" + re.sub("[^a-zA-Z0-9_]", "_", name), None, "As the engine counts it.", value)
        if (usage := kv_usage(counters)) is not None:
            yield _family(GaugeMetricFamily, "kv_cache_usage_perc", None, "Pages held by sequences, of all; 1 is all.", usage)


def kv_usage(counters: Mapping[str, Any]) -> float | None:
    """Pages that sequences hold, of all pages, 0 to 1; None where the engine doesn't count pages."""
    pages = counters.get("pages")
    if not isinstance(pages, Mapping) or not sum(pages.values()):
        return None
    return pages.get("held", 0) / sum(pages.values())


def _family(family: type, metric: str, label: str | None, text: str, value: Any) -> Metric:
    """One metric; a dict's values by label, or their sum where the metric has none."""
    labelled = isinstance(value, Mapping)
    found = family(PREFIX + metric, text, labels=[label] if label and labelled else None)
    if label and labelled:
        for key, part in value.items():
            found.add_metric([str(key)], float(part))
    else:
        found.add_metric([], float(sum(value.values()) if labelled else value))
    return found


def _histogram(metric: str, text: str, value: Mapping[str, Any]) -> Metric:
    bounds = [str(float(bound)) for bound in value["bounds"]] + ["+Inf"]
    sums = [float(total) for total in itertools.accumulate(value["counts"])]
    return HistogramMetricFamily(PREFIX + metric, text, buckets=list(zip(bounds, sums, strict=True)), sum_value=float(value["sum"]))
