"""Hold the pinned versions against the known vulnerabilities: `make audit`.

PyPI's own index of advisories is asked, else osv.dev. A known vulnerability ends it with 1, whether or not there is a
version without it; what cannot be helped is named in ACCEPTED, with the reason. Where neither index can be reached it
says so and ends with 0, or with 1 where SWEEP_NEEDS_AUDIT=1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVICES = ("pypi", "osv")
# Advisory -> why it does not concern us, or why we live with it until there is a version without it.
ACCEPTED: dict[str, str] = {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requirements", type=Path, default=ROOT / "constraints.txt", metavar="FILE")
    parser.add_argument("--service", choices=SERVICES, help="ask this one alone")
    asked = parser.parse_args()
    reasons = []
    for service in [asked.service] if asked.service else SERVICES:
        found, reason = ask(service, asked.requirements)
        if found:
            return judge(found, service)
        reasons.append(f"{service}: {reason}")
    print(f"audit: NOT DONE, no index of advisories can be reached ({'; '.join(reasons)})")
    print("audit: run `make audit` where pypi.org or api.osv.dev can be reached")
    return 1 if os.environ.get("SWEEP_NEEDS_AUDIT") else 0


def ask(service: str, requirements: Path) -> tuple[list[dict[str, Any]], str]:
    """What the service knows of each pinned version; nothing, and why, where it cannot be asked."""
    program = Path(sys.executable).with_name("pip-audit")
    options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", "--desc=off"]
    command = [program, "--requirement", requirements, f"--vulnerability-service={service}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        every = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = [line for line in done.stderr.strip().splitlines() if not line.startswith("WARNING:pip_audit._cli:")]
        return [], said[-1][:120] if said else f"pip-audit ended with {done.returncode}"
    known = [one for one in every if "skip_reason" not in one]
    return known and every, "it knows none of our packages"


def judge(every: list[dict[str, Any]], service: str) -> int:
    """Print what was found; 1 where there is a vulnerability that was not accepted."""
    skipped = [one["name"] for one in every if "skip_reason" in one]
    found = [(one, flaw) for one in every for flaw in one.get("vulns", ())]
    for one, flaw in found:
        names = [flaw["id"], *flaw.get("aliases", ())]
        why = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
        fixed = f"fixed in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else "no version without it yet"
        print(
            f"audit: {one['name']} {one['version']}: {', '.join(names)}: {fixed}{f'; accepted: {why}' if why else ''}"
        )
    open_ones = [flaw for _, flaw in found if not {flaw["id"], *flaw.get("aliases", ())} & ACCEPTED.keys()]
    stale = ACCEPTED.keys() - {name for _, flaw in found for name in (flaw["id"], *flaw.get("aliases", ()))}
    for name in sorted(stale):
        print(f"audit: {name} is accepted and no longer found: take it out of ACCEPTED")
    if skipped:
        print(f"audit: not known to {service}: {', '.join(skipped)}")
    print(f"audit: {len(every) - len(skipped)} versions held against {service}, {len(open_ones)} vulnerabilities")
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
