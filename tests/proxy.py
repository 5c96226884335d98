"""A wire to a PostgreSQL server that is cut at a COMMIT: before it arrives, or before its answer does."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

PASS, LOSE_QUESTION, LOSE_ANSWER = "pass", "lose the question", "lose the answer"


@contextmanager
def wire(to_port: int, judge: Callable[[int], str]) -> Iterator[int]:
    """The port of a proxy. judge: says of the n-th COMMIT, from 0, which of the three becomes of it."""
    commits = count()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_accept, args=(listening, to_port, judge, commits), daemon=True).start()
        yield int(listening.getsockname()[1])


def _accept(listening: socket.socket, to_port: int, judge: Callable[[int], str], commits: Iterator[int]) -> None:
    while True:
        try:
            client, _ = listening.accept()
        except OSError:  # closed
            return
        threading.Thread(target=_carry, args=(client, to_port, judge, commits), daemon=True).start()


def _carry(client: socket.socket, to_port: int, judge: Callable[[int], str], commits: Iterator[int]) -> None:
    with client, socket.create_connection(("127.0.0.1", to_port)) as server, suppress(OSError):
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                if ready is server:
                    client.sendall(data)
                    continue
                fate = judge(next(commits)) if b"COMMIT" in data else PASS
                if fate == LOSE_QUESTION:
                    return
                server.sendall(data)
                if fate == LOSE_ANSWER:
                    server.recv(65536)
                    return
