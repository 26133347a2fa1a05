"""Breathing as a transform in closed form: lungs that slide along the chest wall, without gaps.

Convention: fixed (exhale) points to moving (inhale) points, mm; the last axis points up, the first to the right, and in
3D the second to the front. "Lateral" are all axes but the last: one in 2D (a coronal slice), two in 3D. All is relative
to ``centre``, whose first coordinate is the midline; each lung keeps to its own side of it.

Per lung and phase there are, at each height z, the centre c(z) and the half widths R(z) of a cross-section. A point of
it has the coordinate w = (lateral - c(z)) / R(z), and lies in the lung's column where q = |w| / g <= 1, with g the
shape of the section. The column ends below in the diaphragm, z = D(w), a dome, and above in the apex.

- In the column, w stays (but for the change of g with height, see ``_lateral_factor``), and the height t between
  diaphragm (0) and apex (1) goes to t + k(w) t (1 - t). Below the diaphragm heights are mapped linearly down to a floor
  that stays.
- Outside there is no axial motion. The section grows with the ribs, R_fixed to R_moving; this fades with the distance
  from the wall, and to nothing at the midline.

Both sides map the wall q = 1 of the fixed onto the wall of the moving image: the displacement jumps there along the
wall alone, so lung and ribs slide, and nothing overlaps. The diaphragm moves with what lies above and below it.

The same code serves a drawn phantom (``thorax``) and lungs measured on a CT (``thorax_ct``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regteach.transforms import Transform, check_points, determinant

CHUNK = 2**19  # points at a time, to bound the memory
REACH = 1.2
THIN = 1e-6  # square of the cap below which the apex counts as a point
Terms = tuple[tuple[tuple[int, ...], float], ...]  # a polynomial: (exponent of each axis, coefficient) each


@dataclass(frozen=True)
class Lung:
    """One lung in both phases: plain numbers, lengths in mm relative to the patient's centre.

    "Series" are Chebyshev coefficients over ``heights``; beyond them a series keeps its last value.

    Args:
        sign: 1 for the lung on the side of rising x (the right one in RAS), -1 for the other.
        apex: height of the tip, which stays.
        cap: over this length below the apex the section opens, as an ellipse does, to its full width.
        floor: height below which the column does not move.
        heights: range of the series.
        medial: series: distance of the inner wall from the midline; it is the same in both phases.
        centre: for each lateral axis after the first, the series of the inhaled section's centre.
        radius: for each lateral axis, the series of the inhaled section's half width where the cap is open.
        shape: series by harmonic, ``[j][0 or 1]``: log g = sum_j cos(j a) s0_j(z) + sin(j a) s1_j(z), with the angle a
            counted from the outward direction; none for an ellipse.
        dome: D of the inhaled lung as a polynomial in w.
        rise: by how much D is higher when exhaled, a polynomial in w.
        uneven: k(w) = uneven[0] + sum uneven[i] w_i, of size below 1.
        growth: mm by which the outer (front) wall moves out, one a lateral axis.
        growth_above: below this height the growth fades, over ``growth_fade`` mm.
        growth_fade: see above.
    """

    sign: float
    apex: float
    cap: float
    floor: float
    heights: tuple[float, float]
    medial: tuple[float, ...]
    centre: tuple[tuple[float, ...], ...]
    radius: tuple[tuple[float, ...], ...]
    shape: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    dome: Terms
    rise: Terms
    uneven: tuple[float, ...]
    growth: tuple[float, ...]
    growth_above: float
    growth_fade: float

    def section(self, z: Float[Tensor, "n"], inhaled: bool) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n e"]]:
        """Centre and half widths of the section at each height, mm, along the lateral axes."""
        opening = ((self.apex - z) / self.cap).clamp(max=1)
        cap = (opening * (2 - opening)).clamp_min(THIN)
        radius = torch.stack([self.series(z, c) for c in self.radius], -1) * cap.sqrt()[:, None]
        fade = torch.exp(-(((self.growth_above - z) / self.growth_fade).clamp_min(0) ** 2))
        half_growth = z.new_tensor(self.growth) / 2 * (cap * fade)[:, None]
        if not inhaled:
            radius = radius - half_growth
        centre = [self.sign * (self.series(z, self.medial) + radius[:, 0])]
        for axis, coefficients in enumerate(self.centre, start=1):  # the back wall stays, the front wall moves
            centre.append(self.series(z, coefficients) - (0 if inhaled else half_growth[:, axis]))
        return torch.stack(centre, -1), radius

    def series(self, z: Float[Tensor, "n"], coefficients: tuple[float, ...]) -> Float[Tensor, "n"]:
        """Value of a Chebyshev series at each height."""
        low, high = self.heights
        x = ((2 * z - low - high) / (high - low)).clamp(-1, 1)
        before, now = torch.ones_like(x), x
        total = coefficients[0] * before
        for coefficient in coefficients[1:]:
            total = total + coefficient * now
            before, now = now, 2 * x * now - before
        return total

    def log_shape(self, w: Float[Tensor, "n e"], z: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """log g: how far the wall lies out in the direction of w, against the ellipse."""
        unit = w / length(w)[:, None]
        cosine = self.sign * unit[:, 0]
        sine = unit[:, 1] if w.shape[1] > 1 else torch.zeros_like(cosine)
        total, c, s = torch.zeros_like(z), torch.ones_like(z), torch.zeros_like(z)
        for even, odd in self.shape:
            total = total + c * self.series(z, even) + s * self.series(z, odd)
            c, s = c * cosine - s * sine, s * cosine + c * sine  # the next harmonic
        return total

    def depth(self, w: Float[Tensor, "n e"], z: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """q: 0 on the lung's axis, 1 on its wall, more outside."""
        return length(w) * torch.exp(-self.log_shape(w, z))

    def diaphragm(self, w: Float[Tensor, "n e"], inhaled: bool) -> Float[Tensor, "n"]:
        """D: height of the diaphragm, mm; beyond |w| = 1.2 as there."""
        w = w * (REACH / length(w)).clamp(max=1)[:, None]
        dome = polynomial(self.dome, w)
        return dome if inhaled else dome + polynomial(self.rise, w)

    def unevenness(self, w: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
        """k: positive where the lower part of the lung opens more than the upper."""
        return self.uneven[0] + w @ w.new_tensor(self.uneven[1:])

    @property
    def width(self) -> float:
        """A typical radius, mm, that makes lengths of q."""
        return sum(c[0] for c in self.radius) / len(self.radius)

    def holds(self, points: Float[Tensor, "n d"], inhaled: bool) -> Float[Tensor, "n"]:
        """Whether each point lies in the lung in one of the phases."""
        z = points[:, -1]
        centre, radius = self.section(z, inhaled)
        w = (points[:, :-1] - centre) / radius
        return (self.depth(w, z) <= 1) & (z < self.apex) & (z >= self.diaphragm(w, inhaled))


@dataclass(frozen=True)
class Breathing(Transform):
    """Exhale to inhale: fixed points to moving points.

    Args:
        lungs: the one on the side of rising x, and the other.
        centre: of the patient, mm; the midline is at its first coordinate.
        decay: mm outside the wall over which the motion of the ribs falls to 1 / e.
    """

    lungs: tuple[Lung, Lung]
    centre: tuple[float, ...]
    decay: float

    def __call__(self, points: Tensor) -> Tensor:
        """In closed form, to rounding."""
        check_points(points, len(self.centre))
        moved = self._by_side(points.flatten(0, 1), self._moved)
        return moved.reshape(points.shape)

    def jacobian(self, points: Tensor) -> Tensor:
        """Exact: the closed form differentiated forwards. On the wall, where it does not exist, that of one side."""
        check_points(points, len(self.centre))
        flat = points.flatten(0, 1)
        columns = []
        for axis in range(points.shape[-1]):
            direction = torch.zeros_like(flat)
            direction[:, axis] = 1
            columns.append(torch.func.jvp(lambda p: self._by_side(p, self._moved), (flat,), (direction,))[1])
        return torch.stack(columns, -1).reshape(*points.shape, points.shape[-1])

    def volume_ratio(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
        """det of the Jacobian inside the lungs of the fixed image; 1 elsewhere.

        Where the shape of the section is the same at all heights, from the closed form: w stays, so the matrix is
        triangular in (w, t), and det = prod R_moving / R_fixed * height_moving / height_fixed * (1 + (1 - 2 t) k).
        """
        check_points(points, len(self.centre))
        flat = points.flatten(0, 1)
        if self._straight:
            ratio = self._by_side(flat, self._ratio)[:, 0]
        else:
            ratio = torch.ones_like(flat[:, 0])
            inside = self.lung_at(points).flatten() > 0
            for part in inside.nonzero()[:, 0].split(CHUNK):
                ratio[part] = determinant(self.jacobian(flat[None, part]))[0]
        return ratio.reshape(points.shape[:-1])

    def lung_at(self, points: Float[Tensor, "b n d"], inhaled: bool = False) -> Int[Tensor, "b n"]:
        """1 in the lung on the side of rising x, 2 in the other, 0 outside; of the fixed image, or the moving one."""

        def inside(lung: Lung, part: Tensor) -> Tensor:
            return lung.holds(part, inhaled)[:, None] * (1 if lung.sign > 0 else 2)

        return self._by_side(points.flatten(0, 1), inside, back=False)[:, 0].reshape(points.shape[:-1])

    def lung_inverse(self, points: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Moving to fixed points inside the lungs, in closed form.

        Raises:
            ValueError: if a point is not in a lung of the moving image, or the shape of the section changes with
                height (then there is no closed form).
        """
        if not self._straight or not bool((self.lung_at(points, inhaled=True) > 0).all()):
            raise ValueError("The inverse is known inside the lungs of the moving image, for sections of one shape.")
        return self._by_side(points.flatten(0, 1), self._unmoved).reshape(points.shape)

    @property
    def _straight(self) -> bool:
        return all(len(series) == 1 for lung in self.lungs for pair in lung.shape for series in pair)

    def _moved(self, lung: Lung, points: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        lateral, z = points[:, :-1], points[:, -1]
        centre_f, radius_f = lung.section(z, inhaled=False)
        w = (lateral - centre_f) / radius_f
        q = lung.depth(w, z)
        column = (q <= 1) & (z < lung.apex) & (z > lung.floor)
        z_moved = torch.where(column, self._height(lung, w, z), z)
        centre_m, radius_m = lung.section(z_moved, inhaled=True)
        inside = centre_m + radius_m * w * self._lateral_factor(lung, w, q, z, z_moved)
        # Outside z_moved is z, so these are the two sections at one height.
        fade = torch.exp(-(q.clamp_min(1) - 1) * lung.width / self.decay)
        fade = fade * smoothstep(points[:, 0].abs() / (0.9 * lung.series(z, lung.medial)).clamp_min(1))
        outside = lateral + (centre_m - centre_f + (radius_m - radius_f) * w) * fade[:, None]
        return torch.cat([torch.where(column[:, None], inside, outside), z_moved[:, None]], -1)

    @staticmethod
    def _height(lung: Lung, w: Tensor, z: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Height in the moving image of points of the column."""
        floor_f, floor_m = lung.diaphragm(w, inhaled=False), lung.diaphragm(w, inhaled=True)
        t = (z - floor_f) / (lung.apex - floor_f)
        t_moved = t + lung.unevenness(w) * t * (1 - t)
        above = lung.apex - (1 - t_moved) * (lung.apex - floor_m)
        below = lung.floor + (z - lung.floor) * (floor_m - lung.floor) / (floor_f - lung.floor)
        return torch.where(t >= 0, above, below)

    def _lateral_factor(self, lung: Lung, w: Tensor, q: Tensor, z: Tensor, z_moved: Tensor) -> Float[Tensor, "n 1"]:
        """Where the section has another shape at its new height, w is multiplied by this: 1 on the axis."""
        if self._straight:
            return torch.ones_like(z)[:, None]
        change = lung.log_shape(w, z_moved) - lung.log_shape(w, z)
        return torch.exp(smoothstep(q) * change)[:, None]

    @staticmethod
    def _ratio(lung: Lung, points: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        z = points[:, -1]
        centre, radius = lung.section(z, inhaled=False)
        w = (points[:, :-1] - centre) / radius
        floor_f, floor_m = lung.diaphragm(w, inhaled=False), lung.diaphragm(w, inhaled=True)
        t = (z - floor_f) / (lung.apex - floor_f)
        k = lung.unevenness(w)
        wider = lung.section(Breathing._height(lung, w, z), inhaled=True)[1] / radius
        ratio = wider.prod(-1) * (lung.apex - floor_m) / (lung.apex - floor_f) * (1 + (1 - 2 * t) * k)
        return torch.where(lung.holds(points, inhaled=False), ratio, 1)[:, None]

    @staticmethod
    def _unmoved(lung: Lung, points: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        z = points[:, -1]
        centre, radius = lung.section(z, inhaled=True)
        w = (points[:, :-1] - centre) / radius
        floor_f, floor_m = lung.diaphragm(w, inhaled=False), lung.diaphragm(w, inhaled=True)
        t_moved, k = (z - floor_m) / (lung.apex - floor_m), lung.unevenness(w)
        t = 2 * t_moved / (1 + k + ((1 + k) ** 2 - 4 * k * t_moved).sqrt())  # the root of t + k t (1 - t) = t_moved
        z_fixed = floor_f + t * (lung.apex - floor_f)
        centre, radius = lung.section(z_fixed, inhaled=False)
        return torch.cat([centre + radius * w, z_fixed[:, None]], -1)

    def _by_side(
        self, points: Float[Tensor, "n d"], work: Callable[[Lung, Tensor], Tensor], back: bool = True
    ) -> Float[Tensor, "n e"]:
        """``work`` on the points of each side, relative to the centre; ``back`` shifts the results by the centre."""
        shift = points.new_tensor(self.centre)
        results = []
        for part in points.split(CHUNK):
            local = part - shift
            right = local[:, 0] >= 0
            order = torch.cat([right.nonzero()[:, 0], (~right).nonzero()[:, 0]])
            done = [work(lung, local[mask]) for lung, mask in zip(self.lungs, (right, ~right), strict=True)]
            results.append(torch.cat(done)[order.argsort()])
        result = torch.cat(results) if results else points
        return result + shift if back and result.shape[-1] == points.shape[-1] else result


def length(w: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
    """|w|, with a derivative at 0 too."""
    return (w.square().sum(-1) + 1e-12).sqrt()


def smoothstep(x: Tensor) -> Tensor:
    """0 up to 0, 1 from 1 on, smooth between."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def polynomial(terms: Terms, w: Float[Tensor, "n e"]) -> Float[Tensor, "n"]:
    """Sum of coefficient * prod w_i ** exponent_i."""
    total = torch.zeros_like(w[:, 0])
    for exponents, coefficient in terms:
        term = torch.full_like(total, coefficient)
        for axis, exponent in enumerate(exponents):
            for _ in range(exponent):
                term = term * w[:, axis]
        total = total + term
    return total
