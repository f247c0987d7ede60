"""Hostile bytes and senseless messages at the port of a process of posted mode."""

import contextlib
import hmac
import json
import os
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest

from lsgd_jax.asynchronous import transport
from lsgd_jax.asynchronous.board import Post
from lsgd_jax.asynchronous.gossip import GossipBoard
from lsgd_jax.asynchronous.transport import Endpoint
from lsgd_jax.distributed.meeting import host_and_port
from tests.reliability import faults

MESSAGES = 10_000 if faults.SOAK else 200
MOST_MEMORY = 2**26
"""Bytes that all of them may take together, with the ends that send them."""
SECRET, WRONG = bytes(32), bytes(31) + b"\1"
PARAMS = {"w": np.arange(6, dtype=np.float32).reshape(1, 1, 6)}
FORGED = {"view": [[0, 9, 9, 0.0, "127.0.0.1:9", 9, -9.0, True, 10**9]]}
"""Would make worker 0 lead from an address of the attacker's, in a life that has not begun."""
SENSELESS = [None, True, -1, "view", [], {}, {"view": None}, {"view": [[]]}, {"view": [[0, 1, 2]]}, {"take": "0"}]
SENSELESS += [{"take": None}, {"view": [[0, 9, 9, 0.0, "x", 9, -9.0, True, 9]]}, {"view": {"0": 1}}, 10**300, [[[]]]]


def framed(text, arrays=0, length=None):
    return struct.pack("<IQ", len(text) if length is None else length, arrays) + text


def proof(secret, address, challenge, role=b"asks", own=bytes(32)):
    return own + hmac.digest(secret, b"\0".join((role, address.encode(), challenge + own)), "sha256")


def garbage(address, challenge, rng):
    return rng.randbytes(rng.choice([1, 63, 64, 65, 10**4]))


def http(address, challenge, rng):
    return b"GET /view HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3


def unproved(address, challenge, rng):
    return rng.randbytes(64) + framed(json.dumps(FORGED).encode())


def wrong_secret(address, challenge, rng):
    return proof(WRONG, address, challenge) + framed(json.dumps(FORGED).encode())


def wrong_address(address, challenge, rng):
    """As if a process had dialed the attacker, who passes on its proof."""
    return proof(SECRET, "127.0.0.1:9", challenge) + framed(json.dumps(FORGED).encode())


def wrong_role(address, challenge, rng):
    """As if a process had answered the attacker's challenge."""
    return proof(SECRET, address, challenge, role=b"answers") + framed(json.dumps(FORGED).encode())


def replay(address, challenge, rng):
    """What a process has sent on another connection."""
    return proof(SECRET, address, rng.randbytes(32)) + framed(json.dumps(FORGED).encode())


def truncated(address, challenge, rng):
    whole = proof(SECRET, address, challenge) + framed(json.dumps(FORGED).encode())
    return whole[: rng.randrange(len(whole))]


def huge_length(address, challenge, rng):
    lengths = {"length": rng.choice([transport.MOST_JSON + 1, 2**32 - 1])} if rng.random() < 0.5 else {}
    return proof(SECRET, address, challenge) + framed(
        b"{}", rng.choice([0 if lengths else 1, 2**40, 2**64 - 1]), **lengths
    )


def not_json(address, challenge, rng):
    return proof(SECRET, address, challenge) + framed(rng.choice([b"", b"\xff", b"{", b"[" * 10**5, rng.randbytes(99)]))


def senseless(address, challenge, rng):
    return proof(SECRET, address, challenge) + framed(json.dumps(rng.choice(SENSELESS)).encode())


STRANGERS = [garbage, http, unproved, wrong_secret, wrong_address, wrong_role, replay]
MEMBERS = [truncated, huge_length, not_json, senseless]
"""With a valid proof, as a process of another version might send."""


def attack(address, kind, rng):
    """Send a message; returns what comes back after the challenge, until the connection is closed."""
    answer = bytearray()
    with socket.create_connection(host_and_port(address), timeout=faults.HANG) as connection:
        challenge = connection.recv(32, socket.MSG_WAITALL)
        with contextlib.suppress(ConnectionError):
            connection.sendall(kind(address, challenge, rng))
            with contextlib.suppress(OSError):  # Not connected any more.
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(2**16):
                answer += piece
    return bytes(answer)


