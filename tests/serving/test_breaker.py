"""The breaker and the budget: what they let through, on a clock of the test's own."""

from hypothesis import given
from hypothesis import strategies as st

from rag_serving.breaker import Breaker, Budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(failures=5, window_seconds=10, open_seconds=5, clock=clock), clock


def fail(subject: Breaker, times: int = 1) -> None:
    for _ in range(times):
        given = subject.enter()
        assert given is not None
        subject.failed(given)


def test_five_failures_within_the_window_open_it():
    """The fifth failure in ten seconds opens it, and nothing passes then."""
    subject, clock = breaker()
    for _ in range(4):
        fail(subject)
        clock.now += 2.4
    assert subject.state == "closed"
    fail(subject)
    assert (subject.state, subject.opened) == ("open", 1)
    assert subject.enter() is None
    assert subject.retry_seconds == 5


def test_rare_failures_do_not_open_it():
    """Failures further apart than the window never open it, however many there are, and successes between them do not hide frequent ones."""
    subject, clock = breaker()
    for _ in range(50):
        fail(subject)
        clock.now += 2.6
    assert subject.state == "closed"
    clock.now += 20
    for _ in range(5):
        subject.succeeded(subject.enter() or 0)
        fail(subject)
    assert subject.state == "open"


def test_one_probe_decides():
    """After the pause exactly one call passes; its failure opens it for another pause, its success closes it."""
    subject, clock = breaker()
    fail(subject, 5)
    clock.now += 5
    assert subject.state == "half_open"
    probe = subject.enter()
    assert probe is not None
    assert subject.enter() is None
    subject.failed(probe)
    assert (subject.state, subject.enter()) == ("open", None)
    clock.now += 5
    probe = subject.enter()
    assert probe is not None
    subject.succeeded(probe)
    assert subject.state == "closed"
    fail(subject, 4)
    assert subject.state == "closed"


def test_an_abandoned_probe_leaves_room_for_the_next():
    """A probe whose caller gave up does not keep the breaker half open for ever."""
    subject, clock = breaker()
    fail(subject, 5)
    clock.now += 5
    probe = subject.enter()
    assert probe is not None
    subject.abandoned(probe)
    assert subject.enter() is not None


def test_late_news_from_before_do_not_count():
    """Calls that began before it opened neither close it nor take the probe's place when they end."""
    subject, clock = breaker()
    early = [subject.enter() for _ in range(3)]
    fail(subject, 5)
    assert None not in early
    subject.succeeded(early[0] or 0)
    assert subject.state == "open"
    clock.now += 5
    probe = subject.enter()
    assert probe is not None
    subject.failed(early[1] or 0)
    subject.abandoned(early[2] or 0)
    assert subject.enter() is None
    subject.succeeded(probe)
    assert subject.state == "closed"


@given(st.lists(st.sampled_from(["call", "fail", "probe_late", "wait"]), max_size=80))
def test_it_never_stays_shut(steps):
    """Whatever happened, once the dependency works again a call made after the pause closes it."""
    subject, clock = breaker()
    held = None
    for step in steps:
        if step == "wait":
            clock.now += 3
        elif step == "probe_late" and held is not None:
            subject.abandoned(held)
            held = None
        elif (taken := subject.enter()) is not None:
            if step == "fail":
                subject.failed(taken)
            elif held is None:
                held = taken
            else:
                subject.succeeded(taken)
    if held is not None:
        subject.abandoned(held)
    clock.now += 6
    taken = subject.enter()
    assert taken is not None
    subject.succeeded(taken)
    assert subject.state == "closed"


@given(st.lists(st.booleans(), max_size=400), st.sampled_from([0.05, 0.1]))
def test_a_budget_keeps_its_share(asks, share):
    """Over any history, extra requests are at most one more than their share of the ordinary ones."""
    budget = Budget(share)
    ordinary = extra = 0
    for ask in asks:
        ordinary += 1
        budget.earn()
        extra += ask and budget.spend()
    assert extra <= share * ordinary + 1


def test_savings_are_bounded_and_nothing_is_nothing():
    """A long quiet time does not save up a burst beyond ten; a share of nothing allows nothing, not even the first."""
    budget = Budget(0.1)
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10
    assert not Budget(0.0).spend()
