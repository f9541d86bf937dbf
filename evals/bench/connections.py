"""Plain HTTP/1.1 over kept connections: as little work a request as a load generator beside the service can do."""

import asyncio
from urllib.parse import urlsplit


class Connections:
    """Those to the service at `url`: one more whenever all others are in use."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes, *, key: str = "") -> tuple[int, bytes]:
        """Status and body of the reply to a JSON body. Raises OSError, EOFError, ValueError; a connection that failed is not used again."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        reader, writer = await self._free()
        try:
            writer.write(head.encode() + (f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n").encode() + body)
            told = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(told.partition(b"content-length:")[2].partition(b"\r\n")[0])
            reply = await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(told.split(b" ", 2)[1]), reply

    async def _free(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()  # the service did so before, after a while without a request
        return await asyncio.open_connection(self._host, self._port)

    async def aclose(self) -> None:
        for _, writer in self._idle:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._idle), return_exceptions=True)
