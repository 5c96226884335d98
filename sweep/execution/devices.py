"""The GPUs of this machine, found without torch, which takes seconds to import."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Of a GPU that is divided (MIG), its instances.
    """
    here = parse_gpus(ask_nvidia_smi())
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is None or not here:
        return here
    allowed = []
    for name in (entry.strip() for entry in outer.split(",")):
        if not name or name.startswith("-"):  # CUDA too sees nothing from there on
            break
        allowed.append(name)
    return allowed


def parse_gpus(listing: str) -> list[str]:
    """The devices in the output of `nvidia-smi -L`: a GPU's index, or the UUIDs of its MIG instances."""
    found: list[list[str]] = []
    for line in listing.splitlines():
        if line.startswith("GPU "):
            found.append([line.split()[1].rstrip(":")])
        elif line.strip().startswith("MIG ") and "UUID: " in line and found:
            if found[-1][0].isdigit():
                found[-1] = []
            found[-1].append(line.rsplit("UUID: ", 1)[1].rstrip(") "))
    return [name for names in found for name in names]


def ask_nvidia_smi() -> str:
    """Its list of devices, or as much as the kernel's driver tells."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        try:
            done = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=30, check=True)
            return done.stdout
        except (OSError, subprocess.SubprocessError):
            pass
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    return "\n".join(f"GPU {i}: NVIDIA" for i in range(count))
