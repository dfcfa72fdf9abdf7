"""A judge: a vision-language model behind an OpenAI-compatible server, asked for one short answer about images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from deepgen_jax.errors import DeepGenError
from deepgen_jax.rewards.base import Missing
from deepgen_jax.rewards.client import Client, ClientConfig
from deepgen_jax.rewards.image_codec import jpeg_data_url
from deepgen_jax.user_warnings import warn_user

#: An unreadable reply that the server ended at ``max_tokens``.
CUT_OFF = Missing("reply cut off at max_tokens")


class Judge:
    """Asks ``/v1/chat/completions`` at temperature 0.

    Attributes:
      client: sends the requests and counts them.
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
          max_tokens: longest reply; one that is cut off has no answer.
          quality: of the JPEG files in which images are sent.
          client: limits, time-outs and retries.

        Raises:
          DeepGenError: a value cannot be used.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise DeepGenError(f"url {url!r} is not the address of a server; write http://HOST:PORT")
        if not model:
            raise DeepGenError("model is empty; give the name of the served model")
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.url, self.model = f"{base}/v1/chat/completions", model
        self.max_tokens, self.quality = max_tokens, quality
        self.client = Client(client)
        self._warned = False

    def data_url(self, image: np.ndarray) -> str:
        """An image, uint8 [H, W, 3], as it is sent."""
        return jpeg_data_url(image, self.quality)

    async def ask(self, text: str, data_urls: Sequence[str], read: Callable[[str], Any]) -> Any:
        """The result of ``read`` on the judge's reply to a question about images.

        Only that is cached, so that the cache of millions of comparisons stays small, and only if it is not `Missing`:
        an unreadable reply is asked for again with the step's other missing rewards.

        Args:
          text: the question.
          data_urls: the images.
          read: turns a reply into a JSON-ready result, or `Missing`; must not raise.

        Raises:
          RequestFailed: there is no reply.
        """
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in data_urls]
        content.append({"type": "text", "text": text})
        payload = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

        def parse(answer: Any) -> Any:
            reply = _content(answer)
            result = read(reply)
            if not isinstance(result, Missing):
                return result
            if answer["choices"][0].get("finish_reason") == "length":
                result = CUT_OFF
            if not self._warned:
                self._warned = True
                start = " ".join(reply[:500].split())[:120]
                warn_user(f"{self.model}: {result.reason}, first in {start!r}; later ones are counted in the log")
            return result

        return await self.client.post(self.url, payload, parse, lambda result: not isinstance(result, Missing))


def fill_template(template: str, prompt: str) -> str:
    """The template with the prompt in its place; braces in the prompt are kept."""
    return template.replace("{prompt}", prompt)


def check_template(template: str) -> None:
    """Raises a DeepGenError unless the template has a place for the prompt."""
    if "{prompt}" not in template:
        raise DeepGenError("the template lacks {prompt}; write it where the prompt belongs")


def _content(answer: Any) -> str:
    """The text of a chat completion; some servers send it in parts."""
    content = answer["choices"][0]["message"]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise ValueError("the reply has no text")
    return content
