"""math-verify in a process of its own: limits, deaths, threads, forks, and a parent that is killed."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.core.errors import KVDistillError
from kvdistill.data.answers import checker as checker_module
from kvdistill.data.answers.checker import CHECKER, Checker, Verdict, count_undecided
from kvdistill.data.answers.latex import compare_latex, compare_latex_pairs, same_latex

HANGS = ("9^{9^{9^{9}}}", "x+5")
RIGHT = ("\\sqrt{20}", "2\\sqrt{5}")
WRONG = ("\\sqrt{21}", "2\\sqrt{5}")
_CHANNEL = "import sys; from multiprocessing.connection import Connection; channel = Connection(int(sys.argv[1]))"


@pytest.fixture
def checker() -> Iterator[Checker]:
    made = Checker(limit_s=2.0)
    yield made
    made.close()


def ask(checker: Checker, pairs: list[tuple[str, str]]) -> list[Verdict]:
    return [checker.compare(first, second) for first, second in pairs]


def _is_there(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait_until(is_so: Callable[[], bool], limit_s: float = 60.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


def test_what_hangs_is_cut_off_and_the_next_comparison_works(checker: Checker) -> None:
    assert ask(checker, [RIGHT, HANGS, RIGHT, WRONG]) == ["equal", "timeout", "equal", "different"]
    assert checker.counts == {"equal": 2, "timeout": 1, "different": 1, "started": 2}
    assert ask(checker, [RIGHT]) == ["equal"] and checker.counts["started"] == 2


def test_a_timeout_is_not_equal_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKER, "limit_s", 1.0)
    CHECKER.close()
    before = count_undecided()
    assert compare_latex(*HANGS) == "timeout" and not same_latex(HANGS[1], HANGS[0])
    assert count_undecided() == before + 2
    assert compare_latex_pairs([RIGHT, ("(1,9^{9^{9^{9}}})", "(1,x+5)"), ("(1,9^{9^{9^{9}}})", "(2,x+5)")]) == [
        "equal",
        "timeout",
        "different",  # decided by the first number
    ]
    CHECKER.close()


def test_memory_is_limited() -> None:
    small = Checker(limit_s=20.0, memory_bytes=200 << 20)
    assert ask(small, [RIGHT]) == ["equal"] and small.pid is not None
    assert resource.prlimit(small.pid, resource.RLIMIT_AS)[0] == 200 << 20
    assert ask(small, [("2^{2^{40}}", "x+1")]) != ["equal"]  # 128 GB
    assert ask(small, [RIGHT]) == ["equal"]
    small.close()


def test_a_child_that_is_killed_is_started_again(checker: Checker) -> None:
    assert ask(checker, [RIGHT]) == ["equal"]
    first = checker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert ask(checker, [RIGHT, WRONG]) == ["equal", "different"]
    assert checker.pid != first and checker.counts["started"] == 2
    with pytest.raises(ChildProcessError):  # waited for: no zombie
        os.waitpid(first, os.WNOHANG)


def test_a_child_that_is_killed_at_work_is_asked_once_more(checker: Checker) -> None:
    checker.limit_s = 2.5
    assert ask(checker, [RIGHT]) == ["equal"]

    def kill() -> None:
        time.sleep(0.5)
        if checker.pid is not None:
            os.kill(checker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert ask(checker, [HANGS, RIGHT]) == ["timeout", "equal"]
    killer.join(60)


def test_a_child_that_dies_of_every_question_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(f"{_CHANNEL}; channel.send('ready'); channel.recv()")
    monkeypatch.setattr(checker_module, "_CHILD", dying)
    broken = Checker()
    assert ask(broken, [RIGHT, RIGHT]) == ["failed", "failed"] and broken.counts["started"] == 4
    broken.close()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("channel.send('ImportError: No module named math_verify')", "No module named math_verify"),
        ("exit(7)", "code 7"),
    ],
)
def test_math_verify_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, reason: str
) -> None:
    (tmp_path / "child.py").write_text(f"{_CHANNEL}; {program}")
    monkeypatch.setattr(checker_module, "_CHILD", tmp_path / "child.py")
    with pytest.raises(KVDistillError, match=reason) as caught:
        ask(Checker(), [RIGHT])
    assert "install math-verify" in caught.value.fix


def test_a_child_that_closes_its_channel_and_does_not_end_is_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "child.py").write_text(f"{_CHANNEL}; channel.close(); import time; time.sleep(60)")
    monkeypatch.setattr(checker_module, "_CHILD", tmp_path / "child.py")
    monkeypatch.setattr("kvdistill.data.limited._END_LIMIT_S", 0.2)
    checker = Checker()
    with pytest.raises(KVDistillError, match="it closed its channel and did not end"):
        ask(checker, [RIGHT])
    assert checker.pid is None, "it was ended"


def test_an_interrupt_leaves_no_answers_behind(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    assert ask(checker, [RIGHT]) == ["equal"]
    with monkeypatch.context() as patched:
        patched.setattr(checker, "_heard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(checker, [RIGHT, WRONG])
    assert checker.pid is None and ask(checker, [WRONG, RIGHT]) == ["different", "equal"]


def test_threads_get_their_own_answers(checker: Checker) -> None:
    found: dict[int, list[str]] = {}

    def ask_some(number: int) -> None:
        pairs = [(f"{number}+{n}+x", f"x+{number + n + n % 2}") for n in range(100)]
        found[number] = list(ask(checker, pairs))

    threads = [threading.Thread(target=ask_some, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {number: ["equal", "different"] * 50 for number in range(4)}
    assert checker.counts["started"] == 1


def test_a_thread_reaches_the_verdicts_of_the_main_thread() -> None:
    pairs = [RIGHT, WRONG, ("1/2", "\\frac12"), ("(x+1)^2", "x^2+2x+1"), ("\\{1,x\\}", "\\{x,1\\}")]
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(compare_latex_pairs(pairs)))
    thread.start()
    thread.join(120)
    assert found == compare_latex_pairs(pairs) == ["equal", "different", "equal", "equal", "equal"]


def test_any_text_can_be_asked(checker: Checker) -> None:
    checker.limit_s = 20.0
    odd = ["a\nb", "\x00", "漢字", "é", "\ud800", '"', "\\", "", "{" * 200, "$", "%", "}{", "\u2028", "x" * 300]
    assert ask(checker, [(text, "5") for text in odd] + [RIGHT]) == ["different"] * len(odd) + ["equal"]
    assert checker.counts["started"] == 1


def test_a_megabyte_goes_through_the_pipe(checker: Checker) -> None:
    checker.limit_s = 120.0
    digits = "7" * 1_000_000  # more than Python turns into a number
    assert ask(checker, [(digits, "8"), RIGHT, ("8", digits)]) == ["different", "equal", "different"]


@given(st.lists(st.sampled_from([RIGHT, WRONG, ("a+b", "b+a"), ("a-b", "b-a")]), max_size=150))
def test_the_order_of_answers_is_that_of_the_questions(pairs: list[tuple[str, str]]) -> None:
    right = {RIGHT: "equal", ("a+b", "b+a"): "equal"}
    assert ask(CHECKER, pairs) == [right.get(pair, "different") for pair in pairs]


def test_the_child_is_light_and_ends_when_it_is_closed(checker: Checker) -> None:
    assert ask(checker, [RIGHT]) == ["equal"] and checker.pid is not None
    pid = checker.pid
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in maps and "pyarrow" not in maps
    checker.close()
    assert not Path(f"/proc/{pid}").exists() and checker.pid is None
    checker.close()


# The package's own start-up loads torch, which is not what is tried here: only the module itself is imported.
_LIGHT = """
import json, os, sys, time, types, signal, multiprocessing, threading
import kvdistill
data = types.ModuleType("kvdistill.data")
data.__path__ = [os.path.join(path, "data") for path in kvdistill.__path__]
sys.modules["kvdistill.data"] = data
from kvdistill.data.answers.checker import CHECKER
def compare_expressions(pairs): return [CHECKER.compare(*pair) for pair in pairs]
RIGHT, WRONG, HANGS = ("a+a", "2a"), ("a", "2a"), ("9^{9^{9^{9}}}", "x+5")
def say(**what): print(json.dumps(what), flush=True)
"""


def _script(code: str) -> list[str]:
    return [sys.executable, "-c", _LIGHT + textwrap.dedent(code)]


def test_a_fork_has_a_child_of_its_own() -> None:
    code = """
        assert compare_expressions([RIGHT]) == ["equal"]
        mine = CHECKER.pid
        if os.fork() == 0:
            verdicts = compare_expressions([WRONG, RIGHT])
            say(forked=verdicts, pid=CHECKER.pid)
            sys.exit(0)  # with atexit: it must not end its parent's child
        status = os.wait()[1]
        say(parent=compare_expressions([RIGHT, WRONG]), pid=CHECKER.pid, same=CHECKER.pid == mine)
        def work(queue): queue.put(compare_expressions([RIGHT, WRONG]))
        for method in ("fork",):
            context = multiprocessing.get_context(method)
            queue = context.Queue()
            worker = context.Process(target=work, args=(queue,), daemon=True)
            worker.start()
            say(daemon=queue.get(timeout=120))
            worker.join()
        say(status=status, started=CHECKER.counts["started"])
    """
    done = subprocess.run(_script(code), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    forked, parent, daemon, last = (json.loads(line) for line in done.stdout.splitlines())
    assert forked["forked"] == ["different", "equal"] and parent["parent"] == ["equal", "different"]
    assert forked["pid"] != parent["pid"] and parent["same"] and daemon["daemon"] == ["equal", "different"]
    assert last == {"status": 0, "started": 1}
    assert _wait_until(lambda: not _is_there(forked["pid"]) and not _is_there(parent["pid"]))


def test_a_lock_held_while_forking_blocks_nobody() -> None:
    code = """
        CHECKER.limit_s = 3.0
        thread = threading.Thread(target=compare_expressions, args=([HANGS],))
        thread.start()
        time.sleep(1.0)  # the thread holds the lock now, or will soon
        if os.fork() == 0:
            say(forked=compare_expressions([RIGHT]))
            os._exit(0)
        os.wait()
        thread.join()
        say(parent=compare_expressions([RIGHT]), undecided=CHECKER.counts["timeout"])
    """
    done = subprocess.run(_script(code), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"forked": ["equal"]},
        {"parent": ["equal"], "undecided": 1},
    ]


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("forked", [False, True])
def test_a_child_does_not_outlive_a_parent_that_is_killed(busy: bool, forked: bool) -> None:
    code = f"""
        CHECKER.limit_s = 2.0
        compare_expressions([RIGHT])
        if {forked} and os.fork() == 0:
            time.sleep(60)  # holds the pipe open
            os._exit(0)
        say(pid=CHECKER.pid)
        if {busy}:
            compare_expressions([HANGS])
        time.sleep(60)
    """
    # a session of its own, so that the forked process, which sleeps, can be ended afterwards
    parent = subprocess.Popen(_script(code), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert parent.stdout is not None
    pid = json.loads(parent.stdout.readline())["pid"]
    time.sleep(0.3)
    assert _is_there(pid)
    parent.kill()
    parent.wait(60)
    parent.stdout.close()
    assert _wait_until(lambda: not _is_there(pid))
    if forked:
        os.killpg(parent.pid, signal.SIGKILL)


def test_a_program_that_ends_leaves_nothing() -> None:
    code = "compare_expressions([RIGHT]); say(pid=CHECKER.pid)"
    done = subprocess.run(_script(code), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == ""
    assert not _is_there(json.loads(done.stdout)["pid"])
