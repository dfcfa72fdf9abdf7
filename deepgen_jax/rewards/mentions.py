"""Marks which of two images a judge's text mentions: "Image 1", "the second one", "图1"; ①, ② or, for both, ⑫."""

from __future__ import annotations

import re

FIRST, SECOND, BOTH = "①②⑫"

#: What judges call an image.
NOUN = r"(?:image|img|picture|pic|photo|figure|option|candidate|version|output|response)"
ZH_NOUN = r"(?:图像|图片|照片|圖像|圖片|图|圖)"
_MEASURE = r"(?:张|張|幅|个|個|副|款)"
_JOINED = r"(?:and|or|nor|&|和|与|與|或者?|跟|以及|还是)"
#: Not "1" of 12, 1.5, 1/2 or 1st.
_NUMBER_ENDS = r"(?![\d%]|[.,:/]\d|\s*/\s*\d|(?:st|nd|rd|th)\b)"
#: Not "the first glance".
_NO_IMAGE = (
    r"(?!\s(?:place|glance|sight|thing|reason|impression|time|step|look|point|aspect|half|row|prompt|two|few"
    r"|criterion)\b)"
)


def _mention(digit: str, word: str, ordinals: str, rank: str, letter: str, zh: str, zh_rank: str) -> re.Pattern[str]:
    # 一 also begins words such as 一样 (alike).
    zh_number = rf"(?:{digit}(?!\d)|{zh}(?![样樣致般直些共起定点點]))"
    forms = (
        rf"<?\b(?:the\s)?{NOUN}\s?[:\-]?\s?(?:no\.?\s?|number\s|nr\.?\s?)?{digit}{_NUMBER_ENDS}>?",
        rf"\b(?:the\s)?{NOUN}\s{word}\b",
        rf"\b(?:the\s)?{NOUN}[\s\-]?(?-i:{letter})\b",
        rf"\b(?:the\s)?(?:{ordinals})\s(?:one|{NOUN})\b",
        rf"\bthe\s(?:{ordinals}|{rank})\b{_NO_IMAGE}",
        rf"{ZH_NOUN}\s?(?:{zh_number}|(?-i:{letter}))",
        rf"第\s?(?:{digit}|{zh})\s?{_MEASURE}的?{ZH_NOUN}?",
        zh_rank,
    )
    return re.compile("|".join(forms), re.IGNORECASE)


_FIRST = _mention("1", "one", "first|1st", "former", "A", "一", "前者")
_SECOND = _mention("2", "two", "second|2nd", "latter", "B", "二", "后者|後者")
_BOTH = re.compile(
    rf"\b{NOUN}s\s1\s?{_JOINED}\s?2\b|[①②]\s?{_JOINED}\s?(?:[①②]|[12]\b)"
    rf"|\bboth\b(?:\s(?:of\s)?(?:the\s|these\s|them\b)?(?:two\s)?(?:{NOUN}s)?)?|\b(?:the|these)\stwo\b(?:\s{NOUN}s)?"
    rf"|(?:这|這)?(?:两|兩|二)(?:者|{_MEASURE}{ZH_NOUN}?|{ZH_NOUN})(?:都|均)?",
    re.IGNORECASE,
)
#: "1 is better", "First is better".
_SUBJECT = re.compile(
    r"(?:^|(?<=\n)|(?<=[.,;:!?]\s))(?:number\s|no\.?\s?)?(?:([12])|(first|second))"
    r"(?=\s(?:is|was|wins|looks|seems)\b|\s?[<>]\s?[12①②])",
    re.IGNORECASE,
)


def mark_mentions(text: str) -> str:
    """Text with the mentions of the images replaced by ①, ② and ⑫."""
    text = _SUBJECT.sub(lambda match: FIRST if match[0].lower()[-1] in "1t" else SECOND, text)
    text = _BOTH.sub(BOTH, _SECOND.sub(SECOND, _FIRST.sub(FIRST, text)))
    return " ".join(text.split(" "))
