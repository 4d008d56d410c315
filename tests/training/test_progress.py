from __future__ import annotations

import io
import logging
import sys

import pytest

from stca_jax.training import progress
from stca_jax.training.progress import Progress

SPEED = {"steps": 2.0, "tokens": 1_234_567.0, "targets": 500.0}


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(progress._log, "info", lambda form, *args: lines.append(form % args))
    return lines


def make_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)  # of the test itself, not of its set-up
    return stream


def test_a_log_gets_a_line_now_and_then(logged, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(10, 10_000, log_every_seconds=30) as shown:
        shown.report(20, 0.5, {}, seconds=7)
        shown.step()
        shown.report(40, 0.4, SPEED, seconds=10)
        shown.report(90, float("nan"), {"steps": 2.0, "tokens": 1_000.0}, seconds=25)
        shown.report(91, 0.1, SPEED, seconds=1)
        shown.report(10_000, None, {"steps": 3.0}, seconds=1)
    assert logged == [
        "step 20/10,000  loss 0.5",
        "step 90/10,000  loss nan  2.00 steps/s  1.00k tokens/s  ETA 1:22:35",
        "step 10,000/10,000  3.00 steps/s  ETA 00:00",
    ]
    assert sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_and_messages_lines_of_their_own(logged, monkeypatch):
    terminal = make_terminal(monkeypatch)
    messages = logging.getLogger("a library")
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(3, 9) as shown:
            assert "3/9" in terminal.getvalue()
            shown.report(5, 0.125, SPEED, seconds=1)
            messages.warning("slow")
            shown._bar.refresh()
        messages.warning("done")
    finally:
        logging.getLogger().removeHandler(handler)
    before, after = terminal.getvalue().split("slow\n")
    assert before.rstrip("\r").endswith(" ")  # blanked, then back at the start of the line
    assert "loss 0.125  2.00 steps/s  1.23M tokens/s" in after
    assert after.endswith("\ndone\n")  # the bar stays, and no filter is left behind
    assert logged == []


def test_other_processes_show_nothing(logged, monkeypatch):
    terminal = make_terminal(monkeypatch)
    with Progress(0, 5, is_shown=False) as shown:
        shown.step()
        shown.report(5, 0.5, SPEED, seconds=100)
    assert terminal.getvalue() == ""
    assert logged == []
