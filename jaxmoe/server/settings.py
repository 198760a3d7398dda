"""What a server may be told: its address, its keys and its limits. Plain values; nothing here opens anything."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Address, keys and limits.

    Attributes:
        model: name under which the model is served; the engine's own if empty.
        host, port: where it listens; port 0 takes a free one.
        api_keys: any of them opens /v1; none: open to all who reach it.
        allow_public: listen on an address that others can reach although there is no key.
        allow_truncation: `truncate_prompt_tokens` may be asked for; it keeps the end of a prompt, and the answer says how many tokens went.
        default_tokens: new tokens of a chat that doesn't say how many, at most.
        max_choices: n, at most.
        max_prompts: prompts of one request, at most.
        max_sequences: prompts times n of one request, at most.
        max_body_bytes: of a request.
        max_concurrent: requests to /v1 that are worked on or wait at a time, before the engine's own queue limits them; the next ones get 429.
        max_connections: open connections; further ones get 503.
        retry_seconds: what Retry-After says.
        request_seconds: wall time of a request from its last byte to its answer's; then 504, or an error in the stream.
        header_seconds, body_seconds: in which a client has to send them.
        keep_alive_seconds: that an idle connection stays open.
        last_word_seconds: for telling a client that reads too slowly why its answer ends.
        close_seconds: for what is still unsent when a connection is closed.
        buffer_bytes: of a streamed answer that its reader hasn't taken yet, and a quarter more for each further answer of the same request; beyond,
            the request is aborted.
        send_buffer_bytes: of the kernel, for each connection.
        drain_seconds: that running requests get at the end.
        log_seconds: between two lines of statistics; 0 for none.
    """

    model: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allow_public: bool = False
    allow_truncation: bool = False
    default_tokens: int = 1024
    max_choices: int = 16
    max_prompts: int = 64
    max_sequences: int = 128
    max_body_bytes: int = 2 * 2**20
    max_concurrent: int = 256
    max_connections: int = 512
    retry_seconds: int = 1
    request_seconds: float = 600.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    keep_alive_seconds: int = 15
    last_word_seconds: float = 2.0
    close_seconds: float = 60.0
    buffer_bytes: int = 2**18
    send_buffer_bytes: int = 2**17
    drain_seconds: float = 30.0
    log_seconds: float = 10.0

    def check(self) -> None:
        """Raises ValueError where a value can't be used, or where the address can be reached by others and there is no key."""
        positive = {field.name for field in dataclasses.fields(self) if field.name.startswith("max_")}
        positive |= {"default_tokens", "request_seconds", "header_seconds", "body_seconds", "buffer_bytes", "send_buffer_bytes", "close_seconds"}
        zero = {"port", "retry_seconds", "keep_alive_seconds", "last_word_seconds", "drain_seconds", "log_seconds"}
        for name in sorted(positive | zero):
            value = getattr(self, name)
            if not value >= 0 or (value == 0 and name in positive):
                raise ValueError(f"{name} is {value}; it must be {'more than 0' if name in positive else '0 or more'}")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535")
        for key in self.api_keys:
            if not key or not key.isascii() or key != key.strip() or not key.isprintable():
                raise ValueError("an API key is empty or has characters that no header can carry: use printable ASCII without blanks at its ends")
        if not self.api_keys and not self.allow_public and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and there is no API key: give one, or say that this is meant (allow_public)"
            )


def is_loopback(host: str) -> bool:
    """Whether a host, as a name or a number, is this machine alone; False for '' (every address), and for names that can't be resolved."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[4][0]).split("%")[0]).is_loopback for address in found)
