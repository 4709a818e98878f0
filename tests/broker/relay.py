"""A bad link: a TCP relay on loopback that a test makes slow, late, cut, or dead without a word.

It runs on a thread of its own (asyncio) and counts what it hands on in each direction. What it was told holds for all
connections, those that are open too.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")
Direction = Literal["up", "down"]
"""up: from the client to the server."""

_PIECE = 16 << 10
"""Bytes read at once; at 10 MB/s they pass in 1.6 ms."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets."""


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter


class Relay:
    """Listens on `port` of the loopback address and hands on to `target`, another port there. As a context it ends.

    `rate` is bytes a second in each direction over all connections, None for any; `delay` is seconds one way; `cut` is
    seconds after which each connection is reset, None for never.
    """

    def __init__(self, target: int, *, rate: float | None = None, delay: float = 0.0, cut: float | None = None) -> None:
        self.rate, self.delay, self.cut = rate, delay, cut
        self.moved: dict[Direction, int] = {"up": 0, "down": 0}
        """Bytes that have passed the line so far, whether they arrived or were lost in a cut."""
        self.connections = 0
        """Accepted so far."""
        self.cuts = 0
        """Connections that were reset by `cut` or `cut_all`."""
        self._target, self._open = target, set[_Connection]()
        self._free: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        """When the line has sent what was given to it, in the loop's seconds."""
        self._passing: asyncio.Event
        self._tasks = set[asyncio.Task[None]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self._server = self._do(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def swallow(self, dead: bool = True) -> None:
        """Half-open: from now on nothing is handed on, nothing refused and nothing closed; connections are accepted."""
        self._do(self._swallow(dead))

    def cut_all(self) -> None:
        """Reset all connections now."""
        self._do(self._cut_all())

    def close(self) -> None:
        """End it, its connections too."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- on the relay's thread --

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> asyncio.Server:
        self._passing = asyncio.Event()
        self._passing.set()
        # The kernel's buffers would hide a slow line: a megabyte is 100 ms of it.
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * _PIECE)
        return await asyncio.start_server(self._accept, sock=listener, limit=_PIECE)

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self._passing.wait()
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self._target, limit=_PIECE)
        except OSError:
            client.transport.abort()
            return
        for writer in (client, server):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer.transport.set_write_buffer_limits(high=4 * _PIECE)
        connection = _Connection(client, server)
        self._open.add(connection)
        pumps = [
            self._spawn(self._pump(reader, server, "up")),
            self._spawn(self._pump(answers, client, "down")),
        ]
        cutter = self._spawn(self._cut_later(connection))
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        await self._passing.wait()  # a dead line hands no end on either
        for task in (*pumps, cutter):
            task.cancel()
        self._open.discard(connection)
        for writer in (client, server):
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction) -> None:
        # What is under way on a line with a delay; without one nothing waits here.
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256 if self.delay else 1)
        sender = self._spawn(self._send(line, writer, way))
        try:
            while piece := await reader.read(_PIECE):
                now = self._loop.time()
                if self.rate is not None:
                    self._free[way] = max(now, self._free[way]) + len(piece) / self.rate
                    await asyncio.sleep(self._free[way] - now)
                self.moved[way] += len(piece)
                await line.put((self._loop.time() + self.delay, piece))
            await line.put((0.0, b""))
            await sender
        except OSError:
            pass
        finally:
            sender.cancel()

    async def _send(
        self, line: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        while True:
            due, piece = await line.get()
            if not piece:
                return
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            await self._passing.wait()
            with contextlib.suppress(OSError):
                writer.write(piece)
                await writer.drain()

    async def _cut_later(self, connection: _Connection) -> None:
        if self.cut is None:
            return
        await asyncio.sleep(self.cut)
        self._cut(connection)

    def _cut(self, connection: _Connection) -> None:
        if connection not in self._open:
            return
        self._open.remove(connection)
        self.cuts += 1
        for writer in (connection.client, connection.server):
            # A reset, not an end of file: what a lost link looks like to a kernel.
            with contextlib.suppress(OSError):  # it has ended by itself in this moment
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def _cut_all(self) -> None:
        for connection in list(self._open):
            self._cut(connection)

    async def _swallow(self, dead: bool) -> None:
        if dead:
            self._passing.clear()
        else:
            self._passing.set()

    async def _close(self) -> None:
        self._server.close()
        await self._cut_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
