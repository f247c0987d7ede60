"""Requests and answers between the processes of a run, over TCP.

Both ends of a connection prove that they know the run's secret before anything else is read: each sends a random
challenge and receives an HMAC-SHA256, keyed by the secret, of the sender's role, the address that was dialed and both
challenges. A recorded proof is worth nothing on another connection, nor is a proof for another address or by the other
role. What follows is neither encrypted nor signed.

A message is a JSON value of limited size, and possibly arrays as raw bytes, whose sizes the receiver knows. It has a
deadline as a whole, however slowly its pieces come. One thread with an asyncio event loop does all of it: an `Endpoint`
has as many connections as it needs, up to limits, and no thread waits for the network but the one that asks.
"""

import asyncio
import hmac
import ipaddress
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Literal

from lsgd_jax.distributed.meeting import host_and_port
from lsgd_jax.errors import UsageError

PATIENCE = 1.0
"""Seconds in which a connection, a proof or a message without arrays must have come as a whole."""
SLOWEST = 10e6
"""Bytes per second that arrays are granted on top of `PATIENCE`."""
MOST_JSON = 2**24
"""Limit in bytes on a message without its arrays."""
MOST_STRANGERS = 64
"""Limit on connections whose other end has yet to prove that it knows the secret: the oldest makes way for the next."""
MOST_CONNECTIONS = 1024
"""Limit on connections whose other end has proved it: the one that was not used for the longest time makes way."""
LOG_EVERY = 10.0
"""Seconds between two log entries about what was dropped: hostile bytes must not fill the log."""

_LENGTHS = struct.Struct("<IQ")
"""Bytes of JSON and of arrays in a message."""
_CHALLENGE = _PROOF = 32

Faults = Callable[[str], float | Literal["drop"]]
"""Fault injection: from the address that is asked to seconds of delay before the request, or "drop" to lose it."""
Buffer = Any
"""A writable or readable buffer of bytes: a memoryview or an array of uint8."""


def seconds_for(nbytes: int) -> float:
    """The deadline of a message with arrays of this size."""
    return PATIENCE + nbytes / SLOWEST


