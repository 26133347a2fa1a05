"""Named trainings: what is trained, on what, and how; ``regteach train NAME`` runs one.

A recipe is a dataclass, so that a change of it is one ``dataclasses.replace``. The choices in it were made on
validation people only.
"""

from dataclasses import dataclass, replace
from typing import Any

from regteach import keypoint_task, objectives, points_task
from regteach.affine import AffineBounds
from regteach.checkpoints import Config
from regteach.data.augment import Augmentation
from regteach.data.named import BRAINS, known
from regteach.grid import Grid
from regteach.keypoint_task import KeypointRecipe
from regteach.nets.georeg import GeoRegConfig
from regteach.nets.istn import AffineStage, ISTNConfig, SplineStage, Stage
from regteach.points_task import PointsRecipe
from regteach.refinement import Refinement
from regteach.training import Settings


@dataclass(frozen=True)
class Recipe:
    """One training.

    Args:
        name: also of the weights.
        data: name of the cohort, see :data:`regteach.data.named.COHORTS`.
        variant: loss of ISTN: "unsupervised", "supervised", "explicit", "implicit"; other networks are "unsupervised".
        config: of the network.
        settings: of the loop.
        augmentation: of the images.
        bending: weight of the bending energy in training, mm^2; of a network that is judged at every level also one for
            each of them, finest first.
        weights: of each level of a network that is judged at every level, finest first; equal where left out. Cortex
            that has been blurred to 16 mm says little of what lies below it: brains are judged by their fine levels.
        window_vox: width of the windows in which local NCC compares images in training, voxels of each level's grid.
        coarse_first: the finest levels of a GeoReg join late, one after each of these numbers of steps: cheaper.
        imitate: the second of two encoders learns to see in its contrast what the first sees in that of the twin;
            nothing else is trained (:func:`regteach.contrasts.alike`).
        resting: parts of the network that keep the weights they start with, by the names of its modules: where one part
            has learned all that these people can teach it, and another has not.
        middle: voxels an axis of the middle of the images, to which training looks; all where left out. Cheaper, where
            what surrounds it is mostly empty; for networks that take images of any size.
        coarsen: in training, alignment is judged on maps averaged over cubes of this many voxels.
        refinement: what is recommended at test time.
        start: name of a model that ships, whose weights training starts from; its own name where training goes on.
    """

    name: str
    data: str
    variant: str
    config: Config
    settings: Settings
    augmentation: Augmentation = Augmentation()
    bending: float | tuple[float, ...] = 0.0
    weights: tuple[float, ...] = ()
    window_vox: int = objectives.WINDOW
    coarse_first: tuple[int, ...] = ()
    imitate: bool = False
    resting: tuple[str, ...] = ()
    middle: tuple[int, ...] = ()
    coarsen: int = 1
    refinement: Refinement = Refinement()
    start: str = ""


TREES = Grid((128, 128))
SLICES = Grid((160, 208))
HIPPOCAMPUS = Grid((48, 64, 48))
DONORS = Grid((64, 64, 64), (3.0,))
DIGITS = Grid((28, 28))
RETINA = Grid((160, 192), (0.0078, 0.030))

# How far people differ, after their images have been brought roughly into place.
PEOPLE = AffineBounds(translation_mm=16.0, rotation_deg=30.0, scale_ratio=1.4, stretch_axes_deg=45.0, shear_ratio=0.2)
FAST = Settings(rate=1e-3, warmup=30, decay=True, precision="bf16")


def _family(name: str, base: Recipe, stages: dict[str, tuple[Stage, ...]]) -> list[Recipe]:
    """Every variant with every kind of transform: what the paper's Table 1 compares."""
    config = base.config
    if not isinstance(config, ISTNConfig):
        raise TypeError("The variants and transforms of Table 1 are those of an ISTN.")
    return [
        replace(
            base,
            name=f"{name}-{kind}-{variant}",
            variant=variant,
            config=replace(config, stages=chosen, itn=() if variant in ("unsupervised", "supervised") else config.itn),
        )
        for kind, chosen in stages.items()
        for variant in objectives.ISTN
    ]


def _trees() -> list[Recipe]:
    affine = AffineStage(replace(PEOPLE, rotation_deg=60.0, scale_ratio=1.6, shear_ratio=0.3), (16, 32, 64))
    base = Recipe(
        "",
        "trees",
        "",
        ISTNConfig(TREES, (affine,), itn=(8, 16, 32), shrink=2),
        Settings(steps=700, batch=10, rate=1e-3, warmup=50, decay=True, validate_every=50),
        Augmentation(shift_mm=6.0, rotation_deg=20.0, scale_ratio=1.15, shear=0.1),
        bending=10.0,
        refinement=Refinement(50, rate=0.01, bending=100.0),
    )
    spline = SplineStage(16.0, widths=(16, 32, 32))
    return _family("istn-trees", base, {"affine": (affine,), "bspline": (affine, spline)})


