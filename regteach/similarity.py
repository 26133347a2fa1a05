"""How alike two images are: one number per pair, differentiable in both images.

Convention: images ``b c *grid`` on the same grid, results ``b``, channels averaged. A mask ``b 1 *grid`` (bool, or
weights of at least 0) says which voxels count; no mask means all of them. Half precision is computed in float32.
Windows and patches are counted in voxels, and at the border they use the voxels that exist.

| name               | range   | alike when | does not see                                              |
|--------------------|---------|------------|-----------------------------------------------------------|
| mse                | 0 to oo | low        | nothing: it sees every change of intensity                |
| ncc                | -1 to 1 | high       | brightness and contrast                                   |
| local_ncc          | 0 to 1  | high       | brightness, contrast and inversion, even where they drift |
| mutual_information | 0 to oo | high       | any one-to-one change of intensities                      |
| mind_ssc           | 0 to 1  | low        | brightness, contrast and inversion, even where they drift |

``dissimilarity(name)`` turns each into a function to minimise.

Sources: local NCC: Avants et al., Medical Image Analysis 12 (2008); mutual information: Mattes et al., IEEE TMI 22
(2003), and Thevenaz and Unser, IEEE TIP 9 (2000), with a cubic B-spline window for both images; MIND-SSC: Heinrich et
al., Towards realtime multimodal fusion for image-guided interventions using self-similarities, MICCAI 2013, normalised
as in the authors' published code.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from regteach import bspline
from regteach.grid import per_axis
from regteach.names import nearest

Image = Float[Tensor, "b c *grid"]
Range = tuple[float, float]
Dissimilarity = Callable[..., Tensor]  # (a, b, mask=None) -> "b", lower is better

FLAT = 1e-5  # local variance, as part of the image's, below which a window holds rounding rather than structure
CHUNK = 4096  # voxels per partial histogram: adding a million equal float32 weights one by one would lose digits


def mse(a: Image, b: Image, mask: Tensor | None = None) -> Float[Tensor, "b"]:
    """Mean squared difference, in squared intensity units.

    Args:
        a, b: the two images, on one grid.
        mask: voxels that count, ``b 1 *grid``; all of them where left out.

    Raises:
        ValueError: here and below, if shapes do not fit, images are not floating point, or a mask selects nothing.
    """
    a, b, weight = _checked(a, b, mask)
    return _mean((a - b) ** 2, weight).mean(1)


def ncc(a: Image, b: Image, mask: Tensor | None = None) -> Float[Tensor, "b"]:
    """Correlation coefficient of the intensities over the whole image, in [-1, 1].

    A constant image correlates with nothing: the value is 0 and so is the gradient.
    """
    a, b, weight = _checked(a, b, mask)
    return _mean(_standardised(a, weight) * _standardised(b, weight), weight).mean(1)


def local_ncc(
    a: Image, b: Image, window_vox: int | Sequence[int] = 9, mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Squared correlation coefficient within a window about each voxel, averaged over the voxels, in [0, 1].

    A window in which an image is flat has no correlation, and counts as 0. Flat means a variance below 1e-5 of the sum
    of the image's variance and the window's mean squared distance from the image's mean; so the value does not change
    with brightness or contrast, and the rounding of float32 can not pass for structure.

    Args:
        a, b: the two images, on one grid.
        window_vox: width of the window in voxels, odd; one number or one per axis.
        mask: voxels that count, ``b 1 *grid``: windows hold only these, and are centred only on these.
    """
    a, b, weight = _checked(a, b, mask)
    window = tuple(int(width) for width in per_axis(window_vox, a.ndim - 2, "window_vox"))
    if any(width < 1 or width % 2 == 0 for width in window):
        raise ValueError(f"A window has a voxel in its middle: its width is odd and at least 1, not {window}.")
    a, b = _standardised(a, weight), _standardised(b, weight)
    inside = a.new_ones(1, 1, *a.shape[2:]) if mask is None else mask.to(a)
    # A window that holds no masked voxel is not centred on one either: it gets weight 0, and any divisor but 0 serves.
    count = box_sum(inside, window)
    count = torch.where(count > 0, count, 1)

    def local(x: Tensor) -> Tensor:
        return box_sum(x if mask is None else x * inside, window) / count

    mean_a, mean_b, square_a, square_b = local(a), local(b), local(a * a), local(b * b)
    covariance = local(a * b) - mean_a * mean_b
    variance_a = torch.maximum(square_a - mean_a**2, FLAT * (1 + square_a))
    variance_b = torch.maximum(square_b - mean_b**2, FLAT * (1 + square_b))
    return _mean(covariance**2 / (variance_a * variance_b), weight).mean(1)


