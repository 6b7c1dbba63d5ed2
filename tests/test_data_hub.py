"""The hub, made up: what its client raises, the real client against a small server, the commit that was read."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest

from kvdistill.core.errors import DataError
from kvdistill.core.recipe import DataRecipe, TaskRecipe
from kvdistill.data.problems import Problem
from kvdistill.data.sets import TASKS
from kvdistill.data.sources import hub

HTTP: Any = sys.modules[huggingface_hub.errors.HTTPError.__module__.partition(".")[0]]  # the client's own client


def response(status: int) -> Any:
    return HTTP.Response(status, request=HTTP.Request("GET", "https://hub.example/x"))


def wrapped(inner: Exception, outer: Exception) -> Exception:
    """`outer`, raised while `inner` was handled and without it as its cause, as `datasets` does."""
    try:
        try:
            raise inner
        except Exception:
            raise outer from None
    except Exception as error:
        return error


def hub_errors() -> dict[str, tuple[Exception, str, str]]:
    import datasets.exceptions as ours
    import huggingface_hub.errors as theirs

    gated = theirs.GatedRepoError("403 Client Error.", response=response(403))
    missing = theirs.RepositoryNotFoundError("404 Client Error.", response=response(404))
    server = theirs.HfHubHTTPError("503 Server Error", response=response(503))
    return {
        "gated": (gated, "is gated", "hf auth login"),
        "gated, as datasets says it": (
            wrapped(gated, ours.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")),
            "is gated",
            "HF_TOKEN",
        ),
        "missing": (
            wrapped(missing, ours.DatasetNotFoundError("Dataset 'x' doesn't exist")),
            "not on the hub",
            "log in",
        ),
        "revision": (
            ours.DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'x' on the Hub."),
            "no revision 'v9'",
            "commit, tag or branch",
        ),
        "offline": (theirs.OfflineModeIsEnabled("Offline mode is enabled."), "cannot be reached", "network"),
        "no route": (HTTP.ConnectError("[Errno 101] Network is unreachable"), "cannot be reached", "network"),
        "slow": (HTTP.ReadTimeout("timed out"), "cannot be reached", "network"),
        "in maintenance": (wrapped(server, FileNotFoundError("Couldn't find")), "it answers 503", "network"),
        "split": (ValueError("Unknown split \"train\". Should be one of ['test']."), "Unknown split", "DIR/gsm8k"),
        "torn": (ours.DatasetGenerationError("An error occurred while generating the dataset"), "cannot load", "DIR"),
        "escape": (ValueError("\x1b[31mred\x1b[0m\nmore" + "x" * 9999), r"\x1b[31mred", "DIR/gsm8k"),
    }


@pytest.mark.parametrize("case", list(hub_errors()))
def test_what_the_hub_client_raises_is_one_error_with_the_local_alternative(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import datasets

    error, what, fix = hub_errors()[case]

    def fail(*args: Any, **options: Any) -> None:
        assert options["revision"] == "v9"
        raise error

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    recipe = TaskRecipe(name="gsm8k", revision="v9")
    with pytest.raises(DataError) as caught:
        TASKS["gsm8k"].load(recipe, DataRecipe(tasks=[recipe]))
    message = str(caught.value)
    assert what in caught.value.what and fix in caught.value.fix and caught.value.place.startswith("data.tasks (gsm8k)")
    assert "data.root=DIR" in message and "DIR/gsm8k/train.jsonl" in message
    assert message.replace("\n", "").isprintable() and len(caught.value.what) < 250


def test_a_full_disk_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from kvdistill.core.errors import TrainingStopped

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(TrainingStopped, match="disk is full"):
        hub.read_hub("openai/gsm8k", "main", "train", local_layout="DIR/x")


ROWS = [{"question": "How many?", "answer": "It is 2.\n#### 2"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IN_A_PROCESS = """
import http.server, json, sys, threading, time
from pathlib import Path

status = {}

