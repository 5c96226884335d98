"""No process outlives the one that started it, even when that one is killed without a word."""

from __future__ import annotations

import multiprocessing
import os
import threading


def die_with_parent() -> None:
    """From now on this process, a child by `multiprocessing`, ends as soon as its parent has."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child has a parent to die with"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
