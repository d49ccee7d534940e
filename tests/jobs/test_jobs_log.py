"""What the harness says goes to the log; a terminal shows one line of it, which goes away."""

import io
import sys

import pytest
from tqdm import tqdm

from kdlm.jobs.log import told_to


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work() -> None:
    print("INFO: something")
    for _ in tqdm(range(3), desc="Requesting", mininterval=0):
        pass
    sys.stderr.flush()


def test_a_terminal_shows_the_bar_and_nothing_else_and_the_log_has_all(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with told_to(tmp_path / "out" / "log", "student: hellaswag"):
        work()
    shown, log = terminal.getvalue(), (tmp_path / "out" / "log").read_text()
    assert sys.stderr is terminal
    assert "student: hellaswag ..." in shown and "student: hellaswag Requesting: 100%|" in shown
    assert "something" not in shown and "something" in log and "100%|" in log
    assert shown.rstrip().endswith("\x1b[2K")  # the line is gone


def test_elsewhere_nothing_is_shown(tmp_path, capfd):
    with told_to(tmp_path / "log", "student: hellaswag"):
        work()
    assert capfd.readouterr() == ("", "") and "100%|" in (tmp_path / "log").read_text()


def test_the_line_goes_away_when_something_goes_wrong(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError, match="lost"), told_to(tmp_path / "log", "student: hellaswag"):
        raise ValueError("lost")
    assert sys.stderr is terminal and "\x1b[?25h" in terminal.getvalue()  # and the cursor is back
