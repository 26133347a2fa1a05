"""The stages of `regteach test`: all run, all are counted, and one that fails fails the whole."""

import io

import pytest
from course.minicourse import make_light_course
from rich.console import Console

from regteach.course import testing
from regteach.course.testing import Bench, Count, read_report

REPORT = '<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2"/></testsuites>'


def test_reports_are_counted(tmp_path):
    report = tmp_path / "a.xml"
    assert read_report(report, status=5) == Count()
    assert read_report(report, status=3) == Count(failed=1)
    report.write_text(REPORT)
    assert read_report(report, status=1) == Count(passed=3, failed=2, skipped=2)
    report.write_text('<testsuites><testsuite tests="2" failures="0" errors="0" skipped="0"/></testsuites>')
    assert read_report(report, status=0) == Count(passed=2)
    assert read_report(report, status=2) == Count(passed=2, failed=1)  # interrupted: not a pass


def test_all_stages_run_and_the_last_line_counts_them(monkeypatch, capsys):
    ran = []

    def stage(name, count):
        def act(bench):
            ran.append(name)
            return count

        return act

    counts = {"a": Count(passed=2), "b": Count(passed=1, failed=3), "c": Count(skipped=4), "d": Count()}
    monkeypatch.setattr(testing, "STAGES", {name: stage(name, count) for name, count in counts.items()})
    assert testing.main() == 1
    assert ran == ["a", "b", "c", "d"]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "3 passed, 3 failed, 4 skipped"
    assert testing.main(("a",)) == 0
    with pytest.raises(ValueError, match="there is no stage 'z'; the stages are a, b, c, d"):
        testing.main(("z",))


def test_commands_pass_or_fail(tmp_path):
    bench = Bench(make_light_course(tmp_path), Console(file=io.StringIO()), force=False, jobs=1)
    assert bench.command("-c", "pass") == Count(passed=1)
    assert bench.command("-c", "raise SystemExit(3)") == Count(failed=1)


def test_the_notebook_stage_counts_lessons_and_solutions_and_looks_at_images(tmp_path):
    bare = ("image", "from IPython.display import Image, display\ndisplay(Image(data=b'\\x89PNG\\r\\n\\x1a\\n'))")
    out = io.StringIO()
    bench = Bench(make_light_course(tmp_path, bare), Console(file=out, width=160), force=False, jobs=2)
    assert bench.notebooks() == Count(passed=1, failed=1)
    assert "90: cell image shows an image whose alt text is shorter than 20 characters: ''" in out.getvalue()
    assert (tmp_path / "build" / "site" / "index.html").exists()


def test_nbval_runs_the_executed_copies_again(tmp_path):
    once = f"from pathlib import Path\nmark = Path({str(tmp_path / 'ran')!r})\nassert not mark.exists()\nmark.touch()"
    bench = Bench(make_light_course(tmp_path, ("once", once)), Console(file=io.StringIO()), force=False, jobs=1)
    assert bench.notebooks() == Count(passed=2)
    count = testing.STAGES["nbval"](bench)
    assert count.failed == 1
    assert count.passed >= 8
