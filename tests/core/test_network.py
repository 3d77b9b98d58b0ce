import socket
import time

import pytest

from altgrad_core.network import reachable


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent():
    """A host that lets every connection hang: its queue of one is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.socket() as waiting:
        waiting.connect(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_host_that_takes_the_connection_is_reachable(listening):
    assert reachable(f"http://{listening}/some/file")


def test_a_host_that_refuses_is_not(closed):
    assert not reachable(f"https://{closed}")


def test_a_host_that_says_nothing_is_given_up_soon(silent):
    start = time.monotonic()
    assert not reachable(f"http://{silent}")
    assert 0.6 < time.monotonic() - start < 15  # without a timeout it is minutes


def test_a_name_that_nobody_looks_up_is_given_up_soon(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30) or [])
    start = time.monotonic()
    assert not reachable("http://hub.invalid")
    assert time.monotonic() - start < 15


def test_an_address_without_a_host_is_not_reachable():
    assert not reachable("http://")


@pytest.mark.parametrize("form", ["http://{}", "{}", "socks5://user:secret@{}"])
def test_behind_a_proxy_the_proxy_is_asked(monkeypatch, listening, closed, form):
    monkeypatch.setenv("all_proxy", form.format(listening))
    assert reachable(f"https://{closed}")
    monkeypatch.setenv("all_proxy", form.format(closed))
    assert not reachable(f"https://{listening}")


def test_a_host_that_needs_no_proxy_is_asked_itself(monkeypatch, listening, closed):
    monkeypatch.setenv("http_proxy", f"http://{closed}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert reachable(f"http://{listening}")
