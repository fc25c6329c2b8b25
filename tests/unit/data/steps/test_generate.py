"""The step `generate`, rollouts: what becomes of answers, of failures, and of a run that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows
from teacher_server import Fault, Seen, TeacherServer, answer_to, serving

from sft.data.read.outcomes import Dropped, Outcome, Replaced
from sft.data.read.record import Record
from sft.data.steps import step_class
from sft.data.steps.context import Context
from sft.data.steps.generate.step import Generate
from sft.recipe.schema import Templates
from sft.utils.errors import UserError


@pytest.fixture
def place(tmp_path: Path) -> Context:
    return context(tmp_path / "step", tokenizer="tiny", seed=3)


def endpoint(server: TeacherServer, **settings: Any) -> dict[str, Any]:
    return {"base_url": server.base_url, "model": "toy", "concurrency": 8, "retry_delay": 0.02, **settings}


def problems(count: int) -> list[Record]:
    return [record(f"What is {i}+1?", None, id=f"p{i}") for i in range(count)]


def ask(server: TeacherServer, place: Context, rows: list[Record], **settings: Any) -> list[Outcome]:
    teacher = endpoint(server, **settings.pop("teacher", {}))
    return run_rows("generate", rows, place, teacher=teacher, **settings)


def only(outcomes: list[Outcome]) -> Record | Dropped:
    """The only row made of the only row."""
    (outcome,) = outcomes
    assert isinstance(outcome, Replaced)
    (made,) = outcome.kept or outcome.dropped
    return made


def journal_of(folder: Path) -> Path:
    """The only file of the only journal."""
    (path,) = folder.glob("answers-*/answers-*.jsonl")
    return path


def usage(place: Context) -> dict[str, Any]:
    return json.loads((place.folder / "usage.json").read_text())


# What is asked, and what is made of the answers


def test_each_problem_is_asked_n_times_and_each_answer_is_a_row(server: TeacherServer, place: Context) -> None:
    rows = problems(5)
    rows[0].facts["quality"] = {"seen": 1}
    outcomes = ask(server, place, rows, n=3)
    assert [outcome.record.id for outcome in outcomes] == ["p0", "p1", "p2", "p3", "p4"]
    for row, outcome in zip(rows, outcomes, strict=True):
        assert isinstance(outcome, Replaced) and not outcome.dropped
        assert [made.id for made in outcome.kept] == [f"{row.id}#g{k}" for k in range(3)]
        for made in outcome.kept:
            facts = made.facts["generate"]
            said = answer_to(Seen("/v1/chat/completions", _body(row, facts["seed"]), None, 0.0))["content"]
            assert made.messages == [
                {"role": "user", "content": row.problem},
                {"role": "assistant", "content": said},
            ]
            assert (facts["finish_reason"], facts["model"], facts["prompt_tokens"]) == ("stop", "toy-teacher", 3)
            assert facts["completion_tokens"] == len(said.split())
            assert made.problem_id == row.problem_id and made.tokens and made.trained and made.trained < made.tokens
        assert len({made.completion for made in outcome.kept}) == 3, "each rollout has a seed of its own"
    assert outcomes[0].kept[0].facts["quality"] == {"seen": 1}
    assert rows[0].messages is None, "the problem itself is left alone"


def _body(row: Record, seed: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": row.problem}], "seed": seed}


def test_requests_carry_templates_sampling_and_further_keys(server: TeacherServer, tmp_path: Path) -> None:
    templates = Templates(prompt_template=r"Reason. {prompt} \boxed{}", system_prompt="Be brief.")
    place = context(tmp_path, tokenizer="tiny", templates=templates)
    settings = {"temperature": 0.7, "top_p": None, "max_tokens": 99}
    ask(
        server, place, problems(1), teacher={"extra_body": {"reasoning_effort": "high"}, "send_seed": False}, **settings
    )
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {
        "model": "toy",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": r"Reason. What is 0+1? \boxed{}"},
        ],
        "temperature": 0.7,
        "max_tokens": 99,
        "reasoning_effort": "high",
    }


def test_a_conversation_is_asked_for_its_last_answer(server: TeacherServer, place: Context) -> None:
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "and 2+2?"), ("assistant", "5")]
    row = record(completion=None)
    row.messages = [{"role": role, "content": text} for role, text in turns]
    made = only(ask(server, place, [row]))
    assert server.seen[0].body["messages"] == row.messages[:3]
    assert isinstance(made, Record) and made.messages is not None and made.messages[:3] == row.messages[:3]
    assert "and 2+2?" in made.messages[3]["content"]


def test_answers_in_any_order_make_the_same_rows(tmp_path: Path) -> None:
    def slow_at_random(seen: Seen) -> dict[str, Any]:
        time.sleep((time.monotonic_ns() // 1000) % 20 / 1000)
        return answer_to(seen)

    made = []
    with serving(slow_at_random) as server:
        for concurrency in (1, 16):
            place = context(tmp_path / str(concurrency), tokenizer="tiny")
            made.append(ask(server, place, problems(8), n=2, teacher={"concurrency": concurrency}))
    assert made[0] == made[1]


def test_requests_fill_the_concurrency_and_no_more(tmp_path: Path) -> None:
    with serving(delay=0.1) as server:
        place = context(tmp_path, tokenizer="tiny")
        ask(server, place, problems(12), n=4, teacher={"concurrency": 12})
        assert server.most_at_once == 12 and len(server.seen) == 48


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_given_apart_is_put_in_front(server: TeacherServer, place: Context, field: str) -> None:
    server.reply = lambda seen: {"content": "\n\nIt is 4.", field: "\nTwo and two.\n"}
    made = only(ask(server, place, problems(1)))
    assert isinstance(made, Record) and made.completion == "<think>\nTwo and two.\n</think>\n\nIt is 4."


def test_a_think_block_that_the_template_opened_is_opened_again(server: TeacherServer, place: Context) -> None:
    server.reply = lambda seen: {"content": "Two and two.\n</think>\n\nIt is 4."}
    made = only(ask(server, place, problems(1)))
    assert isinstance(made, Record) and made.completion == "<think>\nTwo and two.\n</think>\n\nIt is 4."


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"content": ""}, "no_answer"),
        ({"content": None}, "no_answer"),
        ({"content": "", "reasoning_content": "I wonder."}, "no_answer"),
        ({"content": "<think>\nhm\n</think>\n\n"}, "no_answer"),
        ({"content": "one two three four five six"}, "truncated"),
        ({"content": None, "reasoning": "cut in thought", "finish_reason": "length"}, "truncated"),
        ({"content": "the end is <|end|> here"}, "control_token"),
    ],
)
def test_answers_that_cannot_be_learned(
    server: TeacherServer, place: Context, said: dict[str, Any], reason: str
) -> None:
    server.reply = lambda seen: said
    made = only(ask(server, place, problems(1), max_tokens=5))
    assert isinstance(made, Dropped) and made.reason == reason, made
    assert made.record.id == "p0#g0" and made.record.facts["generate"]["model"] == "toy-teacher"


def test_truncated_answers_may_be_kept(server: TeacherServer, place: Context) -> None:
    server.reply = lambda seen: {"content": "one two three four five six"}
    made = only(ask(server, place, problems(1), max_tokens=5, truncated="keep"))
    assert isinstance(made, Record) and made.completion == "one two three four five"
    assert made.facts["generate"]["finish_reason"] == "length"


def test_rows_without_a_question_are_not_asked(server: TeacherServer, place: Context) -> None:
    tools = record(completion=None)
    tools.messages = [{"role": "system", "content": "", "tools": "[]"}, {"role": "user", "content": "?"}]
    tools.messages.append({"role": "assistant", "content": "!"})
    declared = Record("y", "toy", "toy:2", problem="?", tools='[{"name": "f"}]')
    outcomes = ask(server, place, [Record("x", "toy", "toy:1"), tools, declared])
    assert [outcome.reason for outcome in outcomes if isinstance(outcome, Dropped)] == ["no_problem", "tools", "tools"]
    assert not server.seen


def test_a_new_answer_is_trained_where_the_old_one_was_context(server: TeacherServer, place: Context) -> None:
    server.reply = lambda seen: {"content": "It is four."}
    item = record(completion=None)
    turn = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]
    item.messages, item.untrained = [*turn, *turn], [1, 3]
    made = only(ask(server, place, [item]))
    assert isinstance(made, Record) and made.completion == "It is four." and made.untrained == [1]


def test_cost_and_tokens_are_counted(server: TeacherServer, place: Context) -> None:
    server.reply = lambda seen: {"content": "It is four.", "usage": {"prompt_tokens": 1000, "completion_tokens": 3000}}
    outcomes = ask(server, place, problems(4), teacher={"input_price": 0.5, "output_price": 2.0})
    assert outcomes[0].kept[0].facts["generate"]["cost"] == pytest.approx(1000 * 0.5e-6 + 3000 * 2e-6)
    counted = usage(place)
    assert (counted["answers"], counted["requests"], counted["retries"], counted["failed"]) == (4, 4, 0, 0)
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (4000, 12000)
    assert counted["cost"] == pytest.approx(0.026) and counted["seconds"] > 0
    # A server that tells the cost is believed; one that doesn't count is noted.
    server.reply = lambda seen: {"content": "It is four.", "usage": {"cost": 0.125}}
    outcomes = ask(server, place, problems(1), n=1, temperature=0.9, teacher={"output_price": 2.0})
    assert outcomes[0].kept[0].facts["generate"]["cost"] == 0.125
    assert usage(place)["uncounted"] == 1 and usage(place)["answers"] == 1


# Log probabilities


def _pieces(phi: Any, text: str) -> list[dict[str, Any]]:
    """The text's tokens as a server gives them, by transformers' own table of bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    pieces = []
    for i, token in enumerate(phi.convert_ids_to_tokens(phi(text, add_special_tokens=False)["input_ids"])):
        raw = bytes(byte_of[character] for character in token)
        pieces.append({"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": -0.5 * i})
    return pieces


