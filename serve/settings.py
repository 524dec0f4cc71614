"""`Settings`: what the server allows, and how long it waits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Overflow = Literal["error", "truncate-oldest"]


@dataclass(frozen=True)
class Settings:
    """How a server treats its clients.

    Attributes:
        api_key: what clients must send; None asks for nothing.
        overflow: "error" refuses a prompt that does not fit; "truncate-oldest" drops its oldest messages or tokens, and
            says in the answer how many.
        queue: how many prompts may wait, of one artifact, before others are refused with 429.
        max_stall: seconds for which reading prompts may keep other texts from their next tokens, and a client that left
            may keep its slot, as far as the artifact's smallest calls allow.
        timeout: seconds that a request may take.
        drain: seconds that running requests are given after SIGTERM.
        ping: seconds between comments in a stream that has nothing else to say.
        body_timeout: seconds without a byte after which a body that has not ended is given up.
        max_choices: texts that one request may ask for: its prompts, each `n` times.
        max_inputs: texts that one request may ask to encode or to rank.
        max_tokens: new tokens that a request may ask for; None leaves it to the context.
        max_body: bytes of a request.
        cache_dir: where prompts that were read can be saved; None for nowhere.
        cors_origins: from which web pages may ask; "*" for all.

    Raises:
        ValueError: a value that makes no sense.
    """

    api_key: str | None = None
    overflow: Overflow = "error"
    queue: int = 64
    max_stall: float = 0.5
    timeout: float = 3600.0
    drain: float = 60.0
    ping: float = 10.0
    body_timeout: float = 30.0
    max_choices: int = 16
    max_inputs: int = 2048
    max_tokens: int | None = None
    max_body: int = 32 << 20
    cache_dir: Path | None = None
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("queue", "max_choices", "max_inputs", "max_tokens", "max_body"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name in ("max_stall", "timeout", "ping", "body_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number of seconds above 0")
        if not self.drain >= 0:
            raise ValueError(f"drain is {self.drain}, expected a number of seconds")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty: give one with characters, or none")
