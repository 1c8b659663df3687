"""The report: schema, one self-contained page, escaping, and the terminal."""

from __future__ import annotations

import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import report_values
from rich.console import Console

from xlstm_distill import plots
from xlstm_distill.errors import UserError
from xlstm_distill.report import ReportData, report, report_data, terminal_table


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return report_values()


@pytest.fixture(scope="module")
def written(data, tmp_path_factory) -> Path:
    """The page; drawing its figures takes a second or two, so it is written once."""
    return report(data, tmp_path_factory.mktemp("run") / "report")


class Page(html.parser.HTMLParser):
    """Tags, text, ids and everything a browser would load or follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.targets.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_complete_and_self_contained(written):
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert written.name == "report.html" and text.startswith("<!DOCTYPE html>")
    # Two losses, layers, three of fidelity, gates, four Win-and-Tie groups, recovery.
    assert page.tags.count("svg") == 2 + 1 + 3 + 1 + 4 + 1
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert all(t.startswith(("#", "data:")) for t in page.targets)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    # Ids are unique, and every reference to one finds it.
    assert len(page.ids) == len(set(page.ids))
    for target in page.targets + re.findall(r"url\((#[^)]+)\)", text):
        assert target.startswith("data:") or target[1:] in page.ids
    for words in (
        "Q4_1 GGUF, dequantised",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "134,515,008",
        "window 64, 4 sinks",
        "piqa *",
        "control (control)",
        "learning_rate: 0.02",
        "5:33 min",
        "2,048",
        "Text was sampled from the teacher.",
    ):
        assert words in " ".join(page.words.split()), words


def test_text_from_outside_is_escaped(written):
    text = written.read_text(encoding="utf-8")
    assert "<script>" not in text and "<b>hi" not in text and "<SmolLM2>" not in text
    page = Page(text)
    assert "<script>alert(1)</script>" in page.words and "<b>hi</b>" in page.words


def test_json_holds_the_same_facts(data, written):
    text = (written.parent / "report.json").read_text()
    assert "NaN" not in text
    assert report_data(json.loads(text)) == report_data(data)
    assert {p.name for p in written.parent.iterdir()} == {"report.html", "report.json"}


def test_the_same_data_give_the_same_bytes(data, written, tmp_path):
    assert report(data, tmp_path).read_bytes() == written.read_bytes()


@pytest.fixture(scope="module")
def least(data) -> dict[str, Any]:
    needed = ("title", "created", "teacher", "student", "main", "control")
    return {key: data[key] for key in needed}


def test_a_report_without_optional_parts(least, tmp_path):
    page = Page(report(least, tmp_path).read_text())
    assert "svg" not in page.tags
    assert all(t.startswith("#") and t[1:] in page.ids for t in page.targets)
    out = io.StringIO()
    terminal_table(least, Console(file=out, width=120))
    assert "Q4_1 GGUF" in out.getvalue()


def test_terminal(data):
    out = io.StringIO()
    terminal_table(ReportData(**data), Console(file=out, width=160))
    text = out.getvalue()
    for words in (
        "Q4_1 GGUF, dequantised",
        "KL / control",
        "128–256",
        "[bold]hi[/bold]",
        "there [/]",
        "piqa *",
        "NO",
        "0.250",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"titel": "x"}, "report: titel: unknown key"),
        ({"teacher": {}}, "report: teacher.name: missing"),
        (
            {"losses": [{"stage": "a", "label": "b", "steps": [1], "values": []}]},
            r"report: losses\.0: 1 steps, but 0 values",
        ),
        (
            {"layer_errors": {"layers": [3], "before": [1.0], "after": []}},
            "report: layer_errors: 1 layers, 1 numbers before, 0 after",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(data, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        report({**data, **change}, tmp_path)


def test_a_place_that_cannot_be_written(least, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the report"):
        report(least, tmp_path / "file" / "report")


def test_plots_in_every_format(tmp_path):
    figure = plots.gate_map([[0.1, None], [0.5, 0.9]], "gates")
    for ending, start in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        assert plots.save(figure, tmp_path / f"x{ending}").read_bytes().startswith(start)
    assert plots.svg(figure).startswith("<svg") and plots.png(figure).startswith(b"\x89PNG")