class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        if status["now"] == "silent":
            time.sleep(60)
        at_root = self.path == "/"
        self.send_response(status["root"] if at_root else status["now"])
        for name, value in status["headers"].items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD
    def log_message(self, *words):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=sys.argv[1])
import datasets
from kvdistill.core.errors import DataError
from kvdistill.data.sources import hub

def ask(name, root=200, now=404, headers=None, **options):
    status.update(root=root, now=now, headers=headers or {})
    begun = time.monotonic()
    try:
        rows = hub.read_hub(name, None, "train", local_layout="DIR/x", **options)
        answer = [rows.commit, [row.place for row in rows]]
    except DataError as error:
        answer = [error.what, error.fix]
    return {"answer": answer, "seconds": time.monotonic() - begun}

hub._PROBE_TIMEOUT_S = 0.5
folder = Path(datasets.config.HF_DATASETS_CACHE) / "Some___my_data/default/0.0.0" / sys.argv[2]
table = datasets.Dataset.from_list([{"a": "x"}, {"a": "y"}])
folder.mkdir(parents=True)
writer = datasets.arrow_writer.ArrowWriter(path=str(folder / "my_data-train.arrow"), features=table.features)
for row in table:
    writer.write(row)
writer.finalize()
split = {"name": "train", "num_bytes": 1, "num_examples": 2, "dataset_name": "my_data"}
datasets.DatasetInfo(
    features=table.features, builder_name="parquet", dataset_name="my_data", config_name="default", version="0.0.0",
    splits=[split],
).write_to_directory(str(folder))

found = {
    "gated": ask("a/b", now=401, headers={"X-Error-Code": "GatedRepo"}),
    "missing": ask("a/b", now=404, headers={"X-Error-Code": "RepoNotFound"}),
    "down": ask("a/b", root=503, now=503),
    "silent": ask("a/b", root=200, now="silent"),
    "cached": ask("Some/MyData", root=503, now=503),
    "cached, this commit": ask("Some/MyData", root=503, now=503, revision=sys.argv[2]),
    "cached, another commit": ask("Some/MyData", root=503, now=503, revision="f" * 40),
}
print(json.dumps(found))
os._exit(0)
"""


def test_the_real_client_against_a_hub_that_refuses_is_down_or_is_not_needed(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and "OFFLINE" not in k}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(tmp_path), COMMIT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    answers = {name: one["answer"] for name, one in found.items()}
    assert "is gated" in answers["gated"][0] and "hf auth login" in answers["gated"][1]
    assert "not on the hub" in answers["missing"][0]
    assert "cannot be reached" in answers["down"][0] and "cannot be reached" in answers["silent"][0]
    assert (
        answers["cached"] == answers["cached, this commit"] == [COMMIT, ["Some/MyData:train:1", "Some/MyData:train:2"]]
    )
    assert COMMIT in answers["cached, another commit"][0] and "f" * 40 in answers["cached, another commit"][0]


def test_the_commit_that_was_read_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    class Table(list[Any]):
        cache_files = ({"filename": f"/cache/openai___gsm8k/main/0.0.0/{COMMIT}/gsm8k-train.arrow"},)

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: Table(ROWS))
    recipe = TaskRecipe(name="gsm8k", revision=COMMIT)
    loaded = TASKS["gsm8k"].load(recipe, DataRecipe(tasks=[recipe]))
    assert [(s.kind, s.place, s.revision) for s in loaded.sources] == [
        ("hub", "openai/gsm8k:main:train", COMMIT),
        ("hub", "openai/gsm8k:main:test", COMMIT),
    ]
    assert list(loaded.problems) == [Problem("gsm8k", "train-1", "How many?", "It is 2.", "2")]


def test_asking_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    class Answer(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self) -> None:
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub.hub_reachable()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for status, reachable in ((200, True), (401, True), (503, False)):
            Answer.status = status
            assert hub.hub_reachable() is reachable
        server.shutdown()
    assert not hub.hub_reachable()  # nobody listens there any more
