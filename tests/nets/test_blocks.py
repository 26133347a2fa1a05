"""Convolutional parts: sizes, what padding does, and the public network written out with functionals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from truths.fields import one_sentence

from regteach.nets.blocks import Encoder, UNet, conv, unit, zero_start

AWKWARD = {2: [(7, 9), (1, 13), (17, 8)], 3: [(7, 9, 11), (5, 3, 13)]}


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_convolution_keeps_the_size_unless_told_otherwise(dim, kernel):
    image = torch.rand(2, 3, *AWKWARD[dim][0])
    assert conv(dim, 3, 4, kernel)(image).shape == (2, 4, *AWKWARD[dim][0])
    unpadded = conv(dim, 3, 4, kernel, padding=0)(image)
    assert unpadded.shape[2:] == tuple(n - kernel + 1 for n in AWKWARD[dim][0])


def test_a_unit_is_normalised_only_where_asked(grid):
    image = torch.rand(2, 3, *grid.shape)
    plain, normalised = (unit(grid.dim, 3, 4, asked) for asked in (False, True))
    assert (plain(image) >= 0).all()
    assert not torch.allclose(plain(image), plain(9 * image), atol=0.1)
    torch.testing.assert_close(normalised(image), normalised(9 * image), rtol=0, atol=1e-3)


def test_zero_start_feeds_zeros():
    layer = zero_start(nn.Linear(5, 3))
    assert torch.equal(layer(torch.randn(2, 5)), torch.zeros(2, 3))
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("finest", [0, 1, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_unet_sizes(dim, finest, normalise):
    net = UNet(dim, 2, 5, (4, 6, 8), normalise, finest)
    for size in AWKWARD[dim]:
        if normalise and all(-(-n // 4) == 1 for n in size):
            continue
        out = net(torch.rand(2, 2, *size))
        assert out.shape == (2, 5, *[-(-n // 2**finest) for n in size])


def test_unet_pads_zeros_at_the_end_and_cuts_them_off_again():
    net = UNet(2, 1, 1, (4, 6, 8), normalise=False)
    image = torch.rand(1, 1, 13, 10)
    padded = F.pad(image, (0, 2, 0, 3))  # to 16 x 12
    torch.testing.assert_close(net(image), net(padded)[:, :, :13, :10])


def test_unet_by_functionals():
    """Without normalisation, written out: skips are added, the decoder's last level has no unit of its own."""
    torch.manual_seed(1)
    net = UNet(2, 1, 3, (4, 6, 8), normalise=False)
    image = torch.rand(1, 1, 8, 12)
    c = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    names = ["stem0", "stem1", "down0", "same0", "down1", "same1", "up0", "up1", "merge0", "head0", "head1", "head2"]
    w = dict(zip(names, ((m.weight, m.bias) for m in c), strict=True))

    def relu(x, name, **options):
        return F.conv2d(x, *w[name], **options).relu()

    full = relu(relu(image, "stem0", padding=1), "stem1", padding=1)
    half = relu(relu(full, "down0", stride=2), "same0", padding=1)
    quarter = relu(relu(half, "down1", stride=2), "same1", padding=1)
    x = relu(F.conv_transpose2d(quarter, *w["up0"], stride=2).relu() + half, "merge0", padding=1)
    x = F.conv_transpose2d(x, *w["up1"], stride=2).relu() + full
    expected = F.conv2d(relu(relu(x, "head0", padding=1), "head1", padding=1), *w["head2"], padding=1)
    torch.testing.assert_close(net(image), expected)


def test_unet_reads_far_and_near():
    """A voxel's answer depends on voxels that only the coarsest level connects it with."""
    net = UNet(2, 1, 1, (4, 6, 8, 8), normalise=False)
    image = torch.rand(1, 1, 32, 32, requires_grad=True)
    net(image)[0, 0, 16, 16].backward()
    reach = image.grad[0, 0].nonzero()
    assert (reach.max(0).values - reach.min(0).values).min() > 14
    assert all(p.grad is not None for p in net.parameters())


def test_unet_can_not_stop_at_a_level_that_it_has_not():
    for finest in (3, -1):
        with pytest.raises(ValueError) as caught:
            UNet(2, 1, 1, (4, 6, 8), finest=finest)
        assert one_sentence(caught.value, "3 levels", str(finest))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("dim", "shape"), [(2, (40, 33)), (2, (17, 64)), (3, (18, 21, 26))])
def test_the_encoders_vector_is_as_long_as_it_says(dim, shape, padded):
    net = Encoder(dim, 2, (3, 5), shape, padded=padded, normalise=False)
    assert net(torch.rand(2, 2, *shape)).shape == (2, net.length)
    if padded:  # the last level is pooled to at most 4 cells an axis
        assert net.length == 5 * 4**dim


def test_a_small_image_keeps_fewer_cells():
    net = Encoder(2, 1, (3, 5), (12, 40))
    assert net.length == 5 * 3 * 4
    assert net(torch.rand(1, 1, 12, 40)).shape == (1, 60)


def test_the_public_encoder_by_functionals():
    torch.manual_seed(1)
    net = Encoder(2, 2, (8, 16), (28, 30), kernel=5, padded=False, normalise=False)
    x = image = torch.rand(2, 2, 28, 30)
    for layer in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        x = F.avg_pool2d(F.conv2d(x, layer.weight, layer.bias).relu(), 2)
    assert x.shape[2:] == (4, 4)  # 28 -> 24 -> 12 -> 8 -> 4, 30 -> 26 -> 13 -> 9 -> 4
    torch.testing.assert_close(net(image), x.flatten(1))


@pytest.mark.parametrize(("shape", "padded"), [((7, 40), True), ((16, 40), False)])
def test_a_grid_too_small_for_the_levels_gets_one_sentence(shape, padded):
    with pytest.raises(ValueError) as caught:
        Encoder(2, 1, (4, 4, 4), shape, kernel=5, padded=padded)
    assert one_sentence(caught.value, str(shape), "3 levels")
