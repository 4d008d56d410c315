"""What every answer is made of: JSON, an error in one sentence, a body that has a limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

RETRY = {"retry-after": "1"}  # seconds


def json_answer(value: Any, status: int = 200) -> Response:
    """A value, NumPy arrays in it too, as JSON."""
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, {"content-type": "application/json"})


def error_answer(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error: one sentence that says what to do."""
    response = json_answer({"error": text}, status)
    response.headers.update(headers or {})
    return response


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
      HTTPException: 413, it has more bytes than `most`.
      ClientDisconnect: it does not come to its end.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"the body has more than {most:,} bytes")
        parts.append(part)
    return b"".join(parts)
