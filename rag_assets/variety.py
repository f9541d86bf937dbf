"""How varied an evaluation's results are, and what share of that was lost since earlier evaluations."""

from collections.abc import Callable, Mapping

from rag_assets.evaluation import Evaluation

AT_RELEASE, BEFORE = "_at_release", "_before"  # ends of the names of numbers that were measured then
DIVERSITY = ("distinct_documents", "intra_list_similarity", "hubness")
_MEASURES: tuple[tuple[str, Callable[[float], float], str], ...] = (  # what falls when results become one thing, and how a fall is told
    ("distinct_documents", lambda value: value, "name {:.0%} fewer distinct documents"),
    ("intra_list_similarity", lambda value: 1 - value, "have passages that differ {:.0%} less"),
)


def varied(evaluation: Evaluation, when: str) -> dict[str, float]:
    """How varied an evaluation's results were, under names that end in `when`."""
    return {f"{name}{when}": value for name, value in evaluation.metrics.items() if name.startswith(DIVERSITY)}


def lost_variety(numbers: Mapping[str, float]) -> list[tuple[float, str]]:
    """What share of the variety of results is lost since the release and since the release before, as far as known, and in words."""
    lost = []
    for start, of_value, words in _MEASURES:
        found = {name: of_value(value) for name, value in numbers.items() if name.startswith(start)}
        now = next((value for name, value in found.items() if not name.endswith((AT_RELEASE, BEFORE))), None)
        for when, since in ((AT_RELEASE, "at the release"), (BEFORE, "in the release before")):
            then = next((value for name, value in found.items() if name.endswith(when)), None)
            if now is not None and then:
                lost.append((1 - now / then, f"{words.format(1 - now / then)} than {since}"))
    return lost
