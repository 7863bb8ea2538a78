"""Options of the server; apart from what it does, so that they can be listed without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.errors import OptionError, at_least
from qpeft.options import Checked


@dataclass(frozen=True)
class Settings(Checked):
    """Serving."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, and then with keys."""
    port: int = 8080
    """Port to listen on; 0: any free one."""
    adapters: str | None = None
    """Folder with adapter folders; each that fits the model is served as BASE:NAME."""
    template: str | None = None
    """Template without an adapter: a name or a YAML file; by default plain. An adapter has its own."""
    calibration: str | None = None
    """File from qpeft calibrate, for the model without an adapter; an adapter has its own in its folder."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens; by default as the adapter was trained, or what the model's context demands."""
    api_key_file: str | None = None
    """File with one key per line; QPEFT_API_KEYS (commas between) works too. Without keys, everybody may ask."""
    max_documents: int = 1000
    """Documents of one query."""
    max_body_mib: float = 8.0
    """Size of a request's body."""
    max_queue_pairs: int = 8192
    """(query, document) pairs that may wait; beyond, requests are refused with 429."""
    max_batch_pairs: int = 128
    """Pairs that go to the model together, from any number of requests."""
    max_wait_ms: float = 5.0
    """How long a request waits for others to share its batch."""
    request_timeout: float = 60.0
    """Seconds until a request is given up with 504."""
    drain_timeout: float = 30.0
    """Seconds that accepted requests have after SIGTERM."""
    cors_origin: tuple[str, ...] = ()
    """Web origin that browsers may ask from; may be given several times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, max_passage_tokens=self.max_passage_tokens, max_documents=self.max_documents)
        at_least(1, max_queue_pairs=self.max_queue_pairs, max_batch_pairs=self.max_batch_pairs)
        at_least(0, port=self.port, max_wait_ms=self.max_wait_ms)
        for name in ("max_body_mib", "request_timeout", "drain_timeout"):
            if not getattr(self, name) > 0:
                raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if self.port > 65535:
            raise OptionError(f"--port is {self.port}; it must be at most 65535")
