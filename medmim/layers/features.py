"""Which intermediate features a caller means."""

from __future__ import annotations

from collections.abc import Sequence


def chosen_indices(indices: int | Sequence[int] | None, number: int, *, what: str) -> list[int]:
    """Turns a choice of features into indices, as timm's encoders do.

    Args:
        indices: The last n for an int, those listed (negative from the end), all for None.
        number: Of the features there are.
        what: They are called, in the error: "blocks".

    Raises:
        ValueError: For a choice that names nothing, or something that does not exist.
    """
    if indices is None:
        return list(range(number))
    if isinstance(indices, int):
        indices = range(-indices, 0)
    chosen = [i + number if i < 0 else i for i in indices]
    if not chosen or any(not 0 <= i < number for i in chosen):
        raise ValueError(f"indices {list(indices)} do not name {what} of a model with {number}")
    return chosen
