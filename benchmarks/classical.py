"""Other people's registration tools, each behind the same two lines: an image pair in, a displacement field out.

They live in an environment of their own (requirements-classical.lock), and each is imported when it is first used.
Images are NumPy arrays on one grid whose first voxel sits at zero and whose axes are the world's, so that a tool's
world is our own, axis by axis, in units of the smallest side of a voxel; a field is ``*grid d``, in the same units, and
maps fixed points to moving points, as in ITK. What a tool is told stands beside it in :data:`TOOLS`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regteach.grid import Grid
from regteach.transforms import Dense

Field = Callable[[np.ndarray, np.ndarray, tuple[float, ...]], np.ndarray]  # moving, fixed, spacing -> field


@dataclass(frozen=True)
class Tool:
    """A tool.

    Args:
        module: that has to be there.
        field: what it finds.
        settings: in words.
        dims: of the images that it takes.
    """

    module: str
    field: Field
    settings: str
    dims: tuple[int, ...] = (2, 3)

    @property
    def here(self) -> bool:
        """Whether it is installed."""
        return find_spec(self.module) is not None

    def __call__(self, moving: Tensor, fixed: Tensor, grid: Grid) -> Dense:
        """Register one pair of one channel.

        Args:
            moving: ``1 1 *grid``.
            fixed: likewise.
            grid: of both.

        Raises:
            ValueError: if the tool does not take such images.
        """
        if grid.dim not in self.dims or moving.shape[:2] != (1, 1):
            raise ValueError(f"{self.module} takes one pair of one channel in {self.dims} axes; got {moving.shape}.")
        arrays = [image[0, 0].cpu().numpy().astype(np.float32) for image in (moving, fixed)]
        # Some tools have lengths of a head built in, and lose their way where a pixel has a hundredth of a millimetre.
        unit = min(grid.spacing)
        found = unit * self.field(arrays[0], arrays[1], tuple(h / unit for h in grid.spacing))
        return Dense(torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))[None].to(moving.device), grid)


# ---- greedy ----


def greedy(moving: np.ndarray, fixed: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """PICSL Greedy: an affine and a diffeomorphic greedy search, both by normalised cross-correlation."""
    module = import_module("picsl_greedy")
    dim = moving.ndim
    tool = module.Greedy2D() if dim == 2 else module.Greedy3D()
    window, always = "x".join("2" * dim), f"-V 0 -threads 1 -d {dim}"
    with tempfile.TemporaryDirectory() as folder:
        affine, warp, both = (f"{folder}/{name}" for name in ("affine.mat", "warp.nii.gz", "both.nii.gz"))
        images = {"fix": _itk(fixed, spacing), "mov": _itk(moving, spacing)}
        tool.execute(
            f"{always} -i fix mov -a -dof 12 -n 100x50x10 -ia-image-centers -m NCC {window} -o {affine}", **images
        )
        tool.execute(
            f"{always} -i fix mov -it {affine} -n 100x50x10 -m NCC {window} -s 1.732vox 0.707vox -o {warp}", **images
        )
        tool.execute(f"{always} -rf fix -rc {both} -r {warp} {affine}", **images)
        return _field(import_module("SimpleITK").ReadImage(both))


# ---- ANTs ----


def syn(moving: np.ndarray, fixed: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """ANTs SyN by cross-correlation, after an affine by mutual information."""
    ants = import_module("ants")
    images = [ants.from_numpy(array, spacing=spacing) for array in (fixed, moving)]
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(
            *images, type_of_transform="SyN", syn_metric="CC", syn_sampling=2, reg_iterations=(40, 20, 10),
            outprefix=f"{folder}/", random_seed=1,
        )  # fmt: skip
        both = ants.apply_transforms(*images, transformlist=found["fwdtransforms"], compose=f"{folder}/both_")
        return _field(import_module("SimpleITK").ReadImage(both))


# ---- SimpleITK ----


def demons(moving: np.ndarray, fixed: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """ITK's diffeomorphic demons over three scales, after an affine by correlation; intensities matched first."""
    sitk = import_module("SimpleITK")
    there, here = _itk(fixed, spacing), _itk(moving, spacing)
    affine = _affine(there, here)
    here = sitk.Resample(here, there, affine, sitk.sitkLinear)
    here = sitk.HistogramMatching(here, there, 256, 12, True)
    tool = sitk.DiffeomorphicDemonsRegistrationFilter()
    tool.SetStandardDeviations(1.5)  # of the Gaussian that smooths the field, voxels
    shift = None
    for factor, steps in ((4, 60), (2, 40), (1, 20)):
        coarse = [_coarser(image, factor) for image in (there, here)]
        tool.SetNumberOfIterations(steps)
        shift = tool.Execute(*coarse, *([] if shift is None else [sitk.Resample(shift, coarse[0])]))
    bent = sitk.DisplacementFieldTransform(sitk.Cast(shift, sitk.sitkVectorFloat64))
    whole = sitk.CompositeTransform([affine, bent])  # the last one listed comes first: fixed points, bent, then affine
    frame = there.GetSize(), there.GetOrigin(), there.GetSpacing(), there.GetDirection()
    return _field(sitk.TransformToDisplacementField(whole, sitk.sitkVectorFloat64, *frame))


