"""Model cards: Markdown with the front matter that the Hugging Face Hub reads, made from a model's spec alone.

The spec holds the run's record, the results and the digests, so a card is never edited: `medmim cards` writes those of
the catalog, and `medmim cards --check` finds the ones that say something else.
"""

from __future__ import annotations

from medmim.cards.encoder import encoder_card
from medmim.cards.task import task_card
from medmim.errors import SpecError
from medmim.spec import ModelSpec


def render_card(spec: ModelSpec, *, picture: str | None = None, has_data_list: bool = True) -> str:
    """The card of a set of weights.

    Args:
        spec: With its weights, and unless it has a task, their training record.
        picture: Path, relative to the card, of a reconstruction of `medmim.cards.encoder.card_scan`.
        has_data_list: Whether `DATA_FILE` is beside the weights.

    Returns:
        Markdown with YAML front matter.

    Raises:
        SpecError: When the spec has no weights, or they no training record.
    """
    weights = spec.weights
    if weights is not None and spec.task is not None:
        return task_card(spec, weights)
    if weights is None or weights.training is None:
        raise SpecError(f"{spec.name}: a card needs weights with a training record")
    return encoder_card(spec, weights, picture=picture, has_data_list=has_data_list)
