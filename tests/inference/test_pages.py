"""Pages and the scheduler, without a model: nothing lost, nothing owned twice, everyone reads what it should."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.base.errors import SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.inference.executor import PAGE
from steelyard.inference.pages import Pages, page_keys
from steelyard.inference.scheduler import Generation, Plan, Scheduler


@given(st.integers(2, 12), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10)), max_size=80))
@settings(max_examples=60, deadline=None)
def test_no_page_is_lost_or_owned_twice(count: int, calls: list[tuple[int, int]]) -> None:
    pages, held = Pages(count), list[list[int]]()
    for call, number in calls:
        if call == 0 and number <= pages.available:
            taken = pages.take(number)
            assert len(set(taken)) == number
            assert not set(taken) & {page for other in held for page in other}
            held.append(taken)
        elif call == 1 and held:
            pages.release(held.pop(number % len(held)))
        elif call == 2 and held and held[number % len(held)]:
            page = held[number % len(held)][0]
            pages.publish(bytes([number]), page)
        elif call == 3:
            found = pages.find([bytes([number])])
            pages.hold(found)
            held.append(found)
        elif call == 4 and held:
            again = held[number % len(held)]
            pages.hold(again)
            held.append(list(again))
        owned = {page for other in held for page in other}
        assert 0 not in owned
        assert len(owned) + pages.available == count - 1
        for page in owned:
            assert pages.holders[page] == sum(other.count(page) for other in held)
    for other in held:
        pages.release(other)
    assert pages.available == count - 1
    pages.forget()
    assert sorted(pages.take(count - 1)) == list(range(1, count))
    with pytest.raises(ValueError, match="1 pages asked for, 0 there"):
        pages.take(1)


def test_a_prefix_outlives_what_follows_it_and_the_oldest_goes_first() -> None:
    pages = Pages(5)
    first = pages.take(3)
    keys = page_keys(list(range(3 * PAGE)))
    for key, page in zip(keys, first, strict=True):
        pages.publish(key, page)
    pages.release(first)
    assert pages.find(keys) == first
    assert pages.available == 4
    pages.take(2)  # the one never used, then the prefix's tail
    assert pages.find(keys) == first[:2]
    with pytest.raises(ValueError, match="held by nobody"):
        pages.release([first[0]])


def test_keys_are_of_everything_before() -> None:
    tokens = list(range(5 * PAGE + 3))
    keys = page_keys(tokens)
    assert len(set(keys)) == len(keys) == 5
    assert page_keys(tokens[: 2 * PAGE]) == keys[:2]
    changed = page_keys([tokens[0] + 1, *tokens[1:]])
    assert not set(keys) & set(changed)


class Memory:
    """What the executor would hold: the token in every slot of every page."""

    def __init__(self, count: int) -> None:
        self.slots = [[-1] * PAGE for _ in range(count)]

    def write(self, table: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        for place, token in enumerate(tokens, start):
            self.slots[table[place // PAGE]][place % PAGE] = token

    def seen(self, table: Sequence[int], length: int) -> list[int]:
        return [token for page in table for token in self.slots[page]][:length]


def serve(schedule: Scheduler, memory: Memory, pick: random.Random, limit: int) -> tuple[int, list[int]]:
    """One step as the engine does it, with made-up tokens. Returns tokens read, and the rows of the batch."""

    def begin(plan: Plan) -> None:
        for source, target in plan.copies:
            memory.slots[target] = list(memory.slots[source])
        for generation, logits in plan.started:
            assert logits == generation.prompt
            write(generation)

    def write(generation: Generation) -> None:
        generation.tokens.append(pick.randrange(1000))
        if len(generation.tokens) == generation.sampling.max_tokens or pick.random() < 0.05:
            generation.finish = "stop"
            schedule.remove(generation)

    rows = list(schedule.running)
    for generation in rows:
        page = generation.table[generation.cached // PAGE]
        assert schedule.pages.holders[page] == 1  # nobody else reads what is about to be written
        memory.write(generation.table, generation.cached, generation.tokens[-1:])
        assert memory.seen(generation.table, generation.cached + 1) == [*generation.prompt, *generation.tokens]
    for generation in rows:
        write(generation)
    plan = schedule.plan()
    begin(plan)
    for part in plan.parts:
        reader = part.reader
        assert memory.seen(reader.table, part.start) == reader.prompt[: part.start]
        memory.write(reader.table, part.start, reader.prompt[part.start : part.stop])
    for part in plan.parts:
        begin(schedule.read(part, part.reader.prompt if part.last else None))
    assert len(schedule.running) + len(schedule.reading) <= schedule.rows
    read = sum(part.stop - part.start for part in plan.parts)
    assert read <= limit
    return read, [id(generation) for generation in rows]


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_row_reads_its_own_text_whatever_is_shared_cancelled_or_short(seed: int) -> None:
    pick = random.Random(seed)
    pages, rows, part = Pages(pick.randint(12, 40)), pick.randint(1, 6), PAGE * pick.randint(1, 8)
    schedule, memory = Scheduler(pages, rows, 1000, part), Memory(pages.count)
    heads = [[pick.randrange(1000) for _ in range(pick.randint(0, 5 * PAGE))] for _ in range(3)]
    all_of_them: list[Generation] = []
    for i in range(pick.randint(1, 25)):
        prompt = [*pick.choice(heads), *([] if pick.random() < 0.5 else [pick.randrange(1000)] * pick.randint(1, 20))]
        prompt = prompt or [7]
        room = (pages.count - 1) * PAGE - len(prompt)
        generation = Generation(str(i), prompt, Sampling(max_tokens=min(pick.randint(1, 40), room)), 0)
        all_of_them.append(generation)
        schedule.add(generation)
    for _ in range(3000):
        if schedule.idle:
            break
        serve(schedule, memory, pick, part)
        if pick.random() < 0.05:
            victim = pick.choice(all_of_them)
            if not victim.done:
                schedule.remove(victim)
                victim.finish = "stop"
    assert schedule.idle
    assert all(generation.done for generation in all_of_them)
    assert pages.available == pages.count - 1  # all given back


def test_samples_of_one_prompt_are_read_once_even_when_they_cannot_all_run_at_once() -> None:
    pages = Pages(200)
    schedule, memory, pick = Scheduler(pages, 4, 100, 4096), Memory(200), random.Random(1)
    for number in range(3):
        for i in range(7):
            schedule.add(Generation(f"{number}/{i}", [number] * 20, Sampling(max_tokens=9), i))
    read = 0
    while not schedule.idle:
        read += serve(schedule, memory, pick, 4096)[0]
    assert read == 3 * 20


def test_a_common_header_is_read_once_when_all_arrive_together() -> None:
    schedule, memory, pick = Scheduler(Pages(500), 16, 100, 4096), Memory(500), random.Random(1)
    header = list(range(10 * PAGE))
    for i in range(16):
        schedule.add(Generation(str(i), [*header, 5000 + i, 7], Sampling(max_tokens=4), i))
    read = [serve(schedule, memory, pick, 4096)[0] for _ in range(3)]
    assert read == [len(header) + 2, 15 * 2, 0]


def test_long_prompts_are_read_in_parts_while_others_write() -> None:
    schedule, memory, pick = Scheduler(Pages(500), 16, 100, 64), Memory(500), random.Random(2)
    schedule.add(Generation("short", [1, 2, 3], Sampling(max_tokens=30), 0))
    schedule.add(Generation("long", list(range(200)), Sampling(max_tokens=3), 0))
    read, batches = zip(*(serve(schedule, memory, pick, 64) for _ in range(5)), strict=True)
    assert read == (51, 64, 64, 24, 0)  # 3 + 48, whole pages
    assert [len(rows) for rows in batches] == [0, 1, 1, 1, 2]


def test_a_request_that_does_not_fit_now_is_not_overtaken() -> None:
    schedule, memory, pick = Scheduler(Pages(11), 16, 100, 4096), Memory(11), random.Random(4)
    names = []
    for i, length in enumerate((60, 130, 20)):  # 4, 9 and 2 of 10 pages
        schedule.add(Generation(str(i), [i] * length, Sampling(max_tokens=3), 0))
    while not schedule.idle:
        serve(schedule, memory, pick, 4096)
        names.append([generation.name for generation in schedule.running])
    assert ["0"] in names
    assert not any("2" in rows and "0" in rows for rows in names)


def test_the_queue_is_bounded() -> None:
    schedule = Scheduler(Pages(11), 1, 2, 4096)
    for name in "ab":
        schedule.add(Generation(name, [1], Sampling(), 0))
    with pytest.raises(SteelyardError, match=r"request c: the queue is full \(2 requests wait\)"):
        schedule.add(Generation("c", [1], Sampling(), 0))
    schedule.clear()
    assert schedule.idle
    schedule.add(Generation("c", [1], Sampling(), 0))