@pytest.fixture(scope="module")
def saved_phi(phi: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("phi")
    phi.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def phi_place(tmp_path: Path, saved_phi: str) -> Context:
    return context(tmp_path / "step", tokenizer=saved_phi)


def test_tokens_of_the_teacher_become_our_ids(server: TeacherServer, phi_place: Context) -> None:
    text = "<think>\nNaïve: ∑ 𝔽 of 12345 — 🙂🙃\n</think>\n\n\\boxed{42}"
    phi = phi_place.tokenizer
    end = {"token": "<|return|>", "bytes": list(b"<|return|>"), "logprob": -0.1}
    pieces = _pieces(phi, text)
    assert any("�" in piece["token"] for piece in pieces), "a character that is cut into tokens is part of the test"
    server.reply = lambda seen: {"content": text, "logprobs": {"content": [*pieces, end]}}
    made = only(ask(server, phi_place, problems(1), logprobs=True))
    assert server.seen[0].body["logprobs"] is True
    assert isinstance(made, Record) and made.teacher_ids == phi(text, add_special_tokens=False)["input_ids"]
    assert made.teacher_logprobs == [-0.5 * i for i in range(len(pieces))]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pieces: None, "the server gave none"),
        (lambda pieces: pieces[1:], "spell another text"),
        (lambda pieces: pieces[:-1], "end at byte"),
        (lambda pieces: [{**piece, "bytes": None, "token": "\ufffd"} for piece in pieces], "doesn't tell the bytes"),
        (
            lambda pieces: [{"token": "", "bytes": [b for p in pieces for b in p["bytes"]], "logprob": 0.0}],
            "is no token",
        ),
    ],
)
def test_tokens_that_are_not_ours_are_left_out_and_noted(
    server: TeacherServer, phi_place: Context, change: Any, why: str
) -> None:
    text = "The answer is certainly 12."
    changed = change(_pieces(phi_place.tokenizer, text))
    server.reply = lambda seen: {"content": text, "logprobs": changed and {"content": changed}}
    made = only(ask(server, phi_place, problems(1), logprobs=True))
    assert isinstance(made, Record) and made.teacher_ids is None and made.teacher_logprobs is None
    assert why in made.facts["generate"]["no_logprobs"]


