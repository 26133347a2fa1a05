"""What `regteach course` does, from data to site, and what its exit status says."""

import subprocess
import sys

from rich.console import Console

from regteach.bootstrap import ROOT, alone
from regteach.course import run, site
from regteach.course.layout import Course


def course(only: tuple[str, ...] = (), *, full: bool = False, force: bool = False, jobs: int = 2) -> int:
    """Execute the lessons, build the site, and show the table.

    Args:
        only: lesson numbers; all when empty.
        full: the full-length course.
        force: execute what has not changed, too.
        jobs: how many at a time.

    Returns:
        0 where every lesson ran, every claim held and all parameters arrived; 1 otherwise.
    """
    status = fetch_data()
    return status or execute_and_build(Course(), Console(), only, run.Settings(full=full, force=force, jobs=jobs))


def execute_and_build(where: Course, console: Console, only: tuple[str, ...], settings: run.Settings) -> int:
    """The part of `course` that works on any course folder."""
    with alone(where.build / "run.lock", "run of the course"):
        results = run.run(where.files("lesson", only), settings, console)
        run.explain(results, console)
        console.print(run.table(results))
        index = site.build(where)
    console.print(f"The site: {index}", soft_wrap=True)
    return int(not all(result.passed for result in results))


def fetch_data() -> int:
    """Fetch the embedded data that the course needs and that is not there yet.

    Returns:
        The exit status: 0 when all of it is there.
    """
    import data_download
    from data_download.store import presence

    wanted = [entry for entry in data_download.entries().values() if entry.embedded]
    if all(presence(entry, data_download.root()).state == "present" for entry in wanted):
        return 0
    return subprocess.call([sys.executable, "-m", "data_download", "--embedded"], cwd=ROOT)
