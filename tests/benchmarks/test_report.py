"""The helper that publishes benchmark tables."""

import subprocess
import sys

from tests.benchmarks import report
from tests.benchmarks.report import ROOT, command, replace_section, table


def test_sections_are_replaced_where_they_are_and_appended_where_not():
    document = replace_section("# Results\n", "loss", "first")
    document = replace_section(document, "comm", "second")
    loss = "<!-- loss -->\nfirst\n<!-- /loss -->"
    comm = "<!-- comm -->\nsecond\n<!-- /comm -->"
    assert document == f"# Results\n\n{loss}\n\n{comm}\n"

    changed = replace_section(document, "loss", "third\nline")
    assert changed == document.replace("first", "third\nline")
    assert replace_section(changed, "loss", "third\nline") == changed


def test_a_command_names_no_place_of_the_machine(monkeypatch):
    words = [
        "--tables",
        "a",
        "b",
        "--out",
        "/tmp/x",
        "--publish",
        "--json",
        "y.json",
        "--jobs",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tests/benchmarks/loss.py"), *words])
    assert command() == "python tests/benchmarks/loss.py --tables a b --jobs 2"


def test_tables():
    rows = [
        {"B": 65536, "ms": 1234.5, "share": 0.61234, "note": None},
        {"B": 1, "ms": 0.5, "share": 1.0, "note": "x"},
    ]
    assert table(rows).splitlines() == [
        "| B | ms | share | note |",
        "| --- | --- | --- | --- |",
        "| 65,536 | 1,234 | 0.612 |  |",
        "| 1 | 0.5 | 1 | x |",
    ]


def test_published_results_do_not_make_the_next_table_s_tree_a_changed_one(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *settings, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit() == "unknown"
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results.md").write_text("one table")
    (tmp_path / "code.py").write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "First")
    clean = report.commit()
    assert len(clean) >= 7

    (tmp_path / "docs" / "results.md").write_text("two tables")
    (tmp_path / "docs" / "results" / "second.json").write_text("{}")
    assert report.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert report.commit() == f"{clean}+"
