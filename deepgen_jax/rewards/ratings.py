"""Reads the score that a judge gives an image, however it words that."""

from __future__ import annotations

import re

from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.replies import plain_text, split_reply

_NUMBER = r"(?<![0-9A-Za-z_.,+/-])([+-]?[0-9]{1,9}(?:\.[0-9]{1,9}|,[0-9]{1,2})?)(?![0-9A-Za-z_]|[.,][0-9]|-[A-Za-z])"
_OF = r"(?:(?:\s?(?:points?|stars?|分))?\s?(/|out of|of|满分)\s?(\d{1,9}(?:\.\d{1,9})?)(?![\w/]|[.,]\d))?(\s?%)?"
_VALUE = rf"{_NUMBER}{_OF}"
_RANGE_GOES_ON = r"(?!\s?(?:-|~|to|and|or)\s?\d)"
_UNIT = r"(?:\s?(?:points?|pts|stars?)\b|\s?分)?"
_ENDS = r"(?=\s?(?:$|[,:(-]|\b(?:because|since|as|for|overall|due|on|with|here)\b|因为))"
_LABEL = (
    r"(?:(?:the|my|final|overall|total|image|quality|alignment|average)\s){0,4}"
    r"(?:(?:score|rating|评分|得分|分数|打分|总分)(?:\s(?:of|for)\s[^0-9]{1,40}?\s?(?:is|:|=)|\s?(?:is|of|as|:|=|-(?=\s)|为|是)?)"
    r"|(?:rate|grade|answer|result|mark|evaluation|verdict)\s?(?:is|of|:|=))\s?"
)
#: The whole answer: "8", "8/10", "Score: 8".
_WHOLE = re.compile(rf"(?:{_LABEL})?{_VALUE}{_UNIT}\s?[.!]?", re.IGNORECASE)
#: Within a sentence: "the score is 8", "I give it an 8", "8/10", "8分".
_STATED = [
    re.compile(rf"{_LABEL}{_VALUE}{_RANGE_GOES_ON}", re.IGNORECASE),
    re.compile(
        rf"\b(?:give|rate|score|grade|assign|award)\s(?:(?:it|this|the|that|image|picture|one|a|an|score|rating|of|as|at)\s)"
        rf"{{0,6}}{_VALUE}{_UNIT}{_ENDS}{_RANGE_GOES_ON}",
        re.IGNORECASE,
    ),
    re.compile(
        rf"(?<!-\s)(?<!to\s){_NUMBER}\s?(/|out of|分\s?/|满分)\s?(\d{{1,9}}(?:\.\d{{1,9}})?)(?![\w/]|[.,]\d)()",
        re.IGNORECASE,
    ),
    re.compile(rf"{_NUMBER}()()()(?=\s?分(?!钟|之))"),
]
_OVERALL = re.compile(r"\b(?:overall|final|total|average)\b|总分|综合|最终", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|never|if|whether|\w+n't)\b|不|如果", re.IGNORECASE)

NO_NUMBER = Missing("no number in the reply")
SEVERAL_NUMBERS = Missing("several numbers in the reply")
OTHER_SCALE = Missing("number on another scale")
OUT_OF_RANGE = Missing("number out of range")


def read_score(reply: str, low: float, high: float) -> float | Missing:
    """The number from ``low`` to ``high`` that a judge's reply states; takes time linear in its length.

    It reads a number alone ("8", "8,5", "**8**", "8/10", "8 out of 10") and one that is said to be the score ("Score:
    8", "I rate it 8", "8分"), in the ``<answer>`` or, without one, in the reply. Other numbers are not the score: "3
    dogs", "about 8", "7-8". Of several scores the one that is called overall or final counts.

    Returns:
      The number, or `Missing`: no number, several ones, one on a scale that does not end at ``high``, or out of range.
    """
    parts = split_reply(reply)
    pieces = parts.answers if parts.answers or parts.unfinished is not None else (parts.rest,)
    # The scale that was asked for is no score: "Score (0-10): 8".
    scale = re.compile(
        rf"(?:\bon a scale )?(?:\b(?:of|from|between) )?(?<![\d.]){low:g}\s?(?:-|~|to|and)\s?{high:g}(?![\d.])",
        re.IGNORECASE,
    )
    scores = [_scores(re.sub(" +", " ", scale.sub(" ", plain_text(piece))).strip(" ,:"), high) for piece in pieces]
    if not scores or not scores[0] or any(found != scores[0] for found in scores):
        return NO_NUMBER
    if len(scores[0]) > 1:
        return SEVERAL_NUMBERS
    value = scores[0].pop()
    if value is None:
        return OTHER_SCALE
    return value if low <= value <= high else OUT_OF_RANGE


def _scores(text: str, high: float) -> set[float | None]:
    """The scores in text without markup; None for one on a different scale."""
    if whole := _WHOLE.fullmatch(text):
        return {_value(whole, high)}
    stated: set[float | None] = set()
    overall: set[float | None] = set()
    for sentence in re.split(r"(?<!\d)[.!?;\n]|[.!?;\n](?!\d)", text):
        if _NEGATION.search(sentence):
            continue
        values = {_value(match, high) for pattern in _STATED for match in pattern.finditer(sentence)}
        (overall if _OVERALL.search(sentence) else stated).update(values)
    return overall or stated


def _value(match: re.Match[str], high: float) -> float | None:
    number, _, scale, percent = match.groups()[-4:]
    value = float(number.replace(",", "."))
    ends = 100.0 if percent else float(scale) if scale else high
    return value if ends == high else None
