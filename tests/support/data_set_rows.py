"""A few rows of each public data set, with the columns and types that it has, good ones and such as recipes drop."""

from __future__ import annotations

from typing import Any

PROBLEMS = {
    "frogs": "A pond holds 14 green frogs and 9 brown ones; how many frogs live there altogether?",
    "trains": "Two trains leave Lyon at noon, one going north at 80 km/h, the other south at 70 km/h. "
    "How far apart are they at three in the afternoon?",
    "primes": "Find the sum of all primes between 10 and 30.",
    "roots": "Let $r$ and $s$ be the roots of $x^2 - 7x + 5 = 0$. Compute $r^3 + s^3$.",
}
ANSWERS = {"frogs": "23", "trains": "450", "primes": "112", "roots": "238"}
# Planted in the benchmark that recipes decontaminate against, in other writing.
LEAKED = "FIND the sum of all primes between $10$ and $30$"


def trace(name: str, extra: str = "") -> str:
    """A closed trace that ends with the right answer."""
    steps = " ".join(f"Step {n}: we look at part {n} of the {name} question and go on." for n in range(6))
    return f"<think>\n{steps}{extra}\n</think>\n\nThe answer is \\boxed{{{ANSWERS[name]}}}."


OPEN = "<think>\nWell, let me think about this for a while, and then"  # cut off while thinking


