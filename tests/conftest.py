"""Fixtures that several tests share: where the real data is, and what must not be skipped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported, in workers and child processes too: the tests demand the same bits, which kernels of a GPU
# do not give, and compare with tensors on the CPU. KVDISTILL_TEST_GPU=1 shows the GPUs to whoever wants to try.
if not os.environ.get("KVDISTILL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from hypothesis import HealthCheck, settings

# how fast a busy machine draws examples says nothing about the code; CI looks at the same examples every time
settings.register_profile(
    "kvdistill", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("kvdistill")

# a shell without job control lets what it starts in the background ignore Ctrl-C, and children inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def is_required(what: str) -> bool:
    """Whether KVDISTILL_REQUIRE (comma-separated: data, chromium, slurm) names it: then it may not be skipped."""
    return what in os.environ.get("KVDISTILL_REQUIRE", "").split(",")


def skip_or_fail(what: str, reason: str) -> None:
    if is_required(what):
        pytest.fail(f"{what} is required here, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with real rows and tokenizers (KVDISTILL_DATA, default ../shared/data beside the repository)."""
    folder = Path(os.environ.get("KVDISTILL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "gsm8k").is_dir():
        skip_or_fail("data", "there is no real data (set KVDISTILL_DATA)")
    return folder


@pytest.fixture(scope="session")
def gsm8k_root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real data as if GSM8K (with the tokenizers) were all of it: 20,000 questions of other evaluations take
    20 seconds to be read and held against what is learned, in every study anew."""
    folder = tmp_path_factory.mktemp("gsm8k_root")
    for name in ("gsm8k", "tokenizers"):
        (folder / name).symlink_to(data_root / name)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no core waits at the end for another's long file (`--dist loadfile`)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
