"""The intermediate features of an encoder: which a caller means, and how they are collected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from medmim.layers.tokens import Size


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
    if isinstance(indices, Integral):
        indices = range(-int(indices), 0)
    chosen = [i + number if i < 0 else i for i in indices]
    if not chosen or any(not 0 <= i < number for i in chosen):
        raise ValueError(f"indices {list(indices)} do not name {what} of a model with {number}")
    return chosen


class FeatureMaps:
    """Gives an encoder `forward_intermediates` and the check of its input.

    The encoder has `_embed(x)`, whose result goes through its `_steps()`, one a feature; `_finish(x)` makes of the last
    what `forward_features` returns, and `_as_output` of any what is asked for.
    """

    maps_are: str  # in errors: "blocks"
    in_chans: int
    img_size: Size
    feature_info: list[dict[str, Any]]

    def _embed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _steps(self) -> Sequence[Callable[[Tensor], Tensor]]:
        raise NotImplementedError

    def _finish(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _as_output(self, x: Tensor, output_fmt: str, *, norm: bool) -> tuple[Tensor, Tensor]:
        """The features of one step as a map or tokens, normed on request, and its prefix tokens (B, P, C)."""
        raise NotImplementedError

    def _encode(self, x: Tensor) -> Tensor:
        """What `_embed` gave, through all steps."""
        for step in self._steps():
            x = step(x)
        return self._finish(x)

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 5:
            raise ValueError(
                f"input is {tuple(x.shape)} but the model takes batches (B, C, D, H, W); x[None] makes one of a volume"
            )
        if tuple(x.shape[1:]) != (self.in_chans, *self.img_size):
            raise ValueError(
                f"input is (C, D, H, W) = {tuple(x.shape[1:])} but the model takes {(self.in_chans, *self.img_size)}; "
                "set_input_size changes the size, in_chans= at creation the channels"
            )

    def _chosen(self, indices: int | Sequence[int] | None) -> list[int]:
        return chosen_indices(indices, len(self.feature_info), what=self.maps_are)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCDHW", "NLC"] = "NCDHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The final features and chosen intermediate ones, fine to coarse: the skips that a decoder takes.

        Args:
            x: Volumes (B, in_chans, D, H, W).
            indices: Which of `feature_info`: the last n for an int, those listed (negative from the end), all for None.
            return_prefix_tokens: Pairs each output with its prefix tokens (B, P, C); P is 0 where there are none.
            norm: Applies the final norm to each output, where there is one.
            stop_early: Skips what comes after the last one asked for; the final features are then those of that one.
            output_fmt: "NCDHW" for maps (B, C, d, h, w), "NLC" for their positions as tokens (B, d*h*w, C).
            intermediates_only: Leaves the final features out.

        Returns:
            (what `forward_features` gives, outputs), or the outputs alone; outputs in the order of `feature_info`.

        Raises:
            ValueError: For another input than the model takes, indices that name nothing, or another format.
        """
        if output_fmt not in ("NCDHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCDHW' or 'NLC'")
        wanted = self._chosen(indices)
        steps = self._steps()
        outputs = []
        x = self._embed(x)
        for i, step in enumerate(steps[: max(wanted) + 1] if stop_early else steps):
            x = step(x)
            if i in wanted:
                output, prefix = self._as_output(x, output_fmt, norm=norm)
                outputs.append((output, prefix) if return_prefix_tokens else output)
        return outputs if intermediates_only else (self._finish(x), outputs)
