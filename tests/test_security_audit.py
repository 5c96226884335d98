"""The audit of pinned versions: pip-audit itself, against an index of advisories that the test serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "scripts" / "audit.py"
FLAWED = "jinja2"


class Advisories(BaseHTTPRequestHandler):
    """As osv.dev answers: one advisory of every version of one package."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        package = asked["package"]["name"].lower()
        affected = {"package": {"name": package, "ecosystem": "PyPI"}, "ranges": [], "versions": [asked["version"]]}
        affected["ranges"] = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
        told = {"id": "GHSA-0000-test", "aliases": ["CVE-2099-1"], "summary": "bad", "affected": [affected]}
        body = json.dumps({"vulns": [told]} if package == FLAWED else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def index() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Advisories) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(pins: str, url: str, place: Path, **more: str) -> tuple[int, list[str]]:
    (place / "pins.txt").write_text(pins)
    command = [sys.executable, AUDIT, "--service", "osv", "--requirements", place / "pins.txt"]
    proxies = {name: "" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    environment = {**os.environ, **proxies, "PIP_AUDIT_OSV_URL": url, **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_a_known_vulnerability_fails_the_audit_and_is_named(index: str, tmp_path: Path) -> None:
    code, lines = audit("numpy==2.0.0\njinja2==3.0.0\n", index, tmp_path)
    assert code == 1
    assert "audit: jinja2 3.0.0: CVE-2099-1, GHSA-0000-test: fixed in 99.0" in lines
    assert lines[-1] == "audit: 2 versions held against osv, 1 vulnerabilities"


def test_without_one_it_passes(index: str, tmp_path: Path) -> None:
    assert audit("numpy==2.0.0\n", index, tmp_path) == (0, ["audit: 1 versions held against osv, 0 vulnerabilities"])


def test_without_an_index_it_says_that_it_was_not_done(tmp_path: Path) -> None:
    code, lines = audit("numpy==2.0.0\n", "http://127.0.0.1:9/v1/query", tmp_path)
    assert code == 0 and lines[0].startswith("audit: NOT DONE") and "`make audit`" in lines[1]
    code, _ = audit("numpy==2.0.0\n", "http://127.0.0.1:9/v1/query", tmp_path, SWEEP_NEEDS_AUDIT="1")
    assert code == 1


def test_what_was_accepted_with_a_reason_passes(index: str, tmp_path: Path) -> None:
    accepting = tmp_path / "audit.py"
    accepting.write_text(AUDIT.read_text().replace("ACCEPTED: dict[str, str] = {}", 'ACCEPTED = {"CVE-2099-1": "why"}'))
    (tmp_path / "pins.txt").write_text("jinja2==3.0.0\n")
    done = subprocess.run(
        [sys.executable, accepting, "--service", "osv", "--requirements", tmp_path / "pins.txt"],
        env={**os.environ, "PIP_AUDIT_OSV_URL": index},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "accepted: why" in done.stdout
