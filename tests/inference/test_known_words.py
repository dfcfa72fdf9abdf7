"""Prompts with words that a model has never seen are reported, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgen_jax.errors import DeepGenError
from deepgen_jax.inference.known_words import KNOWN_WORDS_FILE, KnownWords, read_known_words, words_of
from deepgen_jax.nano.known_words import training_words
from deepgen_jax.nano.samples import TASK_SKILLS, make_sample
from deepgen_jax.stores.model_folder import NANO, PACKAGED
from deepgen_jax.user_warnings import collect_warnings


@pytest.fixture(scope="module")
def nano() -> KnownWords:
    known = read_known_words(PACKAGED / NANO)
    assert known is not None
    return known


def test_words():
    assert words_of("A sign that says \"OPEN\", two 5-point stars; it's 红色, naïve") == [
        "a", "sign", "that", "says", "OPEN", "two", "5", "point", "stars", "it's", "红", "色", "naïve",
    ]  # fmt: skip


def test_nothing_in_the_world_is_unknown(nano: KnownWords):
    for split in ("train", "held_out"):
        for kind in TASK_SKILLS:
            texts = [make_sample(split, kind, seed=7, index=index).text for index in range(150)]
            assert nano.unknown(texts) == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat", ["cat"]),
        ("a red fox in fresh snow", ["fox", "fresh", "snow"]),
        ("a zebra on a bus", ["zebra", "bus"]),
        ("a king", ["king"]),
        ('a sign that says "HELLO"', []),
        ('a sign that says "HELO"', ["HELO"]),
        ("as many red circles as a cat has legs", []),
        ("一只猫", ["只", "猫"]),
        ("", []),
    ],
)
def test_unknown_words(nano: KnownWords, prompt: str, words: list[str]):
    assert nano.unknown([prompt]) == words


def test_one_line_for_all_prompts_and_each_word_once():
    known = KnownWords(["a", "red", "green circle"])
    said: list[str] = []
    with collect_warnings(said.append):
        known.warn(["a red green circle"])
        known.warn(["a dog", "seven cats and a circle in one house", "a dog"])
        known.warn(["red dog"])
        known.warn(["red bird"])
    assert said == [
        "this model has never seen 'dog', 'seven', 'cats', 'and', 'circle' and 3 more; it can only draw what its "
        "known_words.txt lists",
        "this model has never seen 'bird'; it can only draw what its known_words.txt lists",
    ]


def test_folders_without_a_list(tmp_path: Path):
    assert read_known_words(tmp_path) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / KNOWN_WORDS_FILE).write_bytes(b"\xff")
    with pytest.raises(DeepGenError, match=r"known_words.txt cannot be read"):
        read_known_words(tmp_path / "other")


def test_the_packages_list_is_what_the_command_writes():
    lines = (PACKAGED / NANO / KNOWN_WORDS_FILE).read_text(encoding="utf-8").splitlines()
    assert lines == training_words(1000)
