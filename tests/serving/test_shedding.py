"""Slots: bounded work, a bounded and fair queue, quick refusals, and nothing lost when requests are given up."""

import asyncio
import random
from contextlib import suppress

import pytest

from rag_serving.deadline import Deadline
from rag_serving.edge.shedding import Slots
from rag_serving.errors import LimitExceeded

LONG = Deadline.after(3600)


class Work:
    """Requests that hold a slot until they are told to end; `order` has their names as they got it."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.order: list[str] = []
        self.refused: list[str] = []
        self.refusals: list[LimitExceeded] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, who: str = "ann", deadline: Deadline = LONG) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(name, who, deadline))
        await settled()

    async def _run(self, name: str, who: str, deadline: Deadline) -> None:
        try:
            async with self.slots.held(who, deadline):
                self.order.append(name)
                await self._ends[name].wait()
        except LimitExceeded as error:
            self.refused.append(name)
            self.refusals.append(error)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await settled()

    async def give_up(self, name: str) -> None:
        self._tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self._tasks[name]
        await settled()

    async def end_all(self) -> None:
        for end in self._ends.values():
            end.set()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_no_more_than_the_limit_at_once():
    """Two slots, three requests: the third starts when one of the others ends, not before."""

    async def story() -> None:
        work = Work(Slots(2, 10))
        for name in "abc":
            await work.ask(name)
        assert (work.order, work.slots.running, work.slots.waiting) == (["a", "b"], 2, 1)
        await work.end("a")
        assert (work.order, work.slots.running, work.slots.waiting) == (["a", "b", "c"], 2, 0)
        await work.end_all()
        assert work.slots.running == 0

    asyncio.run(story())


def test_the_queue_is_bounded_by_number():
    """What does not fit into the queue is refused at once; those in it are served in order."""

    async def story() -> None:
        work = Work(Slots(1, 2))
        for name in "abcd":
            await work.ask(name)
        assert (work.refused, work.slots.waiting) == (["d"], 2)
        assert work.slots.refused["queue"] == 1
        assert [(error.code, error.retry_after >= 1) for error in work.refusals] == [("overloaded", True)]
        for name in "abc":
            await work.end(name)
        assert work.order == ["a", "b", "c"]

    asyncio.run(story())


def test_no_queue_at_all():
    """With a queue of 0 whatever finds no slot is refused."""

    async def story() -> None:
        work = Work(Slots(1, 0))
        await work.ask("a")
        await work.ask("b", "bob")
        assert (work.order, work.refused) == (["a"], ["b"])
        await work.end_all()

    asyncio.run(story())


def test_a_greedy_caller_does_not_hold_up_another():
    """With twenty requests of one caller waiting, another caller's first is the next to be served, and its second takes turns."""

    async def story() -> None:
        work = Work(Slots(1, 100))
        await work.ask("first", "greedy")
        for number in range(20):
            await work.ask(f"greedy{number}", "greedy")
        for number in range(2):
            await work.ask(f"ann{number}", "ann")
        await work.end("first")
        for _ in range(4):
            await work.end(work.order[-1])
        assert work.order[1:6] in (
            ["ann0", "greedy0", "ann1", "greedy1", "greedy2"],
            ["greedy0", "ann0", "greedy1", "ann1", "greedy2"],
        )
        await work.end_all()

    asyncio.run(story())


def test_the_next_slot_goes_to_who_holds_fewest():
    """A caller that holds no slot comes before one that holds three."""

    async def story() -> None:
        work = Work(Slots(3, 10))
        for name in "abc":
            await work.ask(name, "greedy")
        await work.ask("d", "greedy")
        await work.ask("e", "ann")
        await work.end("a")
        assert work.order[-1] == "e"
        await work.end_all()

    asyncio.run(story())


def test_a_full_queue_makes_room_for_a_caller_with_less():
    """When the queue is full of one caller's requests, its newest is refused for the first of another; but not for one more of its own."""

    async def story() -> None:
        work = Work(Slots(1, 3))
        for name in ("a", "b", "c", "d"):
            await work.ask(name, "greedy")
        await work.ask("e", "greedy")
        assert work.refused == ["e"]
        await work.ask("f", "ann")
        assert (work.refused, work.slots.waiting) == (["e", "d"], 3)
        await work.ask("g", "ann")
        assert work.refused == ["e", "d", "g"]
        await work.end_all()

    asyncio.run(story())


