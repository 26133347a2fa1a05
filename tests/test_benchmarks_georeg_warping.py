"""What a warp costs trained features: shares with a known answer, networks that differ in nothing but their way."""

from pathlib import Path

import pytest
import torch
from truths.fields import one_sentence

from benchmarks import georeg_warping as bench
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig

GRID = Grid((16, 16))
CONFIG = GeoRegConfig(GRID, (4, 4, 8), (0, 3, 3), (3, 3))


def test_the_mean_of_unrelated_numbers_keeps_one_over_their_count() -> None:
    torch.manual_seed(0)
    assert bench.share_left(torch.randn(8, 4, 64, 64)) == pytest.approx(1 / 4, abs=0.01)
    assert bench.share_left(torch.randn(4, 2, 32, 32, 32)) == pytest.approx(1 / 8, abs=0.01)


def test_a_wave_keeps_what_its_length_lets_it() -> None:
    """Half-way between pixels cos(w x) keeps cos(w / 2) of its height, so the square of that of its variance."""
    w = 2 * torch.pi / 8
    wave = torch.cos(w * torch.arange(64.0)).expand(1, 1, 64, 64)
    kept = float(torch.cos(torch.tensor(w / 2))) ** 2
    assert bench.share_left(wave) == pytest.approx(kept, abs=0.02)
    assert bench.share_left(5 + 3 * wave) == pytest.approx(bench.share_left(wave), rel=1e-4)


def trained_like() -> GeoReg:
    torch.manual_seed(0)
    network = GeoReg(CONFIG).eval()
    for module in network.deform:
        if hasattr(module, "head"):
            torch.nn.init.normal_(module.head[-1].weight, std=0.3)
    return network


def test_exchanged_is_the_same_network_in_the_other_way() -> None:
    network = trained_like()
    images = torch.rand(2, 1, *GRID.shape)

    def answer(one: GeoReg) -> torch.Tensor:
        with torch.no_grad():
            return one(images[:1], images[1:], GRID).transform.displacement

    other = bench.exchanged(network, "features")
    assert (network.config.moves, other.config.moves) == ("points", "features")
    assert all(a is b for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert not torch.equal(answer(network), answer(other))
    assert torch.equal(answer(bench.exchanged(other, "points")), answer(network))
    assert list(bench.shares(network, images)) == ["level 1", "level 2"], "the finest takes no steps"


def test_what_is_lost_is_a_part_of_the_own_error() -> None:
    rows = [
        {"moves": "points", "error, points": 1.0, "error, features": 1.1},
        {"moves": "points", "error, points": 2.0, "error, features": 1.8},
        {"moves": "features", "error, points": 3.0, "error, features": 2.0},
    ]
    first, second = bench.statements(rows)
    assert "changes by 0.0 ± 14.1 %, and is larger with 1 of 2 seeds" in first
    assert "changes by 50.0 %, and is larger with 1 of 1 seeds" in second


def test_a_quick_run(tmp_path: Path) -> None:
    out = bench.main(["--quick", "--runs", str(tmp_path / "runs"), "--seeds", "0", "--json", str(tmp_path / "o.json")])
    (table,) = out["tables"]
    assert [row[0] for row in table["rows"]] == ["nothing yet", "points", "warped features"]
    assert list(table["columns"][1:3]) == ["% left, level 1", "% left, level 2"]
    assert [row["moves"] for row in out["records"]] == ["points", "features"]
    assert (tmp_path / "o.md").exists()


def test_one_way_of_training_alone(tmp_path: Path) -> None:
    out = bench.main(["--quick", "--runs", str(tmp_path / "runs"), "--seeds", "0", "--recipes", "georeg"])
    (table,) = out["tables"]
    assert [row[0] for row in table["rows"]] == ["nothing yet", "points"]
    assert sum("tested with" in note for note in table["notes"]) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--sets", "hearts"), ("digits", "slices")),
        (("--steps", "0"), ("steps",)),
        (("--recipes", "u-net"), ("GeoReg", "feature warping", "U-Net")),
        (("--recipes", "elastix"), ("elastix",)),
    ],
)
def test_what_makes_no_sense_is_a_sentence(wrong: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        bench.main(list(wrong))
    assert one_sentence(caught.value, *words)
