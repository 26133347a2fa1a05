"""Exercises of lesson 06: nested training sets, drift, when to stop, and what several seeds allow one to say."""

from itertools import pairwise

import torch

from regteach.lessons.exercises import Exercise, Mistake

Curve = list[float]


# e1: nested training sets
def nested_sets(pairs: list, sizes: list[int], seed: int) -> list[list]:
    """The first ones of a single random order."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[pairs[k] for k in order[:n]] for n in sizes]


def _drawn_anew(pairs: list, sizes: list[int], seed: int) -> list[list]:
    generator = torch.Generator().manual_seed(seed)
    return [[pairs[k] for k in torch.randperm(len(pairs), generator=generator)[:n].tolist()] for n in sizes]


def _not_shuffled(pairs: list, sizes: list[int], seed: int) -> list[list]:
    return [pairs[:n] for n in sizes]


def _with_repeats(pairs: list, sizes: list[int], seed: int) -> list[list]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(pairs), (max(sizes),), generator=generator).tolist()
    return [[pairs[k] for k in order[:n]] for n in sizes]


def _cut_apart(pairs: list, sizes: list[int], seed: int) -> list[list]:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [[pairs[k] for k in order[a : a + n]] for a, n in zip(starts, sizes, strict=True)]


def _kind_of_sets(sets: list[list]) -> str:
    """What matters of the choice: any random order may be the right one."""
    members = [set(map(tuple, chosen)) for chosen in sets]
    if any(len(own) < len(chosen) for own, chosen in zip(members, sets, strict=True)):
        return "a pair comes twice"
    if all(smaller <= larger for smaller, larger in pairwise(members)):
        first = max(max(pair) for pair in members[-1]) < 2 * len(members[-1])  # pairs are (0, 1), (2, 3), ...
        return "nested, the first of the list" if first else "nested, at random"
    return "not nested" if members[0] & members[1] else "apart"


def _pairs() -> list[tuple[list, list[int], int]]:
    pairs = [(2 * k, 2 * k + 1) for k in range(40)]
    return [(pairs, [5, 12, 30], 3), (pairs, [5, 12, 30], 4)]


# e2: drift
def drift(dice: Curve) -> tuple[int, float]:
    """The step of the best Dice, and how much of it is lost by the end."""
    best = max(range(len(dice)), key=lambda k: dice[k])
    return best, dice[best] - dice[-1]


def _since_start(dice: Curve) -> tuple[int, float]:
    return drift(dice)[0], dice[-1] - dice[0]


def _wrong_sign(dice: Curve) -> tuple[int, float]:
    return drift(dice)[0], dice[-1] - max(dice)


def _smallest(dice: Curve) -> tuple[int, float]:
    worst = min(range(len(dice)), key=lambda k: dice[k])
    return worst, dice[-1] - dice[worst]


def _counted_from_one(dice: Curve) -> tuple[int, float]:
    return drift(dice)[0] + 1, drift(dice)[1]


def _curves() -> list[tuple[Curve]]:
    return [([0.61, 0.74, 0.83, 0.86, 0.85, 0.81, 0.79],), ([0.50, 0.62, 0.55, 0.58],), ([0.4, 0.6, 0.7],)]


# e3: when to stop
def steps_taken(losses: Curve, patience: int, tolerance: float) -> int:
    """Steps until the loss has not fallen for ``patience`` of them."""
    reference, since = losses[0], 0
    for step, loss in enumerate(losses[1:], start=1):
        if loss < reference - tolerance * reference:
            reference, since = loss, 0
        else:
            since += 1
        if since == patience:
            return step
    return len(losses) - 1


def _against_the_last(losses: Curve, patience: int, tolerance: float) -> int:
    since = 0
    for step in range(1, len(losses)):
        since = 0 if losses[step] < losses[step - 1] - tolerance * losses[step - 1] else since + 1
        if since == patience:
            return step
    return len(losses) - 1


def _never_forgives(losses: Curve, patience: int, tolerance: float) -> int:
    reference, failed = losses[0], 0
    for step, loss in enumerate(losses[1:], start=1):
        if loss < reference - tolerance * reference:
            reference = loss
        else:
            failed += 1
        if failed == patience:
            return step
    return len(losses) - 1


def _absolute(losses: Curve, patience: int, tolerance: float) -> int:
    reference, since = losses[0], 0
    for step, loss in enumerate(losses[1:], start=1):
        if loss < reference - tolerance:
            reference, since = loss, 0
        else:
            since += 1
        if since == patience:
            return step
    return len(losses) - 1


def _reference_follows(losses: Curve, patience: int, tolerance: float) -> int:
    """The reference creeps down with every small fall, so that a slow fall never counts."""
    reference, since = losses[0], 0
    for step, loss in enumerate(losses[1:], start=1):
        since = 0 if loss < reference - tolerance * reference else since + 1
        reference = min(reference, loss)
        if since == patience:
            return step
    return len(losses) - 1


def _losses() -> list[tuple[Curve, int, float]]:
    bumpy = [1.0, 0.8, 0.83, 0.81, 0.78, 0.79, 0.76, 0.77, 0.775, 0.771, 0.772, 0.77]
    slow = [0.1 * 0.994**k for k in range(30)]
    fast = [1.0, 0.5, 0.25, 0.12]
    rebound = [1.0, 0.4, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45]
    return [(bumpy, 3, 0.02), (slow, 3, 0.01), (fast, 2, 0.01), (rebound, 3, 0.01)]


# e4: what several seeds allow one to say
def compare(a: list[float], b: list[float]) -> tuple[float, float, int]:
    """Mean and spread (n - 1) of the differences a - b, seed by seed, and in how many seeds a is larger."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / len(differences)
    spread = (sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)) ** 0.5
    return mean, spread, sum(d > 0 for d in differences)


