"""Training that starts from weights that ship."""

from dataclasses import replace

import pytest
import torch
from truths.fields import one_sentence

from regteach.checkpoints import Model, network
from regteach.cohort_task import start_from
from regteach.grid import Grid
from regteach.nets.georeg import GeoReg, GeoRegConfig

SMALL = GeoRegConfig(Grid((16, 16)), (4, 8, 8), (0, 3, 3), (3, 3))


def shaken(config: GeoRegConfig) -> GeoReg:
    built = network(config)
    assert isinstance(built, GeoReg)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built.eval()


def test_weights_are_taken_over_and_count_in_voxels() -> None:
    """On voxels of twice the width the same weights move points twice as far."""
    torch.manual_seed(0)
    wide = Grid((16, 16), (2.0, 2.0))
    first, built = shaken(SMALL), network(replace(SMALL, grid=wide)).eval()
    start_from(built, Model("first", first))
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    here = first(moving, fixed, SMALL.grid).transform.displacement
    torch.testing.assert_close(built(moving, fixed, wide).transform.displacement, 2 * here, rtol=1e-4, atol=1e-4)
    assert here.abs().max() > 0.01


def test_a_second_encoder_begins_as_the_first_and_is_its_own() -> None:
    torch.manual_seed(0)
    first, built = shaken(SMALL), network(replace(SMALL, encoders=2))
    start_from(built, Model("first", first))
    pairs = list(zip(built.encoders[0].parameters(), built.encoders[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)
    moving, fixed = torch.rand(2, 1, 1, 16, 16)
    found = [net(moving, fixed, SMALL.grid).transform.displacement for net in (first, built.eval())]
    torch.testing.assert_close(*found)


def test_weights_that_do_not_fit_get_one_sentence() -> None:
    for other in (replace(SMALL, widths=(8, 8, 8)), replace(SMALL, widths=(4, 8), windows=(0, 3), parents=(3,))):
        with pytest.raises(ValueError, match="weights of first do not fit") as error:
            start_from(network(SMALL), Model("first", shaken(other)))
        assert one_sentence(error.value)
