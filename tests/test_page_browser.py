"""The report's page in a real browser: no errors, no requests, no overflow on a phone, nothing hostile comes alive.

Speaks the DevTools protocol over Chromium's own pipe, so that nothing but Chromium itself is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_factory import make_recipe, write_latents, write_lines, write_run, write_tuned

from kvdistill.stages.report import report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
HOSTILE = '<script>document.title="owned"<b>\x1b[31m\u202eevil'


def find_chromium() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        reason = "no chromium on PATH"
        if "chromium" in os.environ.get("KVDISTILL_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Browser:
    """One tab. `call` sends a command and returns its result; every event on the way is kept in `events`."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        moved = [os.dup(to_child), os.dup(from_child)]  # Chromium reads fd 3 and writes fd 4
        script = f'exec 3<&{moved[0]} 4>&{moved[1]}; exec "$0" "$@"'
        command = ["bash", "-c", script, binary, f"--user-data-dir={profile}", *FLAGS]
        self.process = subprocess.Popen(command, pass_fds=moved, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for fd in (*moved, to_child, from_child):
            os.close(fd)
        self.events: list[dict[str, Any]] = []
        self._rest, self._next, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], 60)[0], "chromium says nothing for a minute"
            chunk = os.read(self._in, 1 << 16)
            assert chunk, "chromium went away"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\0", 1)
        return json.loads(line)

    def open(self, page: Path, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Load a page at a device width and wait until it has fired `load`."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print_pdf(self, path: Path) -> None:
        answer = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile names, ids and predictions, and words too long for any screen."""
    run = tmp_path_factory.mktemp("run")
    long = "w" * 300
    recipe = make_recipe(
        {"competence": {}, "ce": {"teachers": []}, HOSTILE: {"teachers": []}},
        title=f"A {HOSTILE} title", report={"comparisons": [["competence", "ce"], [HOSTILE, "ce"]]},
    )  # fmt: skip
    write_run(run, recipe, questions=12)
    for path in run.glob("arms/*/seed-*/records.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [
            {**r, "id": f"{HOSTILE}{i}", "prediction": f"{HOSTILE}</pre>{long}", "gold": long}
            for i, r in enumerate(rows)
        ]
        write_lines(path, rows)
    return report(recipe, run)


def test_no_errors_and_no_requests(browser: Browser, page: Path) -> None:
    browser.open(page, 900)
    events = browser.events
    assert [
        e for e in events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    ] == []
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(u.startswith("file:") for u in urls)
    assert [u for u in urls if not u.startswith(("file:", "data:"))] == []
    assert [u for u in urls if u.startswith("file:")] == [page.as_uri()]


def test_pictures_are_drawn_and_hostile_text_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page, 900)
    assert browser.evaluate("[...document.images].length") >= 5
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("document.title") != "owned"
    text = browser.evaluate("document.body.textContent")
    assert "⟨U+001B⟩" in text and "⟨U+202E⟩" in text and not {"\x1b", "\u202e"} & set(text)


@pytest.mark.parametrize("width", [320, 390, 900, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_no_horizontal_overflow(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.body.getBoundingClientRect().width") <= width
    # nothing outside the scrolling boxes sticks out either
    wide = f"[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > {width} + 1).length"  # noqa: E501
    assert browser.evaluate(wide) == 0


def test_prints(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, 900)
    browser.print_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")


# -- a finished study in both languages: for everybody, on any screen, on paper --------------------------


@pytest.fixture(scope="module", params=["en", "zh"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp(f"study-{request.param}")
    arms = {"ce": {"teachers": []}, "competence": {"fuse": {"fusion_strategy": "competence"}},
            "keys": {"loss": {"v_weight": 0.0}}, "both": {}, "placebo": {"control": "placebo"},
            "thinks": {"reasoning": "latent", "compress": {"kv_compression": "r-kv"}}}  # fmt: skip
    curves = {"arms": ["competence", "ce"], "budgets": [1, 2]}
    rules = {"comparisons": [["competence", "ce"], ["placebo", "ce"]], "language": request.param, "curves": curves}
    tune = {"grid": {"train": {"learning_rate": [1e-3, 4e-3]}, "loss": {"kv_weight": [5, 20]}}, "seeds": [5]}
    recipe = make_recipe(arms, report=rules, tune=tune)
    write_run(run, recipe, questions=12)
    write_tuned(run, recipe)
    write_latents(run, recipe)
    return report(recipe, run)


def find_axe() -> str:
    """axe-core's source: KVDISTILL_AXE, or node_modules beside the tests (`npm install --no-save axe-core`)."""
    folder = Path(__file__).resolve().parent.parent / "node_modules" / "axe-core"
    path = Path(os.environ.get("KVDISTILL_AXE") or folder / "axe.min.js")
    if not path.is_file():
        reason = "no axe-core: npm install --no-save axe-core"
        if "axe" in os.environ.get("KVDISTILL_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, False), (1100, True)])
def test_axe_finds_nothing(browser: Browser, study: Path, width: int, dark: bool) -> None:
    source = find_axe()
    browser.open(study, width, dark=dark)
    browser.call("Runtime.evaluate", expression="document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.call("Runtime.evaluate", expression=source)
    asked = "axe.run().then(r => JSON.stringify(r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))])))"
    answer = browser.call("Runtime.evaluate", expression=asked, awaitPromise=True, returnByValue=True)
    assert json.loads(answer["result"]["value"]) == []


def test_what_is_wider_than_a_phone_says_so(browser: Browser, study: Path) -> None:
    browser.open(study, 390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => ["
        "e.classList.contains('picture'), e.tabIndex, e.getAttribute('aria-label') || '',"
        "getComputedStyle(e).backgroundAttachment.includes('local'),"
        "(c => !!c && c.className === 'cue' && getComputedStyle(c).display !== 'none')(e.previousElementSibling)])"
    )
    assert len(boxes) > 8
    for is_picture, tab_index, name, has_shadow, has_words in boxes:
        assert tab_index == 0 and name  # the keyboard gets there, and is told where
        assert has_words if is_picture else has_shadow
    browser.open(study, 1100)
    shown = "[...document.querySelectorAll('.cue')].filter(e => getComputedStyle(e).display !== 'none').length"
    assert browser.evaluate(shown) == 0


def test_on_paper_what_is_folded_is_open_and_nothing_is_cut(browser: Browser, study: Path) -> None:
    browser.open(study, 700)
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 0
    tall = "[...document.querySelectorAll('details')].map(d => d.getBoundingClientRect().height)"
    folded = browser.evaluate(tall)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert all(after > 2 * before for after, before in zip(browser.evaluate(tall), folded, strict=True))
        assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        kept = "[...document.querySelectorAll('h2, h3')].every(h => getComputedStyle(h).breakAfter === 'avoid')"
        assert browser.evaluate(kept)
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_on_paper_every_table_is_as_wide_as_the_paper_and_names_are_not_broken(browser: Browser, study: Path) -> None:
    wide = 688  # A4 less its margins, in pixels of CSS
    browser.open(study, wide)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        over = f"[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > {wide} + 1)"
        assert browser.evaluate(f"{over}.map(t => t.parentElement.getAttribute('aria-label'))") == []
        narrow = "[...document.querySelectorAll('tbody th')].filter(t => t.getBoundingClientRect().width < 70).length"
        assert browser.evaluate(narrow) == 0
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_pictures_have_words_and_the_page_its_landmarks(browser: Browser, study: Path) -> None:
    browser.open(study, 900)
    alts = browser.evaluate("[...document.images].map(i => i.alt)")
    assert len(alts) > 10 and all(len(alt) > 30 for alt in alts) and len(set(alts)) == len(alts)
    assert browser.evaluate("['header', 'main', 'nav'].map(n => document.querySelectorAll(n).length)") == [1, 1, 1]
    titles = "[...document.querySelectorAll('section')].map(s => s.getAttribute('aria-labelledby'))"
    named = f"{titles}.every(title => document.getElementById(title))"
    assert browser.evaluate(named)
    assert browser.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
