"""What fetching parameters from another process costs: by the transport of posted mode, plain sockets, and gRPC.

    pip install grpcio
    python -m benchmarks.asynchronous.transport

Another process on this machine serves an array by each of them; they take turns in every round. CPU time is that of
both processes.
"""

import argparse
import importlib.util
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.asynchronous.transport import Endpoint
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "transport.json"
SECRET = bytes(32)
SIZES = {"1 MB": 10**6, "10 MB": 10**7, "100 MB": 10**8}
PULLS = {"1 MB": 30, "10 MB": 10, "100 MB": 2}
"""In one round."""
CHUNK = 2**21
"""Bytes of a message in gRPC's stream."""
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
PLAIN = "plain socket"


def received(connection: socket.socket, size: int) -> np.ndarray:
    """Receive an array through a plain socket."""
    array = np.empty(size, np.uint8)
    view = array.data
    while view:
        view = view[connection.recv_into(view) :]
    return array


def serve(pipe: Connection) -> None:
    """Serve arrays by every transport, and tell this process's CPU time whenever it is asked for."""
    import grpc

    arrays = {size: np.random.default_rng(0).integers(0, 256, size, np.uint8) for size in SIZES.values()}

    async def answer(size: Any, _: Any) -> tuple[Any, list[np.ndarray]]:
        return size, [arrays[size]]

    def plain(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        while request := connection.recv(8, socket.MSG_WAITALL):
            connection.sendall(arrays[int.from_bytes(request)].data)

    def chunks(request: bytes, _: Any) -> Any:
        view = arrays[int.from_bytes(request)].data
        return (bytes(view[start : start + CHUNK]) for start in range(0, len(view), CHUNK))

    def whole(request: bytes, _: Any) -> bytes:
        return arrays[int.from_bytes(request)].tobytes()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=plain, args=(listener,), daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(4), options=UNLIMITED)
    handlers = {
        "chunks": grpc.unary_stream_rpc_method_handler(chunks),
        "whole": grpc.unary_unary_rpc_method_handler(whole),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("board", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    endpoint = Endpoint(answer, secret=SECRET)
    pipe.send((listener.getsockname(), endpoint.address, f"127.0.0.1:{port}"))
    while pipe.recv():
        pipe.send(time.process_time())


def transports(addresses: tuple) -> dict[str, Callable[[int], np.ndarray]]:
    """From a size to the array of that size from the other process, by name of the transport."""
    import grpc

    plain_address, endpoint_address, grpc_address = addresses
    connection = socket.create_connection(plain_address)
    channel = grpc.insecure_channel(grpc_address, options=UNLIMITED)
    stream, unary = channel.unary_stream("/board/chunks"), channel.unary_unary("/board/whole")

    async def answer(*_: Any) -> tuple[Any, list]:
        raise ValueError("nobody asks this end")

    endpoint = Endpoint(answer, secret=SECRET)

    def plain(size: int) -> np.ndarray:
        connection.sendall(size.to_bytes(8))
        return received(connection, size)

    def ours(size: int) -> np.ndarray:
        array = np.empty(size, np.uint8)
        endpoint.start(endpoint.ask(endpoint_address, size, into=[array])).result()
        return array

    def streamed(size: int) -> np.ndarray:
        array, start = np.empty(size, np.uint8), 0
        for chunk in stream(size.to_bytes(8)):
            array[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
            start += len(chunk)
        return array

    def at_once(size: int) -> np.ndarray:
        return np.frombuffer(unary(size.to_bytes(8)), np.uint8)

    return {PLAIN: plain, "Endpoint": ours, "gRPC, streamed": streamed, "gRPC, one message": at_once}


def measure(rounds: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds, and seconds of CPU time, per pull, for each size, transport and round."""
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end,), daemon=True)
    process.start()
    ways = transports(pipe.recv())

    def cpu() -> float:
        pipe.send(True)
        return pipe.recv() + time.process_time()

    taken: dict = {name: {way: {"seconds": [], "cpu": []} for way in ways} for name in SIZES}
    for name, size in SIZES.items():
        first, *others = (pull(size) for pull in ways.values())
        assert all(np.array_equal(first, other) for other in others)
        for number in range(rounds):
            for way in sorted(ways, key=lambda way: hash((way, number))):
                cpu_before, before = cpu(), time.perf_counter()
                for _ in range(PULLS[name]):
                    ways[way](size)
                taken[name][way]["seconds"].append((time.perf_counter() - before) / PULLS[name])
                taken[name][way]["cpu"].append((cpu() - cpu_before) / PULLS[name])
    pipe.send(False)
    process.join()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("grpc") is None:
        parser.error("this compares with gRPC: pip install grpcio.")
    taken = measure(arguments.rounds)
    print("| size | transport | MB/s | of a plain socket's | CPU seconds per GB | of a plain socket's |")
    print("|---|---|---|---|---|---|")
    summary: dict = {}
    for name, ways in taken.items():
        for way, values in ways.items():
            row = summary.setdefault(name, {})[way] = {
                "MB/s": SIZES[name] / 1e6 / float(np.median(values["seconds"])),
                "throughput, of a plain socket's": float(
                    np.median(np.divide(ways[PLAIN]["seconds"], values["seconds"]))
                ),
                "CPU seconds per GB": float(np.median(values["cpu"])) * 1e9 / SIZES[name],
                "CPU, of a plain socket's": float(np.median(np.divide(values["cpu"], ways[PLAIN]["cpu"]))),
            }
            print(f"| {name} | {way} | {' | '.join(f'{value:.3g}' for value in row.values())} |")
    settings = {"rounds": arguments.rounds, "pulls per round": PULLS}
    content = {"settings": settings, "summary": summary, "per pull": taken, "environment": environment()}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
