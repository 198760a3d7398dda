"""What a bank of which nothing moves answers, where one that streams experts would have something to say."""

from __future__ import annotations

from typing import Self


class NothingMoves:
    """Such a bank splits into itself, and nothing that is carried from step to step."""

    def split(self) -> tuple[Self, tuple]:
        """`(fixed, moving)`."""
        return self, ()

    def join(self, moving: tuple) -> Self:
        """The bank whose `split` gave this fixed part and `moving`."""
        return self

    def in_order(self) -> Self:
        """The bank for steps whose tokens come one after another: the same."""
        return self

    def init_state(self) -> tuple:
        """The moving part at the beginning."""
        return ()

    def forget(self, moving: tuple) -> tuple:
        """The moving part as if nothing had been run."""
        return moving

    def new_text(self, moving: tuple) -> tuple:
        """The moving part for another text."""
        return moving

    def counters(self, moving: tuple) -> dict:
        """What the bank has counted: nothing."""
        return {}
