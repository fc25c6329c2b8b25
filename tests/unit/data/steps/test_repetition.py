"""Loops and repeated passages, beside slow definitions of both."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.steps.quality.repetition import SHORTEST_LOOP, looping_end, repeated_share


def slow_loop(text: str, copies: int) -> int | None:
    """The shortest period of the text's end, by trying each."""
    text = text.rstrip()
    for period in range(1, len(text) // copies + 1):
        length = max(copies * period, SHORTEST_LOOP)
        if length <= len(text) and all(text[-i] == text[-i - period] for i in range(1, length - period + 1)):
            return period
    return None


def slow_share(words: list[str], ngram: int) -> float:
    """Words in an n-gram that was seen before, by comparing all with all."""
    covered: set[int] = set()
    seen = set()
    for start in range(len(words) - ngram + 1):
        window = tuple(words[start : start + ngram])
        if window in seen:
            covered.update(range(start, start + ngram))
        seen.add(window)
    return len(covered) / len(words) if words else 0.0


passage = st.text(st.sampled_from("ab \n中é😀."), min_size=1, max_size=30)


@given(st.text(max_size=40), passage, st.integers(0, 80), st.integers(0, 40), st.integers(2, 9))
@settings(max_examples=400)
def test_loops_are_what_the_definition_says(front: str, part: str, times: int, cut: int, copies: int) -> None:
    text = front + part * times + part[:cut]
    loop = looping_end(text, copies)
    assert (len(loop.passage) if loop else None) == slow_loop(text, copies)


@given(st.integers(0, 2**32), st.integers(1, 3000), st.integers(8, 40))
@settings(max_examples=60)
def test_a_random_passage_in_a_loop_is_found_wherever_it_was_cut_off(seed: int, size: int, times: int) -> None:
    rng = random.Random(seed)
    part = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=size - 1)) + "z"
    times = max(times, -(-SHORTEST_LOOP // size))
    text = "A good beginning. " + part * times + part[: rng.randrange(size)]
    loop = looping_end(text, 8)
    assert loop is not None
    assert size % len(loop.passage) == 0 and loop.copies >= 8
    assert text.rstrip().endswith(loop.passage * loop.copies)
    assert looping_end(text + " And so it ends.", 8) is None


def test_seven_copies_are_no_loop_and_neither_are_the_zeros_of_a_number() -> None:
    part = "Wait, let me think about this again. "
    assert looping_end("Hm. " + part * 7, 8) is None
    assert looping_end("Hm. " + part * 8, 8) is not None
    assert looping_end("So it is 1" + "0" * 40, 8) is None
    assert looping_end("| a | b |\n" + "|---" * 10, 8) is None


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(2, 6))
@settings(max_examples=300)
def test_the_repeated_share_is_what_the_definition_says(words: list[str], ngram: int) -> None:
    assert repeated_share([" ".join(words)], ngram) == slow_share(words, ngram)


def test_a_text_written_twice_is_repeated_by_half_and_parts_are_not_compared() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    assert repeated_share([text], 20) == 0.0
    assert repeated_share([f"{text} {text}"], 20) == 0.5
    assert repeated_share([text, text], 20) == 0.0
    # Chinese writes no spaces, and a text without spaces still has words.
    chinese = "".join(chr(0x4E00 + i) for i in range(100))
    assert repeated_share([chinese * 2], 20) == 0.5
    assert repeated_share(["a" * 16_000], 20) > 0.9
