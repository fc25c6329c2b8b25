"""What is asked: a problem without the instructions, labels and chat marks around it.

Instructions say how to answer, never what: all their words are of a closed list, and some of them speak of the answer,
the problem or the reader. Only such sentences and labels go, from both ends; nothing within a problem is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# What makes a sentence an instruction,
_HEAD = re.compile(
    r"\b(?:answer(?:s|ing)?|step[- ]by[- ]step|stepwise|(?:all|each|every|your|intermediate|detailed|more) steps?"
    r"|problems?|questions?|boxed|solve (?:this|it|the following)"
    r"|your (?:full |own )?(?:work|solution|thinking|thoughts?|result)"
    r"|(?:full|detailed|complete|concise|write a) solution|show (?:\w+ )?work(?:ings?)?|reason|reasoning|think(?! of)"
    r"|carefully|careful|concise|in english|guess|respond|responses?|reply|explain|explaining|explanation|justify"
    r"|instructions?|tasks?|exercise|puzzle|homework|assignment|please|thanks?|hi|hello|hey|greetings|help|assistant|tutor|expert|mathematician"
    r"|calculators?|calculations|python|format)\b"
)
# if it has only words of these.
_WORDS = """
    a about above accurate accurately after ai all also always am an and answer answering answers any approach
    appropriate appropriately are as ask asked asking asks assignment assist assistant at back be before begin below
    best between box boxed break breath brief briefly but by calculate calculation calculations calculator
    calculators can careful carefully chain challenge check choice clear clearly code command common competition
    complete completely completes completion complex concise concisely conclude consider correct correctly could
    decimal deep describe describes description detail detailed details did directly do does doesn don double down
    each efficiently either else enclose enclosed end english ensure enter entire every exact exactly exam example
    exercise expert explain explaining explanation explicit explicitly express expressed expression fellow final
    finally first following follows for form format formatted fraction from full fully gave get give given gives
    good got grade great greetings guess guide have hello help helpful here hey hi his homework hope how human i if
    immediately in include including input inside instead instruction instructions integer intermediate into is it
    its itself job just justify keep know language last latex learning let letter level like line lines list logic
    logical logically look make makes marks math mathematical mathematician mathematics maths me message minimal
    model more must my need needed needs new next no not note nothing now number numbered numeric numerical of on
    once one only or order organized other out output own paired part place please precise precisely prepare present
    problem problems process produce professional prompt proof properly provide provided put puzzle python q
    question questions quickly quotation quotes read ready reason reasoned reasoning regardless remember reply
    report request requested respond response responses result return right rigorous say school second see self
    sentence sentences separate separately should show showing shown simple simplest simplified simplify single
    skilled small smaller smart so solution solve solved solver solves solving some something state statement step
    steps stepwise still stuck student style such sure surrounded symbol system tag tags take task tasks teacher
    tell text than thank thanks that the their them then there therefore these things think thinking this thorough
    thoroughly thought thoughts through time to together trained true try trying tutor unit units unsure until up us
    use used user using value verify very via want was way we well what where which will with within without word
    words work working workings would wrap write writing written yes you your yourself