def _people(
    name: str, data: str, grid: Grid, structures: int, steps: int, control_mm: tuple[float, ...]
) -> list[Recipe]:
    affine = AffineStage(PEOPLE, (16, 32, 32))
    splines = tuple(SplineStage(mm, widths=(16, 32, 32)) for mm in control_mm)
    base = Recipe(
        "",
        data,
        "",
        ISTNConfig(grid, (affine,), 1, structures, (16, 32, 64, 64), shrink=2),
        replace(FAST, steps=steps, batch=2, validate_every=100),
        Augmentation(3.0, 10.0, 1.1, 0.05, 2.0, 16.0, gamma=0.3, noise=0.05),
        bending=5.0,
        coarsen=2,
        refinement=Refinement(50, rate=0.03, focus_mm=4.0, coarsen=2),
    )
    return _family(name, base, {"affine": (affine,), "bspline": (affine, *splines)})


def _shipped() -> list[Recipe]:
    """One model for each kind of image, as good as we know how."""
    small = AffineStage(replace(PEOPLE, translation_mm=10.0), (16, 32, 32))
    slim = (16, 32, 32)
    return [
        Recipe(
            "istn-hippocampus",
            "hippocampus",
            "explicit",
            ISTNConfig(
                HIPPOCAMPUS,
                (small, SplineStage(12.0, widths=slim), SplineStage(6.0, widths=slim)),
                structures=2,
                itn=(24, 48, 96, 96),
                shrink=2,
            ),
            # A third run, of the STN alone. A first one of 2,500 steps at 1e-3 and a second of 1,450 at 7e-4 (two pairs
            # a step, bending 5) trained the whole. More of that drew training people better, and validation people no
            # better, whatever the augmentation: the ITN has learned what there is to learn.
            replace(FAST, steps=300, batch=4, validate_every=50),
            Augmentation(3.0, 10.0, 1.1, 0.05, 2.0, 16.0, gamma=0.4, bias=0.2, noise=0.05, blur_mm=0.5),
            bending=1.0,
            coarsen=2,
            resting=("itn",),
            # 50 steps of Adam on the parameters, at 2 mm, took longer and came to a Dice of 0.843 on validation people;
            # these to 0.858: voxels move more freely than control points, and the last steps see the maps in full.
            refinement=Refinement(
                10, "greedy", 0.5, sharpen=16.0, focus_mm=3.0, pyramid=1, coarser=(5, 8), smoothing_vox=(0.7, 0.0)
            ),
            start="istn-hippocampus",
        ),
        Recipe(
            "istn-slices",
            "slices",
            "explicit",
            ISTNConfig(
                SLICES,
                (
                    AffineStage(AffineBounds(16.0, 20.0, 1.3, 45.0, 0.15), (16, 32, 32)),
                    SplineStage(32.0, widths=(*slim, 32)),
                    *(SplineStage(mm, widths=slim) for mm in (16.0, 8.0, 4.0)),
                ),
                structures=2,
                shrink=2,
            ),
            replace(FAST, steps=800, batch=4),
            Augmentation(6.0, 8.0, 1.12, 0.05, 4.0, 24.0, gamma=0.3, bias=0.2, noise=0.05, blur_mm=0.5),
            bending=1.0,
            # On validation people 100 steps of Adam on corrections reached a Dice of 0.773; these, in a quarter of the
            # time, 0.788.
            refinement=Refinement(
                40, "greedy", 0.5, images=4.0, sharpen=8, pyramid=2, coarser=(10, 20, 30), smoothing_vox=(1.0, 0.3)
            ),
        ),
        Recipe(
            "istn-brains",
            "brains",
            "explicit",
            ISTNConfig(
                BRAINS,
                (
                    AffineStage(replace(PEOPLE, translation_mm=20.0), (16, 32, 32)),
                    SplineStage(16.0, widths=slim),
                    SplineStage(8.0, widths=slim),
                ),
                structures=7,
                shrink=2,
            ),
            replace(FAST, steps=2400, batch=1, validate_every=200),
            Augmentation(6.0, 12.0, 1.12, 0.05, 3.0, 24.0, synthetic=1.0),
            bending=5.0,
            coarsen=2,
            refinement=Refinement(30, "corrections", rate=0.4, bending=10.0, images=30.0, focus_mm=6.0),
        ),
    ]


