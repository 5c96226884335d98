"""Text that may be shown: no user, no password, no key of anybody."""

from __future__ import annotations

import re

IN_ADDRESS = re.compile(r"(\w://)[^/\s'\"]*@")
IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:user|pass|token|key|secret|sig|credential|auth)[\w.-]*=)[^&\s'\"]*", re.IGNORECASE
)
HUB_TOKEN = re.compile(r"\bhf_\w{16,}")
PASSWORD = re.compile(r"://[^/@]*:(?!\d+(?:/|$))[^@]*@")  # a port is none


def without_credentials(text: str) -> str:
    """`text` with user and password cut out of every URL, keys and tokens out of its query, and the hub's tokens."""
    return HUB_TOKEN.sub("hf_…", IN_QUERY.sub(r"\1…", IN_ADDRESS.sub(r"\1", text)))


def holds_secret(url: str) -> bool:
    """Whether a URL has a password in it, a key or a token. A name before an @ is none: it may be a container's."""
    return any(secret.search(url) for secret in (PASSWORD, IN_QUERY, HUB_TOKEN))