"""
_KNOWN = frozenset(_WORDS.split())
_WORD = re.compile(r"(?<![a-z]['’])[^\W_]+")  # of don't and let's the word before the apostrophe
# Labels stand for themselves; a letter does only before a colon.
_LABEL = re.compile(
    r"[\W_]*(?:(?:math(?:ematics)? |word )*(?:problem|question|exercise|task|puzzle|example|instructions?|prompt|input)"
    r"(?: (?:no\.? ?|#)?\d{1,4})?(?: statement)?|q(?=\W*:)"
    r"|user|human|student|teacher|system|assistant|model|completion|a(?=\W*:)|system prompt"
    r"|(?:final |correct |my |your |the )?(?:answer|solution|response|output|reasoning|explanation)|\d{1,2}\.)[\W_]*",
    re.IGNORECASE,
)
_MARKS = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|</?(?:problem|question|instructions?|user|system|task|prompt|query|exercise|input|text)>",
    re.IGNORECASE,
)
# What is in the box, or stands for the answer, is no part of a problem; nor are the numbers of steps.
_PLACEHOLDER = re.compile(
    r"\\{0,2}boxed\s?\{(?:[^{}]|\{[^{}]{0,40}\}){0,40}\}|(?<=nswer is)\W{0,4}\w{1,2}(?![^\W_])"
    r"|(?<=nswer is:)\W{0,4}\w{1,2}(?![^\W_])|(?<=nswer:)\W{0,3}[xn](?!\w)|(?<=boxed )\d+"
    r"|(?<=between )\d+ and \d+|\d+(?= steps?\b)|(?<=step )\d+"
)
_ASKED = re.compile(
    r"\W*(?:can|could|would|will|please|how (?:do|would|can|should) (?:you|i|we) (?:solve|answer)|what(?:'s|’s| is)"
    r" (?:the |your )?(?:(?:final |correct )?answer|solution))\b"
)
# Where a sentence or a line begins; a request after a sentence without its mark; and one within a sentence.
_SENTENCE = r"(?<=[.!?:;\]])[\"'”’)\]*$]{0,6}(?:\s+|$)|\n\s*"
_BEGINNING = re.compile(_SENTENCE)
_REQUEST = re.compile(
    rf"{_SENTENCE}|(?<!\s)\s+(?=[(\"'“]?(?:Please|Let's|Let’s|Let us|Think|Solve|Put|Give|Show|Explain|Return|Answer"
    r"|Write|Provide|Present|Make|Remember|Reason|Enclose|Respond|Your|Output|Use|Express|Do not"
    r"|Thanks|Thank you|Take|Work|Break|Can you|Could you|Be sure|Ensure|A:)(?![^\W_]))"
    r"|(?<!\s),?\s+(?=(?:and|then)\s(?:then\s)?(?:put|give|write|present|provide|report|enclose|box|explain|show)\s)"
)


def core(text: str) -> str:
    """`text` without what is said around the problem; all of it where nothing else would be left."""
    plain = _MARKS.sub("\n", text) if "<" in text or "[" in text else text
    start = _last(_first_pieces(plain))
    rest = plain[start:]
    left = rest[: len(rest) - _last(_last_pieces(rest))].strip()
    return left if _WORD.search(left) else text


def _first_pieces(text: str) -> Iterator[tuple[str, int]]:
    """(sentence, where it ends) from the start on; none where the text begins with another word than instructions."""
    start, word = 0, _WORD.search(text)
    if word is None or word[0].lower() not in _KNOWN:
        return
    for found in _BEGINNING.finditer(text):
        yield text[start : found.end()], found.end()
        start = found.end()


def _last_pieces(text: str) -> Iterator[tuple[str, int]]:
    """(sentence, how far from the end of the text it begins) from the end on."""
    tail = text[-80:].lower()
    words = _WORD.findall(tail)
    if words and words[-1] not in _KNOWN and "boxed" not in tail and "answer" not in tail:
        return  # as with nearly all texts: spares the search
    end = len(text)
    for start in reversed([found.end() for found in _REQUEST.finditer(text)]):
        yield text[start:end], len(text) - start
        end = start


def _last(pieces: Iterable[tuple[str, int]]) -> int:
    """How far the instructions at the beginning of `pieces` go."""
    reached, joined = 0, False
    for piece, position in pieces:
        lowered = piece.lower()
        if "boxed" in lowered or "answer" in lowered or "step" in lowered:
            lowered = _PLACEHOLDER.sub(lambda found: " boxed " if "boxed" in found[0] else " ", lowered)
        words = _WORD.findall(lowered)
        label = len(words) < 7 and _LABEL.fullmatch(piece) is not None
        if not label and not _KNOWN.issuperset(words):
            break
        joined = label or (joined and not words) or _is_instruction(lowered)
        reached = position if joined else reached
    return reached


def _is_instruction(piece: str) -> bool:
    return _HEAD.search(piece) is not None and ("?" not in piece or _ASKED.match(piece) is not None)
