"""Finding an assistant's thinking in whatever marks it stands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.text.thinking import MARKS, Broken, Thought, canonical, find_thinking

CANONICAL = "<think>\nI add.\n</think>\n\nIt is 4."

FORMS = {
    "think": CANONICAL,
    "prefilled": "I add.\n</think>\n\nIt is 4.",
    "open_thoughts": (
        "<|begin_of_thought|>\n\nI add.\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\nIt is 4.\n\n<|end_of_solution|>"
    ),
    "thinking": "<thinking>I add.</thinking>It is 4.",
    "reasoning": "<reasoning>\nI add.\n</reasoning>\n<answer>\nIt is 4.\n</answer>\n",
    "thought": "  <thought>I add.</thought> It is 4.",
    "seed": "<seed:think>I add.</seed:think>It is 4.",
    "seed_prefilled": "I add.</seed:think>It is 4.",
    "magistral": "[THINK]I add.[/THINK]It is 4.",
    "kimi": "◁think▷I add.◁/think▷It is 4.",
    "am": "<think>\nI add.\n</think>\n<answer>It is 4.</answer>",
    "harmony": (
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    ),
    "harmony_started": (
        "<|start|>assistant<|channel|>analysis<|message|>I add.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|end|>\n"
    ),
    "harmony_decoded_without_end": (
        "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant<|channel|>final<|message|>It is 4."
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_canonical_one(form: str) -> None:
    thought = find_thinking(FORMS[form])
    assert isinstance(thought, Thought)
    assert canonical(thought) == CANONICAL
    again = find_thinking(CANONICAL)
    assert isinstance(again, Thought) and canonical(again) == CANONICAL


def test_several_analyses_are_one_thinking_and_a_bare_final_message_has_none() -> None:
    two = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    thought = find_thinking(two)
    assert isinstance(thought, Thought)
    assert canonical(thought) == "<think>\nOne.\n\nTwo.\n</think>\n\nDone."
    thought = find_thinking("<|channel|>final<|message|>Done.<|return|>")
    assert isinstance(thought, Thought)
    assert canonical(thought) == "Done."


@pytest.mark.parametrize(
    ("content", "closed"),
    [
        ("<think>\nI add", False),
        ("<think>a</think>b</think>c", True),
        ("<think>a<think>b</think>c", True),
        ("<think>a</think>b<think>c</think>d", True),
        ("Sure. <think>a</think>b", True),
        ("Sure. <think>a", False),
        ("a</think>b</think>c", True),
        ("<|begin_of_thought|>a", False),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b", True),
        ("<|channel|>analysis<|message|>a", False),
        ("<|channel|>analysis<|message|>a<|end|>", False),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|call|>", True),
        ("<|channel|>commentary to=functions.f<|message|>{}<|call|>", True),
        ("<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>", True),
        ("<|channel|>", True),
    ],
)
def test_marks_that_make_no_sense_are_told(content: str, closed: bool) -> None:
    found = find_thinking(content)
    assert isinstance(found, Broken)
    assert found.closed == closed and found.detail


@pytest.mark.parametrize(
    "content",
    ["", "It is 4.", "Write <reasoning>why</reasoning> in XML.", "Close it by </thinking>.", "<answer>4</answer>"],
)
def test_ordinary_text_has_no_thinking(content: str) -> None:
    assert find_thinking(content) is None


def test_other_marks_inside_thinking_are_text() -> None:
    found = find_thinking("<think>They want <reasoning> and <answer>x</answer>.</think>Use </reasoning>.")
    assert found == Thought("think", "They want <reasoning> and <answer>x</answer>.", "Use </reasoning>.")


def test_only_one_answer_is_taken_out_of_its_marks() -> None:
    answer = "<answer>x</answer> or <answer>y</answer>"
    assert find_thinking(f"<think>a</think>{answer}") == Thought("think", "a", answer)


words = st.text(st.characters(exclude_characters="<>[]◁▷|", exclude_categories=("Cs",)), min_size=1).filter(str.strip)


@given(st.sampled_from(MARKS), words, words)
def test_thinking_and_answer_come_back_from_any_marks(marks: object, text: str, answer: str) -> None:
    name, begin, end, _ = marks  # type: ignore[misc]
    found = find_thinking(f"{begin}{text}{end}{answer}")
    assert found == Thought(name, text, answer)
    assert isinstance(found, Thought)
    again = find_thinking(canonical(found))
    assert isinstance(again, Thought) and again.marks == "think"
    assert again.text.strip() == text.strip() and again.answer.strip() == answer.strip()


marked = st.lists(
    st.sampled_from(
        [mark for marks in MARKS[:3] for mark in (marks.open, marks.close)]
        + [
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>assistant",
            "analysis",
            "final",
            "<answer>",
            "</answer>",
            "a",
        ]
    ),
    max_size=12,
)


@given(marked)
def test_any_heap_of_marks_is_judged_and_what_is_canonical_stays(pieces: list[str]) -> None:
    found = find_thinking("".join(pieces))
    if isinstance(found, Thought) and not found.wrapped and found.marks == "think":
        assert find_thinking(canonical(found)) == found or not found.opened
