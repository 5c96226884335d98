"""(d) K concurrent processes of (c), each with its share of the cores: what a user without packs would try.

The processes are forked from a server that has imported the libraries and done nothing else, which is quicker than
spawning and as clean. Each warms up, says so, and waits for the word, so that all of them step at the same time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from sweep.study.records import Setup

from .peft_loop import Mode

PATIENCE_S = 900.0  # a process that is silent for so long is taken for dead


class ProcessFailed(RuntimeError):
    """One of the processes ended or could not do its work."""


@dataclass(frozen=True)
class Order:
    """What one process does in one repetition."""

    rank: int
    threads: int
    warmup: int
    steps: int
    memory: int  # bytes that it may allocate


@dataclass(frozen=True)
class Member:
    process: ForkServerProcess
    pipe: Connection


class ProcessPool:
    """Processes that are kept between repetitions; grows to the largest K that was asked for."""

    def __init__(self, setup: Setup, mode: Mode, modules: tuple[str, ...], memory: int):
        self.job = (setup, mode, modules)
        self.memory = memory  # bytes for all processes together
        self.members: list[Member] = []

    def time(self, ranks: Sequence[int], warmup: int, steps: int) -> list[tuple[float, ...]]:
        """The seconds of each process's steps, all processes at once. Raises ProcessFailed, and is closed then."""
        try:
            self._grow(len(ranks))
            members = self.members[: len(ranks)]
            threads = max(1, len(os.sched_getaffinity(0)) // len(ranks))
            for member, rank in zip(members, ranks, strict=True):
                member.pipe.send(Order(rank, threads, warmup, steps, self.memory // len(ranks)))
            for member in members:
                _hear(member, "warm")
            for member in members:
                member.pipe.send("go")
            return [_hear(member, "done") for member in members]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process that was started, the ones that hang too."""
        for member in self.members:
            member.pipe.close()  # a process that waits for its next order ends by itself
        for member in self.members:
            member.process.join(timeout=2)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self.members = []

    def _grow(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["transformers.modeling_utils", "peft", __name__])
        fresh = []
        while len(self.members) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, *self.job), daemon=True)
            process.start()
            theirs.close()
            fresh.append(Member(process, ours))
            self.members.append(fresh[-1])
        for member in fresh:
            _hear(member, "ready")


def _hear(member: Member, wanted: str) -> Any:
    """What a process says next. Raises ProcessFailed where it is another word, an end or silence."""
    try:
        if not member.pipe.poll(PATIENCE_S):
            raise ProcessFailed(f"a process said nothing for {PATIENCE_S:.0f} s")
        word, value = member.pipe.recv()
    except EOFError:
        member.process.join(timeout=2)
        raise ProcessFailed(f"a process ended with exit code {member.process.exitcode} (-9: out of memory)") from None
    if word != wanted:
        raise ProcessFailed(str(value))
    return value


def _serve(pipe: Connection, setup: Setup, mode: Mode, modules: tuple[str, ...]) -> None:
    """A process's life: take orders until the pipe closes."""
    import torch

    from .peft_loop import Loop, plain_base
    from .work import memory_held, read_data

    try:
        data = read_data(setup)
        plain_base(setup, data.labels, mode.base, mode.attention)
        pipe.send(("ready", None))
        while True:
            order: Order = pipe.recv()
            torch.set_num_threads(order.threads)
            with memory_held(order.memory):
                loop = Loop(setup, data, mode, order.rank, modules)
                for _ in range(order.warmup):
                    loop.step()
                pipe.send(("warm", None))
                pipe.recv()
                seconds = tuple(loop.step() for _ in range(order.steps))
                del loop
            pipe.send(("done", seconds))
    except EOFError:
        return
    except Exception as error:  # told to the parent, which writes it into the table
        with contextlib.suppress(OSError):  # a parent that has given up already
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
