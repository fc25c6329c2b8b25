r"""Edits that a person makes to a problem: such that it stays the same problem, and such that it becomes another.

Each takes the text and a seeded generator and gives the changed text, or None where it has nothing to work on.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise

Edit = Callable[[str, random.Random], str | None]

SYNONYMS = [
    ("students", "pupils"), ("kids", "children"), ("children", "kids"), ("buys", "purchases"), ("bought", "purchased"),
    ("buy", "purchase"), ("big", "large"), ("house", "home"), ("store", "shop"), ("car", "vehicle"), ("earns", "makes"),
    ("wants", "would like"), ("in total", "altogether"), ("total", "overall"), ("friends", "buddies"),
    ("gave", "handed"), ("Find", "Determine"), ("Compute", "Calculate"), ("What is", "Determine"),
    ("Evaluate", "Compute"), ("Let", "Suppose"), ("such that", "so that"), ("each", "every"), ("decides", "chooses"),
    ("spends", "uses"), ("has", "owns"), ("makes", "creates"), ("takes", "needs"), ("costs", "is priced at"),
    ("box", "crate"), ("money", "cash"), ("received", "got"), ("remaining", "left over"),
    ("small", "little"), ("start", "begin"), ("begins", "starts"), ("finish", "complete"), ("job", "task"),
    ("trip", "journey"), ("road", "street"), ("number", "count"), ("equal to", "the same as"), ("largest", "greatest"),
    ("smallest", "least"), ("larger", "greater"), ("fewer", "less"), ("twice", "two times"), ("same", "identical"),
]  # fmt: skip
CONTRACTIONS = [
    ("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"), ("is not", "isn't"), ("are not", "aren't"),
    ("was not", "wasn't"), ("were not", "weren't"), ("can not", "can't"), ("cannot", "can't"), ("will not", "won't"),
    ("would not", "wouldn't"), ("could not", "couldn't"), ("has not", "hasn't"), ("have not", "haven't"),
    ("she is", "she's"), ("he is", "he's"), ("it is", "it's"), ("they are", "they're"), ("she has", "she's"),
    ("they have", "they've"), ("he will", "he'll"), ("they will", "they'll"), ("there are", "there're"),
    ("I am", "I'm"), ("What is", "What's"), ("there is", "there's"), ("you are", "you're"), ("let us", "let's"),
    ("he would", "he'd"), ("she would", "she'd"), ("that is", "that's"), ("who is", "who's"), ("we have", "we've"),
]  # fmt: skip
CALENDAR_WORDS = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August
    September October November December How What The If When Find Let
"""
CALENDAR = set(CALENDAR_WORDS.split())

