"""One computing request a round of the event loop."""

import asyncio

from rag_serving.loop_rounds import Rounds


class Clock:
    """Counts the rounds of the running loop."""

    def __init__(self) -> None:
        self.round = 0
        self._tick()

    def _tick(self):
        self.round += 1
        asyncio.get_running_loop().call_soon(self._tick)


def test_one_a_round_in_the_order_of_asking():
    """Of ten that are ready at once each computes in a round of its own, first come first served; the next round is nobody's."""

    async def run():
        rounds, clock, seen = Rounds(), Clock(), []

        async def one(number):
            await rounds.turn()
            seen.append((number, clock.round))

        await asyncio.gather(*(one(number) for number in range(10)))
        return seen

    seen = asyncio.run(run())
    assert [number for number, _ in seen] == list(range(10))
    taken = [at for _, at in seen]
    assert taken == sorted(set(taken))


def test_alone_nobody_waits():
    """A turn that nobody else has is had at once."""

    async def run():
        rounds, clock = Rounds(), Clock()
        before = clock.round
        await rounds.turn()
        assert clock.round == before
        await asyncio.sleep(0.01)
        before = clock.round
        await rounds.turn()
        assert clock.round == before

    asyncio.run(run())


def test_who_leaves_passes_the_turn_on():
    """Whoever is cancelled while waiting, or in the moment of being woken, holds up nobody behind."""

    async def run(rest):
        rounds, seen = Rounds(), []

        async def one(number):
            await rounds.turn()
            seen.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(4)]
        for _ in range(rest):
            await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks, timeout=5)
        assert all(task.done() for task in tasks)
        return seen

    for rest in range(6):
        seen = asyncio.run(run(rest))
        assert [number for number in seen if number != 1] == [0, 2, 3], rest
