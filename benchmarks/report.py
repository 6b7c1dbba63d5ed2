"""What a benchmark says: a table on the terminal and one JSON file a machine, without paths or user names."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Ratio
from kvdistill.core.files import write_json
from kvdistill.core.provenance import machine_facts, package_versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a table: a ratio, and where there is one, the bar it is held against."""

    name: str
    ratio: Ratio
    bar: float | None = None
    at_least: bool = False  # a speed-up is met from above, a cost from below
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio.median >= self.bar if self.at_least else self.ratio.median <= self.bar

    def as_dict(self) -> dict[str, Any]:
        interval = [round(self.ratio.low, 4), round(self.ratio.high, 4)]
        found = {"name": self.name, "ratio": round(self.ratio.median, 4), "interval": interval}
        if self.bar is not None:
            found |= {"bar": round(self.bar, 4), "bar_is": "least" if self.at_least else "most", "met": self.met}
        return found | ({"note": self.note} if self.note else {})


def print_table(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    width = max(len(row.name) for row in rows)
    print(f"  {'':{width}}  {'ratio [95 % interval]':22}  {'bar':>8}  met")
    for row in rows:
        bar = "" if row.bar is None else f"{'>=' if row.at_least else '<='} {row.bar:.2f}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        print(f"  {row.name:{width}}  {row.ratio!s:22}  {bar:>8}  {met:3}  {row.note}".rstrip())


def save(name: str, settings: Mapping[str, Any], tables: Mapping[str, Any], device: torch.device) -> Path:
    """results/NAME-HARDWARE.json: figures, settings, machine, versions and date."""
    machine = machine_facts()
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    path = RESULTS / f"{name}-{hardware_slug(machine)}.json"
    path.parent.mkdir(exist_ok=True)
    versions = package_versions(("torch", "transformers", "accelerate", "trl", "safetensors", "numpy"))
    write_json(
        path,
        {
            "benchmark": name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine,
            "versions": versions,
            "settings": dict(settings),
            **tables,
        },
    )
    print(f"\n  written: benchmarks/results/{path.name}")
    return path


def hardware_slug(machine: Mapping[str, Any]) -> str:
    """The GPU, or the processor and its usable cores, as letters, digits and dashes."""
    text = machine.get("gpu") or f"{machine['processor'].split('@')[0]} {machine['cores']} cores"
    text = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")
