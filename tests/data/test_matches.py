"""Faults of matches: each has the size that it was asked for, and the same seed draws the same faults."""

import math

import pytest
import torch
from truths.fields import one_sentence

from regteach.data.matches import Faults, corrupted, random_field

POINTS = 300 * torch.rand(4000, 3, generator=torch.Generator().manual_seed(3))
STILL = torch.zeros_like(POINTS)


def faulty(seed: int = 0, **what: float) -> tuple[torch.Tensor, torch.Tensor]:
    return corrupted(POINTS, STILL, Faults(**what), torch.Generator().manual_seed(seed))


def test_no_fault_changes_nothing() -> None:
    found, wrong = corrupted(POINTS, POINTS, Faults(), torch.Generator().manual_seed(0))
    assert torch.equal(found, POINTS)
    assert not wrong.any()


def test_noise_has_its_size_on_each_axis() -> None:
    assert torch.allclose(faulty(noise_mm=3.0)[0].std(0), torch.tensor(3.0), rtol=0.05)
    assert torch.allclose(faulty(noise_mm=6.0)[0], 2 * faulty(noise_mm=3.0)[0])  # the same draw, twice as large


def test_outliers_are_the_share_that_was_asked_for_and_are_named() -> None:
    found, wrong = faulty(outliers=0.2, outlier_mm=15.0)
    assert float(wrong.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert not found[~wrong].any()
    assert float(found[wrong].std()) == pytest.approx(15.0, rel=0.05)
    more = faulty(outliers=0.4)[1]
    assert bool(more[wrong].all())  # those of a smaller share are among those of a larger one


def test_neighbours_share_a_drift() -> None:
    pairs = torch.cat([POINTS, POINTS + torch.tensor([25.0, 0.0, 0.0])])
    both = torch.cat([
        random_field(pairs, 3, 25.0, torch.Generator().manual_seed(seed)) for seed in range(10)
    ], 1)  # fmt: skip
    first, second = both.split(len(POINTS))
    assert float(first.square().mean()) == pytest.approx(1.0, abs=0.1)
    # A length apart, the correlation is exp(-1 / 2).
    assert float((first * second).mean()) == pytest.approx(math.exp(-0.5), abs=0.1)


def test_unevenness_moves_noise_from_place_to_place() -> None:
    level = (faulty(noise_mm=1.0, uneven=1.0)[0] / faulty(noise_mm=1.0)[0]).log()
    assert torch.allclose(level[:, 0], level[:, 2], atol=1e-3)  # one level a match
    assert 0.5 < float(level[:, 0].std()) < 1.5


@pytest.mark.parametrize(
    "wrong", [{"noise_mm": -1.0}, {"outliers": 1.5}, {"drift_mm": math.nan}, {"uneven": math.inf}, {"length_mm": 0.0}]
)
def test_faults_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Faults are") as caught:
        Faults(**wrong)
    assert one_sentence(caught.value)
