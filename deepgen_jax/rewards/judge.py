"""A judge: a vision-language model behind an OpenAI-compatible server, asked for one short answer about images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.client import Client, ClientConfig
from deepgen_jax.rewards.image_codec import jpeg_data_url

#: The answer in a judge's reply.
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
#: Characters that are kept of a reply without an answer.
_KEPT = 200


def answer_of(text: str | None) -> str | None:
    """What stands inside the one ``<answer>`` of a judge's reply; None where there is none, or more than one."""
    answers = ANSWER.findall(text or "")
    return answers[0].strip() if len(answers) == 1 else None


class Judge:
    """Asks ``/v1/chat/completions`` at temperature 0.

    Attributes:
      client: the connection, with its counts.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int = 2048,
        quality: int = 95,
        client: ClientConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Sets up; nothing is sent.

        Args:
          url: the server, as http://HOST:PORT, with or without the path of its interface.
          model: name of the served model.
          max_tokens: longest reply; one that is cut off has no answer in it.
          quality: of the JPEG files in which images are sent.
          client: limits, time-outs and retries.

        Raises:
          DeepGenError: a value cannot be used.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DeepGenError(f"url {url!r} is no address of a server; write http://HOST:PORT")
        if not model:
            raise DeepGenError("model is empty; give the name of the served model")
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.url, self.model = f"{base}/v1/chat/completions", model
        self.max_tokens, self.quality = max_tokens, quality
        self.client = Client(client)

    def data_url(self, image: np.ndarray) -> str:
        """An image, uint8 [H, W, 3], as it is sent."""
        return jpeg_data_url(image, self.quality)

    async def ask(self, text: str, data_urls: Sequence[str], is_answer: Callable[[str], bool]) -> str:
        """The judge's reply to a text about images: its ``<answer>`` parts alone, or its start if there are none.

        So the cache of a run of millions of comparisons stays small, without the judge's trains of thought.

        Args:
          text: the question.
          data_urls: the images.
          is_answer: whether a reply answers the question. One that does not is not cached: when the step's rewards are
            tried again, so is the question.

        Raises:
          RequestFailed: there is none.
        """
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in data_urls]
        content.append({"type": "text", "text": text})
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return await self.client.post(self.url, payload, _reply, is_answer)


def filled(template: str, prompt: str) -> str:
    """The template with the prompt in its place; braces in prompts mean nothing."""
    return template.replace("{prompt}", prompt)


def check_template(template: str) -> None:
    """Raises a DeepGenError unless the template has a place for the prompt."""
    if "{prompt}" not in template:
        raise DeepGenError("the template lacks {prompt}; write it where the prompt belongs")


def _reply(answer: Any) -> str:
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the reply is no text")
    answers = ANSWER.findall(text)
    return "".join(f"<answer>{answer}</answer>" for answer in answers) if answers else text.strip()[:_KEPT]