# Failures


@pytest.mark.parametrize("action", [408, 429, 500, 503, "cut", "drop", "malformed", "html", "error", "stall"])
def test_what_passes_is_asked_again(server: TeacherServer, place: Context, action: int | str) -> None:
    server.faults = [Fault(action, times=2)]
    made = only(ask(server, place, problems(1), teacher={"timeout": 0.3}))
    assert isinstance(made, Record) and made.completion is not None and "boxed" in made.completion
    assert [seen.status for seen in server.seen] == [action, action, 200]
    assert (usage(place)["requests"], usage(place)["retries"]) == (3, 2)


def test_the_back_off_waits_twice_as_long_each_time(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(500, times=4)]
    only(ask(server, place, problems(1), teacher={"retry_delay": 0.1}))
    arrived = [seen.arrived for seen in server.seen]
    waits = [after - before for before, after in pairwise(arrived)]
    for retry, wait in enumerate(waits):
        delay = 0.1 * 2**retry
        assert delay / 2 <= wait < delay + 10, waits


def test_retry_after_is_honoured_by_all_requests(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(429, times=1, match="What is 0+1?", headers={"retry-after": "0.6"})]
    server.delay = 0.05
    ask(server, place, problems(12), teacher={"concurrency": 2})
    (refused,) = [seen for seen in server.seen if seen.status == 429]
    after = sorted(seen.arrived - refused.arrived for seen in server.seen if seen is not refused)
    assert len(after) == 12
    # Only what was on its way when the server asked for the pause may come before it is over.
    assert sum(seconds < 0.6 for seconds in after) <= 2 and after[-1] < 30


