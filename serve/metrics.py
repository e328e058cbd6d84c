"""`Metrics`: what Prometheus is told: requests, how long, how many at a time, how fresh the forecast is."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Scope

from serve.forecasts import Forecasts

UNMATCHED = "none"
"""The route of what no route answers; labels never hold text of a request."""


class Metrics:
    """The numbers of one service, in a registry of its own."""

    def __init__(self, forecasts: Forecasts) -> None:
        self._forecasts = forecasts
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "metnet_http_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "metnet_http_request_duration_seconds",
            "From a request to the beginning of its answer.",
            ("route",),
            registry=self.registry,
        )
        self.in_flight = self._gauge("metnet_http_requests_in_flight", "Requests being answered.")
        self.limit = self._gauge("metnet_http_requests_in_flight_limit", "Beyond it, 503.")
        init = self._gauge("metnet_newest_run_init_timestamp_seconds", "Of the newest run; 0: there is none.")
        init.set_function(self._init_time)
        stale = self._gauge("metnet_stale", "1 if the newest run is old or there is none.")
        stale.set_function(self._stale)
        reachable = self._gauge("metnet_store_reachable", "1 if the last look at the store succeeded.")
        reachable.set_function(self._reachable)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts an answer; `scope` is the one that the router saw."""
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._answers.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self.registry)

    def _init_time(self) -> float:
        _, runs = self._forecasts.newest(1)
        return runs[0].header.init_time.timestamp() if runs else 0.0

    def _stale(self) -> float:
        _, runs = self._forecasts.newest(1)
        return float(not runs or runs[0].stale)

    def _reachable(self) -> float:
        self._forecasts.newest(1)  # looks at the store, if it is time
        return float(self._forecasts.reachable)
