"""Seeds, threads and devices: everything that makes two runs of one recipe the same numbers.

Seeds come from one place: `derive_seed(base, "student", "init")` is a stable hash of its words, so that
data order, initial weights and evaluation never share a stream and never depend on call order.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from functools import reduce

import numpy as np
import torch

from kvdistill.core.errors import RecipeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sum_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What sums over these are made in: float32 at least; float64 where any of them is."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def derive_seed(base: int, *words: object) -> int:
    """A seed in [0, 2**31) that depends on `base` and every word, the same on every machine."""
    text = "\x1f".join([str(base), *map(str, words)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def seed_everything(seed: int) -> None:
    """Python, NumPy and torch (all devices) from one seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_threads(num_threads: int) -> None:
    """Intra-op threads on purpose: 0 leaves torch's own choice."""
    if num_threads > 0:
        torch.set_num_threads(num_threads)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else CPU. One process sees one device (LOCAL_RANK).

    Raises RecipeError for a device that is not there.
    """
    if name != "auto":
        device = torch.device(name)
        there = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
        if (device.index or 0) >= there:
            found = "there is none here" if there == 0 else f"there are {there}, counted from 0"
            raise RecipeError(
                f"no device {name}: {found}", place="hardware.device", fix="set hardware.device=auto (or cpu)"
            )
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


class Stopwatch:
    """Wall and CPU seconds since it was made, and those of earlier calls that `advance` adds."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def advance(self, wall_s: float, cpu_s: float) -> None:
        self._wall, self._cpu = self._wall - wall_s, self._cpu - cpu_s

    def wall_s(self) -> float:
        return time.perf_counter() - self._wall

    def cpu_s(self) -> float:
        return time.process_time() - self._cpu


def elements_at_once(device: torch.device) -> int:
    """Numbers that one batch of a measurement may make live together, where rows can be taken apart at will.

    A GiB of float32 on a CPU; a sixteenth of a GPU's whole memory, so that the same device batches alike every time.
    """
    if device.type != "cuda":
        return 1 << 28
    return torch.cuda.get_device_properties(device).total_memory // (16 * 4)


def quiet_libraries() -> None:
    """Keep transformers' and datasets' own bars and advice off the terminal: progress is ours to show."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # renamings that transformers 5 announces for 6, met inside peft and Trainer themselves
    warnings.filterwarnings("ignore", message=".*will be removed in v6.*", category=FutureWarning)


def keep_freed_memory() -> bool:
    """Let the allocator keep what it frees, on glibc; True where that was possible.

    A training step on the CPU frees and asks for the same large tensors again and again (logits of a batch). By default
    each of them goes back to the system and comes back as zeroed pages: on gsm8k-tiny, a third of the time.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    libc = ctypes.CDLL(None)
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
