"""report: one page that needs no network, opened in a browser where there is one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from medkd_fast.cli import main
from medkd_fast.training.compare import compare, parse_methods
from medkd_fast.training.evaluate import Evaluation
from medkd_fast.training.files import read_json, write_json
from medkd_fast.training.metrics import Scores

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WHY_NOT = f"no browser: none of {', '.join(BROWSERS)} is on PATH, and MEDKD_FAST_CHROMIUM names none"


def browser() -> str | None:
    return os.environ.get("MEDKD_FAST_CHROMIUM") or next((p for b in BROWSERS if (p := shutil.which(b))), None)


@pytest.fixture(scope="module")
def page(teacher, config, tmp_path_factory) -> Path:
    """Of two runs and two comparisons with one name in different folders, and a failure whose reason looks like HTML."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("a", "b"):
        shutil.copytree(teacher, folder / name / "teacher")
        assert main(["evaluate", str(folder / name / "teacher")]) == 0
    out = folder / "a" / "compare"
    compare(config.resolved(epochs=1, steps=2), teacher, parse_methods("kd"), out, seeds=1)
    record = read_json(out / "compare.json")
    student = record["networks"]["student"]
    student["cells"], student["hd95"] = student["cells"] * 3, {"mean": 15.0, "sd": 7.1, "n": 2}
    record["networks"]["student + KD"]["failed"] = {"7": "<script>alert(1)</script> & so on"}
    write_json(out / "compare.json", record)
    shutil.copytree(out, folder / "b" / "compare")
    arguments = [str(folder / "a" / "teacher"), str(folder / "b" / "teacher"), str(out), str(folder / "b" / "compare")]
    assert main(["report", *arguments, "--out", str(folder / "report.html")]) == 0
    return folder / "report.html"


def test_the_page_holds_everything(page):
    text = page.read_text(encoding="utf-8")
    for words in (
        "a/teacher",
        "b/teacher",
        "student + KD",
        "gallbladder",
        "case4",
        "config.yaml",
        "versions.json",
        "n − 1",
    ):
        assert words in text, words
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in text
    assert "Content-Security-Policy" in text and "default-src &#39;none&#39;" not in text
    dice = read_json(page.parent / "a" / "teacher" / "scores.json")["classes"]["liver"]["dice"]
    assert f"<td>{dice:.3f}</td>" in text
    steps = read_json(page.parent / "a" / "teacher" / "finished.json")["steps"]
    assert steps == 6 and text.count(f"<td>{steps}</td></tr>\n") == 2  # the losses of every fifth are in the logs
    assert "<td>3</td>" in text and '<td>15.0 <span class="spread">± 7.1</span> (n = 2)</td>' in text


