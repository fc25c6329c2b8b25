r"""What is asked: a problem without the instructions, labels, marks and worked examples around it.

Instructions say how to answer, never what: they speak of the answer, the problem or the reader, nearly all their words
are common in such sentences, and the others are neither numbers, names, units nor what is to be found. Only such
sentences and labels go, from both ends; within a problem nothing is touched but marks of lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from sft.data.text.spelling import TURNING, plain_words

# What makes a sentence an instruction,
_HEAD = re.compile(
    r"\b(?:answer(?:s|ing)?|step[- ]by[- ]step|stepwise|(?:all|each|every|your|intermediate|detailed|more) steps?"
    r"|problems?|questions?|boxed|solv(?:e|ing) (?:this|it|the following)|the following|report the|remember|the result"
    r"|(?:your|the final|final) (?:\w+ )?(?:work|solutions?|result|number|value|thinking|thoughts?|output)"
    r"|(?:full|detailed|complete|concise|write a|correct and \w+) solutions?|show (?:\w+ )?work(?:ings?)?|work it out"
    r"|reason|reasoning|think(?! of)|careful(?:ly)?|concise(?:ly)?|brief|in english|guess|respond|responses?|reply"
    r"|explain|explaining|explanations?|justify|instructions?|tasks?|exercise|puzzle|homework|assignment|please"
    r"|thanks?|hi|hello|hey|greetings|help|helpful|assistant|tutor|expert|(?:are|as) an? (?:\w+ )?mathematician"
    r"|calculators?|calculations?|(?:show|tell) me|understand|python|code|program|json|latex|markdown|tags"
    r"|format(?:ted)?)\b"
)
# how many of its words have to be of these, and which make it a part of the problem where others are there too.
_KNOWN_SHARE = 0.65
_WORDS = """
    a about above act after ai all also always am an and answer answering answers any approach are as ask asked
    asking asks assign assist assistant at back be before begin below best between box boxed brackets break breath
    brief briefly but by calculate calculation calculations calculator can careful carefully chain challenge check
    choice clear clearly code come common complete completely concise concisely conclude consider conversation
    correct correctly could decimal deep describe describes detail detailed details directly do does doesn don
    double down each efficiently either else enclose enclosed end english ensure enter every exact exactly exam
    example exercise expert explain explaining explanation express expressed expression feel final finally find
    finish first following follows for form format formatted fraction from full fully gave get give given gives good
    got grade great greetings guess guide have hello help helpful here hey hi homework hope how human i if in
    include including input inside instead instruction instructions integer intermediate into is it its itself job
    json just justify keep know language last latex let letter level like line lines list logic logical logically
    look make makes marks math mathematical mathematician mathematics maths may me message more much must my need
    needed needs never new next no not note nothing now number numerical object of on once one only or order
    organized other out output own part please possible precise precisely prepare present problem problems process
    produce program prompt proof properly provide provided put puzzle python question questions quickly quotes read
    ready reason reasoning regardless remember reply report request respond response responses result return right
    rigorous role round s same say school second see sentence sentences separate separately should show showing
    simple simplest simplify single skilled small so solution solutions solve solved solver solves solving some
    state statement step steps still student style such sure symbol system t tags take task tasks teacher tell text
    than thank thanks that the then there therefore these think thinking this through time to together translate
    true try trying tutor under understand unit units until up us use used user using value verify very want was way
    we well what where which will with within without word words work working would write writing written wrong yes
    you your yourself
