"""What is shown of long work: bars one after the other, and the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from xlstm_distill import durations, progress
from xlstm_distill.progress import Reporter


@pytest.fixture
def clock(monkeypatch):
    """The time as `progress` sees it, in seconds: clock[0]."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_the_named_part(clock):
    stream = io.StringIO()
    with Reporter(stream=stream).in_turn(["squad", "drop", "coqa"]) as show:
        for name, done, seconds in (
            ("squad", 50, 0),  # all there from before
            ("drop", 0, 0),
            ("drop", 30, 60),
            ("drop", 31, 1),  # too soon after the last line
            ("drop", 50, 39),
            ("coqa", 40, 0),  # some there from before
            ("coqa", 45, 20),
            ("coqa", 50, 20),
        ):
            clock[0] += seconds
            show(name, done, 50)
    assert stream.getvalue().splitlines() == [
        "squad (1 of 3): 50/50",
        "drop (2 of 3): 0/50",
        "drop (2 of 3): 30/50, 0:40 left",
        "drop (2 of 3): 50/50",
        "coqa (3 of 3): 40/50",
        "coqa (3 of 3): 45/50, 0:20 left",
        "coqa (3 of 3): 50/50",
    ]


def test_work_without_a_known_end_says_now_and_then_how_far_it_is(clock):
    stream = io.StringIO()
    with Reporter(stream=stream).counting("reading notes") as show:
        for documents, seconds in ((10, 14), (20, 1), (30, 14), (40, 2)):
            clock[0] += seconds
            show(f"{documents} documents")
    lines = ["reading notes: 20 documents", "reading notes: 40 documents"]
    assert stream.getvalue().splitlines() == lines


def test_a_first_call_behind_several_steps_is_not_taken_for_one(clock):
    stream = io.StringIO()
    with Reporter(stream=stream).bar("perplexity") as update:
        clock[0] += 8
        update({"step": 4, "steps": 10})
    assert stream.getvalue() == "perplexity: 4/10, 0:12 left\n"


def test_a_terminal_shows_a_bar_for_each_name(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reporter, stream = Reporter(), io.StringIO()
    reporter.console = Console(file=stream, force_terminal=True, width=100)
    with reporter.in_turn(["squad", "drop"]) as show:
        for name, done in (("squad", 7), ("drop", 3), ("drop", 7)):
            show(name, done, 7)
    shown = stream.getvalue()
    assert "squad (1 of 2)" in shown and "drop (2 of 2)" in shown and "3/7" not in shown
    assert shown.index("squad") < shown.index("7/7") < shown.index("drop") < shown.rindex("7/7")


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_a_narrow_terminal_cuts_no_number_of_the_end(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reporter, stream = Reporter(), io.StringIO()
    reporter.console = Console(file=stream, force_terminal=True, width=width, no_color=True)
    metrics = {"loss": 3.125, "kl": 0.25, "tokens_per_second": 1234.0, "validation": 1.5}
    with reporter.bar("stage II: expert general") as update:
        update({"step": 1250, "steps": 20000, "validated": 1000, **metrics})
    last = stream.getvalue().split("\r")[-1]
    for shown in ("expert general", "1250/20000", "-:--:--", "loss 3.125"):
        assert shown in last
    assert ("1,234 tokens/s" in last) == (width >= 80)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "xterm", "FORCE_COLOR": "1"}])
def test_what_cannot_rewrite_a_line_gets_lines(variables, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return variables["TERM"] == "dumb"  # the other is a file

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = Screen()
    with Reporter(stream=stream).bar("align") as update:
        update({"step": 1, "steps": 3})
        assert stream.getvalue().startswith("align: 1/3")


def test_days_are_told_from_hours_and_minutes():
    said = [durations.clock(s) for s in (7.4, 59.6, 205, 3599.7, 3805, 86399, 2 * 86400 + 3805)]
    assert said == ["0:07", "1:00", "3:25", "1:00:00", "1:03:25", "23:59:59", "2 d 1:03:25"]
    assert [durations.duration(s) for s in (7, 205, 3599.7, 3805)] == [
        "7.0 s",
        "3:25 min",
        "1:00:00",
        "1:03:25",
    ]


def test_quiet_shows_nothing():
    stream = io.StringIO()
    with Reporter(quiet=True, stream=stream).in_turn(["squad"]) as show:
        show("squad", 1, 2)
    assert stream.getvalue() == ""