def sharegpt(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def openr1() -> list[dict[str, Any]]:
    """`generations` with flags that are shorter, null, or from another judge."""

    def row(name: str, generations: list[str], **flags: Any) -> dict[str, Any]:
        base = {
            "problem": PROBLEMS[name], "solution": "A short one.", "answer": ANSWERS[name], "problem_type": "Algebra",
            "question_type": "math-word-problem", "source": "olympiads", "uuid": f"u-{name}",
            "generations": generations,
            "is_reasoning_complete": [True] * len(generations), "correctness_math_verify": [True] * len(generations),
            "correctness_llama": None, "finish_reasons": None, "correctness_count": 1,
            "messages": chat(PROBLEMS[name], generations[0]),
        }  # fmt: skip
        return {**base, **flags}

    return [
        row("frogs", [trace("frogs"), trace("frogs", " Again.")], correctness_math_verify=[True, False],
            correctness_llama=[None, False]),
        row("trains", [trace("trains"), OPEN], finish_reasons=["stop", "length"]),
        row("primes", [trace("primes")]),
        row("roots", [trace("roots"), trace("roots", " Or so.")], correctness_math_verify=[False],
            correctness_llama=[True]),
    ]  # fmt: skip


def openmathreasoning() -> list[dict[str, Any]]:
    return [
        {"expected_answer": ANSWERS[name], "problem_type": "has_answer_extracted", "problem_source": "aops_c6",
         "generation_model": "DeepSeek-R1", "pass_rate_72b_tir": rate, "problem": PROBLEMS[name],
         "generated_solution": answer, "inference_mode": "cot", "used_in_kaggle": True}
        for name, rate, answer in [
            ("frogs", "0.96875", trace("frogs")), ("trains", "n/a", OPEN), ("roots", "0.5", trace("roots")),
        ]
    ]  # fmt: skip


def openthoughts3() -> list[dict[str, Any]]:
    return [
        {"difficulty": 7, "source": "ai2-adapt", "domain": "math", "conversations": sharegpt(PROBLEMS[name], answer)}
        for name, answer in [("frogs", trace("frogs")), ("frogs", trace("frogs", " Twice.")), ("trains", OPEN)]
    ]


def openthoughts_114k() -> list[dict[str, Any]]:
    marked = (
        "<|begin_of_thought|>\n\nWe add them up.\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\nIt is \\boxed{23}.\n\n<|end_of_solution|>"
    )
    system = "Your role as an assistant involves thoroughly exploring questions through a systematic process."
    return [
        {"system": system, "conversations": [{"from": "user", "value": PROBLEMS["frogs"]},
                                             {"from": "assistant", "value": marked}]},
        {"system": system, "conversations": [{"from": "user", "value": PROBLEMS["trains"]},
                                             {"from": "assistant", "value": "<|begin_of_thought|>\n\nHm."}]},
    ]  # fmt: skip


def mixture_of_thoughts() -> list[dict[str, Any]]:
    return [
        {"messages": chat(PROBLEMS[name], answer), "num_tokens": 100, "source": "open-r1/OpenR1-Math-220k"}
        for name, answer in [("frogs", trace("frogs")), ("trains", trace("trains")), ("roots", OPEN)]
    ]


def acereason() -> list[dict[str, Any]]:
    return [
        {"category": "math", "source": "orca_math", "input": PROBLEMS[name], "output": answer}
        for name, answer in [("frogs", trace("frogs")), ("trains", OPEN)]
    ]


def light_r1() -> list[dict[str, Any]]:
    system = {"from": "system", "value": "You are helpful. The assistant first thinks, then answers."}
    return [
        {"conversations": [{"from": "user", "value": PROBLEMS[name]}, {"from": "assistant", "value": answer}][at:]}
        for at, name, answer in [(0, "frogs", trace("frogs")), (0, "trains", OPEN)]
    ] + [{"conversations": [system, *sharegpt(PROBLEMS["roots"], trace("roots"))]}]


def limo() -> list[dict[str, Any]]:
    said = "Okay, so there are two kinds of frogs. Wait, I should add them. So 14 and 9 is 23.\n\n**Final** \\boxed{23}"
    return [{"question": PROBLEMS["frogs"], "solution": said, "answer": "23"}]


def s1k() -> list[dict[str, Any]]:
    return [
        {"solution": ANSWERS[name], "question": PROBLEMS[name], "cot_type": "math", "source_type": "olympiad",
         "metadata": "{}", "gemini_thinking_trajectory": "g", "gemini_attempt": "g", "gemini_grade": "No",
         "gemini_grade_reason": "", "deepseek_thinking_trajectory": f"I think of {name}.",
         "deepseek_attempt": f"So it is \\boxed{{{ANSWERS[name]}}}.", "deepseek_grade": grade,
         "deepseek_grade_reason": ""}
        for name, grade in [("frogs", "Yes"), ("trains", "No")]
    ]  # fmt: skip


def numinamath() -> list[dict[str, Any]]:
    return [
        {"problem": PROBLEMS[name], "solution": "Short.", "answer": answer, "problem_type": "Algebra",
         "question_type": kind, "problem_is_valid": valid, "solution_is_valid": "Yes", "source": "olympiads",
         "synthetic": False}
        for name, answer, kind, valid in [
            ("frogs", "23", "math-word-problem", "Yes"), ("trains", "proof", "math-word-problem", "Yes"),
            ("primes", "112", "MCQ", "Yes"), ("roots", "238", "math-word-problem", "Incomplete"),
        ]
    ]  # fmt: skip


def nemotron_math() -> list[dict[str, Any]]:
    def row(name: str, content: str) -> dict[str, Any]:
        said = {"role": "assistant", "content": content, "reasoning_content": f"I think of {name}."}
        return {"uuid": name, "expected_answer": ANSWERS[name], "problem": PROBLEMS[name], "tools": [],
                "messages": [{"role": "user", "content": PROBLEMS[name]}, said], "license": "cc-by-4.0"}  # fmt: skip

    return [row("frogs", "It is \\boxed{23}."), row("trains", "It is \\boxed{451}.")]


def dolci() -> list[dict[str, Any]]:
    return [
        {"id": name, "source": "openthoughts3", "messages": chat(PROBLEMS[name], answer)}
        for name, answer in [("frogs", trace("frogs")), ("trains", OPEN)]
    ]


def superior_reasoning() -> list[dict[str, Any]]:
    return [
        {"uuid": f"id-{name}", "input": PROBLEMS[name], "output": answer, "domain": "math", "meta": {"dataset": "x"}}
        for name, answer in [("frogs", trace("frogs")), ("trains", trace("trains")), ("primes", trace("primes"))]
    ]


def superior_reasoning_logprobs(tokenizer: Any) -> list[dict[str, Any]]:
    """Log probabilities of the outputs' tokens for all but the last row; the first one's are higher."""
    rows = []
    for row, logprob in zip(superior_reasoning()[:2], (-0.001, -9.0), strict=True):
        ids = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        rows.append({"sample_uuid": row["uuid"], "token_ids": ids, "logprobs": [logprob] * len(ids)})
    return rows


def gsm8k() -> list[dict[str, Any]]:
    return [{"question": PROBLEMS["frogs"], "answer": "14 + 9 = <<14+9=23>>23\n#### 23"}]


def benchmark() -> list[dict[str, Any]]:
    """A benchmark of two problems, under both names that benchmarks give the column."""
    problems = [LEAKED, "How many ways are there to seat six knights around a round table of the king?"]
    return [{"problem": text, "question": text, "answer": "1"} for text in problems]
