"""A client of HTTP that keeps its connections: the front process asks its workers by it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Header = tuple[bytes, bytes]


class Answer(NamedTuple):
    """What the server said; names of headers are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Upstream:
    """One server, such as `python -m stca_jax.serving`, whose every answer states its length.

    Attributes:
      num_asked: Requests that it has not answered yet.
    """

    def __init__(self, connect: Callable[[], Awaitable[_Connection]]):
        """Nothing is connected yet.

        Args:
          connect: Opens a connection.
        """
        self._connect = connect
        self._idle: list[_Connection] = []
        self.num_asked = 0

    async def ask(
        self, method: str, target: bytes, headers: Iterable[Header] = (), body: bytes = b""
    ) -> Answer:
        """One request.

        Args:
          method: GET, POST, …, but not HEAD.
          target: Path and query, as they stand in a request.
          headers: But for the body's length.
          body: Whole.

        Raises:
          OSError: the server is not there, or went away before it had answered: nobody knows
            whether it did what it was asked.
        """
        self.num_asked += 1
        connection = None
        try:
            connection = self._take_idle() or await self._connect()
            answer = await _exchange(*connection, method, target, headers, body)
        except asyncio.IncompleteReadError as error:
            raise ConnectionError("the server ended the connection") from error
        else:
            self._idle.append(connection)
            connection = None
            return answer
        finally:
            self.num_asked -= 1
            if connection is not None:
                connection[1].close()

    def _take_idle(self) -> _Connection | None:
        """The connection used last that the server has not closed meanwhile, for it was idle."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    def close(self) -> None:
        """Closes what is connected and not in use."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    target: bytes,
    headers: Iterable[Header],
    body: bytes,
) -> Answer:
    lines = [b"%s %s HTTP/1.1" % (method.encode(), target), b"host: stca"]
    lines += [b"%s: %s" % header for header in headers]
    lines.append(b"content-length: %d" % len(body))
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    await writer.drain()
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    found = {}
    for line in filter(None, rest):
        name, _, value = line.partition(":")
        found[name.lower()] = value.strip()
    content = await reader.readexactly(int(found.get("content-length", 0)))
    return Answer(int(first.split(" ")[1]), found, content)
