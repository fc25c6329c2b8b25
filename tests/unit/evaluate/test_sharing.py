"""Crews of several members in one process: who gets what, who counts as dead and when, and whose error it is."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sft.evaluate import sharing
from sft.evaluate.sharing import NOBODY, Crew
from sft.evaluate.units import Share, Task, units_of
from sft.utils.errors import UsageError, UserError


@pytest.fixture
def crews(tmp_path: Path) -> Iterator[list[Crew]]:
    """Three members; what they think of each other is of this moment."""
    members = [Crew(tmp_path / "shared", rank, range(3)) for rank in range(3)]
    for member in members:
        member.__enter__()
    look(members)
    yield members
    for member in members:
        die(member)


def look(members: list[Crew]) -> None:
    for member in members:
        member._tell()
    for member in members:
        member.look()


def die(member: Crew) -> None:
    """As a killed process does: no signs of life, and the lock is free."""
    member._over.set()
    member._thread.join(timeout=10)
    member._held.close()


def tasks(*samples: int) -> list[Task]:
    """So many samples of problem 0, 1, ..."""
    places = [(problem, sample) for problem, count in enumerate(samples) for sample in range(count)]
    return [Task(number, *place) for number, place in enumerate(places)]


# ---- claims ----


def test_one_of_all_gets_a_claim(crews: list[Crew]) -> None:
    got: dict[int, list[str]] = {0: [], 1: [], 2: []}

    def grab(rank: int) -> None:
        got[rank] = [name for name in map(str, range(200)) if crews[rank].take(name)]

    threads = [threading.Thread(target=grab, args=(rank,)) for rank in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted((name for names in got.values() for name in names), key=int) == list(map(str, range(200)))
    assert all(crews[0].owner(name) == rank for rank, names in got.items() for name in names)
    assert crews[0].owner("200") is None


def test_one_alone_writes_nothing(tmp_path: Path) -> None:
    with Crew(tmp_path / "shared", 0, [0]) as crew:
        assert crew.take("0") and crew.leads()
        crew.finish("a", 3)
        crew.count("a", 1, True)
        crew.count("a", 1, False)
        assert crew.finished("a") == {3} and crew.counts("a") == [2, 1] and crew.counts("b") == []
        crew.end({"a": 1})
    assert crew.results == {"a": 1} and list(tmp_path.iterdir()) == []


def test_what_is_finished_and_counted_is_told(crews: list[Crew]) -> None:
    for rank, crew in enumerate(crews):
        crew.finish("a", rank)
        crew.count("a", 1, rank)
    look(crews)
    assert all(crew.finished("a") == {0, 1, 2} and crew.counts("a") == [3, 3] for crew in crews)


# ---- who is there ----


def test_on_one_machine_a_death_is_seen_at_once(crews: list[Crew]) -> None:
    assert [crew.lost for crew in crews] == [set()] * 3 and [crew.leads() for crew in crews] == [True, False, False]
    die(crews[0])
    look(crews[1:])
    assert crews[1].lost == crews[2].lost == {0}
    assert crews[1].leads() and not crews[2].leads()


@pytest.mark.parametrize("why", ["another machine", "no locks"])
def test_elsewhere_silence_is_what_tells(crews: list[Crew], why: str) -> None:
    crews[0]._state |= {"machine": "another"} if why == "another machine" else {"locked": False}
    look(crews)
    die(crews[0])
    look(crews[1:])
    assert crews[1].lost == set()
    crews[1].others[0].beat -= sharing.LOST - 10
    look(crews[1:])
    assert crews[1].lost == set()
    crews[1].others[0].beat -= 20
    look(crews[1:])
    assert crews[1].lost == {0} and crews[2].lost == set()
    crews[0]._tell()  # it was only slow
    look(crews[1:])
    assert crews[1].lost == set()


def test_one_that_lives_but_gets_nowhere_is_lost(crews: list[Crew]) -> None:
    crews[1].others[0].step -= sharing.STUCK + 1
    look(crews)
    assert crews[1].lost == {0}
    crews[0].step()
    look(crews)
    assert crews[1].lost == set()


def test_a_sign_that_is_being_written_is_read_the_next_time(crews: list[Crew]) -> None:
    crews[0].finish("a", 1)
    look(crews)
    path = crews[0]._told_by(0)
    with crews[0]._writing:
        path.write_text(path.read_text()[:40])
        crews[1].look()
    assert crews[1].finished("a") == {1} and crews[1].lost == set()


def test_signs_of_life_are_given_while_the_process_computes(crews: list[Crew]) -> None:
    beat, deadline = crews[1].others[0].state["beat"], time.monotonic() + 60
    while crews[1].others[0].state["beat"] < beat + 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        crews[1].look()


# ---- the end ----


def test_all_get_the_results_and_leave_nothing(tmp_path: Path) -> None:
    found: dict[int, object] = {}

    def work(rank: int) -> None:
        with Crew(tmp_path / "shared", rank, range(3)) as crew:
            while crew.results is None:
                crew.end({"a": 1}) if crew.leads() and crew.looks > 2 else crew.pause()
            found[rank] = crew.results

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {rank: {"a": 1} for rank in range(3)} and list(tmp_path.iterdir()) == []


def test_the_end_says_who_was_lost_and_one_of_them_that_lives_stops(crews: list[Crew]) -> None:
    crews[0].lost = {1}
    crews[0].end({"a": 1})
    crews[2].look()
    assert crews[2].results == {"a": 1} and crews[2].lost == {1}
    with pytest.raises(UserError, match="Rank 1 wasn't heard of"):
        crews[1].look()


def test_one_that_comes_after_the_end_stops(crews: list[Crew]) -> None:
    import shutil

    die(crews[1])
    shutil.rmtree(crews[0].folder)
    with pytest.raises(UserError, match="Rank 1 wasn't heard of"):
        crews[1].pause()


@pytest.mark.parametrize(
    ("error", "kind", "text", "code"),
    [
        (UserError("logits"), UserError, "logits", 1),
        (UsageError("recipe"), UserError, "recipe", 2),
        (RuntimeError("odd\nmore"), UserError, "RuntimeError: odd (run", 1),
        (KeyboardInterrupt(), KeyboardInterrupt, "", 1),
    ],
)
def test_the_first_error_is_everyone_s(
    crews: list[Crew], error: BaseException, kind: type[BaseException], text: str, code: int
) -> None:
    crews[1].__exit__(type(error), error, None)
    with pytest.raises(kind) as seen:
        crews[0].look()
    assert text in str(seen.value) and seen.value.__dict__ == {"exit_code": code, "from_rank": 1}
    crews[0].__exit__(kind, seen.value, None)
    with pytest.raises(kind) as later:
        crews[2].__exit__(UserError, UserError("a later one"), None)
    assert later.value.__dict__ == {"exit_code": code, "from_rank": 1}


# ---- units ----


def test_a_prompt_s_samples_stay_together_while_there_are_prompts_for_all() -> None:
    made = tasks(*[8] * 20)
    for processes in (1, 2, 5):
        units = units_of(made, list(range(20)), processes)
        assert [unit[0].problem for unit in units] == list(range(19, -1, -1))
        assert [len({task.problem for task in unit}) for unit in units] == [1] * 20


@pytest.mark.parametrize(("problems", "each", "processes"), [(1, 64, 4), (3, 8, 4), (2, 3, 16), (30, 64, 64)])
def test_few_prompts_are_split_so_that_all_have_something(problems: int, each: int, processes: int) -> None:
    made = tasks(*[each] * problems)
    units = units_of(made, [5] * problems, processes)
    assert len(units) >= min(processes, problems * each)
    assert sorted((task for unit in units for task in unit), key=lambda task: task.number) == made
    assert all(len({task.problem for task in unit}) == 1 for unit in units)


def shares(crews: list[Crew], made: list[Task], recorded: set[tuple[int, int]]) -> list[Share]:
    units = units_of(made, [3] * len(made), len(crews))
    return [Share(crew, "a", units, lambda: recorded) for crew in crews]


@pytest.mark.parametrize("seed", range(4))
def test_every_task_is_made_once_and_each_has_its_part(crews: list[Crew], seed: int) -> None:
    choose, recorded = random.Random(seed), set()
    made = tasks(*[choose.randint(1, 4) for _ in range(40)])
    members = shares(crews, made, recorded)
    busy: list[list[Task]] = [[], [], []]
    done: list[Task] = []
    busy[0] += members[0].claim(1000)
    assert 0 < len(busy[0]) < len(made) / 2  # the others have yet to come
    while len(done) < len(made):
        rank = choose.randrange(3)
        if busy[rank] and choose.random() < 0.7:
            task = busy[rank].pop(choose.randrange(len(busy[rank])))
            members[rank].made()
            members[rank].record(task, lambda: None)
            done.append(task)
        else:
            busy[rank] += members[rank].claim(choose.randint(0, 8))
    look(crews)
    assert sorted(done, key=lambda task: task.number) == made and all(member.is_done() for member in members)
    assert all(member.claim(8) == [] for member in members)


def test_a_unit_is_done_when_it_is_secured(crews: list[Crew]) -> None:
    share = shares(crews, tasks(2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2), set())[0]
    order: list[str] = []
    found = share.claim(2)
    share.record(found[0], lambda: order.append("early"))
    assert order == [] and crews[0].finished("a") == set()
    share.record(found[1], lambda: order.append(f"secured, {crews[0].finished('a')}"))
    assert order == ["secured, set()"] and crews[0].finished("a") == {0}


def make_all(*members: Share) -> list[Task]:
    """What these members make in turn until nothing is left for them."""
    made: list[Task] = []
    while found := [(share, task) for share in members for task in share.claim(2)]:
        for share, task in found:
            share.made()
            share.record(task, lambda: None)
            made.append(task)
    return made


def test_of_a_dead_one_s_units_what_isn_t_recorded_is_made_by_one_other(crews: list[Crew]) -> None:
    recorded: set[tuple[int, int]] = set()
    made = tasks(*[3] * 12)
    first, second, third = shares(crews, made, recorded)
    lost = first.claim(6)
    recorded |= {(task.problem, task.sample) for task in lost[:4]}
    rest = make_all(second, third)
    assert sorted([*lost, *rest], key=lambda task: task.number) == made  # nothing of the living is taken from them
    look(crews)
    assert not second.is_done()
    die(crews[0])
    look(crews[1:])
    assert second.claim(0) == []
    again = second.claim(5)
    assert again == lost[4:] and third.claim(5) == []
    for task in again:
        second.made()
        second.record(task, lambda: None)
    look(crews[1:])
    assert second.claim(5) == [] and second.is_done() and third.is_done()


def test_what_a_dead_one_took_over_or_was_just_taking_is_taken_over_too(crews: list[Crew]) -> None:
    made = tasks(*[1] * 12)
    first, second, third = shares(crews, made, set())
    lost = first.claim(1)
    assert len(make_all(second, third)) == len(made) - 1
    die(crews[0])
    look(crews[1:])
    assert second.claim(1) == lost
    die(crews[1])
    (crews[2].folder / "claims" / "a.0.2").touch()  # another was killed between making it and writing its number
    assert crews[2].owner("a.0.2") == NOBODY
    look(crews[2:])
    assert third.claim(1) == lost and crews[2].owner("a.0.3") == 2


def test_members_that_were_lost_before_are_none(tmp_path: Path) -> None:
    with ExitStack() as stack:
        crew = stack.enter_context(Crew(tmp_path / "shared", 1, [1]))
        assert crew.leads() and crew.take("x")
        crew.end({})
