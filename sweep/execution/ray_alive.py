"""`python -m sweep.execution.ray_alive ADDRESS…` fails where the head at RAY_ADDRESS knows of no living node there.

For health checks: a node whose processes run is of no use once the head holds it for dead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection

SECONDS = 5  # for the head to answer


def is_alive(head: str, addresses: Collection[str]) -> bool:
    """Whether the head at HOST:PORT knows of a living node there. Raises what Ray raises where it does not answer."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    nodes = GcsClient(address=head).get_all_node_info(timeout=SECONDS).values()
    return any(node.node_manager_address in addresses and node.state == node.ALIVE for node in nodes)


if __name__ == "__main__":
    if not is_alive(os.environ["RAY_ADDRESS"], sys.argv[1:]):
        sys.exit(f"no living Ray node at {' or '.join(sys.argv[1:])}")