def test_waiting_ends_at_half_of_the_time_left():
    """A request that gets no slot in half of its time is refused while there is time to say so."""

    async def story() -> None:
        work = Work(Slots(1, 10))
        await work.ask("a")
        deadline = Deadline.after(1)
        await work.ask("b", deadline=deadline)
        await work._tasks["b"]
        assert (work.refused, work.slots.waiting) == (["b"], 0)
        assert not deadline.expired
        await work.end_all()

    asyncio.run(story())


def test_waiting_in_vain_is_refused_at_once():
    """Once it is known how long a slot is held, whoever would wait longer than half of its time is refused without waiting."""

    async def story() -> None:
        slots = Slots(1, 100)
        async with slots.held("ann", LONG):
            await asyncio.sleep(0.05)
        work = Work(slots)
        await work.ask("a")
        await work.ask("b", deadline=Deadline.after(0.05))
        assert (work.refused, slots.refused["deadline"]) == (["b"], 1)
        await work.ask("c")
        assert slots.waiting == 1
        assert slots.expected_wait("ann") > slots.expected_wait("bob") / 2 > 0
        await work.end_all()

    asyncio.run(story())


def test_the_limit_follows_the_machine():
    """A late event loop lowers the limit step by step, never below four; while all slots are taken and the loop is prompt, it rises again."""

    async def story() -> None:
        slots = Slots(16, 100)
        limits = []
        for _ in range(10):
            slots.pace(0.2)
            limits.append(slots.limit)
        assert limits[:3] == [12, 9, 7]
        assert limits[-1] == 4
        slots.pace(0.0)
        slots.pace(0.0)
        assert slots.limit == 4
        work = Work(slots)
        for number in range(7):
            await work.ask(f"{number}")
        assert (slots.running, slots.waiting) == (4, 3)
        for _ in range(30):
            slots.pace(0.0)
        assert (slots.limit, slots.running, slots.waiting) == (8, 7, 0)
        await work.end_all()
        assert Slots(2, 0).limit == 2

    asyncio.run(story())


def test_who_gives_up_leaves_no_trace():
    """A waiting request that is cancelled frees its place; one that is cancelled at the moment it got a slot gives it back."""

    async def story() -> None:
        work = Work(Slots(1, 10))
        for name in "abc":
            await work.ask(name)
        await work.give_up("b")
        assert work.slots.waiting == 1
        work._ends["a"].set()
        await asyncio.sleep(0)
        work._tasks["c"].cancel()
        await work.end_all()
        assert (work.slots.running, work.slots.waiting) == (0, 0)
        await work.ask("d")
        assert work.order[-1] == "d"
        await work.end_all()

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_in_any_order(seed):
    """Whatever comes, ends, gives up, fails or waits in vain: never more than the limit, and in the end no slot and no place is taken."""

    async def story() -> None:
        chance = random.Random(seed)  # noqa: S311 - drawn, not secret
        slots = Slots(chance.randint(1, 8), chance.randint(0, 6))
        most = 0

        async def request(who: str) -> str:
            nonlocal most
            try:
                async with slots.held(who, Deadline.after(chance.choice((0.002, 0.05, 60)))):
                    most = max(most, slots.running)
                    await asyncio.sleep(chance.random() * 0.004)
                    if chance.random() < 0.2:
                        raise RuntimeError(who)
            except LimitExceeded:
                return "refused"
            return "done"

        tasks = []
        for _ in range(150):
            tasks.append(asyncio.create_task(request(chance.choice("abc"))))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.1:
                slots.pace(chance.choice((0.0, 1.0)))
            await asyncio.sleep(chance.random() * 0.002)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert (slots.running, slots.waiting, slots._queues) == (0, 0, {})
        assert most <= slots.most
        assert "done" in outcomes
        async with slots.held("a", LONG):
            assert slots.running == 1

    asyncio.run(story())
