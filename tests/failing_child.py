"""A child of docs/try_families.py that hangs at one family and dies at another. Imports nothing heavy."""

from __future__ import annotations

import os
import time
from typing import Any


def fail(names: list[str], results: Any) -> None:
    for name in names:
        if name == "hangs":
            time.sleep(1000)
        if name == "dies":
            os._exit(3)
        results.put({"family": name, "kind": "", "verdicts": [(0.0, "", "")] * 3})
        time.sleep(0.3)
