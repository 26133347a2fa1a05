"""Keypoints: where an image can be recognised, and where its points are found again in another image.

`detection` chooses the points, `costs` compares what is about them with what is about their candidates, `agreement`
makes neighbours agree, and `matching` does it all and says how far each match can be trusted.
"""

from regteach.keypoints.agreement import mean_field, tree_marginals
from regteach.keypoints.costs import cost_volume, search_window, soft_argmin
from regteach.keypoints.detection import distinctiveness, farthest_points, foerstner, library_keypoints
from regteach.keypoints.matching import Matches, Search, find, forward_backward, match

__all__ = [
    "Matches",
    "Search",
    "cost_volume",
    "distinctiveness",
    "farthest_points",
    "find",
    "foerstner",
    "forward_backward",
    "library_keypoints",
    "match",
    "mean_field",
    "search_window",
    "soft_argmin",
    "tree_marginals",
]
