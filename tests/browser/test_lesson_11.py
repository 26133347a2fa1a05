"""Lesson 11 in JupyterLab: a student types one more correspondence, and the field changes.

The cells are the lesson's own. What they need is made here with an untrained model on a coarse grid, in seconds.
"""

import nbformat
import pytest
import test_browser_lab as lab
from course.minicourse import make_course

from regteach.course.layout import Course

server = lab.server
LESSON = "11_keypoints_lung"
CELLS = ("type", "type-draw", "type-form")
SETUP = """
import torch

from regteach import Grid, checkpoints, register
from regteach.data.thorax import generate_patient, thorax_grid
from regteach.nets.keypoint_kernel import KeypointKernel, KeypointKernelConfig, Scale
from regteach.plotting import ORANGE, image

torch.manual_seed(SEED)
grid3 = thorax_grid(12.0)
case = generate_patient(grid3, 1)
small = KeypointKernelConfig.of(grid3, scales=(Scale(1, 2),), features=0, width=8, neighbours=10)
model = checkpoints.Model("small", KeypointKernel(small).eval().requires_grad_(False))
pair = [(picture[0, 0], grid3) for picture in (case.moving, case.fixed)]
found = register(*pair, model=model, device="cpu")
marks3, partners3 = case.fixed_landmarks_mm[0], case.moving_landmarks_mm[0]
worst = int(marks3.norm(dim=1).argmin())


def mark_errors(case, result):
    return (result.transform(marks3) - partners3).norm(dim=1)


def coronal(case, values, y_mm):
    return values[0, 0, :, round((y_mm - grid3.origin[1]) / 12)]


def slice_grid(case):
    return Grid((28, 28), (12.0, 12.0), (grid3.origin[0], grid3.origin[2]))


case_off = mark_errors(case, found)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A course of one lesson: the setup, and the cells of lesson 11 where a correspondence is typed."""
    path = Course().notebooks / f"{LESSON}.ipynb"
    own = {cell["id"]: cell["source"] for cell in nbformat.read(path, as_version=4)["cells"]}
    return make_course(tmp_path_factory.mktemp("lab"), ("setup", SETUP), *((name, own[name]) for name in CELLS))


def test_a_student_types_a_correspondence_and_the_field_changes(visit, server, tiny):
    seen = lab.open_and_run(visit, server, tiny.files()[0], 180)
    output = seen.page.locator(".jp-OutputArea-output")
    picture = output.locator("img[alt^='The length of the field']").last
    picture.wait_for(timeout=60_000)
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")

    up = output.get_by_label("partner up, mm")
    up.fill("-60")
    up.press("Enter")
    typed = output.get_by_alt_text("partner up, mm: -60.")
    typed.wait_for(timeout=60_000)
    assert typed.get_attribute("src") != before

    # An example fills the fields; a point that no field can go through is said, and nothing is lost.
    chooser = output.get_by_role("slider").first
    chooser.focus()
    chooser.press("ArrowRight")
    output.locator("img[alt*='one correspondence more: in voxels']").last.wait_for(timeout=60_000)
    assert up.input_value() != "-60"
    up.fill("9000")
    up.press("Enter")
    output.get_by_text("This can not be drawn.").wait_for(timeout=60_000)
    assert seen.asked == []
