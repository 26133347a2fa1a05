"""Fields from scattered values in the classical ways, with one call: points, keypoints, values, settings.

Convention: positions in mm in tensor order, ``n d`` and ``m d`` without a batch axis; values ``m v``; results ``n v``.
What learns nothing, and what a learned kernel has to be better than. The local ones are kernel fields with fixed
weights, and :func:`regteach.ops.kernel_field.kernel_field_on` evaluates them on a whole grid.

Sources: Shepard, ACM National Conference 1968; Duchon, 1977, and Bookstein, IEEE PAMI 11 (1989) (thin-plate splines).
The splines are those of scipy.interpolate.RBFInterpolator, with gradients.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.ops.kernel_field import Gaussian, InverseDistance, Uniform, checked, kernel_field
from regteach.ops.neighbours import squared_distances
from regteach.precision import exactly

KERNELS = ("thin_plate", "linear")
PAIRS_AT_ONCE = 2**20  # of point and keypoint; 8 MB for each tensor in double precision
NEAREST_MM2 = 1e-24  # squared distance that counts as 0: no slope there


def nearest(
    query_mm: Float[Tensor, "n d"], keypoints_mm: Float[Tensor, "m d"], values: Float[Tensor, "m v"]
) -> Float[Tensor, "n v"]:
    """The value of the nearest keypoint (:class:`Uniform` with k = 1)."""
    return kernel_field(query_mm, keypoints_mm, values, Uniform(), 1)


def inverse_distance(
    query_mm: Float[Tensor, "n d"],
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    k: int = 30,
    power: float = 2.0,
    taper: bool = False,
) -> Float[Tensor, "n v"]:
    """Mean of the K nearest with weights distance^-power (:class:`InverseDistance`)."""
    return kernel_field(query_mm, keypoints_mm, values, InverseDistance(power), k, taper=taper)


def gaussian(
    query_mm: Float[Tensor, "n d"],
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    k: int = 30,
    sigma_mm: float = 10.0,
    taper: bool = False,
) -> Float[Tensor, "n v"]:
    """Mean of the K nearest with weights exp(-distance^2 / 2 sigma^2) (:class:`Gaussian`)."""
    return kernel_field(query_mm, keypoints_mm, values, Gaussian(sigma_mm), k, taper=taper)


def local_affine(
    query_mm: Float[Tensor, "n d"],
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    k: int = 30,
    sigma_mm: float = 20.0,
    taper: bool = False,
) -> Float[Tensor, "n v"]:
    """Plane through the K nearest, by least squares with Gaussian weights, read at the point (``degree=1``)."""
    return kernel_field(query_mm, keypoints_mm, values, Gaussian(sigma_mm), k, taper=taper, degree=1)


@exactly
def thin_plate_spline(
    query_mm: Float[Tensor, "n d"],
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    smoothing: float | Tensor = 0.0,
    kernel: str = "thin_plate",
    degree: int = 1,
) -> Float[Tensor, "n v"]:
    """The smoothest field through all values: f(x) = sum_y c_y phi(|x - y|) + polynomial(x).

    All keypoints act on all points. The fit and its evaluation are in double precision, since large terms cancel; the
    result has the precision of what came in. Differentiable in points, keypoints and values.

    Args:
        query_mm: where the field is wanted.
        keypoints_mm: where the values are known.
        values: one row for each keypoint.
        smoothing: 0 goes through the values; more lets go of them. Added to the diagonal of the system, one number or
            one for each keypoint, in the unit of phi.
        kernel: ``"thin_plate"``, phi(r) = r^2 log r, or ``"linear"``, phi(r) = -r (which in 3D is the spline of least
            bending energy, as r^2 log r is in 2D).
        degree: of the polynomial: 1 affine, which is reproduced; 0 constant, for the linear kernel.

    Raises:
        ValueError: as in ``kernel_field``; and if two keypoints are at one place while nothing is smoothed, the
            keypoints do not span space, the smoothing is negative, or the kernel is unknown.
    """
    points, known, query = checked(keypoints_mm, values, 1, degree, query_mm)
    return fit_spline(points, known, smoothing, kernel, degree).at(query).to(points.dtype)


@dataclass(frozen=True, eq=False)
class Spline:
    """A spline that was fitted once, to be read at any points: see :func:`fit_spline`.

    Args:
        points: keypoints, ``m d``, mm; this and the other tensors are in double precision.
        coefficients: of phi, ``m v``.
        linear: of the polynomial.
        middle, half: of the keypoints' box: the polynomial is one of coordinates from -1 to 1.
        kernel, degree: as given.
    """

    points: Tensor
    coefficients: Tensor
    linear: Tensor
    middle: Tensor
    half: Tensor
    kernel: str
    degree: int

    @exactly
    def at(self, query_mm: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """The field at points, in double precision."""
        parts = [
            _phi(part, self.points, self.kernel) @ self.coefficients
            + _polynomial((part - self.middle) / self.half, self.degree) @ self.linear
            for part in query_mm.double().split(max(1, PAIRS_AT_ONCE // len(self.points)))
        ]
        return torch.cat(parts)


@exactly
def fit_spline(
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    smoothing: float | Tensor = 0.0,
    kernel: str = "thin_plate",
    degree: int = 1,
) -> Spline:
    """The spline of :func:`thin_plate_spline`, fitted; arguments and errors as there."""
    points, known, _ = (tensor.double() for tensor in checked(keypoints_mm, values, 1, degree))
    matrix, middle, half = _system(points, smoothing, kernel, degree)
    terms = len(matrix) - len(points)
    solved = torch.linalg.solve(matrix, torch.cat([known, known.new_zeros(terms, known.shape[1])]))
    coefficients, linear = solved.split([len(points), terms])
    return Spline(points, coefficients, linear, middle, half, kernel, degree)


@exactly
def left_out(
    keypoints_mm: Float[Tensor, "m d"],
    values: Float[Tensor, "m v"],
    smoothing: float | Tensor = 0.0,
    kernel: str = "thin_plate",
    degree: int = 1,
) -> Float[Tensor, "m v"]:
    """What each value differs by from the spline through all the others: value minus spline, ``m v``.

    All at once, by the inverse of the system (Dubrule, Mathematical Geology 15 (1983)): c_y / (A^-1)_yy. Arguments and
    errors as in :func:`thin_plate_spline`. The others have to span space as well.
    """
    as_given = checked(keypoints_mm, values, 1, degree)
    points, known, _ = (tensor.double() for tensor in as_given)
    inverse = torch.linalg.inv(_system(points, smoothing, kernel, degree)[0])[: len(points), : len(points)]
    return (inverse @ known / inverse.diagonal()[:, None]).to(as_given[0].dtype)


def _system(
    points: Float[Tensor, "m d"], smoothing: float | Tensor, kernel: str, degree: int
) -> tuple[Float[Tensor, "n n"], Tensor, Tensor]:
    """The matrix of the fit, and the middle and half the size of the box that the polynomial is scaled to."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is one of {', '.join(KERNELS)}, not {kernel!r}.")
    if kernel == "thin_plate" and degree == 0:
        raise ValueError("A thin-plate spline has an affine part: degree is 1 with this kernel, not 0.")
    smooth = torch.as_tensor(smoothing).to(points)
    if smooth.shape not in ((), (len(points),)) or not bool((smooth >= 0).all()):
        raise ValueError("smoothing is one number for all keypoints or one for each, and none is negative.")
    if not bool((smooth > 0).all()) and len(torch.unique(points, dim=0)) < len(points):
        raise ValueError(
            "Two keypoints are at one place, and a spline without smoothing can not go through both values."
        )
    # Coordinates from -1 to 1 for the polynomial: millimetres would make the system badly conditioned.
    low, high = points.detach().amin(dim=0), points.detach().amax(dim=0)
    middle, half = (low + high) / 2, ((high - low) / 2).where(high > low, 1.0)
    polynomial = _polynomial((points - middle) / half, degree)
    terms = polynomial.shape[1]
    if torch.linalg.matrix_rank(polynomial.detach()) < terms:
        raise ValueError(f"A spline with an affine part needs keypoints that span the {points.shape[1]} axes.")
    matrix = torch.cat(
        [
            torch.cat([_phi(points, points, kernel) + torch.diag(smooth.expand(len(points))), polynomial], dim=1),
            torch.cat([polynomial.mT, points.new_zeros(terms, terms)], dim=1),
        ]
    )
    return matrix, middle, half


def _phi(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], kernel: str) -> Float[Tensor, "n m"]:
    squared = squared_distances(x, y).clamp_min(NEAREST_MM2)
    return -squared.sqrt() if kernel == "linear" else 0.5 * squared * squared.log()


def _polynomial(x: Float[Tensor, "n d"], degree: int) -> Float[Tensor, "n terms"]:
    one = torch.ones_like(x[:, :1])
    return torch.cat([one, x], dim=1) if degree == 1 else one