def _coarser(image: Any, factor: int) -> Any:
    """Every so many voxels of an image smoothed by half as many."""
    sitk = import_module("SimpleITK")
    if factor == 1:
        return image
    widths = [(factor * step / 2) ** 2 for step in image.GetSpacing()]  # variances
    return sitk.Shrink(sitk.DiscreteGaussian(image, widths), [factor] * image.GetDimension())


def _affine(fixed: Any, moving: Any) -> Any:
    sitk = import_module("SimpleITK")
    dim = fixed.GetDimension()
    tool = sitk.ImageRegistrationMethod()
    tool.SetMetricAsCorrelation()
    tool.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    tool.SetOptimizerScalesFromPhysicalShift()
    tool.SetShrinkFactorsPerLevel([4, 2, 1])
    tool.SetSmoothingSigmasPerLevel([2, 1, 0])
    tool.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()  # in voxels
    tool.SetInterpolator(sitk.sitkLinear)
    middle = sitk.CenteredTransformInitializerFilter.GEOMETRY
    start = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(dim), middle)
    tool.SetInitialTransform(start, inPlace=False)
    return tool.Execute(fixed, moving)


# ---- ConvexAdam ----


def convex_adam(moving: np.ndarray, fixed: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """ConvexAdam with MIND features and its own default settings; no affine before it."""
    tool = import_module("convexAdam.convex_adam_MIND")
    with torch.enable_grad():
        shift: np.ndarray = tool.convex_adam_pt(fixed, moving, dtype=torch.float32, device=torch.device("cpu"))
    return shift * np.asarray(spacing)


# ---- images and fields ----


def _itk(array: np.ndarray, spacing: tuple[float, ...]) -> Any:
    image = import_module("SimpleITK").GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    return image


def _field(image: Any) -> np.ndarray:
    """ITK's arrays have their axes backwards."""
    array = import_module("SimpleITK").GetArrayFromImage(image)
    dim = image.GetDimension()
    return np.moveaxis(array, range(dim), range(dim)[::-1])


TOOLS = {
    "ANTs SyN": Tool(
        "ants", syn, "an affine by mutual information, then SyN by cross-correlation, radius 2, 40, 20 and 10 steps"
    ),
    "diffeomorphic demons (ITK)": Tool(
        "SimpleITK", demons,
        "an affine by correlation, then 60, 40 and 20 steps on quarters, halves, whole; field smoothed by 1.5 voxels",
    ),
    "ConvexAdam": Tool("convexAdam", convex_adam, "MIND features, its own defaults", dims=(3,)),
    "Greedy (PICSL)": Tool(
        "picsl_greedy", greedy,
        "an affine, then 100, 50 and 10 steps, both by NCC, radius 2; steps smoothed by 1.7 voxels, the field by 0.7",
    ),
}  # fmt: skip