def test_a_wait_that_is_too_long_stops_the_run(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(429, headers={"retry-after": "86400"}, message="daily limit")]
    with pytest.raises(UserError, match=r"asks to wait 86400 s \(429\): daily limit; run again after that"):
        ask(server, place, problems(1))
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, None, r"refused to answer without a key \(401\): no, .* the environment variable TOY_KEY"),
        (403, None, r"\(403\): no, .*TOY_KEY"),
        (404, None, r"knows no such page or no model 'toy' \(404\): no, never; check base_url and model"),
        (402, None, r"refused the request \(402\): no, never; check base_url and the account"),
        (429, "insufficient_quota", r"has no quota left \(429\): no, never; pay"),
    ],
)
def test_what_will_not_pass_stops_the_run_at_once(
    server: TeacherServer, place: Context, status: int, code: str | None, says: str
) -> None:
    server.faults = [Fault(status, message="no, never.", code=code)]
    with pytest.raises(UserError, match=says) as caught:
        ask(server, place, problems(30), teacher={"api_key_env": "TOY_KEY"})
    assert str(caught.value).startswith(server.base_url) and "\n" not in str(caught.value)
    assert len(server.seen) <= 8, "those on their way, and none again"


def test_the_key_comes_from_the_environment(
    server: TeacherServer, place: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "toy-key-1"
    monkeypatch.setenv("TOY_KEY", "toy-key-2")
    with pytest.raises(UserError, match=r"refused the key \(401\)") as caught:
        ask(server, place, problems(1), teacher={"api_key_env": "TOY_KEY"})
    assert "toy-key" not in str(caught.value)
    monkeypatch.setenv("TOY_KEY", "toy-key-1")
    assert isinstance(only(ask(server, place, problems(1), teacher={"api_key_env": "TOY_KEY"})), Record)
    written = b"".join(path.read_bytes() for path in place.folder.rglob("*") if path.is_file())
    assert b"toy-key" not in written


def test_a_refused_problem_is_dropped_with_the_reason(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(400, match="What is 7+1?", message="prompt is too long")]
    outcomes = ask(server, place, problems(30))
    dropped = [item for outcome in outcomes if isinstance(outcome, Replaced) for item in outcome.dropped]
    assert [(item.record.id, item.reason) for item in dropped] == [("p7#g0", "request_failed")]
    assert dropped[0].detail == "refused (400): prompt is too long"
    assert len(server.seen) == 30, "a 400 isn't asked again"
    assert usage(place)["failed"] == 1
    ask(server, place, problems(30))
    assert len(server.seen) == 31, "only the failed one is asked again by the next run"


def test_too_many_failures_stop_the_run_and_lose_nothing(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(500, match=f"What is {i}+1?") for i in (20, 25, 30, 35)]
    with pytest.raises(UserError, match=r"^[2-4] of \d+ requests to http.*max_failed \(5%\).*the last one: 500: made"):
        ask(server, place, problems(40), teacher={"max_retries": 1, "concurrency": 4})
    before = server.answered
    assert sum(before.values()) >= 15
    server.faults = []
    outcomes = ask(server, place, problems(40), teacher={"concurrency": 4})
    assert sum(len(outcome.kept) for outcome in outcomes if isinstance(outcome, Replaced)) == 40
    asked_twice = [name for name, count in server.answered.items() if count > 1]
    assert len(asked_twice) <= 3, "no more than were on their way when it stopped"


def test_failures_up_to_the_limit_are_borne(server: TeacherServer, place: Context) -> None:
    server.faults = [Fault(500, match=f"What is {i}+1?") for i in (20, 25, 30, 35)]
    outcomes = ask(server, place, problems(40), max_failed=0.25, teacher={"max_retries": 1})
    dropped = [item for outcome in outcomes if isinstance(outcome, Replaced) for item in outcome.dropped]
    assert [item.record.id for item in dropped] == ["p20#g0", "p25#g0", "p30#g0", "p35#g0"]
    assert dropped[0].detail == "500: made to fail by the test (asked 2 times)"


def test_nobody_listens(place: Context) -> None:
    teacher = {"base_url": "http://127.0.0.1:9/v1", "model": "toy", "max_retries": 2, "retry_delay": 0.01}
    with pytest.raises(UserError, match=r"the connection failed: .+ \(asked 3 times\)"):
        run_rows("generate", problems(3), place, teacher=teacher)


def test_without_the_library_one_sentence(place: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'sambay-sft\[teacher\]'"):
        run_rows("generate", problems(1), place, teacher={"base_url": "http://127.0.0.1:9/v1", "model": "toy"})


# Runs that end early

_CHILD = """
import signal, sys
from pathlib import Path
from step_toys import context, record, run_rows

class Terminated(BaseException):
    pass

def terminate(signum, frame):
    raise Terminated

if __name__ == "__main__":
    folder, url, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGTERM, terminate)
    rows = [record(f"What is {i}+1?", None, id=f"p{i}") for i in range(count)]
    teacher = {"base_url": url, "model": "toy", "concurrency": 4}
    try:
        run_rows("generate", rows, context(folder, tokenizer="tiny"), teacher=teacher, n=2)
    except (KeyboardInterrupt, Terminated) as error:
        print(type(error).__name__)
"""


def start(tmp_path: Path, server: TeacherServer, count: int) -> subprocess.Popen[str]:
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(_CHILD))
    support = Path(__file__).resolve().parents[3] / "support"
    root = support.parents[1]
    code = f"import sys; sys.path[:0] = [{str(support)!r}, {str(root)!r}]; sys.argv = sys.argv[1:]; "
    code += f"exec(compile(open({str(script)!r}).read(), 'child.py', 'exec'))"
    command = [sys.executable, "-c", code, "child", str(tmp_path / "step"), server.base_url, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(server: TeacherServer, answers: int, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while sum(server.answered.values()) < answers:
        assert child.poll() is None, child.communicate(timeout=60)
        assert time.monotonic() < end, "the child doesn't ask"
        time.sleep(0.005)


def test_a_killed_run_pays_for_nothing_twice(tmp_path: Path) -> None:
    with serving(delay=0.1) as server:
        child = start(tmp_path, server, 30)
        wait_for(server, 25, child)
        child.kill()
        child.wait(timeout=60)
        time.sleep(0.1)
        first, names = server.answered, len(server.seen)
        journal = journal_of(tmp_path / "step").read_bytes().splitlines(keepends=True)
        kept = [json.loads(line) for line in journal if line.endswith(b"\n")]
        assert 20 <= len(kept) < 60
        # What a kill in the midst of a write leaves: the next run must neither trip over it nor write behind it.
        with journal_of(tmp_path / "step").open("ab") as handle:
            handle.write(b'{"key": "00ff", "answer": {"conte')
        outcomes = ask(server, context(tmp_path / "step", tokenizer="tiny"), problems(30), n=2)
        rows = [made.completion for outcome in outcomes if isinstance(outcome, Replaced) for made in outcome.kept]
        assert len(rows) == 60 and len(set(rows)) == 60
        assert len(server.answered) == 60
        assert len(server.seen) - names == 60 - len(kept), "asked is what isn't in the journal, and nothing else"
        twice = [name for name, count in server.answered.items() if count > 1]
        assert len(twice) == sum(first.values()) - len(kept) <= 4, "those on their way when it was killed"
        assert max(server.answered.values()) <= 2
        asked = len(server.seen)
        again = ask(server, context(tmp_path / "step", tokenizer="tiny"), problems(30), n=2)
        assert again == outcomes and len(server.seen) == asked, "what the second run wrote can be read too"
        final = json.loads((tmp_path / "step" / "usage.json").read_text())
        assert final["answers"] == 60 and final["completion_tokens"] == sum(len(row.split()) for row in rows)


@pytest.mark.parametrize(("number", "says"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals, says: str) -> None:
    with serving(delay=0.03) as server:
        child = start(tmp_path, server, 100)
        wait_for(server, 10, child)
        server.faults = [Fault("stall")]
        time.sleep(0.2)
        child.send_signal(number)
        output, errors = child.communicate(timeout=60)  # an answer on its way never comes: it doesn't wait for it
        assert output.strip() == says and child.returncode == 0, errors
        raw = journal_of(tmp_path / "step").read_bytes()
        assert raw.endswith(b"\n") and len([json.loads(line) for line in raw.splitlines()]) == sum(
            server.answered.values()
        )
        assert json.loads((tmp_path / "step" / "usage.json").read_text())["answers"] == raw.count(b"\n")


def test_a_broken_line_is_asked_again(server: TeacherServer, place: Context, caplog: pytest.LogCaptureFixture) -> None:
    before = ask(server, place, problems(4))
    journal = journal_of(place.folder)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2] + b"\0\0\n" + lines[2] + lines[3])
    assert ask(server, place, problems(4)) == before
    assert len(server.seen) == 5 and "1 broken lines" in caplog.text


def test_another_question_is_another_answer_and_another_address_is_not(server: TeacherServer, place: Context) -> None:
    ask(server, place, problems(2))
    ask(server, place, problems(2), teacher={"concurrency": 1, "timeout": 9.0, "input_price": 1.0, "max_retries": 1})
    assert len(server.seen) == 2
    ask(server, place, problems(2), temperature=0.9)
    assert len(server.seen) == 4
    with serving() as other:
        ask(other, place, problems(2))
        assert not other.seen, "the same model behind another address is asked nothing that it has answered"


# Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher": {"base_url": "localhost:8000", "model": "m"}}, "must begin with http:// or https://"),
        ({"teacher": {"base_url": "http://h", "model": "m", "extra_body": {"n": 2}}}, "'n' is set by the step itself"),
        ({"mode": "mixed"}, "needs a student"),
        ({"student": {"checkpoint": "x"}}, "only mode `mixed` asks a student"),
        ({"mode": "mixed", "student": {"checkpoint": "x"}, "logprobs": True}, "only mode `rollouts` keeps them"),
        ({"mode": "mixed", "student": {"checkpoint": "x"}, "top_p": None}, "needs a number"),
        ({"mode": "mixed", "student": {"checkpoint": "x", "modle": "y"}}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        entry("generate", **{"teacher": {"base_url": "http://h/v1", "model": "m"}, **settings})


def test_settings_that_change_no_answer_are_not_part_of_the_key() -> None:
    teacher = {"base_url": "http://h/v1", "model": "m"}
    plain = entry("generate", teacher=teacher).config.deciding()
    faster = {**teacher, "concurrency": 99, "timeout": 5.0, "base_url": "http://other/v1", "output_price": 3.0}
    assert entry("generate", teacher=faster, max_failed=0.5).config.deciding() == plain
    assert entry("generate", teacher={**teacher, "model": "other"}).config.deciding() != plain
    assert entry("generate", teacher=teacher, n=2).config.deciding() != plain


# What is paid for once


def test_more_answers_and_other_rows_ask_only_for_what_is_new(server: TeacherServer, place: Context) -> None:
    first = ask(server, replace(place, folder=place.folder / "a"), problems(3))
    assert len(server.seen) == 3
    more = ask(server, replace(place, folder=place.folder / "b"), problems(4), n=2)
    assert len(server.seen) == 8, "three of eight had been answered"
    assert [outcome.kept[0] for outcome in more[:3]] == [outcome.kept[0] for outcome in first]
    ask(server, replace(place, folder=place.folder / "c"), problems(2), max_tokens=77)
    assert len(server.seen) == 10, "asked in another way is asked anew"


def test_a_slow_answer_holds_up_no_other(tmp_path: Path) -> None:
    """The first one comes only when ten others have been asked for, though a batch has four rows."""
    others = threading.Semaphore(0)

    def slow_at_first(seen: Seen) -> dict[str, Any]:
        if "What is 0+1?" not in str(seen.body):
            others.release()
        else:
            assert all(others.acquire(timeout=30) for _ in range(10))
        return answer_to(seen)

    with serving(slow_at_first) as server:
        place = context(tmp_path / "step", tokenizer="tiny")
        teacher = endpoint(server, concurrency=2, max_retries=0)
        step = step_class("generate")(entry("generate", teacher=teacher).config, place)
        assert isinstance(step, Generate)
        rows = problems(16)
        batches = [rows[start : start + 4] for start in range(0, 16, 4)]
        try:
            step.ahead(iter(batches))
            outcomes = [outcome for batch in batches for outcome in step(batch)]
        finally:
            step.close()
    assert len(server.seen) == 16 and all(isinstance(o, Replaced) and len(o.kept) == 1 for o in outcomes)
