"""An S3 server on 127.0.0.1 (moto's), and the environment that a user gives for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

SECRET = "canary-of-the-bucket"


@dataclass
class Bucket:
    url: str
    environment: dict[str, str]
    port: int
    server: Any = None

    def start(self) -> None:
        """Serve it; what lies in it outlives a stop."""
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()
        _, self.port = self.server.get_host_and_port()

    def stop(self) -> None:
        self.server.stop()

    def names(self) -> list[str]:
        """All that lies in it, relative to the URL."""
        files, root = fsspec.core.url_to_fs(self.url)
        files.invalidate_cache()
        return sorted(path.removeprefix(f"{root}/") for path in files.find(root))

    def read(self, name: str) -> bytes:
        files, root = fsspec.core.url_to_fs(self.url)
        return bytes(files.cat_file(f"{root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        files, root = fsspec.core.url_to_fs(self.url)
        files.pipe_file(f"{root}/{name}", content)

    def remove(self, name: str) -> None:
        files, root = fsspec.core.url_to_fs(self.url)
        files.rm_file(f"{root}/{name}")

    def copy(self, name: str, to: str) -> None:
        files, root = fsspec.core.url_to_fs(self.url)
        files.copy(f"{root}/{name}", f"{root}/{to}", recursive=True)


@contextmanager
def bucket(name: str = "sweeps") -> Iterator[Bucket]:
    """A bucket on a server of its own; the environment names both as long."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    found = Bucket(f"s3://{name}/team", {}, 0)
    found.start()
    found.environment |= {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in found.environment.items():
            patch.setenv(key, value)
        S3FileSystem.clear_instance_cache()  # it would go on with the server of an earlier test
        try:
            S3FileSystem().mkdir(name)
            yield found
        finally:
            found.stop()
            S3FileSystem.clear_instance_cache()