def _population(a: list[float], b: list[float]) -> tuple[float, float, int]:
    mean, spread, larger = compare(a, b)
    return mean, spread * ((len(a) - 1) / len(a)) ** 0.5, larger


def _standard_error(a: list[float], b: list[float]) -> tuple[float, float, int]:
    mean, spread, larger = compare(a, b)
    return mean, spread / len(a) ** 0.5, larger


def _spread_of_a(a: list[float], b: list[float]) -> tuple[float, float, int]:
    return compare(a, b)[0], compare(a, [0.0] * len(a))[1], compare(a, b)[2]


def _other_way(a: list[float], b: list[float]) -> tuple[float, float, int]:
    return compare(b, a)


def _best_seeds(a: list[float], b: list[float]) -> tuple[float, float, int]:
    return max(a) - max(b), compare(a, b)[1], compare(a, b)[2]


def _by_seed() -> list[tuple[list[float], list[float]]]:
    return [([0.81, 0.74, 0.86], [0.79, 0.75, 0.80]), ([0.71, 0.66, 0.90, 0.78], [0.80, 0.61, 0.72, 0.70])]


EXERCISES = [
    Exercise(
        "e1",
        "training sets of several sizes",
        "o1",
        reference=nested_sets,
        cases=_pairs,
        observe=_kind_of_sets,
        hint="One random order of all pairs, made from the seed; each set is the beginning of that order.",
        mistakes=[
            Mistake(
                "drawn anew",
                _drawn_anew,
                "Your larger sets do not contain the smaller ones. Then two things change at once: how many pairs, and "
                "which.",
            ),
            Mistake(
                "not shuffled",
                _not_shuffled,
                "These are nested, but always the first pairs of the list. How would another seed give other pairs?",
            ),
            Mistake("with repeats", _with_repeats, "A pair comes twice in a set, so it has fewer pairs than it says."),
            Mistake(
                "cut apart",
                _cut_apart,
                "Your sets have no pair in common. The larger set should be the smaller one and more.",
            ),
        ],
    ),
    Exercise(
        "e2",
        "drift",
        "o3",
        reference=drift,
        cases=_curves,
        hint="Find the step at which Dice is largest. Then subtract what is left at the end.",
        mistakes=[
            Mistake(
                "since the start",
                _since_start,
                "That is what the whole refinement brought. Drift is what was won on the way, and lost again.",
            ),
            Mistake("wrong sign", _wrong_sign, "A loss of Dice should come out positive: best minus last."),
            Mistake("smallest", _smallest, "Dice is better when it is larger. You looked for the smallest one."),
            Mistake(
                "counted from one",
                _counted_from_one,
                "The first number of the curve is that before any step: step 0.",
            ),
        ],
    ),
    Exercise(
        "e3",
        "when to stop",
        "o3",
        reference=steps_taken,
        cases=_losses,
        hint="Keep two things: the loss at the last fall that counted, and how many steps ago that was.",
        mistakes=[
            Mistake(
                "against the step before",
                _against_the_last,
                "You compare with the step before. A loss that jumps up and comes down again then counts as falling. "
                "Compare with the last loss that counted as a fall.",
            ),
            Mistake(
                "failures are never forgiven",
                _never_forgives,
                "You add up all steps without a fall. Patience counts those *in a row*: a fall sets the count to 0.",
            ),
            Mistake(
                "absolute tolerance",
                _absolute,
                "The tolerance is a part of the loss, not an amount. A loss that has become small could never fall "
                "by that amount.",
            ),
            Mistake(
                "the reference creeps",
                _reference_follows,
                "Your reference goes down with falls that did not count. A slow but steady fall then never counts.",
            ),
        ],
    ),
    Exercise(
        "e4",
        "three seeds",
        "o5",
        reference=compare,
        cases=_by_seed,
        hint="Subtract seed by seed first. Then mean, standard deviation with n - 1, and count of the differences.",
        mistakes=[
            Mistake(
                "divided by n",
                _population,
                "Your spread divides by n. With three seeds that makes it a fifth too small; divide by n - 1.",
            ),
            Mistake(
                "standard error",
                _standard_error,
                "You divided by the root of n once more: that says how sure the *mean* is, not how much seeds differ.",
            ),
            Mistake(
                "spread of one method",
                _spread_of_a,
                "That is how much a varies by itself. Seeds that are hard for both cancel in the differences.",
            ),
            Mistake("b minus a", _other_way, "The sign is turned round: it should be a minus b."),
            Mistake(
                "best seeds",
                _best_seeds,
                "You compared the best seed of each. Nobody who trains once will know which seed that is.",
            ),
        ],
    ),
]
