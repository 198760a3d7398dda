"""Makes the next items of an iterator in a thread of its own, while the last ones are being used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item], limit: int, size: Callable[[Item], int]) -> Generator[Item, None, None]:
    """The same items, some of which are made before they are asked for. Close it (`contextlib.closing`), or nothing stops the thread.

    Args:
        items: used by the thread alone.
        limit: how much finished items may add up to before the next is made; a single one may be larger.
        size: what an item adds.

    Raises:
        BaseException: what `items` raises, at its place.
    """
    shelf = _Shelf[Item](limit)

    def work() -> None:
        try:
            for item in items:
                if not shelf.put(item, size(item)):
                    return
            shelf.end(None)
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the item
            shelf.end(error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        yield from shelf.take_all()
    finally:
        shelf.abandon()
        thread.join()


class _Shelf(deque[tuple[Item, int]]):
    """Finished items, with how much they add."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()
        self._ended = self._unwanted = False
        self._error: BaseException | None = None

    def put(self, item: Item, size: int) -> bool:
        """Waits for room; False if nobody wants the item any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._unwanted or not self or self._held + size <= self._limit)
            self.append((item, size))
            self._held += size
            self._changed.notify_all()
            return not self._unwanted

    def end(self, error: BaseException | None) -> None:
        """No more items come."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody wants more items."""
        with self._changed:
            self._unwanted = True
            self._changed.notify_all()

    def take_all(self) -> Iterator[Item]:
        """Every item, as they come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self or self._ended)
                if not self:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self.popleft()
                self._held -= size
                self._changed.notify_all()
            yield item
            del item  # not to be kept while the next is waited for
