"""The bar of a run on a terminal, seen as a person sees it, and plain lines everywhere else."""

import os
import subprocess
import sys
from io import StringIO

import pytest

from vlp import config, console, log
from vlp.reporter import Reporter


class Terminal(StringIO):
    """Keeps what a terminal would show: a carriage return goes back to the line's beginning."""

    def isatty(self):
        return True

    def screen(self):
        lines, column = [""], 0
        for sign in self.getvalue():
            if sign == "\n":
                lines.append("")
                column = 0
            elif sign == "\r":
                column = 0
            else:
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + sign + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


def watched(monkeypatch):
    """Standard output and error on one terminal that a person watches."""
    for name in ("CI", "NO_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    # Not by a fixture: pytest puts streams of its own in their place before a test begins.
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


SCALARS = {"loss": 1.5, "pictures": 8, "text_tokens": 80}


def reporter_in(folder):
    settings = config.load(config.find("demo"), [f"out={folder}"])
    return Reporter(settings, config.Plan(batch=8, steps_per_epoch=4, total=4), 0)


def test_lines_stand_above_the_bar_and_its_last_state_stays(monkeypatch, tmp_path):
    terminal = watched(monkeypatch)
    report = reporter_in(tmp_path)
    report.training(1, SCALARS, {})
    log.warn("a sample was replaced")
    with report.paused():
        noted = terminal.screen()[-1]
        report.evaluation(1, [{"label": "zeroshot", "metrics": {"acc1": 0.25}}])
    report.stepped(2)
    report.training(4, SCALARS | {"loss": 0.75}, {})
    report.close()
    log.say("written")

    *lines, last = terminal.screen()
    assert last == ""
    assert lines[0] == "warning: a sample was replaced"
    assert lines[1] == "step 1  zeroshot.acc1 0.25"
    assert lines[2].startswith("step 4/4 |") and "100%  loss 0.75  samples_s" in lines[2]
    assert lines[2].endswith("eta 0:00:00")
    assert lines[3:] == ["written"]
    assert "evaluating" in noted and "evaluating" not in lines[2]


def test_an_error_leaves_the_bar_on_a_line_of_its_own(monkeypatch, tmp_path):
    terminal = watched(monkeypatch)
    report = reporter_in(tmp_path)
    with pytest.raises(RuntimeError):
        try:
            report.training(1, SCALARS, {})
            report.stepped(0)  # a step that was none is taken back
            raise RuntimeError("no data")
        finally:
            report.close()
    log.warn("after it")
    bar, after, _ = terminal.screen()
    assert bar.startswith("step 1/4") and after == "warning: after it"


@pytest.mark.parametrize(
    "change", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"CI": "true"}, {"RANK": "1"}, {}]
)
def test_there_is_no_bar_where_nobody_watches(monkeypatch, tmp_path, change):
    terminal = watched(monkeypatch)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    if not change:
        monkeypatch.setattr(terminal, "isatty", lambda: False)

    report = reporter_in(tmp_path)
    report.training(1, SCALARS, {})
    report.close()
    assert "\r" not in terminal.getvalue() and console._drawn is None
    expected = "" if "RANK" in change else "step 1/4  loss 1.5  samples_s "
    assert terminal.getvalue().startswith(expected) and bool(terminal.getvalue()) == bool(expected)


def test_help_waits_for_neither_torch_nor_the_bar():
    code = (
        "import sys; from vlp.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'tqdm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr
