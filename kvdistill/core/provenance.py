"""Versions and machine, for the page and for benchmark results: facts, no paths, no user names."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("kvdistill", "torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy", "scipy")


def package_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    found: dict[str, str] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_facts() -> dict[str, Any]:
    """Processor, cores that may be used, memory in bytes, GPUs by name where the driver says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = named[0] if named else platform.processor() or "unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": cores,
        "memory_bytes": memory,
    }
