"""Whether a host answers, found out at once.

Clients of file hubs try again and again for minutes before they give up. Whoever is about to download asks
here first, and can say within a second that there is no network, and what to do without one.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse
import urllib.request

PATIENCE = 0.7
"""Seconds that a connection may take: several round trips around the world."""

PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


def reachable(url: str, patience: float = PATIENCE) -> bool:
    """Return whether the host of `url`, or the proxy in front of it, takes a connection in `patience` s."""
    host, port = _first_hop(url)
    answers: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=patience):
            answers.append(True)

    # The look-up of a name takes no timeout, so a thread that nobody waits for longer does it.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers)


def _first_hop(url: str) -> tuple[str, int]:
    """Return host and port of the proxy that the environment names for `url`, else of `url` itself."""
    target = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return target.hostname or "", target.port or PORTS.get(target.scheme, PORTS["https"])
