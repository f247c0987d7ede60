"""Requests and answers between processes: two ends in one process, with a thread each."""

import concurrent.futures
import contextlib
import queue
import re

import numpy as np
import pytest

from lsgd_jax.asynchronous import transport
from lsgd_jax.asynchronous.transport import Endpoint
from lsgd_jax.errors import UsageError

HANG = 60
SIZE = 3 * 10**6
"""More bytes than a socket takes at once."""


@pytest.fixture
def endpoint(monkeypatch):
    """Begins ends that send back what they get, without haste; all are closed in the end."""
    monkeypatch.setattr(transport, "PATIENCE", HANG)

    async def echo(request, arrays):
        if request == "nonsense":
            raise ValueError("not a request")
        return request, arrays

    with contextlib.ExitStack() as ends:

        def endpoint(**options):
            end = Endpoint(echo, room=lambda size: [bytearray(size)], secret=bytes(32), **options)
            ends.callback(end.close)
            return end

        yield endpoint


def ask(end, other, *arguments, **options):
    return end.start(end.ask(other.address, *arguments, **options)).result(HANG)


def test_arrays_go_there_and_back(endpoint):
    one, other = endpoint(), endpoint()
    array, back = np.random.default_rng(0).bytes(SIZE), bytearray(SIZE)
    for _ in range(2):  # The second time over the same connection.
        assert ask(one, other, SIZE, [array], [back]) == SIZE
        assert back == array
        back = bytearray(SIZE)
    assert ask(one, other, {"no": ["arrays", None, 0.1]}) == {"no": ["arrays", None, 0.1]}
    assert ask(one, other, None, into=[back]) is None  # Nothing may come without arrays.


@pytest.mark.parametrize("asked", [("request", [], [bytearray(1)]), (1, [b"12"], [bytearray(1)]), ("nonsense",)])
def test_what_does_not_fit_together_is_refused(asked, endpoint):
    """Arrays that are not expected, or of another size, or a senseless request; the next request works."""
    one, other = endpoint(), endpoint()
    with pytest.raises(ConnectionError):
        ask(one, other, *asked)
    assert ask(one, other, "another") == "another"


def test_connections_that_are_not_used_make_way(endpoint, monkeypatch):
    monkeypatch.setattr(transport, "MOST_CONNECTIONS", 2)
    asked, closed = endpoint(), queue.Queue()
    asking = [endpoint(closed=lambda _, i=i: closed.put(i)) for i in range(3)]
    for i in (0, 1, 0, 2):  # The third makes the second one go.
        assert ask(asking[i], asked, i) == i
    assert closed.get(timeout=HANG) == 1
    assert ask(asking[0], asked, "again") == "again"
    assert closed.empty()
    assert ask(asking[1], asked, "anew") == "anew"


def test_closing_an_end_ends_who_waits_there(endpoint):
    one = endpoint(faults=lambda address: "drop")
    waiting = one.start(one.ask("127.0.0.1:1", None, seconds=HANG))
    one.close()
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(HANG)
    with pytest.raises(ConnectionError, match="closed"):
        ask(one, one, None)
    one.close()  # Does nothing.


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "::", ""])
def test_where_nobody_can_be_reached_nobody_listens(host, endpoint):
    with pytest.raises(UsageError, match=rf"at an address at which others reach it, got {host or repr(host)}\.$"):
        endpoint(host=host)


@pytest.mark.parametrize("host", ["192.0.2.1", "node..local", 64 * "x"])
def test_an_address_of_another_host_is_one_sentence(host, endpoint):
    said = rf"^this process can't listen at {re.escape(host)} \(.+\): name an address of its host\.$"
    with pytest.raises(UsageError, match=said):
        endpoint(host=host)


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:0", "127.0.0.1:99999"])
def test_what_is_no_address_can_not_be_asked(address, endpoint):
    one = endpoint()
    with pytest.raises(ConnectionError):
        one.start(one.ask(address, None)).result(HANG)
