"""Which known name was meant: planted slips, among them those for which a ratio of similarity gives another answer."""

import difflib

import pytest

from regteach.checkpoints import available
from regteach.names import nearest
from regteach.recipes import RECIPES


@pytest.mark.parametrize("known", [available(), list(RECIPES)], ids=["weights", "recipes"])
@pytest.mark.parametrize(
    ("given", "begins"),
    [
        ("trees", "istn-trees-"),
        ("istn-trees", "istn-trees-"),
        ("istn-treees", "istn-trees-"),
        ("ISTN-Tree", "istn-trees-"),
        ("istn-brain", "istn-brains"),
        ("retina", "georeg-retina"),
        ("georeg-brains-t2t1", "georeg-brains-t1t2"),
        ("hippocampus", "istn-hippocampus"),
    ],
)
def test_what_was_meant_is_found(given: str, begins: str, known: list[str]) -> None:
    assert nearest(given, known).startswith(begins)


def test_a_ratio_alone_would_answer_otherwise() -> None:
    assert not difflib.get_close_matches("trees", available(), 1, 0.0)[0].startswith("istn-trees")


def test_of_equally_good_names_the_most_similar_is_taken() -> None:
    assert nearest("ncc", ["local_ncc", "ncc"]) == "ncc"
    assert nearest("zzz", ["a", "b"]) in ("a", "b")
