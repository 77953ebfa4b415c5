"""Models for a task: an encoder with a decoder that segments, and names for what a model predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from medmim.errors import SpecError
from medmim.factory import create_model
from medmim.heads.segmenter import Segmenter
from medmim.identity import uncompiled
from medmim.spec import ModelSpec, Origin, PartSpec, TaskSpec, VolumeSpec

MOST_CLASSES = 2**15  # labels are int16


def create_segmenter(
    encoder: str,
    decoder: str = "unetr",
    *,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
    pretrained: bool = False,
    decoder_args: Mapping[str, Any] | None = None,
    volume: VolumeSpec | None = None,
    **kwargs: Any,
) -> Segmenter:
    """Builds a segmentation network around an encoder, on request with the encoder's weights.

    Args:
        encoder: A name as for `create_model`; of a segmenter or classifier that was saved, the encoder is taken, which
            is then what the new model started from.
        decoder: "unetr" for a plain transformer, "unet" for a pyramid (residual and Swin encoders); "light" (transposed
            convolutions) and "linear" take any encoder.
        num_classes: K, the background included, at least 2; may be left out when `classes` are given.
        classes: Their names, the background first; without them "background", "class 1", ...
        pretrained: Loads the encoder's weights; the decoder is new either way. The model is then in evaluation mode.
        decoder_args: Arguments of the decoder, such as `feature_size` of "unetr".
        volume: Preprocessing, where it is not that which the encoder was trained with last.
        **kwargs: As for `create_model`: `img_size`, `in_chans`, `device`, `revision`, ...

    Returns:
        A model from volumes (B, in_chans, D, H, W) to class scores (B, K, D, H, W).

    Raises:
        SpecError: For a decoder that does not exist or does not fit, or classes that do not match.
        UnknownModelError: See `create_model`.
        WeightsError: See `create_model`.
    """
    classes = _names_of_classes(num_classes, classes)
    part = PartSpec.parse({"kind": decoder, "args": decoder_args or {}}, source="decoder")
    model = create_model(encoder, pretrained, **kwargs)
    volume = volume or model.spec.volume  # that of a stored task goes before that of the weights
    model = encoder_of(model)
    segmenter = Segmenter(model, part, num_classes=len(classes))
    segmenter.decoder.to(next(model.parameters()))
    segmenter.train(model.training)
    segmenter.spec = _with_task(model.spec, kind="segmentation", classes=classes, decoder=part, volume=volume)
    return segmenter


def _names_of_classes(num_classes: int | None, classes: Sequence[str]) -> tuple[str, ...]:
    """The names of a segmenter's classes, made up where they are not given."""
    classes = _as_names(classes)
    if num_classes is None and not classes:
        raise SpecError("a segmenter needs num_classes=, the background included, or classes=, their names")
    number = len(classes) if num_classes is None else num_classes
    if not isinstance(number, Integral):
        raise SpecError(f"num_classes must be a whole number, not {number!r}")
    if not 2 <= number <= MOST_CLASSES:
        raise SpecError(
            f"a segmenter needs two classes or more, the background included, and at most {MOST_CLASSES}; not {number}"
        )
    if classes and number != len(classes):
        raise SpecError(f"num_classes is {number}, but {len(classes)} classes are named")
    return classes or ("background", *(f"class {i}" for i in range(1, number)))


def _as_names(classes: Sequence[str]) -> tuple[str, ...]:
    # A text would be taken for the names of its letters.
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise SpecError(f"classes must be names, such as ('background', 'liver'), not {classes!r}")
    return tuple(classes)


def name_classes(model: nn.Module, classes: Sequence[str], *, volume: VolumeSpec | None = None) -> None:
    """Writes into a model's spec what its outputs mean, so that it is saved with it.

    Args:
        model: A model with a classifier, or a segmenter.
        classes: Names in the order of its outputs; for a segmenter the first is the background.
        volume: Preprocessing, where it is not what the spec says already.

    Raises:
        SpecError: When there are not as many names as outputs, or two are the same.
    """
    model = uncompiled(model)
    if not isinstance(getattr(model, "spec", None), ModelSpec):
        raise SpecError("only a model from create_model can be given names of classes")
    classes = _as_names(classes)
    if len(classes) != model.num_classes:
        raise SpecError(f"the model has {model.num_classes} outputs, but {len(classes)} classes are named")
    if isinstance(model, Segmenter):
        what = {"kind": "segmentation", "decoder": model.spec.task.decoder}
    else:
        what = {"kind": "classification", "decoder": None}
    model.spec = _with_task(model.spec, classes=classes, volume=volume, **what)


def _with_task(spec: ModelSpec, *, classes: Sequence[str], volume: VolumeSpec | None, **what: Any) -> ModelSpec:
    task = {"classes": tuple(classes), "volume": volume or spec.volume, "origin": _origin(spec), **what}
    return spec.model_copy(update={"task": TaskSpec.parse(task, source=f"task of {spec.name}")})


def _origin(spec: ModelSpec) -> Origin | None:
    """The weights that a model for a task starts from; new names of classes change nothing of that."""
    if spec.task is not None:
        return spec.task.origin
    return Origin(name=spec.name, license=spec.weights.license) if spec.weights is not None else None


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a model, without what a task added to it but prepared for as the task was.

    Args:
        model: A segmenter, or an encoder with or without a classifier, which is taken off.

    Returns:
        The encoder itself, no copy. Its spec has no task, and its weights the preprocessing of the task.
    """
    model = uncompiled(model)
    encoder, spec = model.encoder if isinstance(model, Segmenter) else model, model.spec
    weights = spec.weights.model_copy(update={"volume": spec.volume}) if spec.weights is not None else None
    encoder.reset_classifier(0)
    encoder.spec = spec.model_copy(update={"task": None, "weights": weights})
    return encoder
