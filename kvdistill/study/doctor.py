"""`kvdistill doctor`: what this machine has, what is missing, how to get it. Changes nothing, reaches no network."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kvdistill.core.provenance import PACKAGES, machine_facts, package_versions

MINIMUM = {"torch": (2, 11), "transformers": (5, 13)}
GIB = 1 << 30


def examine(folder: Path = Path(".")) -> dict[str, Any]:
    """Facts and findings: {"machine", "versions", "gpus", "findings"}; findings are sentences with a fix."""
    versions = package_versions()
    facts = machine_facts()
    gpus = _gpus()
    findings: list[str] = []
    for name in PACKAGES:
        if versions[name] == "not installed":
            findings.append(f"{name} is not installed: `make setup`, or pip install kvdistill")
        elif name in MINIMUM:
            numbers = tuple(int(part) for part in versions[name].split("+")[0].split(".")[:2] if part.isdigit())
            if numbers < MINIMUM[name]:
                wanted = ".".join(map(str, MINIMUM[name]))
                findings.append(f"{name} {versions[name]} is too old: {wanted} or newer is needed")
    free = shutil.disk_usage(folder).free
    if free < 2 * GIB:
        findings.append(f"only {free / GIB:.1f} GiB free here: the demo needs 2, a study with 7B teachers hundreds")
    if facts["memory_bytes"] and facts["memory_bytes"] < 6 * GIB:
        findings.append("less than 6 GiB of memory: set hardware.workers=1 for the demo")
    if not gpus:
        findings.append("no GPU: the demo and tiny recipes run on the processor; 1B models and up need one")
    for module, what in (("bitsandbytes", "4- and 8-bit teachers"), ("trl", "the benchmark's rivals")):
        if importlib.util.find_spec(module) is None:
            findings.append(f"{module} is not installed (only for {what})")
    return {
        "machine": {
            **facts,
            "memory": f"{(facts['memory_bytes'] or 0) / GIB:.1f} GiB",
            "disk_free": f"{free / GIB:.1f} GiB",
        },
        "gpus": gpus,
        "versions": versions,
        "findings": findings,
    }


def _gpus() -> list[str]:
    """Names as the driver tells them, without loading torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in out.stdout.splitlines() if line.strip()] if out.returncode == 0 else []
