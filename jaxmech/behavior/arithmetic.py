"""One-digit sums, which show whether an intervention costs a model what it could do before."""

from __future__ import annotations


def one_digit_sums(items: int) -> list[tuple[int, int]]:
    """All of them except the worked ones.

    Raises:
      ValueError: more are asked for.
    """
    sums = [(a, b) for a in range(1, 9) for b in range(1, 10 - a) if (a, b) not in ((2, 3), (4, 1), (1, 7))]
    if items > len(sums):
        raise ValueError(f"items: there are {len(sums)} one-digit sums, got {items}")
    return sums
