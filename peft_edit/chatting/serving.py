"""Where a page is served, and to whom."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

from ..arguments import Argument, ArgumentError, check_options


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """
    Where a page is served.

    Args:
        host (`str`):
            Address that it listens on. By default that of this machine for itself alone; 0.0.0.0 is for all others.
        port (`int`):
            Port.
        share (`bool`):
            Let gradio make a public address for it, by a tunnel through its own servers.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on. 0.0.0.0: for other machines too."})
    port: int = field(
        default=7860, metadata={"help": "Port.", "minimum": 1, "maximum": 65535, "allowed": "from 1 to 65535"}
    )
    share: bool = field(
        default=False, metadata={"help": "Make a public address, by a tunnel through gradio's servers."}
    )

    def __post_init__(self):
        check_options(self)

    @property
    def is_private(self) -> bool:
        """Whether this machine alone can open the page."""
        return self.host in LOOPBACK and not self.share

    def check_free(self) -> None:
        """Raise ArgumentError where the page cannot be served, before anything is loaded for it."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                name, problem = "host", f" {self.host} is no address of this machine: pass 127.0.0.1 or 0.0.0.0"
                if error.errno == errno.EADDRINUSE:
                    name, problem = "port", f" {self.port} of {self.host} is in use: pass another"
                elif isinstance(error, PermissionError):
                    name, problem = "port", f" {self.port} is for the system: pass one of at least 1024"
                raise ArgumentError(Argument(name), problem) from error
