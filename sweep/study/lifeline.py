"""No process outlives the one that started it, even when that one is killed without a word."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def die_with_parent(with_group: bool = False) -> None:
    """From now on this process, a child by `multiprocessing`, ends as soon as its parent has.

    with_group: and with it all of its process group, which must be its own.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child has a parent to die with"

    def watch() -> None:
        parent.join()
        if with_group:
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
