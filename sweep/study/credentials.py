"""Text that may be shown or kept: no user, no password, no key of anybody."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import cache
from urllib.parse import unquote

CUT = "***"  # in place of a password in what is kept, so that it can be seen that there was one
ADDRESS = re.compile(r"(?<![\w+.-])([\w+.-]+://)(\S*@)")
NAMED_USER = re.compile(r"([^/?#\s'\":@]*):(?=\S*@)")
PORT = re.compile(r"\d+(?:[/?#'\",]|$)")
IN_QUERY = re.compile(
    r"([?&][\w.-]*(?:user|pass|token|key|secret|sig|credential|auth)[\w.-]*=)[^&\s'\"]*", re.IGNORECASE
)
# key=value and key: value, quoted or not; pad_token and its like are no secrets.
IN_PAIR = re.compile(
    r"(\b[\w.-]*(?:passw(?:or)?d|passphrase|secret|(?:access|account|api|private)[_-]?key"
    r"|shared[_-]?access[_-]?signature)(?:[_-][\w-]*)?['\"]?\s*[=:]\s*"
    r"|(?<![\w-])(?:[\w.-]*(?:access|api|auth|hf|id|refresh|security|session)[_-])?token['\"]?\s*=\s*)"
    r"('[^']*'|\"[^\"]*\"|[^\s,;&'\"]+)",
    re.IGNORECASE,
)
IN_HEADER = re.compile(
    r"\b((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?\w+\s+|bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE
)
KEYS = re.compile(r"\b(hf_)\w{16,}|\b(A[KS]IA)[A-Z0-9]{16}\b")
# Variables of the environment that hold a secret, and those that hold an address which may.
SECRET_NAME = re.compile(
    r"(?:(?:^|_)(?:PG)?(?:PASSWORD|PASSWD|PASS|PASSPHRASE|PAT|TOKEN|SECRET|KEY|APIKEY|CREDENTIALS?)|_PWD)(?:_ID)?$",
    re.IGNORECASE,
)
ADDRESS_NAME = re.compile(
    r"(?:URI|URL|DSN|PROXY|STORAGE|CHECKPOINTS|ENDPOINT|CONNECTION|CONNECTION_STRING|ADDRESS)$", re.IGNORECASE
)
OPTIONS_NAME = re.compile(r"^FSSPEC_[A-Z0-9]+$", re.IGNORECASE)  # a file system's arguments as JSON
IN_VALUE = re.compile(
    r"\w://[^/\s:@]*:(\S*)@|(?:password|passwd|pwd|token|accountkey|signature)=('[^']*'|[^\s&;]+)", re.IGNORECASE
)
IN_OPTIONS = re.compile(r"pass|pwd|token|key|secret|credential|connection|sas", re.IGNORECASE)
IN_URL = re.compile(r"[/?#@:]")  # what parts a URL
SHORTEST = 6  # of a secret that is looked for by itself


def without_credentials(text: str) -> str:
    """`text` with user and password cut out of every URL, passwords, keys and tokens out of queries, pairs and headers,
    and whatever else the environment holds as a secret."""
    if not text:
        return text
    text = IN_QUERY.sub(r"\1…", ADDRESS.sub(lambda found: found[1] + _user_cut(found[1], found[2]), text))
    text = KEYS.sub(r"\1\2…", IN_HEADER.sub(r"\1…", IN_PAIR.sub(r"\1…", text)))
    for secret in sorted(set(_secrets_around()), key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", "…", text)
    return text


def kept_address(address: str) -> str:
    """An address as it may be kept: user and host stay, `***` stands for a password."""
    address = ADDRESS.sub(lambda found: found[1] + _password_cut(found[1], found[2]), address)
    return IN_PAIR.sub(rf"\1{CUT}", IN_QUERY.sub(rf"\1{CUT}", address))


def holds_secret(url: str) -> bool:
    """Whether a URL has a password in it, a key or a token. A name before an @ is none: it may be a container's."""
    return kept_address(url) != url or KEYS.search(url) is not None


def _user_cut(scheme: str, rest: str) -> str:
    """What stays of a URL up to its last @, which is nothing where all of it is user and password."""
    if _has_password(scheme, rest):
        return ""
    authority, slash, path = rest.partition("/")
    return f"{authority.rpartition('@')[2]}{slash}{path}"


def _password_cut(scheme: str, rest: str) -> str:
    return f"{rest.partition(':')[0]}:{CUT}@" if _has_password(scheme, rest) else rest


def _has_password(scheme: str, rest: str) -> bool:
    """Whether a URL up to its last @ is user:password@. A password may hold "/" and "@" where somebody did not encode
    it; only behind http(s) are digits up to a slash a port, and an @ after it one of the path."""
    user = NAMED_USER.match(rest)
    return user is not None and not (scheme.lower().startswith("http") and PORT.match(rest, user.end()))


def _secrets_around() -> Iterator[str]:
    """Passwords, tokens and keys that the environment holds, as they are and as they stand in a URL."""
    for name in os.environ:
        kind = _kind(name)
        if kind is not None:
            value = os.environ.get(name, "")
            found = [value] if kind is SECRET_NAME else [one for pair in IN_VALUE.findall(value) for one in pair]
            if kind is OPTIONS_NAME:
                found += _in_options(value)
            if kind is ADDRESS_NAME:  # whoever parses a password that is not encoded may tell of a part of it
                found += [part for one in found for part in IN_URL.split(one)]
            for secret in found:
                yield from (form for form in (secret, unquote(secret), secret.strip("'")) if len(form) >= SHORTEST)


def _in_options(value: str) -> list[str]:
    try:
        options = json.loads(value)
    except ValueError:
        return []
    pairs = options.items() if isinstance(options, dict) else ()
    return [one for name, one in pairs if isinstance(one, str) and IN_OPTIONS.search(name)]


@cache
def _kind(name: str) -> re.Pattern[str] | None:
    """What a variable of the environment is known to hold, by its name."""
    return next((kind for kind in (SECRET_NAME, ADDRESS_NAME, OPTIONS_NAME) if kind.search(name)), None)
