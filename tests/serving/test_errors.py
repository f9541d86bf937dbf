"""The error tree: what its docstring shows is what the classes are."""

import inspect
import re

import pytest

from rag_serving import errors
from rag_serving.errors import RaglineError, StoreError

CLASSES = {name: each for name, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, RaglineError)}
BRANCH = re.compile(r"^(?P<indent>[│ ]*)(?:├── |└── )?(?P<name>[A-Z]\w+)")


def drawn_parents() -> dict[str, str | None]:
    """Class name -> name of its parent, from the indentation of the drawn tree."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    tree = (errors.__doc__ or "").split("\n\n")[1]
    for line in tree.splitlines():
        match = BRANCH.match(line)
        assert match, line
        depth = match.start("name")
        path = [(at, name) for at, name in path if at < depth]
        parents[match["name"]] = path[-1][1] if path else None
        path.append((depth, match["name"]))
    return parents


def test_tree_is_the_classes():
    """Every class is drawn once, under the class it derives from, and nothing else is drawn."""
    real = {name: each.__bases__[0].__name__ if each is not RaglineError else None for name, each in CLASSES.items()}
    assert drawn_parents() == real


def test_codes_are_unique():
    """Each class declares its own code, which no other has, so a reply or log line names one cause."""
    assert all("code" in vars(each) for each in CLASSES.values())
    assert len({each.code for each in CLASSES.values()}) == len(CLASSES)
    assert all(re.fullmatch(r"[a-z_]+", each.code) for each in CLASSES.values())


@pytest.mark.parametrize(("fix", "text"), [("Do this.", "It broke. Do this."), ("", "It broke.")])
def test_message_ends_in_the_fix(fix, text):
    """An error's text is what happened and then what to do; both parts stay readable on their own."""
    error = StoreError("It broke.", fix=fix)
    assert (str(error), error.what, error.fix) == (text, "It broke.", fix)
