"""Benchmarks: the same work side by side, in one command each. `steps`, `search`, `gpu`, and `report` on all three."""
