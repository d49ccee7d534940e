"""Pace: how soon a request may go, where a server allows so many requests and tokens a minute."""

import threading
import time


class Pace:
    """Spaces requests evenly: one every `60 / requests` seconds, and tokens at `tokens / 60` a second.

    What a request will take is not known before its answer: it is booked by the mean of the answers so far, the first
    ones by the most that they can take, and put right when the answer is there. May be called from any thread.

    Args:
        requests, tokens: a minute, of prompts and completions together; None is no limit.
    """

    def __init__(self, requests: float | None, tokens: float | None):
        self.seconds_a_request = 60 / requests if requests else 0.0
        self.seconds_a_token = 60 / tokens if tokens else 0.0
        self._lock = threading.Lock()
        self._free = self._free_tokens = time.monotonic()
        self._answers = self._tokens = 0

    def begin(self, most: int) -> tuple[float, float]:
        """Book a request of at most so many tokens; return the seconds to wait for it, and the tokens booked."""
        with self._lock:
            now = time.monotonic()
            booked = self._tokens / self._answers if self._answers else float(most)
            start = max(now, self._free, self._free_tokens)
            self._free = start + self.seconds_a_request
            self._free_tokens = max(now, self._free_tokens) + booked * self.seconds_a_token
            return start - now, booked

    def end(self, booked: float, tokens: int) -> None:
        """Put a booking right: the request took so many tokens."""
        with self._lock:
            self._answers, self._tokens = self._answers + 1, self._tokens + tokens
            self._free_tokens += (tokens - booked) * self.seconds_a_token
