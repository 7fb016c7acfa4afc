"""Errors in the form of OpenAI's API: a status, and a JSON object that says what is wrong."""

from typing import Any

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.serve.engine_driver import (
    EngineFailedError,
    QueueFullError,
    ServerClosingError,
    TimeLimitError,
)

RETRY_SECONDS = 1
"""After which a client that found the queue full may ask again."""


class ApiError(Exception):
    """An error that a client gets.

    Args:
        message: one line.
        status: of HTTP.
        param: the field of the request that is meant.
        kind: `type` in OpenAI's form.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.kind = status, param, kind

    def content(self) -> dict[str, Any]:
        """Return the body of the answer."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        if self.status == 429:
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def refused(error: AscendSpeedError, param: str | None = None) -> ApiError:
    """Return the error for a request that was not taken."""
    if isinstance(error, QueueFullError):
        return ApiError(str(error), 429, kind="rate_limit_error")
    if isinstance(error, ServerClosingError):
        return ApiError(str(error), 503, kind="server_error")
    if isinstance(error, EngineFailedError):
        return internal_error()
    return ApiError(str(error), 400, param)


def failed(error: Exception) -> ApiError:
    """Return the error for a request that was taken and could not be answered."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeLimitError):
        return ApiError(str(error), 504, kind="server_error")
    if isinstance(error, ServerClosingError):
        return ApiError(str(error), 503, kind="server_error")
    if isinstance(error, AscendSpeedError) and not isinstance(error, EngineFailedError):
        return ApiError(str(error), 500, kind="server_error")
    return internal_error()


def internal_error() -> ApiError:
    """Return the error for anything else, which says nothing of what is inside."""
    return ApiError("the server failed; its log says why", 500, kind="server_error")
