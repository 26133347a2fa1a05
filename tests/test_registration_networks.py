"""``register`` with every kind of network: refinement finds a known shift, on grids that are not the network's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regteach
from regteach import contrasts
from regteach.checkpoints import Model, load, save_model
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig
from regteach.nets.istn import ISTN, AffineStage, ISTNConfig
from regteach.nets.voxelmorph import VoxelMorph, VoxelMorphConfig
from regteach.refinement import Refinement
from regteach.sampling import grid_points

WORKING = Grid((24, 24, 24), (2.5,))
FILES = Grid((30, 33, 27), (2.0,), (-20.0, 10.0, 3.0))
SHIFT = np.array([3.0, 0.0, -2.0], dtype=np.float32)


def blob(shift: np.ndarray) -> np.ndarray:
    offsets = grid_points(FILES) - torch.tensor(FILES.centre) - torch.from_numpy(shift)
    return (offsets / torch.tensor([8.0, 5.0, 6.0])).square().sum(-1).neg().exp().numpy()


@pytest.mark.parametrize(
    "network",
    [
        GeoReg(GeoRegConfig(WORKING, (4, 8, 8), (0, 3, 3), (2, 3))),
        VoxelMorph(VoxelMorphConfig(WORKING, (4, 8), finest=1)),
    ],
    ids=["georeg", "voxelmorph"],
)
def test_an_untrained_network_is_refined_to_a_known_shift(network: nn.Module, tmp_path: Path) -> None:
    path = save_model(tmp_path / "mine.safetensors", Model("mine", network, Refinement(20, rate=0.25, bending=1.0)))
    result = regteach.register((blob(SHIFT), FILES), (blob(0 * SHIFT), FILES), model=load(path), refine=20)
    similarity = result.report["similarity"]
    assert similarity["before"] < 0.92
    assert similarity["after"] > 0.99
    middle = np.array([FILES.centre], dtype=np.float32)
    # The moving blob lies at +SHIFT, and a transform maps fixed to moving points.
    np.testing.assert_allclose(result.transform(middle) - middle, SHIFT[None], atol=1.6)
    curve = result.report["curve"]
    assert curve[-1] < 0.5 * curve[0]
    assert result.report["folding_percent"] == 0


def test_a_model_whose_refinement_looks_at_the_images_says_so_in_its_file_and_finds_the_shift(tmp_path: Path) -> None:
    """An untrained ITN draws nothing, so only the images can tell where to go."""
    network = ISTN(ISTNConfig(WORKING, (AffineStage(widths=(4, 8), hidden=8),), itn=(4, 8))).eval()
    settings = Refinement(30, "corrections", rate=0.25, bending=1.0, images=2.0, sharpen=4.0)
    model = load(save_model(tmp_path / "mine.safetensors", Model("mine", network, settings)))
    assert model.refinement == settings
    result = regteach.register((blob(SHIFT), FILES), (blob(0 * SHIFT), FILES), model=model, refine=30)
    middle = np.array([FILES.centre], dtype=np.float32)
    np.testing.assert_allclose(result.transform(middle) - middle, SHIFT[None], atol=1.6)
    assert result.report["curve"][-1] < 0.9 * result.report["curve"][0]  # flat windows, which count as 0, stay


def test_a_model_for_two_contrasts_says_which_is_which_and_whether_they_look_exchanged(monkeypatch) -> None:
    """Judged by mutual information, as it is refined. When images look exchanged is tested beside the loss."""
    config = GeoRegConfig(WORKING, (4, 8, 8), (0, 3, 3), (2, 3), encoders=2, similarity="mutual_information")
    network = GeoReg(replace(config, contrasts=("a positive", "a negative"))).eval()
    model = Model("both", network, Refinement(20, rate=0.25))
    positive, negative = (blob(SHIFT), FILES), (1 - blob(0 * SHIFT), FILES)
    asked = []

    def contrasts_seen(encoders, moving, fixed) -> torch.Tensor:  # type: ignore[no-untyped-def]
        asked.append([encoder is own for encoder, own in zip(encoders, network.encoders, strict=True)])
        return torch.tensor([[int(image.mean() > 0.5) for image in (moving, fixed)]])

    monkeypatch.setattr(contrasts, "contrasts_seen", contrasts_seen)
    right = regteach.register(positive, negative, model=model, refine=2).report
    (told,) = right["notes"]
    assert told == "both takes a positive as the moving image and a negative as the fixed image."
    assert right["feature_loss"]["before"] == pytest.approx(right["curve"][0], abs=1e-5)
    assert right["feature_loss"]["after"] == pytest.approx(min(right["curve"]), abs=1e-5)
    exchanged = regteach.register(negative, positive, model=model).report["notes"]
    assert exchanged == [told, "These two look exchanged: register them the other way round."]
    alike = regteach.register(negative, negative, model=model).report["notes"]
    assert alike[:2] == [told, "The two look like one contrast: this model is not meant for two of a kind."]
    assert asked == [[True, True]] * 3
    one = Model("one", GeoReg(replace(config, encoders=1)).eval())
    assert regteach.register(positive, negative, model=one).report["notes"] == []
