"""What a recipe says about a server, and where the key comes from."""

import os
from typing import Any, ClassVar

from pydantic import Field

from kdlm.remote import Endpoint, Remote
from kdlm.section import Section


class ServerOptions(Section):
    """Where a server is, and how it is asked."""

    place: ClassVar[str] = "teacher"
    """The key of a recipe under which these options stand."""

    url: str = Field(pattern=r"^https?://[^/?#\s]+/?$")
    """Where the server is: `http://127.0.0.1:8100`."""
    key_env: str | None = None
    """Name of the environment variable that holds the server's key. The key itself never stands in a recipe."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one try may take."""
    patience: float = Field(300.0, gt=0)
    """Seconds that a request is tried for before the run ends, with a checkpoint, for want of an answer."""
    concurrency: int = Field(8, ge=1)
    """Requests that are under way at once."""

    def remote(self, **changes: Any) -> Remote:
        """Return what asks the server; `changes` replace values of the endpoint. Raises ValueError without the key."""
        key = None if self.key_env is None else key_in(self.key_env, f"{self.place}.key_env")
        values = {
            "timeout": self.timeout,
            "patience": self.patience,
            "concurrency": self.concurrency,
            "place": f"{self.place}.url",
        }
        return Remote(Endpoint(self.url.rstrip("/"), key, **(values | changes)))


def key_in(variable: str, asked_by: str) -> str:
    """Return the key in an environment variable. Raises ValueError, naming who asked, where there is none to send."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{asked_by}: the environment variable {variable} is not set, or empty")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{asked_by}: the key in {variable} has characters that a header cannot carry")
    return key