def test_a_page_of_many_cases_is_bounded_and_says_what_is_left_out(teacher, tmp_path):
    """Here 40 classes, 100 cases and pictures of 9 MB in each of three runs."""
    classes = {c: f"class {c}" for c in range(1, 41)}
    worst = {"case 42": {c: Scores(0.001 * c, 1.0, 1.0, "valid") for c in classes}}
    others = {f"case {i}": {c: Scores(0.5, 1.0, 1.0, "valid") for c in classes} for i in range(1, 100) if i != 42}
    for name in ("a", "b", "c"):
        shutil.copytree(teacher, tmp_path / name)
        Evaluation(classes, others | worst).write(tmp_path / name, data="large", split="test")
        (tmp_path / name / "overlay.png").write_bytes(os.urandom(9_000_000))
    assert main(["report", *(str(tmp_path / n) for n in "abc"), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 30_000_000
    for name in ("a", "b", "c"):
        rows = f"The 1000 lowest Dice of 3960 cases and classes; all are in {tmp_path / name / 'scores-cases.csv'}"
        assert text.count(f"<summary>{rows}</summary>") == 1
    assert text.count("<td>0.040</td>") == 3 and text.count('<tr><th scope="row">case 42</th>') == 3 * 40
    assert "points of single cases are left out" in text and "a point one case" not in text
    left_out = f"The picture of slices is left out, because the page has many: it is {tmp_path / 'c' / 'overlay.png'}."
    assert text.count("<img src=") == 2 and text.count("left out, because the page") == 1 and left_out in text


def test_wrong_use(teacher, tmp_path, capsys):
    def error(*folders: Path) -> str:
        assert main(["report", *map(str, folders), "--out", str(tmp_path / "x.html")]) == 2
        return capsys.readouterr().err

    bare = Path(shutil.copytree(teacher, tmp_path / "bare"))
    for file in bare.glob("scores*.json"):
        file.unlink()
    assert "holds no scores and no comparison: run `medkd-fast evaluate" in error(bare)
    assert "is no folder" in error(tmp_path / "nowhere")
    assert "is given twice" in error(bare, bare)
    assert not (tmp_path / "x.html").exists()


@pytest.fixture(scope="module")
def devtools(tmp_path_factory) -> Iterator[str]:
    """Address of a headless browser's DevTools."""
    found = browser()
    if not found:
        pytest.skip(WHY_NOT)
    profile = tmp_path_factory.mktemp("browser")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [found, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    with (profile / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            port = profile / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not (port.exists() and port.read_text().strip()):
                assert process.poll() is None and time.monotonic() < deadline, (profile / "log").read_text()[-2000:]
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port.read_text().split()[0]}"
        finally:
            process.terminate()


async def visit(devtools: str, address: str, expression: str, *, dark: bool = False) -> tuple[Any, list[dict]]:
    """Open a page; the value of a JavaScript expression in it, and every event: requests, log entries, exceptions."""
    events: list[dict] = []
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as answer:
            target = json.loads(await answer.text())
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            number = 0

            async def call(method: str, **parameters: Any) -> dict:
                nonlocal number
                number += 1
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (message := await socket.receive_json(timeout=60)).get("id") != number:
                    events.append(message)
                assert "error" not in message, message
                return message["result"]

            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", features=[scheme])
            await call("Page.navigate", url=address)
            while not any(e.get("method") == "Page.loadEventFired" for e in events):
                events.append(await socket.receive_json(timeout=60))
            result = await call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result
    return result["result"]["value"], events


LOOK = """(() => {
  const style = getComputedStyle(document.body);
  return {
    text: document.body.innerText,
    images: [...document.images].map(i => [i.naturalWidth, i.alt.length]),
    drawings: [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width * s.getBoundingClientRect().height),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    links: [...document.querySelectorAll('a')].map(a => document.getElementById(a.hash.slice(1)) !== null),
    heads: [...document.querySelectorAll('th')].every(t => t.scope),
    ink: style.color, ground: style.backgroundColor,
    drawn: getComputedStyle(document.querySelector('figure svg text')).fill,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
})()"""


def luminance(colour: str) -> float:
    channels = [int(c) / 255 for c in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_and_has_nothing_to_say(page, devtools, dark):
    seen, events = asyncio.run(visit(devtools, page.as_uri(), LOOK, dark=dark))
    for words in (
        "Runs side by side",
        "a/teacher",
        "Comparison: a/compare",
        "Comparison: b/compare",
        "liver",
        "student + KD",
        "cannot be concluded",
    ):
        assert words in seen["text"], words
    assert len(seen["images"]) == 2 + 2 * 3 and all(width > 100 and alt > 20 for width, alt in seen["images"])
    assert len(seen["drawings"]) == 2 and min(seen["drawings"]) > 10_000
    assert len(set(seen["ids"])) == len(seen["ids"]) and all(seen["links"]) and seen["heads"]
    assert seen["wide"] <= 0  # wide tables scroll by themselves
    bright, dim = sorted((luminance(seen["ink"]), luminance(seen["ground"])), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) > 7 and seen["drawn"] == seen["ink"]
    assert (luminance(seen["ink"]) > luminance(seen["ground"])) == dark

    said = [
        e
        for e in events
        if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    assert said == []
    asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"} and page.as_uri() in asked


def test_a_page_that_cannot_be_written(page, tmp_path, capsys):
    run = str(page.parent / "a" / "teacher")
    (tmp_path / "file").touch()
    for out, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "page.html", "File exists")):
        assert main(["report", run, "--out", str(out)]) == 2
        assert f"{out} cannot be written ({reason}): make room or choose another --out" in capsys.readouterr().err
