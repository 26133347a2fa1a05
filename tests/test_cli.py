"""The command line: what it accepts, and what it says."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from truths import pairs
from truths.pairs import FIXED, MOVING, Motion, affine_of, untrained, write

import regteach
from regteach import checkpoints, cli, recipes, registration, runs
from regteach.affine import AffineBounds
from regteach.bootstrap import ROOT
from regteach.checkpoints import load, save_model
from regteach.course import commands, doctor, student, testing
from regteach.data import named
from regteach.data.trees import generate_trees
from regteach.data.volumes import read_volume
from regteach.grid import Grid
from regteach.nets.istn import AffineStage, ISTNConfig
from regteach.recipes import Recipe
from regteach.refinement import Refinement
from regteach.training import Settings


@pytest.fixture
def called(monkeypatch):
    """Record the calls that the command line makes, instead of making them."""
    calls = []

    def recorder(name, value=0):
        def record(*arguments, **options):
            calls.append((name, arguments, options))
            return value

        return record

    monkeypatch.setattr(commands, "course", recorder("course", 1))
    monkeypatch.setattr(commands, "fetch_data", recorder("data"))
    monkeypatch.setattr(testing, "main", recorder("test"))
    monkeypatch.setattr(student, "lab", recorder("lab"))
    monkeypatch.setattr(student, "start", recorder("start", "Your copy"))
    monkeypatch.setattr(doctor, "main", recorder("doctor"))
    return calls


def test_course(called):
    assert cli.main(["course"]) == 1
    assert cli.main(["course", "--all", "--full", "--jobs", "3", "--only", "01", "03"]) == 1
    assert called == [
        ("course", ((),), {"full": False, "force": False, "jobs": 2}),
        ("course", (("01", "03"),), {"full": True, "force": True, "jobs": 3}),
    ]


def test_the_other_commands(called, capsys):
    for line in ("test --only static unit", "lab --no-browser --port 9999", "start 01 --again b", "doctor"):
        assert cli.main(line.split()) == 0
    assert [name for name, _, _ in called] == ["data", "test", "data", "lab", "start", "doctor"]
    assert called[1][1] == (("static", "unit"),)
    assert called[3][2] == {"browser": False, "port": 9999}
    assert called[4][1:] == (("01",), {"to": cli.Path("my"), "again": "b"})
    assert capsys.readouterr().out == "Your copy\n"


@pytest.mark.parametrize("line", ["", "corse", "course --jobs many", "start", "lab --port"])
def test_wrong_lines_end_with_usage(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err


def test_a_wrong_value_is_one_sentence(capsys):
    assert cli.main(["start", "77"]) == 2
    assert capsys.readouterr().err.startswith("regteach: there is no lesson '77'; there are ")


def test_data_that_cannot_be_had_stop_the_course_but_not_the_lab(called, monkeypatch, capsys):
    monkeypatch.setattr(commands, "fetch_data", lambda: 4)
    assert cli.main(["test"]) == 4
    assert called == []
    cli.main(["lab"])
    assert len(called) == 1
    assert capsys.readouterr().err == "Lessons that need the missing data will say so.\n"


def test_embedded_data_are_fetched_only_where_some_are_absent(monkeypatch):
    commands_run, there = [], {"mnist-5k": "present", "mni152": "partly"}
    monkeypatch.setattr(commands.subprocess, "call", lambda command, cwd: commands_run.append(command[1:]) or 3)
    entries = {name: SimpleNamespace(embedded=True, name=name) for name in there}
    monkeypatch.setattr("data_download.entries", lambda: entries)
    monkeypatch.setattr("data_download.store.presence", lambda entry, base: SimpleNamespace(state=there[entry.name]))
    assert commands.fetch_data() == 3
    assert commands_run == [["-m", "data_download", "--embedded"]]
    there["mni152"] = "present"
    assert commands.fetch_data() == 0
    assert len(commands_run) == 1


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "regteach", "start", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "--again" in done.stdout


def test_the_package_looks_names_up_when_they_are_used():
    code = "import sys, regteach; print('torch' in sys.modules, regteach.Grid.__module__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "regteach.grid", "False"]


def test_every_exported_name_is_there():
    for name in regteach.__all__:
        assert getattr(regteach, name).__name__ == name
    assert set(regteach.__all__) <= set(dir(regteach))
    with pytest.raises(AttributeError, match="regteach has no 'registr'"):
        _ = regteach.registr


# ---- register ----


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pair of slices, labels of the moving one, and a model; it is the current one."""
    moving, fixed = pairs.pair(2, Motion.of(2))
    write(tmp_path / "moving.nii.gz", moving, MOVING[2])
    write(tmp_path / "fixed.nii.gz", fixed, FIXED[2])
    write(tmp_path / "labels.nii.gz", (moving > 0.3).astype(np.uint8), MOVING[2])
    save_model(tmp_path / "model.safetensors", untrained(2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINE = "register moving.nii.gz fixed.nii.gz --model model.safetensors --refine 5"


def test_register_refines_as_the_model_recommends(files: Path) -> None:
    assert cli.main(LINE.replace(" --refine 5", "").split()) == 0
    report = json.loads((files / "registration" / "report.json").read_text())
    assert report["refinement_steps"] == untrained(2).refinement.steps


def test_register_end_to_end(files: Path, capsys) -> None:
    assert cli.main(f"{LINE} --labels labels.nii.gz --out some/where".split()) == 0
    out = files / "some" / "where"
    assert sorted(path.name for path in out.iterdir()) == [
        "displacement.nii.gz",
        "report.json",
        "warped.nii.gz",
        "warped_labels.nii.gz",
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["refinement_steps"] == 5
    assert report["model"] == "untrained-2d"
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("some/where: correlation 0.")
    for part in (
        f"{report['similarity']['after']:.3f} after",
        "0.00 % folded",
        "world coordinates",
        "not for clinical",
    ):
        assert part in said.out
    result = regteach.register("moving.nii.gz", "fixed.nii.gz", model="model.safetensors", refine=5)
    np.testing.assert_allclose(read_volume(out / "warped.nii.gz").data, result.warp().data, atol=1e-4)
    labels = read_volume(out / "warped_labels.nii.gz", labels=True)
    assert labels.grid == FIXED[2]
    assert (labels.data != result.warp("labels.nii.gz", order=0).data).float().mean() < 1e-3
    field = nib.load(out / "displacement.nii.gz")
    assert field.shape == (*FIXED[2].shape, 1, 1, 2)


def test_register_by_name_and_once_more_without_labels(files: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", files)
    line = ["register", "moving.nii.gz", "fixed.nii.gz", "--model", "model", "--refine", "0"]
    assert cli.main([*line, "--labels", "labels.nii.gz"]) == 0
    assert cli.main(line) == 0
    # Labels of the run before do not lie beside results that they do not belong to.
    assert sorted(path.name for path in (files / "registration").iterdir()) == [
        "displacement.nii.gz",
        "report.json",
        "warped.nii.gz",
    ]
    assert capsys.readouterr().out.count("registration: correlation") == 2


def test_register_says_what_it_did_to_an_image(files: Path, capsys) -> None:
    turned = affine_of(MOVING[2])
    turned[:2, :2] = [[1.9, -0.5], [0.5, 2.4]]
    write(files / "moving.nii.gz", pairs.pair(2, Motion.of(2))[0], affine=turned)
    assert cli.main(LINE.split()) == 0
    said = capsys.readouterr().err
    assert said.startswith("regteach: moving.nii.gz: ")
    assert "oblique" in said
    assert "Warning" not in said


def bad_lines(files: Path) -> dict[str, tuple[list[str], str]]:
    """A command line with a fault, and what is said about it."""
    moving, fixed = pairs.pair(2, Motion.of(2))
    write(files / "other.nii.gz", (fixed > 0.3).astype(np.uint8), FIXED[2])
    write(files / "half.nii.gz", moving, MOVING[2])
    write(files / "empty.nii.gz", np.zeros(moving.shape, np.uint8), MOVING[2])
    write(files / "solid.nii.gz", np.random.default_rng(0).random((12, 12, 12)), affine=np.eye(4))
    (files / "text.nii.gz").write_text("this is no image")
    (files / "model2.safetensors").write_bytes((files / "model.safetensors").read_bytes()[:999])
    (files / "file").touch()
    line = LINE.split()
    return {
        "no such file": (["register", "gone.nii.gz", *line[2:]], "no file gone.nii.gz"),
        "no image": (["register", "text.nii.gz", *line[2:]], "not a NIfTI"),
        "no such model": ([*line[:4], "istn-brain"], "no model 'istn-brain'"),
        "half a model": ([*line[:4], "model2.safetensors"], "truncated"),
        "3D": ([*line[:2], "solid.nii.gz", *line[3:]], "is 3D"),
        "labels on another grid": ([*line, "--labels", "other.nii.gz"], "must be on the moving image's grid"),
        "labels that are none": ([*line, "--labels", "half.nii.gz"], "no label map"),
        "no labels in it": ([*line, "--labels", "empty.nii.gz"], "is empty: there is nothing to warp"),
        "no such labels": ([*line, "--labels", "none.nii.gz"], "no file none.nii.gz"),
        "negative steps": ([*line[:-1], "-5"], "0 steps or more"),
        "no such device": ([*line, "--device", "abacus"], "no device 'abacus'"),
        "a folder that is a file": ([*line, "--out", "file"], "is a file"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "no such file",
        "no image",
        "no such model",
        "half a model",
        "3D",
        "labels on another grid",
        "labels that are none",
        "no labels in it",
        "no such labels",
        "negative steps",
        "no such device",
        "a folder that is a file",
    ],
)
def test_register_refuses_in_one_sentence_and_writes_nothing(kind: str, files: Path, capsys) -> None:
    line, said = bad_lines(files)[kind]
    before = sorted(files.rglob("*"))
    assert cli.main(line) == 2
    output = capsys.readouterr()
    assert output.err.startswith("regteach: ")
    assert said in output.err
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    assert output.out == ""
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize("kind", ["labels on another grid", "labels that are none", "no such labels"])
def test_labels_that_can_not_be_warped_are_refused_before_the_work(
    kind: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, said = bad_lines(files)[kind]
    monkeypatch.setattr(registration, "register", lambda *_: pytest.fail("it was registered"))
    assert cli.main(line) == 2
    assert said in capsys.readouterr().err


def test_register_as_its_own_process_ends_with_2_and_without_a_traceback(files: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "regteach",
        "register",
        "moving.nii.gz",
        "gone.nii.gz",
        "--model",
        "model.safetensors",
    ]
    done = subprocess.run(
        line, cwd=files, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert done.returncode == 2
    assert done.stderr == "regteach: There is no file gone.nii.gz.\n"


# ---- train and evaluate ----


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that trains for three steps on small trees."""
    config = ISTNConfig(Grid((32, 32)), (AffineStage(AffineBounds(4.0), (4, 8), 8),), itn=(4, 6))
    settings = Settings(steps=3, batch=2, validate_every=2)
    recipe = Recipe("istn-tiny", "tiny", "implicit", config, settings, refinement=Refinement(2))
    monkeypatch.setitem(recipes.RECIPES, recipe.name, recipe)
    monkeypatch.setitem(named.COHORTS, "tiny", lambda: generate_trees(4, 2, 3, size=32))
    named.load_cohort.cache_clear()
    monkeypatch.chdir(tmp_path)
    return recipe


def test_train_writes_a_checkpoint_that_evaluate_measures(tiny: Recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    assert cli.main(["train", "istn-tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["step", "2"], ["step", "3"]]
    assert lines[-1] == str(Path("runs", "istn-tiny", "istn-tiny.safetensors"))
    card = load(lines[-1]).card
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(tiny)))

    assert cli.main(["evaluate", lines[-1], "--pairs", "3"]) == 0
    said = capsys.readouterr().out
    for name, key in (("before", "before"), ("one pass", "one_pass"), ("refined", "refined")):
        (line,) = [line for line in said.splitlines() if line.startswith(name)]
        assert f"dice {card['dice'][key]:.3f}" in line
    assert cli.main(["evaluate", lines[-1], "--pairs", "1", "--refine", "0"]) == 0
    assert "refined" not in capsys.readouterr().out

    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "runs" / "istn-tiny")
    assert cli.main(["evaluate"]) == 0
    assert capsys.readouterr().out == "istn-tiny\n"
    assert cli.main(["evaluate", "istn-tiny", "--pairs", "1"]) == 0
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "none")
    capsys.readouterr()
    assert cli.main(["evaluate"]) == 0
    assert capsys.readouterr().out == "No weights ship with this version.\n"


def test_evaluate_measures_on_the_device_that_it_is_told(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(runs, "evaluate", lambda model, *_: seen.append(next(model.network.parameters()).device) or {})
    for option in ("--device meta", "--device cpu", ""):
        assert cli.main(["evaluate", "model.safetensors", *option.split()]) == 0
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    assert [device.type for device in seen] == ["meta", "cpu", auto]
    assert cli.main(["evaluate", "model.safetensors", "--device", "abacus"]) == 2
    assert "no device 'abacus'" in capsys.readouterr().err


def test_train_takes_steps_seed_and_folder(tiny: Recipe, tmp_path: Path) -> None:
    more = ["--steps", "1", "--seed", "4", "--batch", "6", "--accumulate", "3", "--precision", "bf16"]
    assert cli.main(["train", "istn-tiny", *more, "--out", "here"]) == 0
    settings = load(tmp_path / "here" / "istn-tiny.safetensors").card["recipe"]["settings"]
    assert (settings["steps"], settings["seed"]) == (1, 4)
    assert (settings["batch"], settings["accumulate"], settings["precision"]) == (6, 3, "bf16")
    assert not (tmp_path / "runs").exists()


def test_train_and_evaluate_refuse_in_one_sentence(tiny: Recipe, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    save_model(tmp_path / "bare.safetensors", untrained(2))
    assert cli.main(["train", "istn-tiny", "--steps", "1"]) == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    for line, said in (
        ("train istn-tree-affine-implicit", "the nearest is 'istn-trees-affine-implicit'"),
        ("train istn-tiny --out file", "is a file"),
        ("train istn-tiny --steps 0", "at least 1, not 0"),
        ("train istn-tiny --batch 3 --accumulate 2", "does not divide into 2 equal parts"),
        ("train istn-tiny --steps 2", "other settings"),
        ("evaluate istn-nothing", "no model 'istn-nothing'"),
        ("evaluate bare.safetensors", "does not say on what it was trained"),
        ("evaluate runs/istn-tiny/istn-tiny.safetensors --pairs 0", "were asked for"),
    ):
        assert cli.main(line.split()) == 2, line
        error = capsys.readouterr().err
        assert error.startswith("regteach: "), line
        assert said in error, error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
