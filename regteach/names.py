"""Words for what went wrong: the known name that was probably meant, and what an error says first."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that has most of a wrong one in it, letters in their order; of several, the most similar.

    A plain ratio of similarity would punish long names: "trees" is a part of "istn-trees-affine-explicit", and yet
    has a better ratio with "istn-slices". Single letters that happen to agree do not count.

    Args:
        name: what was given.
        known: at least one name.
    """

    def shared(other: str) -> tuple[int, float]:
        matcher = SequenceMatcher(None, name.lower(), other.lower(), autojunk=False)
        runs = (block.size for block in matcher.get_matching_blocks())
        return sum(size for size in runs if size > 1), matcher.ratio()

    return max(known, key=shared)


def first_line(error: Exception) -> str:
    """What an error says first, as part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
