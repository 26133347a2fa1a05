"""The course's notebooks as files: every check of `regteach.course.checks` on whatever lies in notebooks/."""

import pytest

from regteach.course import checks
from regteach.course.layout import Course

COURSE = Course()
FILES = [*COURSE.files("lesson"), *COURSE.files("solution")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.kind}-{file.name}")
def test_a_notebook_by_itself(file):
    complaints = checks.notebook_complaints(file)
    assert not complaints, "\n".join(complaints)


def test_the_course_across_its_notebooks():
    complaints = checks.course_complaints(COURSE)
    assert not complaints, "\n".join(complaints)
