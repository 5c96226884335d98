"""Benchmarks: the same work side by side, in one command each: `steps`, `search`, `gpu`, `scale`; `report` on all."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the tests' fakes are found from here, too
