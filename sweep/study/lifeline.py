"""Nothing outlives the process that it belongs to, even when that one is killed without a word."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HELD = f"held-on-{platform.node()}"  # locked while its process lives, which only its own machine surely knows
INSIDE = "in"


def die_with_parent(with_group: bool = False) -> None:
    """From now on this process, a child by `multiprocessing`, ends as soon as its parent has.

    with_group: and with it all of its process group, which must be its own; a stopped one then ends too, since
    the kernel lets a stopped group go on that its parent's end orphans.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child has a parent to die with"

    def watch() -> None:
        parent.join()
        if with_group:
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


@contextmanager
def temporary_folder(prefix: str, place: str | None = None) -> Iterator[Path]:
    """An empty folder for as long; those with this prefix whose processes were killed are removed first.

    place: where, the usual folder for temporary files without. Raises OSError.
    """
    place = place or tempfile.gettempdir()
    _remove_abandoned(Path(place), prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        with open(folder / "new", "wb") as held:
            with suppress(OSError):  # a disk without locks: then nobody takes it for abandoned
                fcntl.flock(held, fcntl.LOCK_EX)
                os.rename(folder / "new", folder / HELD)  # locked before anybody looks for it
            (folder / INSIDE).mkdir()
            yield folder / INSIDE
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(place: Path, prefix: str) -> None:
    for folder in place.glob(f"{prefix}*"):
        with suppress(OSError):  # its process lives, or something still writes there: the next one tries again
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with open(folder / HELD, "r+b") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder / INSIDE)
                shutil.rmtree(folder)