def _georeg() -> list[Recipe]:
    """Learned from the images alone. Labels of validation people choose the step that is kept, and measure."""
    brain = GeoRegConfig(BRAINS, (8, 16, 32, 64), (0, 3, 3, 3), (2, 3, 3), (0, 1, 2, 2), similarity="local_ncc")
    deep = replace(brain, iterations=(0, 2, 2, 1))
    search = Refinement(20, "greedy", 1.0, coarser=(50, 50), smoothing_vox=(1.732, 0.5), window_vox=5)
    people = Recipe(
        "georeg-brains",
        "brains-by-source",
        "unsupervised",
        deep,
        replace(FAST, steps=950, batch=1, validate_every=50),
        Augmentation(2.0, 4.0, 1.05, 0.03, 2.0, 24.0, gamma=0.2, noise=0.02),
        bending=3.0,
        # Optimised without a network, images of 2 mm bring the structures of validation people to a Dice of 0.73, of
        # 4 mm to 0.64, of 8 mm nowhere: what is fine has to be judged finely.
        weights=(1.0, 0.3, 0.01, 0.0),
        coarse_first=(200,),
        refinement=Refinement(50, "corrections", rate=0.3, bending=3.0),
        start="georeg-hippocampus",  # matching is learned once: whole brains take longer than many small crops
    )
    return [
        Recipe(
            "georeg-digits",
            "digits",
            "unsupervised",
            GeoRegConfig(DIGITS, (16, 32, 64), (3, 3, 3), (3, 3)),
            Settings(steps=1000, batch=16, rate=2e-3, warmup=30, decay=True, validate_every=100),
            bending=0.3,
            refinement=Refinement(50, "corrections", rate=0.2, bending=0.3),
        ),
        replace(
            people,
            name="georeg-hippocampus",
            data="hippocampus",
            # Steps that are smoothed, and several of them, at the levels that see anatomy. One or two rough ones at
            # each brought validation people to a Dice of 0.67; four smooth ones, trained so, to 0.73; eight at the
            # level of 2 mm to 0.74. That is all that images of 2 mm tell: a search that compares them ends at 0.740,
            # one that ends with images of 1 mm at 0.768. So the finest level, too, takes steps, and counts most.
            config=replace(brain, grid=HIPPOCAMPUS, windows=(3, 3, 3, 3), iterations=(2, 8, 4, 2), smoothing_vox=1.0),
            # The last of several runs, each of which went on from the weights of the one before it: 700 steps with
            # rough steps, 1,400 and 900 with smooth ones, judged at 2 mm; then, judged at 1 mm, 250 steps without a
            # step at that level, 480 with, and these.
            settings=replace(FAST, steps=700, batch=2, rate=8e-4, warmup=10, validate_every=140, seed=6),
            augmentation=Augmentation(1.0, 4.0, 1.04, 0.02, 2.5, 16.0, gamma=0.3, bias=0.15, noise=0.02),
            bending=0.7,
            weights=(10.0, 0.5, 0.25, 0.05),
            window_vox=5,
            coarse_first=(),
            middle=(40, 56, 40),
            start="georeg-hippocampus",
            # Its answer is near: fewer coarse steps than from nothing.
            refinement=replace(search, coarser=(5, 30), restart=True),
        ),
        people,
        replace(
            people,
            name="georeg-brains-t1t2",
            data="brains-t1t2",
            config=replace(deep, encoders=2, contrasts=("T1", "T2"), similarity="mutual_information"),
            # The T2 may be darker or brighter than any that is drawn: how dark is dark, a file's rim decides. This is
            # the second run: a first one, from georeg-brains, had 2,600 steps at 1e-3, and saw only brighter ones.
            settings=replace(people.settings, steps=1200, rate=5e-4, warmup=10, validate_every=150),
            augmentation=Augmentation(
                4.0, 6.0, 1.08, 0.04, 4.0, 24.0, gamma=0.5, lift=0.5, bias=0.2, noise=0.04, blur_mm=1.0
            ),
            bending=0.0,
            weights=(),
            coarse_first=(),
            imitate=True,
            refinement=Refinement(10, "greedy", 0.5, coarser=(30, 40), smoothing_vox=(2.5, 0.7)),
            start="georeg-brains-t1t2",
        ),
        Recipe(
            "georeg-retina",
            "retina",
            "unsupervised",
            # One rough step a level, 300 steps of training on 40 eyes: a Dice of 0.745 on validation eyes in one pass.
            GeoRegConfig(
                RETINA, (8, 16, 32, 32, 64), (0, 3, 3, 3, 3), (2, 3, 3, 3), (0, 4, 4, 2, 1), smoothing_vox=1.0
            ),
            # The second of two runs. A first one of 700 steps, from nothing, with half the bending, saw the visits as
            # they are: 0.826, and hardly a step sideways. Shifted further, with these: 0.858.
            Settings(steps=600, batch=4, rate=1e-3, warmup=30, decay=True, precision="bf16", validate_every=100),
            Augmentation(shift_mm=0.25),
            bending=2e-4,
            refinement=Refinement(30, "greedy", 0.7, coarser=(40,) * 4, smoothing_vox=(2.5, 0.8), restart=True),
            start="georeg-retina",
        ),
    ]


AnyRecipe = Recipe | PointsRecipe | KeypointRecipe
_EVERY: tuple[AnyRecipe, ...] = (
    *_trees(),
    *_people("istn-hippocampus", "hippocampus", HIPPOCAMPUS, 2, 600, (12.0, 6.0)),
    *_people("istn-donors", "donors", DONORS, 14, 600, (18.0, 9.0)),
    *_shipped(),
    *_georeg(),
    *points_task.RECIPES,
    *keypoint_task.RECIPES,
)
RECIPES: dict[str, AnyRecipe] = {recipe.name: recipe for recipe in _EVERY}


def find_recipe(name: str, **changes: object) -> Any:
    """A recipe of any kind (:data:`AnyRecipe`) by name, with changes of its loop's settings.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    recipe: Any = known(name, RECIPES, "recipe")
    return replace(recipe, settings=replace(recipe.settings, **changes)) if changes else recipe