# How prompts of data sets and benchmarks, and people, ask for a problem to be solved.
WRAPPERS = [
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "{} Please reason step by step, and put your final answer within \\boxed{{}}.",
    "Solve the following math problem: {}",
    "Solve the following math problem step by step.\n\n{}",
    "Question: {}\nAnswer:",
    "Q: {}\nA: Let's think step by step.",
    "{}\n\nLet's think step by step.",
    "Problem:\n{}\n\nSolution:",
    "### Question\n{}\n\n### Answer\n",
    "### Instruction:\n{}\n\n### Response:",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "User: {}\nAssistant:",
    "Human: {}\n\nAssistant:",
    "[INST] {} [/INST]",
    "Solve the following math problem efficiently and clearly. The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
    "answering.\n\n{}",
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".',
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response: Let's think step by step.",
    "You are a math expert. Solve this problem and give only the final number.\n\n{}",
    "{}\nShow your work.",
    "{} Explain your reasoning.",
    "Please answer: {}",
    "Can you help me with this problem? {}",
    "{}\n\nReturn your final response within \\boxed{{}}.",
    "{}\nPresent the answer in LaTex format: \\boxed{{Your answer}}",
    "Answer the following question. Give the final answer after '####'.\n{}",
    "Return your final response within \\boxed{{}}. {}",
    "**Problem:** {}\n\n**Solution:**",
    "<problem>\n{}\n</problem>\nThink carefully before you answer.",
    "{}\nEnd your response with 'The answer is X.'",
    "Hi! I'm stuck on this homework question: {} Thanks for your help!",
]
# The same, by other people.
OTHER_WRAPPERS = [
    "{}\nLet's think step by step and output the final answer within \\boxed{{}}.",
    "Please solve the following problem and put your answer at the end with \"The answer is: \".\n\n{}\n\n",
    "Answer the following math problem. Provide ONLY the final numerical answer, without showing any work or "
    "reasoning.\n\nProblem: {}\n\nAnswer:",
    "### Question:\n{}\n\n### Instruction:\nSolve the problem step by step. You can use Python code if needed.\nOutput "
    "ONLY the final number inside \\boxed{{}}. Example: \\boxed{{42}}.\n\n### Solution:\n",
    "<|start_header_id|>user<|end_header_id|>\n\nProblem: {}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
    "You will be given a math problem. Work through it carefully, then state your final answer on the last line.\n\n{}",
    "{}\nPlease provide only the final answer, without including any intermediate reasoning steps, and put your final "
    "answer within \\boxed{{}}.",
    "User: Please reason step by step and put your final answer at the end with \"The answer is: \".\n\n{}\n\n"
    "Assistant:",
    "{} Think about it logically and write down every step.",
    "Here is a word problem for you to solve.\n{}\nMake sure to double-check your calculations.",
    "{}\n\nYour final answer should be a single number.",
    "As an expert mathematician, solve this problem carefully:\n\n{}",
    "You are an AI tutor. Help the student with this exercise.\n\nExercise: {}",
    "{}\nEnclose your reasoning in <think> and </think> tags and your answer in <answer> and </answer> tags.",
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {}\nYour response should "
    'end with "The final answer is [answer]" where [answer] is the response to the problem.',
    "Could you please tell me the answer to this: {}",
    "{} Give your answer as a number only, no units.",
    "Task: {}\nOutput:",
    "Hello, I need some help with my math homework. {} Please explain how you got the answer.",
    "{}\n\nDo not use a calculator. Write your solution in detail.",
    "Use chain-of-thought reasoning to solve the question below.\n\n{}\n\nReasoning:",
    "Math problem:\n\"{}\"\nWhat is the answer?",
    "{}\n\n(Respond with just the answer.)",
    "Let's solve this together! {} Take a deep breath and work on this problem step-by-step.",
    "Instruction: solve the problem. Input: {} Output:",
    '{}\n\nBe concise.',
    'I have a math question for you: {}',
    '{}\nGive your final answer as an integer between 0 and 999.',
    'Consider the following problem:\n\n{}\n\nWhat is the final answer?',
    '{}\nAnswer with just the number.',
    '# Problem\n{}\n\n# Solution',
    '{}\n\nFirst think about the reasoning process, then provide the answer. Write the final answer in \\boxed{{}}.',
    'The following is a grade school math problem. Solve it step by step.\n{}',
    "{} Let's work this out in a step by step way to be sure we have the right answer.",
    'You are given a math problem. Your task is to solve it.\n\nProblem: {}\n\nShow all steps.',
    '{}\n\nPut the answer in a box.',
    'Student: {}\nTeacher:',
    "Here's a question: {}",
    '{}\n\nAnswer (number only):',
    'System: You are a careful solver.\nUser: {}\nAssistant: Let me think.',
    'Work through the following step by step:\n{}\nState the final answer clearly at the end.',
    '<question>{}</question>\n<answer>',
    'Can you solve this? {}',
    '{}\nMake sure your final answer is enclosed in \\boxed{{}} tags.',
    'Question 12: {}',
    'Exercise 3.\n{}',
    '{} (Show your reasoning.)',
    "Let's think carefully.\n{}",
    'Respond in English. {}',
    "My teacher gave me this problem and I don't know how to solve it: {} Can you help?",
    '{} Give only the numerical answer.',
    'Prompt: {}\nCompletion:',
    '{}\n\nIf you are unsure, make your best guess.',
    'Math Word Problem: {}\n\nStep-by-step solution:',
]  # fmt: skip


_FORMULA = re.compile(r"\$(?![\s$])[^$]*(?<!\s)\$(?!\d)")


def wrapped(text: str, rng: random.Random) -> str:
    """In a prompt that says how to answer."""
    return rng.choice(WRAPPERS).format(text)


