"""A TCP proxy on loopback that fails as networks do: one thread, any number of connections, one server behind it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

CHUNK_BYTES = 65_536
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST, and not FIN


@dataclass(eq=False)
class Link:
    """One connection: the client's side and the server's."""

    tasks: tuple[asyncio.Task[None], ...] = ()
    silent: bool = False
    """Nothing of it gets through any more, for good: as where a firewall has forgotten it."""
    answered: int = 0
    """Bytes of answers since the mode was set."""


class Proxy:
    """Passes everything on until it is told otherwise; each mode lasts until the next. For any thread."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._reserved = self._bound(0)  # never listens: the port stays ours while nobody is listened to
        self.port: int = self._reserved.getsockname()[1]
        self._links: set[Link] = set()
        self._silent, self._delay_s = False, 0.0
        self._most: int | None = None
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def heal(self) -> None:
        """Pass everything on. What was swallowed stays so: its client has to notice."""
        self._set(silent=False, delay_s=0.0, most=None)

    def cut(self) -> None:
        """Reset what is open, and refuse what comes."""
        self._do(self._refuse())

    def blackhole(self) -> None:
        """Take connections and bytes, and pass nothing on: neither side is told."""
        self._set(silent=True, delay_s=0.0, most=None)

    def delay(self, ms: int) -> None:
        """Each piece, either way, comes so much later."""
        self._set(silent=False, delay_s=ms / 1_000, most=None)

    def cut_after(self, most: int) -> None:
        """Reset each connection after so many bytes of answers."""
        self._set(silent=False, delay_s=0.0, most=most)

    def _set(self, *, silent: bool, delay_s: float, most: int | None) -> None:
        async def change() -> None:
            self._silent, self._delay_s, self._most = silent, delay_s, most
            for link in self._links:
                link.silent, link.answered = link.silent or silent, 0
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, sock=self._bound(self.port))

        self._do(change())

    async def _refuse(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = [task for link in self._links for task in link.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    @staticmethod
    def _bound(port: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        return made

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(silent=self._silent)
        self._links.add(link)
        me = asyncio.current_task()
        assert me is not None
        link.tasks = (me,)
        sides = [writer]
        try:
            if link.silent:
                await asyncio.Event().wait()
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
            sides.append(to_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link, reader, to_writer, lambda size: size))
                group.create_task(self._pump(link, to_reader, writer, lambda size: self._left(link, size)))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            for side in sides:
                with suppress(OSError):  # it is closed already
                    side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        finally:
            self._links.discard(link)
            for side in sides:
                side.transport.abort()

    def _left(self, link: Link, size: int) -> int:
        """How many of so many bytes of an answer get through."""
        link.answered += size
        return size if self._most is None else max(0, size - max(0, link.answered - self._most))

    async def _pump(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: Callable[[int], int]
    ) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await asyncio.sleep(self._delay_s)
            if link.silent:
                await asyncio.Event().wait()
            passed = left(len(data))
            writer.write(data[:passed])
            await writer.drain()
            if passed < len(data):
                await asyncio.sleep(0.05)  # what got through arrives before the reset, which would overtake it
                raise ConnectionResetError
        writer.write_eof()