def drip(connection):
    """Send one byte at a time until the connection is closed."""
    with contextlib.suppress(ConnectionError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def boards(tmp_path):
    """Of two processes, and the events of the first."""
    events, boards = [], []
    for position in range(2):
        log = {"log": lambda name, **values: events.append((name, values))} if position == 0 else {}
        boards.append(GossipBoard(tmp_path, [position], PARAMS, secret=SECRET, **log))
        boards[-1].write(position, 3, Post(1, 3, 1.0, True, PARAMS))
    faults.until(lambda: all(len(board.read()[0]) == 2 for board in boards))
    yield boards, events
    for board in boards:
        board.close()


def test_nothing_that_is_hostile_is_answered_or_believed(boards, record_property):
    (board, other), events = boards
    rng, threads, begun = random.Random(0), threading.active_count(), time.monotonic()
    for number in range(MESSAGES):
        if number == MESSAGES // 10:
            before = memory()
        kind = [*STRANGERS, *MEMBERS][number % len(STRANGERS + MEMBERS)]
        answer = attack(board.address, kind, rng)
        # After the proof in return, nothing.
        assert len(answer) == 0 or (kind in MEMBERS and len(answer) == 32), kind
    assert memory() - before < MOST_MEMORY
    assert threading.active_count() <= threads + 2  # Names are resolved in threads of their own.
    assert board.read() == ({0: board._posts[0], 1: Post(1, 3, 1.0, True, None)}, {0: 3, 1: 3})
    assert not board.replaced
    _, post = other.take(0, other.read()[0][0], None)
    assert post == Post(1, 3, 1.0, True, None)
    names = [name for name, _ in events]
    assert names.count("dead") == 0
    assert 0 < names.count("dropped") <= 1 + (time.monotonic() - begun) / transport.LOG_EVERY
    record_property("hostile messages", MESSAGES)


def test_strangers_who_say_nothing_do_not_keep_others_out(boards, tmp_path):
    ((board, _), events), begun = boards, time.monotonic()
    silent = [socket.create_connection(host_and_port(board.address)) for _ in range(3 * transport.MOST_STRANGERS)]
    third = GossipBoard(tmp_path, [2], PARAMS, secret=SECRET)
    faults.until(lambda: len(third.members()) == len(board.members()) == 3)
    third.close()
    for connection in silent:  # All are closed: most at once, for there are too many, and the others in time.
        connection.settimeout(faults.HANG)
        while connection.recv(64):
            pass
        connection.close()
    entries = [values for name, values in events if name == "dropped"]
    assert 0 < len(entries) <= 1 + (time.monotonic() - begun) / transport.LOG_EVERY
    assert all(entry["peer"] == "127.0.0.1" for entry in entries)


def test_slow_pieces_do_not_prolong_a_deadline():
    """Each piece comes soon, but the whole does not: of the asked as of who asks."""

    async def answer(request, arrays):
        return request, ()

    endpoint = Endpoint(answer, secret=SECRET)
    with socket.create_connection(host_and_port(endpoint.address), timeout=faults.HANG) as connection:
        connection.recv(32, socket.MSG_WAITALL)
        drip(connection)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(faults.HANG)
        asking = endpoint.start(endpoint.ask("{}:{}".format(*listener.getsockname()), None, seconds=2))
        connection, _ = listener.accept()
        with connection:
            drip(connection)
        with pytest.raises(TimeoutError):
            asking.result(faults.HANG)
    endpoint.close()


def test_who_does_not_know_the_secret_is_not_asked(monkeypatch):
    """A stranger at an address of the run learns no request, and its answers are not read."""
    monkeypatch.setattr(transport, "PATIENCE", faults.HANG)

    async def answer(request, arrays):
        return request, ()

    ends = [Endpoint(answer, secret=secret) for secret in (SECRET, WRONG)]
    for one, other in (ends, ends[::-1]):
        with pytest.raises(ConnectionError):
            one.start(one.ask(other.address, "a request")).result(faults.HANG)
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(bytes(32))
                connection.recv(64, socket.MSG_WAITALL)
                connection.sendall(bytes(32) + framed(b'"an answer"'))
                heard.append(connection.recv(64))

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(ConnectionError, match="it does not know the run's secret"):
            ends[0].start(ends[0].ask("{}:{}".format(*listener.getsockname()), "a request")).result(faults.HANG)
        thread.join()
    assert not any(heard)
    for end in ends:
        end.close()