def wrapped_otherwise(text: str, rng: random.Random) -> str:
    """In one of other people's prompts."""
    return rng.choice(OTHER_WRAPPERS).format(text)


def money(text: str, rng: random.Random) -> str | None:
    """`$5` as 5 dollars, or 5 dollars as `$5`."""
    if "\\" in text or _FORMULA.search(text):
        return None
    changed = re.sub(r"\$(\d[\d,]*(?:\.\d+)?)(?: (million|thousand))?(?!\d)", _dollars, text)
    return changed if changed != text else re.sub(r"\b(\d[\d,.]*) dollars?\b", r"$\1", text)


def _dollars(found: re.Match[str]) -> str:
    return f"{found[1]}{f' {found[2]}' if found[2] else ''} dollar{'' if found[1] == '1' else 's'}"


def percent(text: str, rng: random.Random) -> str | None:
    """% as a word, or the word as %."""
    changed = re.sub(r"\\?%", rng.choice([" percent", " per cent"]), text)
    return changed if changed != text else re.sub(r" percent\b", "%", text)


def sentence_order(text: str, rng: random.Random) -> str | None:
    """Sentences of the story in another order, the question at the end or at the start."""
    if "\\" in text:
        return None
    *story, question = re.split(r"(?<=[.!?]) +(?=[A-Z])", " ".join(text.split()))
    if len(story) < 2:
        return None
    moved = list(story)
    while moved == story and len(set(story)) > 1:
        rng.shuffle(moved)
    return " ".join([question, *moved] if rng.random() < 0.3 else [*moved, question])


UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
"""
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"


def spelled(number: int, rng: random.Random) -> str:
    """A whole number below a thousand million in words."""
    for scale, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if number >= scale:
            head, rest = divmod(number, scale)
            tail = spelled(rest, rng) if rest else ""
            joint = " and " if rest and rest < 100 and rng.random() < 0.6 else " "
            return f"{spelled(head, rng)} {name}{joint}{tail}".rstrip()
    if number < 20:
        return UNITS.split()[number]
    tens, ones = divmod(number, 10)
    return TENS.split()[tens] + (rng.choice("- ") + UNITS.split()[ones] if ones else "")


def number_words(text: str, rng: random.Random) -> str | None:
    """Numbers in words, outside of formulas, or words as numbers."""
    pattern = (
        r"(?<![\d.,/$\\^_{}:+*=-])(?<!\$ )\b\d{1,3}(?:,\d{3}|\d{0,3})\b(?![\d%/:]|[.,-]\d|[a-z]|\s*[-+*/=^<>$\\{}])"
    )
    if "\\" in text or "[asy]" in text or _FORMULA.search(text):
        return None
    changed = re.sub(pattern, lambda found: spelled(int(found[0].replace(",", "")), rng), text)
    if changed == text or rng.random() < 0.3:
        words = {word: str(value) for value, word in enumerate(UNITS.split()) if value > 1}
        words.update({word: f"{value}0" for value, word in enumerate(TENS.split()) if value > 1})
        back = re.sub(r"(?<![\w-])[a-z]+(?![\w-])", lambda found: words.get(found[0], found[0]), text)
        changed = back if back != text else changed
    return changed


LAYOUT: list[tuple[str, Sequence[str]]] = [
    (r"\\[dt]?frac(?![a-z])", [r"\dfrac", r"\tfrac", r"\frac"]),
    (r"(?<![\\(a-z])\(", ["(", r"\left("]),
    (r"\\cdot(?![a-z])", ["·", r"\cdot "]),
    (r"\\leq?(?![a-z])", ["≤", r"\leq ", r"\le "]),
    (r"\\geq?(?![a-z])", ["≥", r"\geq ", r"\ge "]),
    (r"\\neq?(?![a-z])", ["≠", r"\neq ", r"\ne "]),
    (r"\\times(?![a-z])", ["×", r"\times "]),
    (r"\\pi(?![a-z])", ["π", r"\pi "]),
    (r"\\theta(?![a-z])", ["θ", r"\theta "]),
    (r"\\l?dots(?![a-z])", [r"\dots ", r"\ldots ", r"\cdots "]),
    (r"\^\\circ|\^\{\\circ\}", ["°", r"^{\circ}", r"^\circ "]),
    (r"(?<=\d),(?=\d{3}\b)", [",", "{,}", r",\!", ""]),
    (r"(?<=[a-z])'", ["'", "’"]),
    (r"(?<![a-z])\+(?![a-z])", [" + ", "+", r"\,+\,"]),
    (r"(?<=[a-z0-9}])=(?=[a-z0-9\\ -])", [" = ", "=", r"\;=\;"]),
    (r" ", [" ", " ", " ", "  ", "\n", "\u00a0"]),
    (r"\^2(?!\d)", ["²", "^{2}", "^2"]),
    (r"\^([a-z0-9])(?![a-z0-9])", [r"^{\1}", r"^\1"]),
    (r"_([a-z0-9])(?![a-z0-9])", [r"_{\1}", r"_\1"]),
    (r"\\frac\{(\d)\}\{(\d)\}", [r"\\frac\1\2", r"\\frac{\1}{\2}"]),
    (r"\\sqrt\{(\d)\}", [r"\\sqrt\1", r"\\sqrt{\1}"]),
]  # fmt: skip


def layout(text: str, rng: random.Random) -> str:
    """As another data set would write it: spacing, line breaks, macros, formula marks."""
    for pattern, forms in LAYOUT:
        if "\\" not in text and "$" not in text and forms[0].startswith("\\"):
            continue
        text = re.sub(pattern, lambda found, forms=forms: _expanded(found, rng.choice(forms)), text)
    text = re.sub(r"\\left\(((?:[^()\n])*)\)", r"\\left(\1\\right)", text)
    text = (
        text
        if text.count("\\left(") == text.count("\\right)")
        else text.replace("\\left(", "(").replace("\\right)", ")")
    )
    marks = rng.choice([r"$\1$", r"\\(\1\\)", r"\1", r"$ \1 $"])
    if "[asy]" not in text and "\\" in text and r"\$" not in text:
        text = re.sub(r"\$([^$]+)\$", marks, text)
    return text


def _expanded(found: re.Match[str], form: str) -> str:
    return found.expand(form) if re.search(r"\\\d", form) else form


def typo(text: str, rng: random.Random) -> str | None:
    """One or two letters of words slip."""
    for _ in range(rng.randint(1, 2)):
        places = [match.start() for match in re.finditer(r"(?<![\\a-zA-Z{])[a-zA-Z]{4,}", text)]
        if not places:
            return None
        place = rng.choice(places) + rng.randint(1, 2)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        elif kind == 1:
            text = text[:place] + text[place + 1 :]
        elif kind == 2:
            text = text[:place] + text[place] + text[place:]
        else:
            text = text[:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[place + 1 :]
    return text


def contraction(text: str, rng: random.Random) -> str | None:
    """Short forms written out, or the other way."""
    changed = text.replace("’", "'")
    for whole, short in rng.sample(CONTRACTIONS, len(CONTRACTIONS)):
        if re.search(rf"\b{short}\b", changed, re.IGNORECASE):
            return re.sub(rf"\b{short}\b", whole, changed, flags=re.IGNORECASE)
        if re.search(rf"\b{whole}\b", changed):
            return re.sub(rf"\b{whole}\b", rng.choice([short, short.replace("'", "’")]), changed)
    return None


def synonym(text: str, rng: random.Random) -> str | None:
    """A word or two by others of the same meaning."""
    there = [(old, new) for old, new in SYNONYMS if re.search(rf"\b{old}\b", text)]
    for old, new in rng.sample(there, min(len(there), rng.randint(1, 2))):
        text = re.sub(rf"\b{old}\b", new, text, count=1)
    return text if there else None


def renamed(text: str, rng: random.Random) -> str | None:
    """Somebody with another name throughout."""
    names = sorted({name for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text)} - CALENDAR)
    return (
        re.sub(rf"\b{rng.choice(names)}\b", rng.choice(["Zoe", "Ravi", "Olga", "Bartholomew"]), text) if names else None
    )


def letter_case(text: str, rng: random.Random) -> str:
    """Shouted, or whispered, but for commands."""
    change = rng.choice([str.upper, str.lower, str.title])
    return re.sub(r"(\\[a-zA-Z]+)|([a-zA-Z]+)", lambda found: found[1] or change(found[2]), text)


def punctuation(text: str, rng: random.Random) -> str:
    """Other marks at the ends and between."""
    text = re.sub(r"(?<=[a-z])[.?](?=\s|$)", lambda _: rng.choice([".", "", "!", " ...", " ?"]), text)
    return re.sub(r"(?<=[a-z]{2}),(?= )", lambda _: rng.choice([",", "", ";", " -"]), text)


def unicode_forms(text: str, rng: random.Random) -> str:
    """The same characters in other code points."""
    kind = rng.randrange(4)
    if kind == 0:
        return re.sub(r"\d", lambda found: chr(0xFF10 + int(found[0])), text)
    if kind == 1:
        return unicodedata.normalize("NFD", text).replace("'", "\u2019").replace(" ", "\u2009")
    if kind == 2:
        return text.replace("fi", "\ufb01").replace("'", "\u02bc").replace("-", "\u2010")
    place = rng.randrange(len(text))
    return "\ufeff" + text[:place] + "\u200b" + text[place:].replace("...", "…").replace('"', "“")


def filler(text: str, rng: random.Random) -> str | None:
    """`the` left out, a word more."""
    found = [pair for pair in ((" the ", " "), (". ", ". Now "), ("How many", "So how many")) if pair[0] in text]
    return text.replace(*rng.choice(found), 1) if found else None


def other_number(text: str, rng: random.Random) -> str | None:
    """A number is another."""
    numbers = [match.span() for match in re.finditer(r"(?<![\d.])\d+(?![\d.])", text)]
    if not numbers:
        return None
    start, end = rng.choice(numbers)
    return f"{text[:start]}{int(text[start:end]) + rng.randint(1, 9)}{text[end:]}"


def swapped_numbers(text: str, rng: random.Random) -> str | None:
    """Two numbers of a sentence have changed their places."""
    numbers = [match.span() for match in re.finditer(r"(?<![\d.,])\d+(?![\d.,])", text)]
    pairs = [(a, b) for a, b in pairwise(numbers) if text[slice(*a)] != text[slice(*b)]]
    if not pairs:
        return None
    (start, end), (begin, stop) = rng.choice(pairs)
    return text[:start] + text[begin:stop] + text[end:begin] + text[start:end] + text[stop:]


TURNS = [
    ("more", "fewer"), ("less", "more"), ("more than", "less than"), ("twice", "half"), ("half", "a third of"),
    ("hours", "minutes"), ("days", "weeks"), ("first", "second"), ("largest", "smallest"), ("smallest", "largest"),
    ("positive", "negative"), ("area", "perimeter"), ("sum", "product"), ("three", "four"), ("two", "five"),
    ("even", "odd"), ("minutes", "hours"), ("sold", "bought"), ("increases", "decreases"), ("at least", "at most"),
    ("before", "after"), ("older", "younger"), ("greater", "smaller"), ("maximum", "minimum"), ("all", "none"),
    ("least", "greatest"), ("dozen", "hundred"), ("gave", "took"), ("every", "every other"), ("gains", "loses"),
]  # fmt: skip
SIGNS = [(r"\\sin", r"\\cos"), (r"\\cos", r"\\tan"), (r"\+", "-"), ("=", r"\\le"), (r"(?<=\d) ?- ?(?=\d)", "+"),
         (r"\\frac", r"\\binom"), (r"\^2", "^3"), ("<", ">"), (r"\\cdot", "+"), (r"\\sqrt", r"\\log")]  # fmt: skip
UNIT_WORDS = ["inches", "feet", "yards", "miles", "meters", "kilometers", "centimeters", "pounds", "ounces", "grams"]
UNIT_GROUPS = [UNIT_WORDS, ["seconds", "minutes", "hours", "days", "weeks", "months", "years"], ["cents", "dollars"]]
QUESTIONS = [
    (r"How many ([a-z]+)( [^?]*)? (?:in total|altogether|in all)\?", r"How many more \1\2?"),
    (r"How many more ", "How many "), (r"How much more ", "How much "), (r"How many (?!more|times)", "How many more "),
    (r"How much (?!more|less)", "How much more "), (r"left\?", "gone?"), (r"What is the area", "What is the perimeter"),
    (r"What is the sum of", "What is the product of"), (r"per day", "per week"),
    (r"in a week\?", "in a month?"), (r"How long", "How far"),
]  # fmt: skip


def _one_of(pairs: list[tuple[str, str]], text: str, rng: random.Random) -> str | None:
    there = [pair for pair in pairs if re.search(pair[0], text)]
    return re.sub(*rng.choice(there), text, count=1) if there else None


def other_word(text: str, rng: random.Random) -> str | None:
    """A word on which the answer hangs is another."""
    return _one_of([(rf"(?<![a-z]){old}(?![a-z])", new) for old, new in TURNS], text, rng)


def other_sign(text: str, rng: random.Random) -> str | None:
    """A sign of a formula is another."""
    return _one_of(SIGNS, text, rng) if "$" in text else None


def other_variable(text: str, rng: random.Random) -> str | None:
    """One place of a variable holds another."""
    places = [match.start() for match in re.finditer(r"(?<![\\a-zA-Z{])[xyabn](?![a-zA-Z}])", text)]
    formulas = [place for place in places if text[:place].count("$") % 2]
    if not formulas:
        return None
    place = rng.choice(formulas)
    return text[:place] + rng.choice(sorted(set("xyz") - {text[place]})) + text[place + 1 :]


def other_unit(text: str, rng: random.Random) -> str | None:
    """A unit is another."""
    there = [(unit, group) for group in UNIT_GROUPS for unit in group if re.search(rf"\b{unit}\b", text)]
    if not there:
        return None
    unit, group = rng.choice(there)
    return re.sub(rf"\b{unit}\b", rng.choice([other for other in group if other != unit]), text, count=1)


def other_question(text: str, rng: random.Random) -> str | None:
    """Another thing is asked of the same story."""
    return _one_of(QUESTIONS, text, rng)


def other_role(text: str, rng: random.Random) -> str | None:
    """The question is about somebody else of the story."""
    body, found, question = text.rpartition(". ")
    named = [name for name in re.findall(r"\b[A-Z][a-z]{2,}\b", question)[1:] if name not in CALENDAR]
    others = sorted(set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", body)) - set(named) - CALENDAR)
    if not found or not named or not others or named[0] not in body:
        return None
    return body + found + question.replace(named[0], rng.choice(others))


def changed_number_or_name(text: str, rng: random.Random) -> str | None:
    """One number or one name (all its places) changed: a benchmark's problem nearly."""
    if rng.random() < 0.4 and (changed := renamed(text, rng)):
        return changed
    return other_number(text, rng) or renamed(text, rng)


