"""Data sets on the Hugging Face hub, through `datasets` and its cache, and folders that `datasets` saved.

Rows are read lazily from Arrow files, which are mapped into memory and not read at once.
Whatever goes wrong is one DataError that names the local alternative; a gated data set's also says how to log in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdistill.core.errors import DataError, KVDistillError
from kvdistill.core.files import disk_full_error
from kvdistill.core.hub import hub_reachable
from kvdistill.core.quoting import at_line, quoted, shown
from kvdistill.data.sources.rows import RawRow

_COMMIT = re.compile(r"[@/]([0-9a-f]{40})(?:/|$)")
_NETWORK_ERRORS = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "OfflineModeIsEnabled")
_FIX = "give the folder of one split, as `Dataset.save_to_disk` writes it"


@dataclass(frozen=True)
class HubRows:
    """Rows to go through once, and the commit that they are from ('' where it is not known)."""

    rows: Iterator[RawRow]
    commit: str

    def __iter__(self) -> Iterator[RawRow]:
        return self.rows


def read_hub(
    path: str,
    config: str | None,
    split: str,
    *,
    local_layout: str,
    revision: str | None = None,
    place: str = "data.root",
) -> HubRows:
    """The rows of a split of a hub data set, or of `datasets`' cache of it.

    revision: commit, tag or branch; None: the newest. place: the recipe key that asked. DataError naming the local
    alternative where the hub cannot be reached, has no such data set or revision, or does not let one have it.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    fix = f"set data.root=DIR with a local copy ({local_layout})"
    owner, _, name = path.rpartition("/")
    in_cache = f"{owner}___{camelcase_to_snakecase(name)}" if owner else camelcase_to_snakecase(name)
    reachable = hub_reachable()
    if not reachable and not (Path(datasets.config.HF_DATASETS_CACHE) / in_cache).exists():
        raise DataError(
            f"the Hugging Face hub cannot be reached to load {path}", place=place, fix=f"{fix}, or check the network"
        )
    options = {} if revision is None else {"revision": revision}
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # The client asks a hub that does not answer again and again before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = offline or not reachable
        table = datasets.load_dataset(path, config, split=split, **options)
    except Exception as error:  # the client has no common base for what it raises
        raise _hub_error(error, path, revision, fix, place) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    commit = commit_of(table)
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and commit and commit != revision:
        raise DataError(
            f"commit {revision} of {path} was asked for and {commit} is what the cache holds",
            place=place,
            fix=f"load it once with a network, or {fix}",
        )
    return HubRows(iterate(table, f"{path}:{split}"), commit)


def commit_of(table: Any) -> str:
    """The hub's commit that a `datasets` table was built from: its cache folder's name; '' where it is not known."""
    files = [file["filename"] for file in getattr(table, "cache_files", None) or ()]
    addresses = getattr(getattr(table, "info", None), "download_checksums", None) or {}
    return next((match[1] for name in (*files, *addresses) if (match := _COMMIT.search(str(name)))), "")


def _hub_error(error: Exception, path: str, revision: str | None, fix: str, place: str) -> KVDistillError:
    if full := disk_full_error(error, path):
        return full
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and isinstance(before, Exception):
        chain.append(before)
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    words = str(error)
    answers = [getattr(getattr(one, "response", None), "status_code", None) for one in chain]
    status = next((code for code in answers if isinstance(code, int) and code >= 500), None)
    what = f"cannot load {path} from the hub: {shown(words) or type(error).__name__}"
    how = f"{fix}, or check the network"
    if "GatedRepoError" in kinds or "gated dataset" in words:
        what = f"{path} is gated on the hub: its owner must let you have it"
        how = f"ask for access on its page there and log in (`hf auth login`, or HF_TOKEN), or {fix}"
    elif "RevisionNotFoundError" in kinds or words.startswith("Revision "):
        what = f"{path} has no revision {quoted(revision)} on the hub"
        how = f"give a commit, tag or branch that it has, or leave `revision` out; or {fix}"
        place = f"{place}.revision" if place.startswith("data.tasks") else place
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        what = f"{path} is not on the hub, or is private"
        how = f"{fix}; if it is private, log in (`hf auth login`, or HF_TOKEN)"
    elif status or kinds & {"ConnectionError", *_NETWORK_ERRORS}:
        reason = f"it answers {status}" if status else shown(words)
        what = f"the Hugging Face hub cannot be reached to load {path} ({reason})"
    return DataError(what, place=place, fix=how)


def read_saved_folder(path: Path, *, place: str) -> Iterator[RawRow]:
    """The rows of one split that `datasets` saved (`save_to_disk`), read as they are asked for. Places: `folder:row`.

    DataError at once for another folder, a torn one, one without rows.
    """
    import datasets

    if not (path / "state.json").is_file():
        splits = sorted(part.parent.name for part in path.glob("*/state.json"))
        fix = f"{_FIX}; here are: {shown(', '.join(splits))}" if splits else _FIX
        raise DataError(f"{at_line(path)} is not a saved data set (it holds no state.json)", place=place, fix=fix)
    try:
        table = datasets.Dataset.load_from_disk(str(path))
        num_rows = len(table)
    except Exception as error:  # whatever `datasets` and pyarrow make of a strange folder
        raise _unreadable(error, at_line(path)) from error
    if not num_rows:
        raise DataError("the saved data set has no rows", place=at_line(path), fix=_FIX)
    return iterate(table, at_line(path))


def iterate(table: Any, name: str) -> Iterator[RawRow]:
    """The rows of a `datasets` table, with places `name:row`."""
    rows, number = iter(table), 0
    while True:
        try:
            columns = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the Arrow file behind it is torn, or no longer there
            raise _unreadable(error, f"{name}:{number + 1}") from error
        number += 1
        yield RawRow(columns, f"{name}:{number}", number)


def _unreadable(error: Exception, place: str) -> DataError:
    return DataError(f"cannot read the saved data set: {shown(error)}", place=place, fix=_FIX)
