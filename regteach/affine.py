"""Affine transforms: the transform itself, the parts it is made of, and how far each may go.

    M = Q S Q^T K R,   y = M (x - c) + c + t

R turns, K shears, S stretches along axes that Q has turned; lengths in mm, ratios without unit. ``AffineParts`` holds
the numbers, ``AffineBounds`` makes them from the unbounded outputs of a network. All zeros is always the identity.

Source: the stretch along turned axes is the affine of Lee et al., ISTN, MICCAI 2019; the true shears are added here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regteach.precision import exactly
from regteach.transforms import NotInvertibleError, Transform, check_points


@dataclass(frozen=True)
class Affine(Transform):
    """y = M (x - c) + c + t: turns, scales and shears about a centre, then shifts.

    Args:
        matrix: M, ``b d d``.
        translation: t, ``b d``, mm.
        centre: c, ``d`` or ``b d``, mm: the point that M leaves in place, normally the middle of the fixed grid.
    """

    matrix: Float[Tensor, "b d d"]
    translation: Float[Tensor, "b d"]
    centre: Tensor

    def __post_init__(self) -> None:
        dim = self.matrix.shape[-1]
        fits = self.matrix.shape[1:] == (dim, dim) and self.translation.shape[1:] == self.centre.shape[-1:] == (dim,)
        if not fits:
            raise ValueError(
                f"An affine needs a matrix b x d x d, a translation b x d and a centre d or b x d, not "
                f"{tuple(self.matrix.shape)}, {tuple(self.translation.shape)} and {tuple(self.centre.shape)}."
            )

    @exactly
    def __call__(self, points: Tensor) -> Tensor:
        """M (x - c) + c + t."""
        check_points(points, self.matrix.shape[-1], len(self.matrix))
        centre = self._centre()
        moved = (points - centre) @ self.matrix.transpose(-1, -2)
        return moved + centre + self.translation[:, None]

    def jacobian(self, points: Tensor) -> Tensor:
        """M at every point (analytic)."""
        batch = max(points.shape[0], self.matrix.shape[0])
        return self.matrix[:, None].expand(batch, points.shape[1], -1, -1)

    @exactly
    def inverse(self) -> "Affine":
        """x = M^-1 (y - c) + c - M^-1 t.

        Raises:
            NotInvertibleError: if M is singular.
        """
        if bool((torch.linalg.det(self.matrix).abs() < 1e-8).any()):
            raise NotInvertibleError("This affine matrix is singular: it flattens space, and has no inverse.")
        inverse = torch.linalg.inv(self.matrix)
        shift = -(inverse @ self.translation[..., None])[..., 0]
        return Affine(inverse, shift, self.centre)

    def _centre(self) -> Tensor:
        return self.centre.to(self.matrix).reshape(-1, 1, self.matrix.shape[-1])


@dataclass(frozen=True)
class AffineParts:
    """The parts that make up an affine matrix, M = Q S Q^T K R, and the shift t.

    R turns by ``rotation_rad``; K shears (unit upper triangular); S = diag(scale) stretches along axes that Q turns by
    ``stretch_axes_rad``. What the ISTN code calls shear is that last angle: it says *where* the image is stretched, and
    has no effect, and no gradient, while all scales are equal. True shears are separate here.

    Args:
        translation: t, ``b d``, mm.
        rotation_rad: ``b 1`` in 2D, ``b 3`` in 3D, about axes 0, 1, 2 (see :func:`rotation_matrix`).
        scale: ``b d``, ratios, 1 = none.
        stretch_axes_rad: as ``rotation_rad``.
        shear: ``b 1`` in 2D, ``b 3`` in 3D: K's entries (0,1), (0,2), (1,2); ratios (mm per mm).
    """

    translation: Tensor
    rotation_rad: Tensor
    scale: Tensor
    stretch_axes_rad: Tensor
    shear: Tensor

    @staticmethod
    def identity(dim: int, batch: int = 1, like: Tensor | None = None) -> "AffineParts":
        """No motion at all."""
        like = torch.zeros(()) if like is None else like
        zeros = [like.new_zeros(batch, n) for n in AffineBounds.counts(dim)]
        return AffineParts(zeros[0], zeros[1], zeros[2] + 1, zeros[3], zeros[4])

    @exactly
    def matrix(self) -> Float[Tensor, "b d d"]:
        """M = Q S Q^T K R."""
        dim = self.translation.shape[-1]
        turned = rotation_matrix(self.stretch_axes_rad)
        stretch = turned @ torch.diag_embed(self.scale) @ turned.transpose(-1, -2)
        row, column = torch.triu_indices(dim, dim, offset=1)
        shear = torch.diag_embed(torch.ones_like(self.scale))
        shear = shear.index_put((torch.arange(len(shear))[:, None], row, column), self.shear)
        return stretch @ shear @ rotation_matrix(self.rotation_rad)

    def about(self, centre: Tensor | Sequence[float]) -> Affine:
        """The affine transform that leaves ``centre`` (mm) in place but for the translation."""
        return Affine(self.matrix(), self.translation, torch.as_tensor(centre).to(self.translation))


@dataclass(frozen=True)
class AffineBounds:
    """How far each part of an affine transform may go, for networks whose outputs are squashed by tanh.

    Args:
        translation_mm: largest shift along each axis.
        rotation_deg: largest turn about each axis.
        scale_ratio: largest factor, 1.2 for scales between 1/1.2 and 1.2.
        stretch_axes_deg: largest turn of the stretch axes.
        shear_ratio: largest shear, mm per mm.
    """

    translation_mm: float = 10.0
    rotation_deg: float = 45.0
    scale_ratio: float = 1.5
    stretch_axes_deg: float = 45.0
    shear_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.scale_ratio < math.inf:
            raise ValueError(f"scale_ratio is a factor of at least 1, not {self.scale_ratio}.")
        for name in ("translation_mm", "rotation_deg", "stretch_axes_deg", "shear_ratio"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} says how far a part may go, a number of at least 0, but it is {value}.")

    @staticmethod
    def counts(dim: int) -> tuple[int, int, int, int, int]:
        """Numbers per part: translation, rotation, scale, stretch axes, shear."""
        turns = dim * (dim - 1) // 2
        return dim, turns, dim, turns, turns

    def parts(self, logits: Float[Tensor, "b p"], dim: int) -> AffineParts:
        """Unbounded numbers z to parts inside the bounds, part = bound * tanh(z); z = 0 is the identity.

        Args:
            logits: ``b p`` with p the sum of :meth:`counts`: 7 in 2D, 15 in 3D.
            dim: 2 or 3.
        """
        if logits.shape[-1] != sum(self.counts(dim)):
            raise ValueError(f"An affine in {dim}D has {sum(self.counts(dim))} numbers, not {logits.shape[-1]}.")
        shift, turn, scale, axes, shear = logits.tanh().split(self.counts(dim), dim=-1)
        radians = torch.pi / 180
        return AffineParts(
            translation=shift * self.translation_mm,
            rotation_rad=turn * self.rotation_deg * radians,
            scale=self.scale_ratio**scale,
            stretch_axes_rad=axes * self.stretch_axes_deg * radians,
            shear=shear * self.shear_ratio,
        )


@exactly
def rotation_matrix(angles_rad: Float[Tensor, "b a"]) -> Float[Tensor, "b d d"]:
    """Rotation from one angle (2D) or three (3D, R = R2 R1 R0: about axis 0 first).

    A positive angle turns axis k+1 towards axis k+2, counted round (in 2D axis 0 towards axis 1).
    """
    if angles_rad.shape[-1] not in (1, 3):
        raise ValueError(f"A rotation has 1 angle (2D) or 3 (3D), not {angles_rad.shape[-1]}.")
    dim = 2 if angles_rad.shape[-1] == 1 else 3
    total = torch.eye(dim, device=angles_rad.device, dtype=angles_rad.dtype).expand(len(angles_rad), -1, -1)
    planes = [(0, 1)] if dim == 2 else [(1, 2), (2, 0), (0, 1)]
    for angle, (i, k) in zip(angles_rad.unbind(-1), planes, strict=True):
        generator = angles_rad.new_zeros(dim, dim)
        generator[k, i], generator[i, k] = 1, -1
        # Rodrigues' formula: exp(angle G) = I + sin(angle) G + (1 - cos(angle)) G^2.
        turn = angle.sin()[:, None, None] * generator + (1 - angle.cos())[:, None, None] * generator @ generator
        total = (torch.eye(dim).to(turn) + turn) @ total
    return total