"""
_KNOWN = frozenset(_WORDS.split())
_ASKS = frozenset(
    "express round simplify find compute calculate determine evaluate how what he she his her him tenth hundredth"
    " thousandth".split()
)
_WORD = re.compile(r"(?<![a-z]['’])[^\W_]+")  # of don't and let's the word before the apostrophe
_FORMULA = re.compile(r"\$\s*[^\W_]|\\[a-z(\[]")
# Labels stand for themselves; a letter does only before a colon or a dot.
_LABEL = re.compile(
    r"[\W_]*(?:textbf\W)?(?:(?:math(?:ematics)? |word |quick )*(?:problem|question|exercise|task|puzzle"
    r"|riddle|challenge|example|text|instructions?|prompt|input|context|ex\.)(?: (?:no\.? ?|#)?\d{1,4}(?:\.\d+)?)?"
    r"(?: statement)?|a(?=\W*[:.])|q\d{0,3}(?=\W*[:.])|math(?:ematics)?|step \d|(?:detailed )?thinking o(?:n|ff)"
    r"|/?(?:no_)?think|user|human|student|teacher|system|assistant|model|completion|system prompt"
    r"|\d{1,2} (?:points?|marks?|pts)"
    r"|(?:final |correct |my |your |the )?(?:answer|solution|response|output|reasoning|explanation)"
    r"|(?:\d{4} )?(?:amc|aime|imo|hmmt|usamo|olympiad)\b[^.?!]{0,20}|(?:given|find)(?=\W*:))[\W_]*",
    re.IGNORECASE,
)
# Tags and chat marks; those within a sentence are no ends of it.
_MARKS = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?[a-zA-Z][a-z_]*\d?(?:\s[a-z]+=\"[^<>\"]{0,60}\")*\s?/?>"
    r"|^(?:difficulty|source|level|topic|subject|category|type|tags?)\s?:.{0,60}$",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE = re.compile(r"</?(?:think|answer|b|i|em|strong|u|span|code|tt)\b")
_LIST_MARK = re.compile(r"(?:\A|[.?!:;]\n)\s*(?:[>*+•-]|\(?\d{1,2}[.)])\s+")
_QUESTION = re.compile(r"^[^\w\n]{0,9}(?:q|question|problem|input)(?:\s\d+)?\W{0,2}:", re.IGNORECASE | re.MULTILINE)
_ANSWER = re.compile(r"^[^\w\n]{0,9}(?:a|answer|solution|output)\W{0,2}:", re.IGNORECASE | re.MULTILINE)
# What is in the box, or stands for the answer, is no part of a problem; nor are the numbers of steps.
_PLACEHOLDER = re.compile(
    r"\\{0,2}boxed\s?\{(?:[^{}]|\{[^{}]{0,40}\}){0,40}\}|\[\[?\w{1,9}\]?\]|(?<=nswer is)\W{0,4}\w{1,2}(?![^\W_])"
    r"|(?<=nswer is:)\W{0,4}\w{1,2}(?![^\W_])|(?<=nswer:)\W{0,3}[xn](?!\w)|(?<=boxed )\d+"
    r"|\b(?:e\.g|i\.e)\.|(?<=between )\d+ and \d+|\d+(?= (?:steps?|words|sentences|tokens|lines)\b)|(?<=step )\d+"
)
_ASKED = re.compile(
    r"\W*(?:can|could|would|will|please|how (?:do|would|can|should) (?:you|i|we) (?:solve|answer)|what(?:'s|’s| is)"
    r" (?:the |your )?(?:(?:final |correct )?answer|solution))\b"
)
# Where a sentence or a line begins; a request after a sentence without its mark; and one within a sentence.
_SENTENCE = (
    r"(?<=[.!?:;\])])[\"'”’)\]*$}]{0,6}(?:\s+|$)"
    r"|(?<!\s)[^\S\n]*\n\s*(?:(?![\sa-z])|(?=(?:assistant|user|system|model)\b))"
)
_BEGINNING = re.compile(_SENTENCE)
_REQUEST = re.compile(
    rf"{_SENTENCE}|(?<!\s)\s+(?=[(\"'“]?(?:Please|Let's|Let’s|Let us|Think|Solve|Put|Give|Show|Explain|Return|Answer"
    r"|Write|Provide|Present|Make|Remember|Reason|Enclose|Respond|Your|Output|Use|Express|Do not"
    r"|Thanks|Thank you|Take|Work|Break|Can you|Could you|Be sure|Ensure|A:)(?![^\W_]))"
    r"|(?<!\s),?\s+(?=(?:and|then)\s(?:then\s)?(?:put|give|write|present|provide|report|enclose|box|explain|show)\s)"
)


def core(text: str) -> str:
    """`text` without what is said around the problem; all of it where nothing else would be left."""
    plain = _LIST_MARK.sub(lambda found: found[0][:2] if found.start() else "", text)
    if ":" in text or "<" in text or "[" in text:
        plain = _after_examples(_MARKS.sub(lambda found: " " if _INLINE.match(found[0]) else "\n", plain))
    start = _last(_first_pieces(plain))
    rest = plain[start:]
    left = rest[: len(rest) - _last(_last_pieces(rest))].strip()
    return left if _WORD.search(left) else text


def _after_examples(text: str) -> str:
    """The last of several questions where one before it has an answer."""
    asked = list(_QUESTION.finditer(text))
    if len(asked) > 1 and _ANSWER.search(text, asked[0].end(), asked[-1].start()):
        return text[asked[-1].start() :]
    return text


def _first_pieces(text: str) -> Iterator[tuple[str, int]]:
    """(sentence, where it ends) from the start on."""
    start = 0
    for found in _BEGINNING.finditer(text):
        yield text[start : found.end()], found.end()
        start = found.end()


def _last_pieces(text: str) -> Iterator[tuple[str, int]]:
    """(sentence, how far from the end of the text it begins) from the end on."""
    begin = max(text.rfind(mark, 0, len(text.rstrip()) - 1) for mark in ".!?:\n") + 1
    if text.rstrip().endswith("?") and not _ASKED.search(text[begin:].lower()):
        return  # as with nearly all texts: spares the search
    end = len(text)
    for start in reversed([found.end() for found in _REQUEST.finditer(text)]):
        yield text[start:end], len(text) - start
        end = start


def _last(pieces: Iterable[tuple[str, int]]) -> int:
    """How far the instructions at the beginning of `pieces` go."""
    reached, joined = 0, False
    for piece, position in pieces:
        plain = piece
        if any(mark in piece for mark in ("boxed", "nswer", "tep", "entence", "word", "[", "e.g.")):
            plain = _PLACEHOLDER.sub(lambda found: " boxed " if "boxed" in found[0] else " ", piece)
        words = _WORD.findall(plain.lower())
        label = len(words) < 7 and _LABEL.fullmatch(piece) is not None
        if not label and _is_content(plain, words):
            break
        joined = label or (joined and not words) or _is_instruction(" ".join(plain.lower().split()), words)
        reached = position if joined else reached
    return reached


def _is_content(piece: str, words: list[str]) -> bool:
    """Whether a sentence has what instructions don't: a question, a number, a formula, a unit, a name."""
    others = [word for word in words if word not in _KNOWN]
    return ("?" in piece and not _ASKED.match(piece.lower())) or (
        bool(others)
        and (
            not _ASKS.isdisjoint(words)
            or _FORMULA.search(piece) is not None
            or not TURNING.isdisjoint(plain_words(others))
            or any(len(word) == 1 or word[0].isdigit() for word in others)
            or (words[0] != "you" and _has_name(_WORD.findall(piece)[1:]))
        )
    )


def _has_name(words: list[str]) -> bool:
    """Whether of `words`, that begin no sentence, one is a name: where most have capitals these say nothing."""
    capital = [word.lower() for word in words if word[0].isupper() and not word.isupper()]
    return 2 * len(capital) < len(words) and not _KNOWN.issuperset(capital)


def _is_instruction(piece: str, words: list[str]) -> bool:
    known = sum(word in _KNOWN for word in words)
    return bool(words) and words[0] in _KNOWN and known >= _KNOWN_SHARE * len(words) and _HEAD.search(piece) is not None
