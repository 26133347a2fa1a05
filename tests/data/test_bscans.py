"""Real B-scans: pictures and tables written here, read back; planted errors get one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from truths.fields import one_sentence

from regteach.data.bscans import load_bscans, read_bscan
from regteach.data.retina import RetinaConfig, generate_retina
from regteach.grid import Grid

SPACING = (0.004, 0.012)
ROWS, COLUMNS = 30, 20
DEPTHS = np.stack([np.full(COLUMNS, 5.0), np.linspace(10, 12, COLUMNS), np.full(COLUMNS, 20.5)])


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, COLUMNS)).astype(np.uint8)


def write(folder: Path, name: str = "a_1", depths: np.ndarray = DEPTHS, seed: int = 0) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture(seed)).save(folder / f"{name}.png")
    np.savetxt(folder / f"{name}.csv", depths, delimiter=",")
    return folder / f"{name}.png", folder / f"{name}.csv"


def test_a_picture_and_its_table(tmp_path: Path):
    image, table = write(tmp_path)
    scan = read_bscan(image, SPACING, table)
    assert scan.grid == Grid((ROWS, COLUMNS), SPACING)
    assert scan.image.shape == (1, 1, ROWS, COLUMNS)
    assert 0 == scan.image.min() < scan.image.max() == 1
    values = torch.from_numpy(picture().astype(np.float32))
    assert torch.corrcoef(torch.stack([values.flatten(), scan.image.flatten()]))[0, 1] > 0.999
    assert scan.boundaries is not None
    np.testing.assert_allclose(scan.boundaries, DEPTHS * SPACING[0], rtol=1e-6)
    row = np.arange(ROWS)[:, None]
    expected = np.where(
        (row >= DEPTHS[0]) & (row < DEPTHS[1]), 1, np.where((row >= DEPTHS[1]) & (row < DEPTHS[2]), 2, 0)
    )
    np.testing.assert_array_equal(scan.labels, expected)


@pytest.mark.parametrize("kind", ["png", "tif", "npy", "16 bit png", "grey as colour", "float npy"])
def test_the_same_picture_in_any_form(tmp_path: Path, kind: str):
    grey = picture()
    if kind.endswith("npy"):
        path = tmp_path / "x_1.npy"
        np.save(path, grey if kind == "npy" else grey / 255)
    else:
        path = tmp_path / ("x_1.tif" if kind == "tif" else "x_1.png")
        form = {"16 bit png": grey.astype(np.uint16) * 257, "grey as colour": np.dstack([grey] * 3)}.get(kind, grey)
        Image.fromarray(form).save(path)
    reference, _ = write(tmp_path, "reference_1")
    torch.testing.assert_close(read_bscan(path, SPACING).image, read_bscan(reference, SPACING).image, rtol=0, atol=1e-5)


def test_rows_and_columns_have_a_distance_each(tmp_path: Path):
    image, _ = write(tmp_path)
    with pytest.raises(ValueError, match="two distances, of its rows and of its columns"):
        read_bscan(image, (0.004,))


def test_what_a_table_does_not_know_has_no_label(tmp_path: Path):
    image, table = write(tmp_path)
    fields = [[f"{v}" for v in row] for row in DEPTHS]
    fields[1][3], fields[0][7] = "", "nan"
    table.write_text("\n".join(",".join(row) for row in fields) + "\n\n")
    labels = read_bscan(image, SPACING, table).labels
    assert (labels[:, 3] == 0).all()
    assert set(labels[:, 7].tolist()) == {0, 2}
    assert set(labels[:, 8].tolist()) == {0, 1, 2}


def test_without_a_table_there_are_no_labels(tmp_path: Path):
    scan = read_bscan(write(tmp_path)[0], SPACING)
    assert scan.boundaries is None
    with pytest.raises(ValueError) as caught:
        _ = scan.labels
    assert one_sentence(caught.value, "table of boundaries")


def test_a_drawn_scan_comes_back_as_it_was(tmp_path: Path):
    retina = generate_retina(1, 0, 0, config=RetinaConfig(shape=(100, 64), spacing_mm=(0.0125, 0.08)))
    np.save(tmp_path / "eye_1.npy", retina.images[0, 0].numpy())
    rows = (retina.boundaries(0) / 0.0125).double().numpy().clip(0, 99)
    np.savetxt(tmp_path / "eye_1.csv", rows, delimiter=",", fmt="%.9f")
    scan = read_bscan(tmp_path / "eye_1.npy", (0.0125, 0.08), tmp_path / "eye_1.csv")
    assert scan.grid == retina.grid
    assert (scan.labels == retina.labels[0]).float().mean() > 0.999


# Folders


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    folder = tmp_path / "clinic"
    for k, name in enumerate(("left_eye_1", "left_eye_2", "b_1", "b_2", "b_3", "c_1", "c_2", "d_1")):
        write(folder, name, DEPTHS + 0.1 * k, seed=k)
    return folder


def test_a_folder_becomes_a_cohort_of_visits_split_by_eye(clinic: Path):
    cohort = load_bscans(clinic, SPACING, {1: "inner", 2: "outer"})
    assert sorted(set(cohort.people)) == ["b", "c", "d", "left_eye"]
    sets = [{cohort.people[i] for i in cohort.splits[s]} for s in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [2, 1, 1]
    assert len(set().union(*sets)) == 4
    pairs = [pair for part in cohort.given_pairs.values() for pair in part]
    assert len(pairs) == 2 + 6 + 2
    assert all(cohort.people[m] == cohort.people[f] and m != f for m, f in pairs)
    assert cohort.soi.shape == (8, 2, ROWS, COLUMNS)
    assert dict(cohort.structures) == {1: "inner", 2: "outer"}
    assert cohort.grid == Grid((ROWS, COLUMNS), SPACING)
    assert load_bscans(clinic, SPACING).structures == {1: "layer 1", 2: "layer 2"}


def test_the_split_can_be_chosen(clinic: Path):
    cohort = load_bscans(clinic, SPACING, parts={"train": 1, "validation": 0, "test": -1})
    assert len({cohort.people[i] for i in cohort.splits["test"]}) == 3


# Planted errors


def plant(folder: Path, kind: str) -> None:
    image, table = folder / "b_2.png", folder / "b_2.csv"
    crossed, outside = DEPTHS.copy(), DEPTHS.copy()
    crossed[1, 4], outside[2, 0] = 3.0, 31.0
    if kind == "cut short":
        image.write_bytes(image.read_bytes()[:90])
    elif kind == "colour":
        Image.fromarray(np.dstack([picture(0), picture(1), picture(2)])).save(image)
    elif kind == "constant":
        Image.fromarray(np.full((ROWS, COLUMNS), 7, np.uint8)).save(image)
    elif kind == "other size":
        Image.fromarray(picture()[:20]).save(image)
        np.savetxt(table, DEPTHS / 2, delimiter=",")
    elif kind == "words":
        table.write_text("ILM,RPE\n1,2\n")
    elif kind == "ragged":
        table.write_text("1,2,3\n4,5\n")
    elif kind == "empty table":
        table.write_text("")
    elif kind == "nothing known":
        table.write_text("\n".join(",".join(["nan"] * COLUMNS) for _ in range(3)))
    elif kind == "no table":
        table.unlink()
    elif kind == "no picture":
        image.unlink()
    elif kind == "nameless":
        image.rename(folder / "e.png")
        table.rename(folder / "e.csv")
    else:
        rows = {
            "columns": DEPTHS[:, :-1],
            "one row": DEPTHS[:1],
            "crossed": crossed,
            "outside": outside,
            "fewer": DEPTHS[:2],
        }
        np.savetxt(table, rows[kind], delimiter=",")


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("cut short", ValueError, ("b_2.png", "not a whole picture")),
        ("colour", ValueError, ("b_2.png", "not a grey picture")),
        ("constant", ValueError, ("b_2.png", "constant")),
        ("other size", ValueError, ("b_2", "(20, 20)", "(30, 20)")),
        ("words", ValueError, ("b_2.csv", "no table of numbers", "ILM")),
        ("ragged", ValueError, ("b_2.csv", "2 rows of 2 or 3 values", "20 columns")),
        ("empty table", ValueError, ("b_2.csv", "0 rows of no values")),
        ("nothing known", ValueError, ("b_2.csv", "no boundary")),
        ("columns", ValueError, ("b_2.csv", "19 values", "20 columns")),
        ("one row", ValueError, ("b_2.csv", "1 rows")),
        ("crossed", ValueError, ("b_2.csv", "boundary 2", "column 4")),
        ("outside", ValueError, ("b_2.csv", "outside of the 30 rows")),
        ("fewer", ValueError, ("b_2", "2 boundaries", "3")),
        ("no table", FileNotFoundError, ("picture of b_2", "not its table")),
        ("no picture", FileNotFoundError, ("table of boundaries of b_2", "not its picture")),
        ("nameless", ValueError, ("EYE_VISIT",)),
    ],
)
def test_a_planted_error_gives_one_sentence(clinic: Path, kind: str, error: type[Exception], words: tuple[str, ...]):
    plant(clinic, kind)
    with pytest.raises(error) as caught:
        load_bscans(clinic, SPACING)
    assert one_sentence(caught.value, *words)


def test_files_and_folders_that_are_not_there(tmp_path: Path):
    for call in (
        lambda: read_bscan(tmp_path / "x.png", SPACING),
        lambda: load_bscans(tmp_path / "nowhere", SPACING),
        lambda: load_bscans(tmp_path, SPACING),
        lambda: read_bscan(write(tmp_path)[0], SPACING, tmp_path / "x.csv"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert one_sentence(caught.value)


@pytest.mark.parametrize("spacing", [(0.0, 0.1), (0.1, 0.1, 0.1)])
def test_a_spacing_that_is_none(tmp_path: Path, spacing):
    with pytest.raises(ValueError) as caught:
        read_bscan(write(tmp_path)[0], spacing)
    assert one_sentence(caught.value)


def test_structures_have_to_fit_and_a_picture_has_a_known_ending(clinic: Path):
    with pytest.raises(ValueError) as caught:
        load_bscans(clinic, SPACING, {1: "all"})
    assert one_sentence(caught.value, "3 boundaries make 2 layers")
    (clinic / "b_1.png").rename(clinic / "b_1.bmp")
    with pytest.raises(ValueError) as caught:
        read_bscan(clinic / "b_1.bmp", SPACING)
    assert one_sentence(caught.value, ".png", ".npy")


def test_a_table_of_a_spreadsheet_is_read(tmp_path: Path):
    """These put a mark before UTF-8."""
    picture_path, table = write(tmp_path)
    plain = read_bscan(picture_path, SPACING, table)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    marked = read_bscan(picture_path, SPACING, table)
    torch.testing.assert_close(marked.boundaries, plain.boundaries, equal_nan=True)


def test_two_pictures_of_one_scan_are_one_too_many(clinic: Path):
    first = sorted(clinic.glob("*.png"))[0]
    np.save(first.with_suffix(".npy"), picture(seed=9))
    with pytest.raises(
        ValueError, match=rf"holds {first.stem} twice: {first.stem}\.npy and {first.stem}\.png"
    ) as caught:
        load_bscans(clinic, SPACING)
    assert one_sentence(caught.value)
