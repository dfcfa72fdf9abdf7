"""Errors of the HTTP interface, in OpenAI's envelope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What the ``type`` field says where nothing else is given.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An answer other than success.

    Attributes:
      status: HTTP status.
      message: the problem and the fix, for a person.
      code: the problem, for a program.
      param: name of the request field at fault.
      headers: extra headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """A 400 for a value that cannot be used."""
    return APIError(400, message, code, param)
