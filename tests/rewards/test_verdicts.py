"""Verdicts of judges in many wordings; what says nothing is not taken for a verdict."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.verdicts import CONTRADICTION, CUT_OFF, EMPTY, NO_VERDICT, read_verdict

#: Names of the two images.
MENTIONS = [
    ("Image 1", "Image 2"),
    ("image 1", "image 2"),
    ("**Image 1**", "**Image 2**"),
    ("`Image 1`", "`Image 2`"),
    ("Image #1", "Image #2"),
    ("image_1", "image_2"),
    ("Image [1]", "Image [2]"),
    ("<image 1>", "<image 2>"),
    ("Image A", "Image B"),
    ("Picture 1", "Picture 2"),
    ("option one", "option two"),
    ("the first image", "the second image"),
    ("The 1st picture", "The 2nd picture"),
    ("the first one", "the second one"),
    ("the former", "the latter"),
]
ZH_MENTIONS = [
    ("图1", "图2"),
    ("图片 1", "图片 2"),
    ("图一", "图二"),
    ("第一张", "第二张"),
    ("第1张图", "第2张图"),
    ("**图像1**", "**图像2**"),
    ("前者", "后者"),
    ("图１", "图２"),
]
#: Statements for the image {x}; {y} is the other one.
STATEMENTS = [
    "{x} is better",
    "{x} is better.",
    "{x} is better than {y}.",
    "{x} is clearly the better one",
    "{x} looks slightly better overall",
    "{x} is better because the text is sharp.",
    "{x} is better in terms of composition",
    "{x} wins",
    "{x} is the winner!",
    "{x} is preferred over {y}",
    "{x} outperforms {y} in every way",
    "{x} is superior to {y}.",
    "{y} is worse",
    "{y} is worse than {x}.",
    "{y} is not as good as {x}",
    "{y} is inferior to {x}",
    "I prefer {x}",
    "I would choose {x} over {y}.",
    "I'd go with {x}, since it follows the prompt.",
    "The better image is {x}",
    "Winner: {x}",
    "My final choice is {x}.",
    "I think that {x} is better.",
    "Compared to {y}, {x} is better",
    "Unlike {y}, {x} is better",
    "{x}, not {y}, is better.",
    "{y} does not follow the prompt, so {x} is better.",
    "{y} is not readable and {x} is better",
    "{x} is better, but {y} is good as well.",
    "{y} is better in colour. Overall, {x} is better.",
    "Without a doubt {x} is better.",
    "Both are fine.\n\n{x}",
    "{x} follows the prompt better.",
    "{x} more accurately reflects the prompt",
    "{x} does a better job of rendering the text",
    "{x} better matches the description",
    "{x} is more faithful to the prompt.",
    "{y} is less realistic.",
    "{x} is the one I prefer",
]
ZH_STATEMENTS = [
    "{x}更好",
    "{x}更好。",
    "{x}明显更好",
    "{x}比{y}好",
    "{x}优于{y}",
    "{x}胜出",
    "{y}更差",
    "{y}不如{x}",
    "{y}比{x}差",
    "与{y}相比，{x}更好",
    "我认为{x}更好，因为文字清晰",
    "更好的是{x}",
    "选{x}",
    "我选择{x}",
    "答案：{x}",
    "综上，{x}更好",
    "{x}更符合提示",
    "{x}比较好",
    "{x}完胜{y}",
    "我喜欢{x}",
]
#: The whole answer.
ALONE = [
    ("1", "2"),
    ("**1**", "**2**"),
    ("First", "Second"),
    ("1st", "2nd"),
    ("A", "B"),
    ("[[A]]", "[[B]]"),
]
ALONE += [("Answer: 1", "Answer: 2"), ("\\boxed{1}", "\\boxed{2}"), ('{"winner": 1}', '{"winner": 2}')]
ALONE += [("1 > 2", "2 > 1"), ("Image 1 > Image 2", "Image 1 < Image 2"), ("1 is better", "2 is better")]
ALONE += [("The answer is **1**.", "The answer is **2**."), ("第一", "第二"), ("答案：1", "答案：2")]
ALONE += [("I prefer 1.", "I prefer 2."), ("I choose A", "I choose B"), ("Select: 1", "Select: 2")]
WRAPS = [
    "{}",
    "<answer>{}</answer>",
    "<answer>\n {} \n</answer>",
    "<ANSWER>{}</ANSWER> ",
    "<answer>{}",
    "<think>Image 1 is better? Image 2 is better!</think>{}",
    "<think>hm</think>\n<answer>{}</answer>",
    "hm</think> <answer>{}</answer>",
    "The fox is red.\n\n{}",
    "## Verdict\n\n**{}**",
]

statements = st.one_of(
    st.tuples(st.sampled_from(STATEMENTS), st.sampled_from(MENTIONS)),
    st.tuples(st.sampled_from(ZH_STATEMENTS), st.sampled_from(ZH_MENTIONS)),
    st.tuples(st.sampled_from(STATEMENTS[:1]), st.sampled_from(MENTIONS)),
    st.tuples(st.just("{x}"), st.sampled_from(MENTIONS + ZH_MENTIONS)),
    st.tuples(st.just("{x}"), st.sampled_from(ALONE)),
)


@given(statements, st.sampled_from(WRAPS), st.booleans(), st.sampled_from([str, str.strip, str.swapcase]))
@example(("{x}, not {y}, is better.", ("**Image 1**", "**Image 2**")), "{}", False, str)
def test_any_wording_is_read_for_either_image(statement, wrap, swap, change):
    template, names = statement
    if change is str.swapcase and any(name.rstrip("*]")[-1] in "ABab" for name in names):
        change = str  # lower-case letters are no names
    x, y = names[::-1] if swap else names
    reply = wrap.replace("{}", template.replace("{x}", x).replace("{y}", y))
    assert read_verdict(change(reply)) == ("second" if swap else "first")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    "tie",
    [
        "It's a tie",
        "Tie",
        "**Tie.**",
        "Both images are equal",
        "Both images are equally good.",
        "Both are equally good",
        "Image 1 and Image 2 are equally good",
        "Images 1 and 2 are equal in quality",
        "Neither is better",
        "Neither image is better.",
        "Neither image 1 nor image 2 is better",
        "There is no clear winner.",
        "I call it a draw",
        "平局",
        "两张图一样好",
        "两图不相上下",
        "图1和图2一样好",
        "两张图差不多",
        "Image 1 = Image 2",
    ],
)
def test_ties_are_stated(wrap, tie):
    assert read_verdict(wrap.replace("{}", tie)) == "tie"


NOT_VERDICTS = [
    "I like both, {{{ image 1 image 2",
    "Both images are good",
    "Image 12 is better",
    "image 1.5 is better",
    "Is {x} better?",
    "Which image is better?",
    "I don't think {x} is better",
    "I do not believe that {x} is better.",
    "It is not true that {x} is better",
    "It is hard to say that {x} is better",
    "{x} is not better",
    "{x} is no better than {y}",
    "{x} isn't better",
    "{x} is hardly better",
    "{x} could be better",
    "{x} might be better",
    "{x} would be better if it had text",
    "{x} follows the prompt but could be better",
    "{x} shows a fox that would look better",
    "{x} is more faithful, but {y} looks nice",
    "{x} isn't more realistic",
    "{x} is better in no aspect",
    "If the text matters, {x} is better",
    "Some may say {x} is better",
    "I would not choose {x}",
    "Not {x}",
    "{x} has better colours, but {y} follows the prompt",
    "{x} is better in colour, but {y} follows the prompt more closely",
    "Although {x} is better lit, {y} follows the prompt",
    "Conclusion: {x} lacks the text",
    "{x}: 7/10, {y}: 8/10",
    "{x} and {y}",
    "{x} shows a man with a red tie",
    "First, look at both.",
    "At first glance they differ",
    "One fox, two dogs",
    "one fox.\n1. foo\n2.",
    "a",
    "0",
    "3",
    "12",
    "1/2",
    "who knows",
    "两张图都不错",
    "图1不是更好",
    "图1并不比图2好",
    "我不认为图1更好",
    "不确定图1是否更好",
    "图1更好吗？",
]


@given(st.sampled_from(NOT_VERDICTS), st.sampled_from(MENTIONS[:7]), st.booleans(), st.sampled_from(WRAPS[:-1]))
def test_undecided_replies_are_unreadable(text, names, swap, wrap):
    x, y = names[::-1] if swap else names
    assert read_verdict(wrap.replace("{}", text.replace("{x}", x).replace("{y}", y))) == NO_VERDICT


@given(st.sampled_from(STATEMENTS[:17]), st.sampled_from(STATEMENTS[:17]), st.sampled_from(MENTIONS[:7]))
def test_opposite_verdicts_contradict(one, other, names):
    x, y = names
    reply = f"{one.replace('{x}', x).replace('{y}', y)}\n{other.replace('{x}', y).replace('{y}', x)}"
    # "better in terms of ..." gives way to a verdict on the whole.
    limited = "in terms of" in one or "in terms of" in other
    assert read_verdict(reply) == CONTRADICTION or (limited and one != other)


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    assert isinstance(read_verdict(text), Missing | str)
    assert read_verdict(f"<answer>{text}</answer>") in ("first", "second", "tie", NO_VERDICT, CONTRADICTION, EMPTY)


def test_reasons_of_unreadable_replies():
    assert read_verdict("") == read_verdict(None) == read_verdict(" \n") == EMPTY
    assert read_verdict("<answer></answer>") == EMPTY
    assert read_verdict("<think>Image 1 is better") == CUT_OFF
    assert read_verdict("hm") == NO_VERDICT
    assert read_verdict("<answer>1</answer><answer>2</answer>") == CONTRADICTION
    assert read_verdict("<answer>1</answer> but image 2 is better") == "first"


def test_number_with_a_full_stop_is_a_verdict_but_not_the_end_of_a_list():
    assert read_verdict("1.") == read_verdict("<answer>1.</answer>") == "first"
    assert read_verdict("The fox is red.\n\n1.") == NO_VERDICT


@pytest.mark.parametrize("verdict", ["first", "second", "tie"])
def test_cached_verdict_is_read_again(verdict):
    assert read_verdict(verdict) == verdict


PIECES = ["<answer>", "<answer>1</answer>", "<think>", "</think>", "<answer ", "image 1 is better ", "Image", "图"]
PIECES += ["no ", "(*", "<b ", "\n", " ", "1", "not ", "①", ".", "better ", "a,", "\\boxed"]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear_in_the_length(piece):
    start = time.process_time()
    read_verdict(piece * (5_000_000 // len(piece)))
    assert time.process_time() - start < 2
