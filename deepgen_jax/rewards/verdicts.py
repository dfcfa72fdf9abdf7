"""Reads which of two images a judge prefers, however it words that.

The images are "Image 1" and "Image 2", "the first one", "the 2nd picture", "Image A", "图1", "第二张" and the like (see
`mentions`). A verdict is one of

* a mention alone, as the whole answer or its last sentence: ``**Image 2**``, ``1``, ``First``, ``Answer: B``;
* a comparison: "Image 1 is better", "Image 2 wins", "I prefer the first one", "图1更好". "Image 2 is worse" and
  "Image 2 is not as good" prefer image 1, since there are only two;
* a tie, where it is stated: "It's a tie", "Both images are equally good", "Neither is better", "平局".

Questions, conditions, negations and hedges decide nothing ("I don't think Image 1 is better", "Image 1 could be
better"). "Better in colour" counts unless a "but" follows. Where comparisons disagree, those after the
last "overall" or "therefore" count. Everything else is unreadable, for a reason that is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.mentions import NOUN, ZH_NOUN, mark_mentions
from deepgen_jax.rewards.replies import plain_text, split_reply

Verdict = Literal["first", "second", "tie"]

EMPTY = Missing("empty reply")
CUT_OFF = Missing("reply cut off while thinking")
NO_VERDICT = Missing("no verdict in the reply")
CONTRADICTION = Missing("contradictory verdicts in the reply")


def read_verdict(reply: str | None) -> Verdict | Missing:
    """The verdict of a judge's reply, or why there is none; takes time linear in its length.

    ``<answer>`` takes precedence over the text around it, and that over the reasoning inside ``<think>``.
    """
    parts = split_reply(reply)
    answers = parts.answers if parts.unfinished is None else (*parts.answers, parts.unfinished)
    if not any(piece.strip() for piece in (*answers, parts.rest)):
        return CUT_OFF if parts.cut_off else EMPTY
    for pieces in (answers, (parts.rest,)):
        readings = [_read(plain_text(piece)) for piece in pieces]
        verdicts = {reading for reading in readings if not isinstance(reading, Missing)}
        if len(verdicts) > 1 or CONTRADICTION in readings:
            return CONTRADICTION
        if verdicts:
            return verdicts.pop()
    return NO_VERDICT


# Comparisons, in lower case with mentions marked. A group [①②] is the image spoken of.

_ADVERB = (
    r"(?:(?:also|still|the|a|an|much|far|bit|little|lot|way|just|by far|clear|clearly|significantly|slightly|definitely"
    r"|certainly|obviously|overall|generally|marginally|noticeably|considerably|substantially|visibly|undoubtedly"
    r"|somewhat|simply|really|truly|decidedly|strongly|in my (?:opinion|view)|to me|to be|more"
    r"|(?:\w{1,20}er|more \w{1,20}) and)\s)"
)
_ZH_ADVERB = (
    r"(?:(?:明显|明顯|显然|顯然|总体|總體|整体|整體|稍微|略微?|稍|相对|绝对|确实|的?(?:整体)?(?:质量|效果|質量)|比较|比較|要|是|会|就"
    r"|看起来|显得|也|上|来说|而言|都)\s?){0,6}"
)
_LINK = r"(?:(?:is|was|does|has done|looks|seems|appears|feels|comes out|stands out as|remains)\s)"
_SUBJECT = r"([①②])\s?"
#: Aspects in which an image can be "more ..." or "less ...".
_ASPECT = (
    r"(?:accurate|accurately|aligned|appealing|aesthetic|beautiful|clear|clearly|closely|coherent|consistent|convincing"
    r"|detailed|faithful|faithfully|natural|pleasing|precise|precisely|realistic|relevant|suitable)"
)
_MATCHES = (
    r"(?:follows|matches|captures|reflects|represents|depicts|adheres to|aligns with|fits|satisfies|meets|renders"
    r"|shows)"
)
#: A few words that change nothing.
_WORDS = r"(?:(?!\b(?:but|not|no|could|would|might|may|although|though|if)\b)[^①②⑫,]){0,60}?"
_GOOD = r"(?:better|best|superior|preferred|preferable|stronger|favou?red|winner|winning)"
_BAD = r"(?:worse|worst|inferior|weaker|weakest|loser|beaten|outperformed|surpassed)"
_WINS = r"(?:wins?|won|beats|outperforms|surpasses|outshines|edges out|gets my vote|is ahead)"
_LOSES = r"(?:loses|lost|is not as good|isn't as good|is less (?:good|preferable|preferred))"
_ZH_GOOD = (
    r"(?:(?:更|较|較|最)(?:好|优|優|佳|出色)|更胜一筹|胜出|勝出|获胜|獲勝|完胜|赢|胜"
    r"|好(?:一些|一点|得多|很多)?(?=\s|$))"
)
_ZH_BAD = r"(?:(?:更|较|較|最|稍|略)(?:差|弱|糟)|差(?:一些|一点|得多|很多)?(?=\s|$)|输|落败)"
_Patterns = tuple[tuple[re.Pattern[str], bool], ...]


def _compiled(before: str, better: tuple[str, ...], worse: tuple[str, ...]) -> _Patterns:
    """(pattern, whether it says that the image is the worse one)."""
    return tuple((re.compile(before + pattern), pattern in worse) for pattern in (*better, *worse))


#: Comparisons of the images as wholes, or, as `_WHOLE` decides, in one aspect.
_STATEMENTS = _compiled(
    _SUBJECT,
    (
        rf"{_LINK}?{_ADVERB}{{0,4}}{_GOOD}\b",
        rf"{_ADVERB}{{0,3}}{_WINS}\b",
        r"(?:is\s)?(?:the one\s)?(?:that\s)?i (?:would )?(?:prefer|choose|pick)\b",
        _ZH_ADVERB + _ZH_GOOD,
    ),
    (rf"{_LINK}?{_ADVERB}{{0,4}}{_BAD}\b", rf"{_ADVERB}{{0,3}}{_LOSES}\b", _ZH_ADVERB + _ZH_BAD),
)
#: Comparisons in one aspect.
_ASPECTS = _compiled(
    _SUBJECT,
    (
        rf"{_ADVERB}{{0,2}}{_MATCHES}\b{_WORDS}\b(?:better|best|more {_ASPECT})\b",
        rf"(?:{_LINK}{_ADVERB}{{0,3}})?more {_ASPECT}\b",
        _ZH_ADVERB + r"更(?:符合|贴合|清晰|准确|自然|美观|真实|接近|贴近)",
    ),
    (rf"{_LINK}{_ADVERB}{{0,3}}less {_ASPECT}\b",),
)
#: What follows a comparison of the images as wholes; anything else limits it, as in "better in colour".
_WHOLE = re.compile(
    r"\s?(?:$|[-①②]|了|的|因|\b(?:overall|because|since|as|due|here|by|for me|to|image|one|choice|option|picture|photo"
    r"|result|version|candidate|of|between|and|or|but|while|whereas|although|though|which|match"
    r"|in (?:my|general|every|all))\b)"
)
_NOWHERE = re.compile(r"\s?(?:only|(?:in|at|for|with) (?:no|neither|few|hardly any))\b")

_LABEL = (
    r"(?:answer|verdict|winner|choice|pick|preference|preferred|conclusion|result|decision|judge?ment|vote|best|better"
    r"|superior|stronger)"
)
_ZH_LABEL = r"(?:答案|结论|結論|结果|胜者)"
_IS = rf"(?:\s(?:{NOUN}|one|choice|of\s⑫))?\s(?:is|was|would be|goes to|=)\s(?:that\s)?"
#: Nothing follows that may belong to another statement, as in "Conclusion: image 2 lacks the text".
_DECIDED = r"(?=\s?(?:$|-|因为|\b(?:because|since|as|due|for|by|overall|here)\b))"
_CHOICES = _compiled(
    "",
    (
        rf"\b{_LABEL}{_IS}([①②]){_DECIDED}",
        r"\b(?:prefer|choose|chose|pick|select|favou?r|go(?:ing)? with|(?:vote|win) goes to|vote for)\s([①②])(?!')",
        r"\blike\s([①②])\s(?:more|better|best)\b",
        r"\bsay\s([①②])\s?$",
        rf"(?:(?:更|较|最)(?:好|优|佳)|胜出|获胜|选择?|喜欢|推荐|偏好)的(?:那张|一张|{ZH_NOUN})?(?:是|为|is)\s?([①②])",
        r"(?:选择?|選擇?|喜欢|喜歡|偏好|倾向于?|推荐)(?:是|为)?\s?([①②])",
        rf"(?:{_ZH_LABEL}|最终)\s?(?:是|为|is)?\s?([①②]){_DECIDED}",
    ),
    (
        rf"\b(?:worse|weaker|inferior|loser|worst){_IS}([①②]){_DECIDED}",
        rf"(?:(?:更|较|最)差|落败|输)的(?:那张|一张|{ZH_NOUN})?(?:是|为|is)\s?([①②])",
    ),
)
_TIES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?:⑫|\bthey)\s(?:{_LINK}|are\s|were\s|look\s|seem\s)?{_ADVERB}{{0,2}}(?:equal|tied|identical|the same"
        r"|evenly matched|on par|indistinguishable|equivalent)(?:\s(?:in|of) (?:overall )?quality)?\s?$",
        r"\bequally (?:good|bad|well|matched|strong|preferable|great|poor)\s?$|\b(?:the same|equal) quality\s?$",
        r"(?:\b(?:it's|it is|this is|(?:result|verdict|answer|winner) is|ends? in)"
        r"|\b(?:call|judge|count|rate|score|consider) (?:it|this|them)(?: as)?)\s(?:a\s)?(?:tie|draw)\b",
        rf"\bneither(?:\s(?:of them|one|⑫|{NOUN}))?\s(?:is\s(?:\w+\s)?better|wins|is preferred)\b",
        r"\bno (?:clear |single |real |overall )?(?:winner|preference)\b",
        r"\bno (?:\w+ )?difference(?: in (?:overall )?quality)?\s?$",
        r"平局|打平|平手|不分上下|不相上下|难分(?:高下|伯仲|胜负)|旗鼓相当|差不多|(?:同样|一样|同樣|一樣)好",
        r"⑫\s?(?:完全|几乎)?(?:一样|相同|相当)\s?$",
    )
)

# What makes a sentence or a clause decide nothing.

_CONDITION = re.compile(r"\b(?:if|whether|unless|depend(?:s|ing)?|either)\b|如果|假如|是否|除非|取决")
_DISBELIEF = re.compile(
    r"\b(?:(?:don't|do not|didn't|did not|can't|cannot|wouldn't|would not|won't) (?:think|believe|say|agree|feel|claim"
    r"|conclude)|disagree|doubt|not (?:true|clear|sure|certain|convinced|obvious|evident)|unsure|uncertain|untrue"
    r"|(?:hard|difficult|impossible|unable|wrong|incorrect|false) (?:to (?:say|tell|claim|believe|argue|conclude)|that)"
    r"|unclear (?:that|which))\b|不认为|不觉得|不能说|并非|不確定|不确定|难说"
)
_NO_DOUBT = re.compile(r"\b(?:no|without(?: a| any)?|beyond) (?:doubt|question)\b,?\s?")
_NEGATION = re.compile(
    r"\b(?:not|never|no|nor|hardly|scarcely|cannot|might|may|could|some|neither|without|\w+n't)\b|[不没沒未無]|非(?!常)|无(?!论|疑)"
)
_CONJUNCTION = re.compile(
    r"\b(?:and|but|however|although|though|while|whereas|so|because|since|therefore|thus|hence)\b"
    r"|所以|因此|因为|但|而|然而|虽然"
)
_ADVERSATIVE = re.compile(r"\b(?:but|however|although|though|while|whereas|yet|nevertheless)\b|但|然而|虽然|不过|尽管")
_CONCLUSION = re.compile(
    r"(?:^|[.!?;,:\n])\s?(?:so |and |but |in my )?(?:(?:overall|in conclusion|in summary|to conclude|to sum up"
    r"|therefore|thus|hence|final(?:ly)?|all in all|verdict)\b|总体|總體|综上|綜上|总之|因此|最终|最終|结论|結論)"
)
_SENTENCE = re.compile(r"([^.!?;\n]+)([.!?;\n]?)")
#: The other image adds nothing to a comparison: "better than ②", "②, not ①," and "unlike ①".
_OTHER = re.compile(
    r",?\s?\b(?:but\s)?(?:not|unlike|rather than|instead of|as opposed to|compared (?:to|with)|than|over|against"
    r"|versus|vs\.?|relative to)\s[①②],?|(?:相?比于?|比起|相较于?|与|與|和|跟|较)\s?[①②](?:相比(?:较)?|比起来)?,?"
)
_ZH_BEATS = re.compile(r"(?:优于|優於|胜过|勝過|强于|好过|好于|超过|胜于)\s?[①②]")
_ZH_LOSES = re.compile(r"(?:不如|不及|逊于|差于|逊色于|弱于|并?没有|沒有)\s?[①②](?:那么|这么)?好?")
_AFTER_MENTION = re.compile(r"([①②])\s?(?:[:=]|-(?=\s))\s?")

# Answers that are nothing but a mention.

_LABEL_COLON = re.compile(
    rf"\b({_LABEL}(?:\s(?:{NOUN}|one))?)(?:\sis)?\s?[:=]\s?|({_ZH_LABEL})(?:是|为)?:\s?", re.IGNORECASE
)
_VERB_COLON = re.compile(r"\b(prefer|choose|pick|select|go with)\s?:\s?", re.IGNORECASE)
_LABELLED_NUMBER = re.compile(
    rf"((?:\b{_LABEL}{_IS})|{_ZH_LABEL}(?:是|为|\sis\s))(?:number\s)?(1|2|(?-i:[AB]))(?=\s?(?:$|[.,;!\n]))",
    re.IGNORECASE,
)
_ALONE = re.compile(
    r"(?:(?:overall|therefore|thus|hence|finally|in conclusion|in summary|between ⑫)\s?,?\s)?"
    rf"(?:(?:the|my|final|your|so)\s){{0,3}}(?:{_LABEL}(?:\s(?:{NOUN}|one))?\s?(?:is|-)?\s)?(?:number\s)?"
    r"(①|②|[12]|1st|2nd|first|second|one|two|(?-i:[AB])|第一|第二)",
    re.IGNORECASE,
)
_FIRST_NAMES = {"①", "1", "1st", "first", "one", "a", "第一"}
_VERB_NUMBER = re.compile(
    r"\b(prefer|choose|pick|select|go with|vote for)\s(?:number\s)?(1|2|(?-i:[AB]))(?=\s?(?:$|[.,;!\n]))", re.IGNORECASE
)
_EQUAL = re.compile(r"(?:①|1)\s?={1,2}\s?(?:②|2)|(?:②|2)\s?={1,2}\s?(?:①|1)")
_GREATER = re.compile(r"(?:①|\b1)\s?(>|<)\s?(?:②|2\b)|(?:②|\b2)\s?(<|>)\s?(?:①|1\b)")
_TIE_ALONE = re.compile(
    r"(?:it is |it's |a |the |⑫ )?(?:are )?(?:tie|draw|tied|equal|same|equally good|平局|平手|一样好|同样好|不相上下)"
)
_VERDICTS: tuple[Verdict, Verdict] = ("first", "second")


def _read(text: str) -> Verdict | Missing:
    """The verdict of text without markup."""
    text = mark_mentions(text)
    text = _VERB_COLON.sub(r"\1 ", _LABEL_COLON.sub(lambda match: f"{match[1] or match[2]} is ", text))
    text = _LABELLED_NUMBER.sub(lambda match: match[1] + ("②" if match[2] in "2B" else "①"), text)
    text = _VERB_NUMBER.sub(lambda match: f"{match[1]} {'②' if match[2] in '2B' else '①'}", text)
    if (alone := _alone(text)) is not None:
        return alone
    reading = _compared(text)
    if reading is CONTRADICTION and (conclusions := list(_CONCLUSION.finditer(text.lower()))):
        concluded = _compared(text[conclusions[-1].start() :])
        reading = CONTRADICTION if isinstance(concluded, Missing) else concluded
    last = _last(text)
    if last is None or reading == last:
        return reading
    return last if isinstance(reading, Missing) else CONTRADICTION


def _last(text: str) -> Verdict | None:
    """The verdict of the last sentence, if it is a mention alone, or of a last line such as "2"."""
    line = text.rstrip("\n").rsplit("\n", 1)[-1].strip()
    if line.endswith(".") and len(line) == 2:
        return None  # a numbered list that is cut off
    sentences = [sentence for sentence, _ in _SENTENCE.findall(line) if sentence.strip()]
    return _alone(sentences[-1]) if sentences and (len(sentences) == 1 or "①" in line or "②" in line) else None


def _alone(text: str) -> Verdict | None:
    """The verdict of text that is nothing but a mention of an image, or of a tie."""
    text = text.strip(" .,!:;-\n")
    if match := _ALONE.fullmatch(text):
        return "first" if match[1].lower() in _FIRST_NAMES else "second"
    if match := _GREATER.fullmatch(text):
        return _VERDICTS[match[1] == "<" if match[1] else match[2] == ">"]
    return "tie" if _TIE_ALONE.fullmatch(text.lower()) or _EQUAL.fullmatch(text) else None


def _compared(text: str) -> Verdict | Missing:
    """The verdict of the comparisons in a text."""
    whole: set[Verdict] = set()
    limited: set[Verdict] = set()
    for clause in _clauses(text):
        for patterns in (_STATEMENTS, _ASPECTS, _CHOICES):
            for match, worse in _matches(clause, patterns):
                chosen = _VERDICTS[(match[1] == "②") ^ worse]
                if patterns is _CHOICES or (patterns is _STATEMENTS and _WHOLE.match(clause, match.end())):
                    whole.add(chosen)
                elif not _NOWHERE.match(clause, match.end()):
                    limited.add(chosen)
        if any((tie := pattern.search(clause)) and not _negated(clause, tie) for pattern in _TIES):
            whole.add("tie")
    found = whole or (limited if not _ADVERSATIVE.search(text.lower()) else set())
    if len(found) > 1:
        return CONTRADICTION
    return found.pop() if found else NO_VERDICT


def _matches(clause: str, patterns: _Patterns) -> Iterator[tuple[re.Match[str], bool]]:
    for pattern, worse in patterns:
        for match in pattern.finditer(clause):
            if not _negated(clause, match):
                yield match, worse


def _clauses(text: str) -> Iterator[str]:
    """The clauses that may decide, in lower case, without the image that another is compared with."""
    for sentence, end in _SENTENCE.findall(text):
        lowered = _NO_DOUBT.sub("", sentence.lower())
        is_question = end == "?" or lowered.rstrip().endswith(("吗", "嗎"))
        if is_question or _CONDITION.search(lowered) or _DISBELIEF.search(lowered):
            continue
        lowered = _ZH_LOSES.sub("更差", _ZH_BEATS.sub("更好", lowered))
        lowered = _AFTER_MENTION.sub(r"\1 ", _OTHER.sub(" ", lowered))
        yield from (" ".join(clause.split()) for clause in re.split(r"[,:]", lowered))


def _negated(clause: str, match: re.Match[str]) -> bool:
    """Whether there is a negation or a hedge between the last conjunction and a match."""
    start = max((found.end() for found in _CONJUNCTION.finditer(clause, 0, match.start())), default=0)
    return _NEGATION.search(clause, start, match.start()) is not None
