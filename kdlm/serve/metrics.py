"""What the server counts, as Prometheus reads it."""

import threading
from collections import Counter

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram, in seconds."""


class Metrics:
    """Counters since the server began: bounded in size, whatever is asked."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._within: Counter[tuple[str, float]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._totals = Counter({"batches": 0, "batched_requests": 0, "tokens": 0, "rows": 0})

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds  # pyright: ignore[reportArgumentType]  a Counter adds floats as well
            for bound in BOUNDS:
                self._within[path, bound] += seconds <= bound

    def batch(self, requests: int, tokens: int, rows: int) -> None:
        """Count what the model read at once."""
        with self._lock:
            self._totals.update({"batches": 1, "batched_requests": requests, "tokens": tokens, "rows": rows})

    def text(self, waiting: int) -> str:
        """Return everything in Prometheus's text format; `waiting` is the length of the queue."""
        with self._lock:
            lines = ["# TYPE kdlm_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'kdlm_requests_total{{path="{path}",status="{status}"}} {count}')
            for name, total in self._totals.items():
                lines += [f"# TYPE kdlm_{name}_total counter", f"kdlm_{name}_total {total}"]
            lines += ["# TYPE kdlm_queue_length gauge", f"kdlm_queue_length {waiting}"]
            lines.append("# TYPE kdlm_request_seconds histogram")
            for path in sorted(self._seconds):
                count = sum(n for (other, _), n in self._requests.items() if other == path)
                for bound in BOUNDS:
                    within = self._within[path, bound]
                    lines.append(f'kdlm_request_seconds_bucket{{path="{path}",le="{bound:g}"}} {within}')
                lines.append(f'kdlm_request_seconds_bucket{{path="{path}",le="+Inf"}} {count}')
                lines.append(f'kdlm_request_seconds_sum{{path="{path}"}} {self._seconds[path]:.6f}')
                lines.append(f'kdlm_request_seconds_count{{path="{path}"}} {count}')
        return "\n".join(lines) + "\n"
