"""Text that may be shown: no user, no password, no key of anybody."""

from __future__ import annotations

import re

IN_ADDRESS = re.compile(r"(\w://)[^/\s'\"]*@")
IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:user|pass|token|key|secret|sig|credential|auth)[\w.-]*=)[^&\s'\"]*", re.IGNORECASE
)


def without_credentials(text: str) -> str:
    """`text` with user and password cut out of every URL, and the values of keys and tokens out of its query."""
    return IN_QUERY.sub(r"\1…", IN_ADDRESS.sub(r"\1", text))
