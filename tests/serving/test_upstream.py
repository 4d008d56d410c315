"""The client of a server's processes, against servers that close connections."""

import asyncio

import pytest

from stca_jax.serving.server.upstream import Upstream


async def asked_after_the_server_closed(num_idle):
    """Statuses of requests, of which the first ones' connections the server closes once idle."""
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    upstream = Upstream(lambda: asyncio.open_connection("127.0.0.1", port))
    first = await asyncio.gather(*(upstream.ask("GET", b"/") for _ in range(num_idle)))
    for writer in list(connections):
        writer.close()
        await writer.wait_closed()
    await asyncio.sleep(0.05)  # for the client to be told
    again = [await upstream.ask("GET", b"/") for _ in range(2)]
    upstream.close()
    server.close()
    return [answer.status for answer in [*first, *again]], len(connections)


@pytest.mark.parametrize("num_idle", [1, 3])
def test_connections_that_the_server_closed_are_not_used_again(num_idle):
    statuses, num_connections = asyncio.run(asked_after_the_server_closed(num_idle))
    assert statuses == [200] * (num_idle + 2)
    assert num_connections == num_idle + 1
