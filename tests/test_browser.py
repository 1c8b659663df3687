"""The pages in a browser: no error on the console, figures drawn, nothing wider than the window.

Runs where Chromium is; `make test` leaves it out elsewhere.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pages import report_values

from xlstm_distill.report import report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTHS = (360, 768, 1280, 1920)

# Each page in a frame of each width: a frame's width is the window's for what is in it.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="found"></pre><script>
const found = [];
let left = 0;
for (const page of PAGES) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  left += 1;
  frame.style.width = width + "px";
  frame.style.border = 0;
  frame.onload = () => {
    const inside = frame.contentDocument, window_ = frame.contentWindow;
    const drawn = e => {
      const box = e.getBoundingClientRect();
      return box.width > 100 && box.height > 50;
    };
    found.push({
      page, width, inner: window_.innerWidth, scroll: inside.documentElement.scrollWidth,
      figures: inside.querySelectorAll("figure").length,
      drawn: [...inside.querySelectorAll("figure svg")].filter(drawn).length,
      broken: [...inside.images].filter(i => !i.complete || !i.naturalWidth).length,
    });
    if (--left == 0) document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.src = page;
  document.body.append(frame);
}
</script>"""


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(path for name in names if (path := shutil.which(name)))


def opened(pages: list[Path], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What is measured of pages at all widths, by page and width, and the lines on the console."""
    frame = folder / "frame.html"
    text = MEASURE.replace("PAGES", json.dumps([page.as_uri() for page in pages]))
    frame.write_text(text.replace("WIDTHS", json.dumps(WIDTHS)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    # Scripts may look into frames with files, and no clock is waited for.
    options += ["--allow-file-access-from-files", "--virtual-time-budget=20000"]
    options += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [chromium(), *options, frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], "not all pages were loaded"
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # Frames are loaded in any order.
    measured = json.loads(html.unescape(found[1]))
    return sorted(measured, key=lambda p: (p["page"], p["width"])), console


def test_pages_fit_every_window(compared, tmp_path):
    pages = [compared / "out" / "report.html", report(report_values(), tmp_path / "run")]
    found, console = opened(pages, tmp_path)
    assert console == []
    assert len(found) == len(pages) * len(WIDTHS)
    for page in found:
        assert page["inner"] == page["width"]
        assert page["scroll"] <= page["inner"], page
        assert page["drawn"] == page["figures"] >= 10 and page["broken"] == 0, page


def test_what_is_wrong_would_be_seen(tmp_path):
    page = tmp_path / "wrong.html"
    wide = '<div style="width: 800px">wide</div><figure><svg width="9"></svg></figure>'
    page.write_text(f'<!DOCTYPE html>{wide}<img src="no.png"><script>no_such_name()</script>')
    found, console = opened([page], tmp_path)
    assert [p["scroll"] > p["inner"] for p in found] == [True, True, False, False]
    assert all(p["drawn"] == 0 and p["broken"] == 1 for p in found)
    assert "no_such_name" in "".join(console)
