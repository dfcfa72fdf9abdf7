"""Words that a model has seen: models of a small world list theirs, and prompts with other words are reported."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepgen_jax.errors import DeepGenError
from deepgen_jax.user_warnings import warn_user

#: One word or phrase per line, in lower case; words in capitals are known only in capitals. May be absent.
KNOWN_WORDS_FILE = "known_words.txt"

# Words of an alphabet, numbers, and single characters of scripts without spaces.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+(?:'[^\W\d_]+)?")
_MOST_SHOWN = 5


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case except words of two or more capitals."""
    return [word if len(word) > 1 and word.isupper() else word.lower() for word in _WORD.findall(text)]


class KnownWords:
    """The words and phrases that a model has seen.

    Attributes:
      words: single words.
      phrases: of several words, which are known as a whole only.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        entries = [line.strip() for line in lines if line.strip()]
        self.words = frozenset(entry for entry in entries if " " not in entry)
        self.phrases = tuple(sorted((entry for entry in entries if " " in entry), key=len, reverse=True))
        pattern = "|".join(rf"(?<!\w){re.escape(phrase)}(?!\w)" for phrase in self.phrases)
        self._phrase = re.compile(pattern, re.IGNORECASE) if pattern else None
        self._reported: set[str] = set()

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """Words of the texts that are not known, each once, in order."""
        rest = [self._phrase.sub(" ", text) if self._phrase else text for text in texts]
        return list(dict.fromkeys(word for text in rest for word in words_of(text) if word not in self.words))

    def warn(self, texts: Sequence[str]) -> None:
        """One warning that lists the texts' unknown words; a word is reported once."""
        unknown = [word for word in self.unknown(texts) if word not in self._reported]
        if not unknown:
            return
        self._reported.update(unknown)
        shown = ", ".join(repr(word) for word in unknown[:_MOST_SHOWN])
        more = f" and {len(unknown) - _MOST_SHOWN} more" if len(unknown) > _MOST_SHOWN else ""
        warn_user(f"this model has never seen {shown}{more}; it can only draw what its {KNOWN_WORDS_FILE} lists")


@functools.cache
def read_known_words(folder: Path) -> KnownWords | None:
    """The known words of a model folder; None if it lists none. The same object for the same folder.

    Raises:
      DeepGenError: the file cannot be read.
    """
    path = folder / KNOWN_WORDS_FILE
    try:
        return KnownWords(path.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DeepGenError(f"{path} cannot be read ({error}); write it again or remove it") from error
