"""README and the pages about using the package: links, commands, options and prompts are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deepgen_jax.cli.commands import COMMANDS, Group
from deepgen_jax.cli.completion import completions
from deepgen_jax.inference.known_words import read_known_words
from deepgen_jax.stores.model_folder import NANO, PACKAGED

ROOT = Path(__file__).parents[2]
NAMES = ("install", "generate", "quantize", "troubleshooting")
PAGES = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in NAMES)]
EXAMPLES = [
    example
    for entry in COMMANDS.values()
    for command in (entry.commands.values() if isinstance(entry, Group) else [entry])
    for example in command.examples
]


def commands(text: str) -> list[list[str]]:
    """The words of each ``deepgen`` command in the text's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("&&", "\n").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(\.venv/bin/)?deepgen ", line)]
    return [words[1 : words.index(">") if ">" in words else None] for words in found]


def check(words: list[str], known: dict[str, list[str]]) -> None:
    words = [word for word in words if word not in (">>", "~/.bashrc", "~/.zshrc")]
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    assert name in known, words
    for word in words:
        if word.startswith("--") and word != "--":
            assert word.partition("=")[0] in known[name], (word, words)


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    return completions()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages(page: Path, known: dict[str, list[str]]):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for words in commands(text):
        check(words, known)
    for module in re.findall(r"pytest (?:-m \S+ )?((?:tests/\S+ ?)+)", text):
        assert all((ROOT / path.strip("`")).exists() for path in module.split())
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[:40])
def test_examples_in_help(example: str, known: dict[str, list[str]]):
    words = shlex.split(example.replace("\\\n", " "), comments=True)
    if words[0] == "deepgen" and not set(words) & {"|", ">"}:
        check(words[1:], known)


def test_nano_can_draw_what_its_examples_ask_for():
    nano = read_known_words(PACKAGED / NANO)
    assert nano is not None
    texts = [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    texts += [shlex.split(example)[1:] for example in EXAMPLES if example.startswith("deepgen")]
    asked = [words[1] for words in texts if words[0] in ("generate", "edit") and " " in words[1]]
    assert len(asked) >= 5
    assert nano.unknown([text for text in asked if not text.startswith("-")]) == []
