"""Which names of the package a notebook uses, and whether the lesson that teaches them has come.

"Built, then imported": a lesson imports a function only once it, or a lesson before it, has built the idea. The lists
are the `teaches` of the lessons' texts; an entry is a name (`regteach.sampling.warp`) or a module
(`regteach.metrics` or `regteach.metrics.*`).
"""

import ast
from collections.abc import Iterable, Mapping

import regteach
from regteach.course.layout import Course
from regteach.lessons import available, load

FREE = ("regteach.lesson", "regteach.plotting", "regteach.widgets", "regteach.data", "regteach.Lesson")


def complaints(course: Course, notebooks: Mapping[str, Iterable[ast.Module]]) -> list[str]:
    """Say which notebooks use a name too early.

    Args:
        course: where the lessons' texts are.
        notebooks: the syntax trees of each notebook's cells, by its name; the name begins with the lesson's number.

    Returns:
        One sentence a name.
    """
    taught: dict[str, str] = {}
    for number in available(course.lesson_texts):
        for name in load(number, course.lesson_texts).teaches:
            taught.setdefault(name.removesuffix(".*"), number)
    found = []
    for notebook, trees in notebooks.items():
        for name in sorted(used_names(trees)):
            lesson = min((number for known, number in taught.items() if _covers(known, name)), default=None)
            if lesson is None:
                found.append(f"{notebook} uses {name}, which no lesson teaches")
            elif lesson > notebook[:2]:
                found.append(f"{notebook} uses {name}, which lesson {lesson} teaches")
    return found


def used_names(trees: Iterable[ast.Module]) -> set[str]:
    """The package's names that a notebook imports or reaches through a module, the lesson's machinery left out."""
    trees, modules, names = list(trees), dict[str, str](), set[str]()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "regteach":
                    modules[alias.asname or "regteach"] = alias.name if alias.asname else "regteach"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "regteach":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if node.module == "regteach" and alias.name not in regteach._HOME:
                    modules[alias.asname or alias.name] = full
                else:
                    names.add(full)
    for tree in trees:
        _Reached(modules, names).visit(tree)
    homes = {f"regteach.{name}": f"regteach.{module}.{name}" for name, module in regteach._HOME.items()}
    full_names = {
        next((home + name[len(known) :] for known, home in homes.items() if _covers(known, name)), name)
        for name in names
    }
    return {name for name in full_names if not any(_covers(free, name) for free in FREE)}


class _Reached(ast.NodeVisitor):
    """Collects `module.name...` for the modules that were imported."""

    def __init__(self, modules: Mapping[str, str], names: set[str]) -> None:
        self.modules, self.names = modules, names

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            parts, inner = [inner.attr, *parts], inner.value
        if isinstance(inner, ast.Name) and inner.id in self.modules:
            self.names.add(".".join([self.modules[inner.id], *parts]))
        else:
            self.visit(inner)


def _covers(known: str, name: str) -> bool:
    return known == name or name.startswith(f"{known}.")