def half(text: str, rng: random.Random) -> str | None:
    """A contiguous half of the words or more, alone or within other text."""
    words = text.split(" ")
    if len(words) < 16:
        return None
    size = rng.randint((len(words) + 1) // 2 + 1, len(words) - 2)
    start = rng.choice([0, len(words) - size, rng.randint(0, len(words) - size)])
    part = " ".join(words[start : start + size])
    return rng.choice(
        ["{}", "{} What do we know?", "Consider this. {}", "Tell me about this story: {} Who is it about?"]
    ).format(part)


SAME: tuple[Edit, ...] = (
    wrapped, wrapped_otherwise, money, percent, sentence_order, number_words, layout, typo, contraction, synonym,
    renamed, letter_case, punctuation, unicode_forms, filler,
)  # fmt: skip
ANOTHER: tuple[Edit, ...] = (
    other_number, swapped_numbers, other_word, other_sign, other_variable, other_unit, other_question, other_role,
)  # fmt: skip
QUOTED: tuple[Edit, ...] = (
    wrapped, wrapped_otherwise, number_words, layout, changed_number_or_name, half, letter_case, money, percent,
    unicode_forms, punctuation,
)  # fmt: skip


def changed(text: str, edits: Sequence[Edit], seed: str) -> list[tuple[str, str]]:
    """(name of the edit, changed text) of all edits that change `text`; depends on `seed` and the text alone."""
    made = []
    for edit in edits:
        result = edit(text, random.Random(f"{seed} {edit.__name__} {text}"))
        if result is not None and result != text:
            made.append((edit.__name__, result))
    return made