class Endpoint:
    """One process's end of the connections among all processes of a run."""

    def __init__(
        self,
        answer: Callable[[Any, Sequence[Buffer]], Awaitable[tuple[Any, Sequence[Buffer]]]],
        *,
        secret: bytes,
        room: Callable[[Any], Sequence[Buffer]] = lambda request: (),
        host: str = "127.0.0.1",
        faults: Faults | None = None,
        closed: Callable[[str], None] = lambda address: None,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Start to listen, at a free port.

        Args:
          answer: from a request and its arrays to the answer and the arrays that go with it; called in the endpoint's
            thread, which it must not block.
          secret: of the run.
          room: from a request to the buffers for its arrays, of their exact sizes.
          host: where to listen, and where others reach this process: the address or name of one interface.
          faults: injected into requests; None: none.
          closed: told the address of a process that has closed an idle connection; called in the endpoint's thread.
          log: takes the name of an event and its values.

        Raises:
          UsageError: if it can't listen there.
        """
        self._answer, self._room, self._secret = answer, room, secret
        self._faults, self._closed, self._log = faults, closed, log
        self._listener = _listen(host)
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """host:port, as others reach it."""
        self._idle: dict[str, list[socket.socket]] = {}
        self._strangers: dict[asyncio.Task, None] = {}
        self._served: dict[asyncio.Task, None] = {}
        self._dropped, self._log_at = 0, 0.0
        self._lock, self._is_closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._loop.add_reader(self._listener, self._accept)
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine) -> Any:
        """Run a coroutine in the endpoint's thread; returns its `concurrent.futures.Future`.

        Raises:
          ConnectionError: if the endpoint is closed.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise ConnectionError("closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def ask(
        self,
        address: str,
        request: Any,
        arrays: Sequence[Buffer] = (),
        into: Sequence[Buffer] = (),
        *,
        seconds: float | None = None,
    ) -> Any:
        """Ask a process; call it in the endpoint's thread, such as by `start`.

        Args:
          address: of the process.
          request: a value for JSON.
          arrays: that go with it.
          into: buffers for the arrays of the answer, of their exact sizes; they may be written even if it fails.
          seconds: deadline of all; None: what its size is granted.

        Returns:
          The answer; if it is None, there may be no arrays.

        Raises:
          OSError: if it does not come in time, whatever the reason.
        """
        async with asyncio.timeout(seconds_for(_size(arrays) + _size(into)) if seconds is None else seconds):
            await self._inject_fault(address)
            while (idle := self._take_idle(address)) is not None:
                try:
                    return await self._ask(address, idle, request, arrays, into)
                except ConnectionError:  # Closed just now: what only reads can be asked for again.
                    if arrays:
                        raise
            return await self._ask(address, await self._connect(address), request, arrays, into)

    def close(self) -> None:
        """Close all connections and end the thread; whatever waits for an answer is cancelled."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for address in list(self._idle):
            while (idle := self._take_idle(address)) is not None:
                idle.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Asking

    async def _inject_fault(self, address: str) -> None:
        fault = self._faults(address) if self._faults is not None else 0.0
        if fault == "drop":
            await asyncio.Event().wait()  # Until the deadline.
        elif fault:
            await asyncio.sleep(fault)

    async def _ask(
        self,
        address: str,
        connection: socket.socket,
        request: Any,
        arrays: Sequence[Buffer],
        into: Sequence[Buffer],
    ) -> Any:
        try:
            await self._send(connection, request, arrays)
            answer, size = await self._receive(connection)
            if answer is not None or size:
                await self._receive_arrays(connection, size, into)
        except BaseException:
            connection.close()
            raise
        self._idle.setdefault(address, []).append(connection)
        # An idle connection has nothing to read before its other end is closed.
        self._loop.add_reader(connection, self._drop_idle, address, connection)
        return answer

    async def _connect(self, address: str) -> socket.socket:
        try:
            host, port = host_and_port(address)
            family, *_, place = (await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        except ValueError as error:
            raise ConnectionError(error) from None
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await self._loop.sock_connect(connection, place)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs, own = await self._receive_bytes(connection, _CHALLENGE), secrets.token_bytes(_CHALLENGE)
            await self._loop.sock_sendall(connection, own + self._proof("asks", address, theirs, own))
            if not hmac.compare_digest(
                await self._receive_bytes(connection, _PROOF), self._proof("answers", address, theirs, own)
            ):
                raise ConnectionError("it does not know the run's secret")
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_idle(self, address: str) -> socket.socket | None:
        if not (connections := self._idle.get(address)):
            self._idle.pop(address, None)
            return None
        connection = connections.pop()
        self._loop.remove_reader(connection)
        return connection

    def _drop_idle(self, address: str, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._idle[address].remove(connection)
        connection.close()
        self._closed(address)

    # Answering

    def _accept(self) -> None:
        try:
            connection, peer = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # Such as too many open files.
            self._loop.remove_reader(self._listener)
            self._loop.call_later(0.1, self._loop.add_reader, self._listener, self._accept)
            return
        connection.setblocking(False)
        if len(self._strangers) >= MOST_STRANGERS:
            self._end_first(self._strangers, peer, f"there are {MOST_STRANGERS} connections of strangers already")
        task = self._loop.create_task(self._serve(connection, peer))
        self._strangers[task] = None
        task.add_done_callback(partial(self._forget, connection))

    def _forget(self, connection: socket.socket, task: asyncio.Task) -> None:
        connection.close()
        self._strangers.pop(task, None)
        self._served.pop(task, None)

    def _end_first(self, tasks: dict[asyncio.Task, None], peer: Any, why: str) -> None:
        task = next(iter(tasks))
        del tasks[task]
        task.cancel()
        self._note_dropped(peer, f"{why}: the oldest makes way")

    async def _serve(self, connection: socket.socket, peer: Any) -> None:
        """Answer the requests of one connection."""
        try:
            async with asyncio.timeout(PATIENCE):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._welcome(connection)
            task = asyncio.current_task()
            assert task is not None
            self._strangers.pop(task, None)
            if len(self._served) >= MOST_CONNECTIONS:
                self._end_first(self._served, peer, f"there are {MOST_CONNECTIONS} connections already")
            self._served[task] = None
            while first := await self._loop.sock_recv(connection, 1):  # The next request may take any time to come.
                self._served[task] = self._served.pop(task, None)  # Now the last that was used.
                async with asyncio.timeout(PATIENCE):
                    request, size = await self._receive(connection, first)
                async with asyncio.timeout(seconds_for(size)):
                    buffers = self._room(request) if size else ()
                    await self._receive_arrays(connection, size, buffers)
                    answer, arrays = await self._answer(request, buffers)
                async with asyncio.timeout(seconds_for(_size(arrays))):
                    await self._send(connection, answer, arrays)
        except (OSError, ValueError) as error:
            self._note_dropped(peer, str(error) or type(error).__name__)

    async def _welcome(self, connection: socket.socket) -> None:
        own = secrets.token_bytes(_CHALLENGE)
        await self._loop.sock_sendall(connection, own)
        answer = await self._receive_bytes(connection, _CHALLENGE + _PROOF)
        theirs, proof = answer[:_CHALLENGE], answer[_CHALLENGE:]
        if not hmac.compare_digest(proof, self._proof("asks", self.address, own, theirs)):
            raise ConnectionError("a wrong secret")
        await self._loop.sock_sendall(connection, self._proof("answers", self.address, own, theirs))

    def _note_dropped(self, peer: Any, why: str) -> None:
        """Log that a connection was dropped, unless that was just done."""
        self._dropped += 1
        if (now := time.monotonic()) >= self._log_at:
            # A log that fails must not end what it is about.
            self._loop.call_soon(partial(self._log, "dropped", peer=str(peer[0]), why=why, connections=self._dropped))
            self._dropped, self._log_at = 0, now + LOG_EVERY

    # Messages

    def _proof(self, role: str, address: str, *challenges: bytes) -> bytes:
        return hmac.digest(self._secret, b"\0".join((role.encode(), address.encode(), b"".join(challenges))), "sha256")

    async def _send(self, connection: socket.socket, value: Any, arrays: Sequence[Buffer]) -> None:
        text = json.dumps(value, separators=(",", ":")).encode()
        await self._loop.sock_sendall(connection, _LENGTHS.pack(len(text), _size(arrays)) + text)
        for array in arrays:
            await self._loop.sock_sendall(connection, memoryview(array).cast("B"))

    async def _receive(self, connection: socket.socket, first: bytes = b"") -> tuple[Any, int]:
        """A message, and the size of the arrays that follow it."""
        text_size, size = _LENGTHS.unpack(first + await self._receive_bytes(connection, _LENGTHS.size - len(first)))
        if text_size > MOST_JSON:
            raise ConnectionError(f"a message of {text_size} bytes, more than {MOST_JSON}")
        try:
            return json.loads(await self._receive_bytes(connection, text_size)), size
        except (ValueError, RecursionError):
            raise ConnectionError("a message that is not JSON") from None

    async def _receive_arrays(self, connection: socket.socket, size: int, into: Sequence[Buffer]) -> None:
        if size != _size(into):
            raise ConnectionError(f"arrays of {size} bytes, not {_size(into)}")
        for buffer in into:
            await self._receive_into(connection, memoryview(buffer).cast("B"))

    async def _receive_bytes(self, connection: socket.socket, count: int) -> bytes:
        buffer = bytearray(count)
        await self._receive_into(connection, memoryview(buffer))
        return bytes(buffer)

    async def _receive_into(self, connection: socket.socket, view: memoryview) -> None:
        while view:
            if not (count := await self._loop.sock_recv_into(connection, view)):
                raise ConnectionError("closed in the middle of a message")
            view = view[count:]


def _size(buffers: Sequence[Buffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _listen(host: str) -> socket.socket:
    try:
        family, *_, place = socket.getaddrinfo(host or "::", 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(place[0]).is_unspecified:  # All addresses of the host, as 0 and :: say.
            raise UsageError(f"a process must listen at an address at which others reach it, got {host or repr(host)}.")
        listener = socket.create_server(place[:2], family=family, backlog=128)
    except UsageError:
        raise
    except (OSError, UnicodeError) as error:  # The latter for a name with an empty or too long part.
        why = getattr(error, "strerror", None) or "not a name"
        raise UsageError(f"this process can't listen at {host} ({why}): name an address of its host.") from None
    listener.setblocking(False)
    return listener