def mutual_information(
    a: Image, b: Image, bins: int = 32, ranges: tuple[Range, Range] | None = None, mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """How much the intensities of one image tell about those of the other, in nats; 0 if nothing.

    H(a) + H(b) - H(a, b) of :func:`joint_histogram`, whose arguments these are; never more than log(bins). The Parzen
    windows blur both intensities, with a variance of a third of a bin squared, and so lower the value; few voxels raise
    it, by at most about (bins - 1)^2 / (2 voxels).
    """
    joint = joint_histogram(a, b, bins, ranges, mask)
    marginals = _entropy(joint.sum(-1), 1) + _entropy(joint.sum(-2), 1)
    return (marginals - _entropy(joint, 2)).mean(1)


def joint_histogram(
    a: Image, b: Image, bins: int = 32, ranges: tuple[Range, Range] | None = None, mask: Tensor | None = None
) -> Float[Tensor, "b c bins bins"]:
    """Joint probability of the intensities, rows for ``a`` and columns for ``b``; sums to 1.

    A voxel is spread over 4 x 4 bins by a cubic B-spline window along both intensities, which is what makes the
    histogram differentiable in both images.

    Args:
        a, b: the two images, on one grid.
        bins: bins along each intensity, at least 4. The lowest intensity falls on the second bin and the highest on the
            last but one, so that no window reaches over the end.
        ranges: lowest and highest intensity of ``a`` and of ``b``; what lies outside counts as the nearest end. Where
            left out they are those of each image and channel (within the mask), and the gradient knows that they are.
        mask: voxels that count, ``b 1 *grid``.
    """
    a, b, weight = _checked(a, b, mask)
    if bins < 4:
        raise ValueError(f"A histogram with cubic windows needs at least 4 bins, not {bins}.")
    range_a, range_b = ranges or (None, None)
    batch, channels = a.shape[:2]
    cell_a, windows_a = _parzen(a, weight, bins, range_a)
    cell_b, windows_b = _parzen(b, weight, bins, range_b)
    flat = weight.expand(batch, channels, *a.shape[2:]).reshape(batch * channels, 1, -1)
    products = (windows_a[:, :, None] * (windows_b * flat)[:, None]).flatten(1, 2)  # (b c) 16 n

    # Voxels whose windows start at the same pair of bins share a cell; each cell has 16 sums, one for each of the bins
    # its windows cover. Only these are added up, where a product of two (n x bins) matrices would add mostly zeros.
    side, n = bins - 3, products.shape[-1]
    length = min(CHUNK, n)
    spare = -n % length
    cell = F.pad(cell_a * side + cell_b, (0, spare)).unflatten(-1, (-1, length))[:, None].expand(-1, 16, -1, -1)
    values = F.pad(products, (0, spare)).unflatten(-1, (-1, length))
    sums = values.new_zeros(*values.shape[:3], side * side).scatter_add(-1, cell, values).sum(2)
    sums = sums.unflatten(-1, (side, side)).unflatten(1, (4, 4))
    joint = sums.new_zeros(batch * channels, bins, bins)
    for i, k in itertools.product(range(4), repeat=2):
        joint[:, i : i + side, k : k + side] += sums[:, i, k]
    return (joint / joint.sum((-1, -2), keepdim=True)).unflatten(0, (batch, channels))


def mind_ssc(
    a: Image, b: Image, radius_vox: int = 2, dilation_vox: int = 2, mask: Tensor | None = None
) -> Float[Tensor, "b"]:
    """Mean squared difference of two images' :func:`mind_descriptor`, in [0, 1]; low when alike.

    The mask ``b 1 *grid`` selects the voxels that are compared; their patches still look beyond it.
    """
    a, b, weight = _checked(a, b, mask)
    difference = mind_descriptor(a, radius_vox, dilation_vox) - mind_descriptor(b, radius_vox, dilation_vox)
    return _mean(difference**2, weight).mean(1)


def mind_descriptor(image: Image, radius_vox: int = 2, dilation_vox: int = 2) -> Float[Tensor, "b k *grid"]:
    """Modality independent neighbourhood descriptor, self-similarity context: how patches about a voxel differ.

    The neighbours of a voxel lie ``dilation_vox`` away along each axis: 6 in 3D, 4 in 2D. Patches about two neighbours
    that are adjacent (not opposite: their distance is sqrt(2) dilations) are compared, in 12 pairs in 3D. The 2D form
    follows the same rule and has 4 pairs; the paper is about 3D. With D_k the mean squared difference of pair k,

        m_k = D_k - min_j D_j,   V = mean_k m_k,   descriptor_k = exp(-m_k / V)

    and V held between 1/1000 and 1000 times its mean over the image. Differences drop an offset, squares drop the sign,
    V drops the scale: ``s * image + t`` has the same descriptor for any s but 0. A constant image has the descriptor 1
    everywhere. Beyond the border, neighbours repeat the outermost voxel.

    Args:
        image: any number of channels, each described on its own; k counts channels times pairs, the pairs running
            fastest.
        radius_vox: a patch is 2 radius + 1 voxels wide.
        dilation_vox: distance of the neighbours.
    """
    if radius_vox < 0 or dilation_vox < 1:
        raise ValueError(f"A patch needs a radius >= 0 and a dilation >= 1, not {radius_vox} and {dilation_vox}.")
    batch, channels, *shape = image.shape
    dim = len(shape)
    single = _image(image).reshape(batch * channels, 1, *shape)
    padded = F.pad(single, (dilation_vox,) * 2 * dim, mode="replicate")
    window = (2 * radius_vox + 1,) * dim
    count = box_sum(single.new_ones(1, 1, *shape), window)

    def neighbour(axis: int, sign: int) -> Tensor:
        out = padded
        for k, n in enumerate(shape):
            out = out.narrow(k + 2, dilation_vox * (1 + sign * (k == axis)), n)
        return out

    # Neighbours on different axes are the pairs at squared distance 2; the two on one axis are at 4.
    neighbours = [(neighbour(axis, -1), neighbour(axis, 1)) for axis in range(dim)]
    pairs = [pair for ends in itertools.combinations(neighbours, 2) for pair in itertools.product(*ends)]
    differences = torch.cat([box_sum((p - q).square(), window) / count for p, q in pairs], dim=1)
    differences = differences - differences.amin(1, keepdim=True)
    scale = differences.mean(1, keepdim=True)
    typical = scale.mean(tuple(range(1, dim + 2)), keepdim=True)
    scale = torch.minimum(torch.maximum(scale, typical / 1000), typical * 1000)
    # A constant image has scale 0 and differences 0: any positive number makes their ratio 0. One that is constant up
    # to rounding (it was read between its voxels) has differences that are rounding: they are no scale.
    told = torch.finfo(scale.dtype)
    rounding = told.eps * single.detach().abs().amax(tuple(range(1, dim + 2)), keepdim=True)
    scale = torch.maximum(scale, rounding.square().clamp_min(told.tiny))
    return torch.exp(differences * (-1 / scale)).reshape(batch, channels * len(pairs), *shape)


def box_sum(image: Image, window_vox: Sequence[int]) -> Image:
    """Sum over the window about each voxel; what lies beyond the border counts as 0.

    Axis by axis, and along an axis by doubling: sums of 2 neighbours make those of 4, of 8, and the binary digits of
    the width say which to add up. Faster than pooling, and without the cancellation of differences of cumulative sums.
    """
    return _BoxSum.apply(image, tuple(window_vox))


class _BoxSum(torch.autograd.Function):
    """A voxel is in its neighbour's window when the neighbour is in its own: the box sum is its own derivative."""

    @staticmethod
    def forward(ctx: FunctionCtx, image: Tensor, window: tuple[int, ...]) -> Tensor:
        ctx.window = window  # type: ignore[attr-defined]
        for axis, width in enumerate(window, start=2):
            n, reach = image.shape[axis], width // 2
            runs = F.pad(image, (0, 0) * (image.ndim - 1 - axis) + (reach, reach))
            total, start = torch.zeros_like(image), 0
            for length in (2**bit for bit in range(width.bit_length())):
                if length > 1:  # runs held sums of length / 2 neighbours
                    size, half = runs.shape[axis], length // 2
                    runs = runs.narrow(axis, 0, size - half) + runs.narrow(axis, half, size - half)
                if width & length:
                    total += runs.narrow(axis, start, n)
                    start += length
            image = total
        return image

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return _BoxSum.apply(gradients[0], ctx.window), None  # type: ignore[attr-defined]


_DISSIMILARITIES: dict[str, tuple[Dissimilarity, int, int]] = {  # value = offset + factor * function
    "mse": (mse, 0, 1),
    "ncc": (ncc, 1, -1),
    "local_ncc": (local_ncc, 1, -1),
    "mutual_information": (mutual_information, 0, -1),
    "mind_ssc": (mind_ssc, 0, 1),
}


def dissimilarity(name: str, **options: object) -> Dissimilarity:
    """A function ``(a, b, mask=None) -> b`` to minimise: mse, 1 - ncc, 1 - local_ncc, -mutual_information or mind_ssc.

    Args:
        name: name of the similarity.
        options: what else it takes, such as ``window_vox=5``.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name not in _DISSIMILARITIES:
        near = nearest(name, _DISSIMILARITIES)
        raise ValueError(
            f"There is no dissimilarity {name!r}; the nearest is {near!r}, and all are {', '.join(_DISSIMILARITIES)}."
        )
    function, offset, factor = _DISSIMILARITIES[name]

    def minimised(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        return offset + factor * function(a, b, mask=mask, **options)

    return minimised


def _parzen(
    image: Tensor, weight: Tensor, bins: int, limits: Range | None
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 4 n"]]:
    """First of the four bins that each voxel is spread over, and its share in each; channels join the batch."""
    flat = image.flatten(2)
    if limits is None:
        counts = (weight > 0).expand(len(image), 1, *image.shape[2:]).flatten(2)
        low = torch.where(counts, flat, torch.inf).amin(-1, keepdim=True)
        high = torch.where(counts, flat, -torch.inf).amax(-1, keepdim=True)
    else:
        low, high = flat.new_tensor(limits).reshape(2, 1, 1, 1)
        if not limits[0] < limits[1]:
            raise ValueError(f"A range runs from a lower to a higher intensity, but it is {limits}.")
    span = high - low
    # A constant image has no span: all its voxels fall on the second bin, and it tells nothing.
    unit = (torch.minimum(torch.maximum(flat, low), high) - low) / torch.where(span > 0, span, 1)
    position = (1 + (bins - 3) * unit).flatten(0, 1)
    centre = position.detach().floor().nan_to_num(1).clamp(1, bins - 3)  # a NaN then shows in the weights
    offsets = torch.arange(-1, 3, device=image.device, dtype=image.dtype)
    return centre.long() - 1, bspline.basis((position - centre)[:, None] - offsets[:, None])


def _entropy(p: Tensor, axes: int) -> Tensor:
    """-sum p log p over the last axes, nats; an empty bin adds nothing (and, unlike in xlogy, has no gradient)."""
    return -(p * torch.where(p > 0, p, 1).log()).flatten(-axes).sum(-1)


def _standardised(image: Tensor, weight: Tensor) -> Tensor:
    """Image with mean 0 and variance 1 per item and channel; a constant image becomes 0, with gradient 0."""
    expand = (..., *[None] * (image.ndim - 2))
    centred = image - _mean(image, weight)[expand]
    variance = _mean(centred**2, weight)
    # Below this the standard deviation is the rounding of the mean, not structure.
    constant = variance <= (16 * torch.finfo(image.dtype).eps) ** 2 * _mean(image**2, weight)
    scale = torch.where(constant, 0, torch.where(constant, 1, variance).rsqrt())
    return centred * scale[expand]


def _mean(image: Tensor, weight: Tensor) -> Float[Tensor, "b c"]:
    return (image * weight).flatten(2).sum(-1)


def _checked(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both images in float32 or better, and the weight of each voxel: they add up to 1, per item."""
    a, b = _image(a), _image(b)
    if a.shape != b.shape:
        raise ValueError(f"Images are compared on one grid, but these are {_by(a.shape)} and {_by(b.shape)}.")
    if mask is None:
        return a, b, a.new_full((1, 1, *[1] * (a.ndim - 2)), 1 / a[0, 0].numel())
    if mask.ndim != a.ndim or mask.shape[0] not in (1, len(a)) or mask.shape[1:] != (1, *a.shape[2:]):
        expected = _by((len(a), 1, *a.shape[2:]))
        raise ValueError(f"A mask for images of {_by(a.shape)} is {expected}, not {_by(mask.shape)}.")
    if bool((mask < 0).any()):
        raise ValueError("A mask holds weights of at least 0, but this one has a negative weight.")
    total = mask.to(a).flatten(1).sum(1)
    if not bool((total > 0).all()):
        raise ValueError(f"The mask selects no voxel in batch item {int((total > 0).int().argmin())}.")
    return a, b, mask.to(a) / total.reshape(-1, *[1] * (a.ndim - 1))


def _image(image: Tensor) -> Tensor:
    if image.ndim not in (4, 5) or not image.is_floating_point():
        raise ValueError(
            f"Images are batch x channel x 2 or 3 axes of floating point, not {_by(image.shape)} of {image.dtype}."
        )
    return image.to(torch.promote_types(image.dtype, torch.float32))


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
