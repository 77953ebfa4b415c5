"""What a run starts from: the weights of another, as they are, widened, balanced, or for other patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medmim.arguments import checked_arguments, defaults_of
from medmim.errors import SpecError
from medmim.factory import create_decoder, create_model, decoder_class
from medmim.fitting import fitted_arguments
from medmim.hub import HubAccess
from medmim.layers.adapt import resize_patch_output
from medmim.registry import as_arguments, find_family
from medmim.resolution import resolve
from medmim.spec import PartSpec, TrainingRecord
from medmim_training.balance import raise_positions
from medmim_training.recipe import Recipe
from medmim_training.widening import WIDTH, widen_decoder, widen_encoder

# In which the decoder of a masked autoencoder may differ.
FITTED = ("encoder_dim", "grid_size", "patch_size", "first_place")


def with_origin(recipe: Recipe) -> Recipe:
    """The recipe with what its encoder has to be told of the weights that it starts from (see `fitted_arguments`).

    Raises:
        UnknownModelError, SpecError, WeightsError: See `medmim.create_model`.
    """
    model = recipe.model
    if model.weights is None:
        return recipe
    stored, _ = resolve(model.weights, None, HubAccess(), needs_weights=True)
    family = find_family(stored.family, needed_by=model.weights)
    given = checked_arguments(family.cls, model.args, model.name)
    origin = fitted_arguments(family.cls, stored.args, given).get("pretrained_img_size")
    if origin is None:
        return recipe
    args = {**model.args, "pretrained_img_size": list(origin)}
    return recipe.model_copy(update={"model": model.model_copy(update={"args": args})})


def start_from_weights(method: nn.Module, recipe: Recipe) -> TrainingRecord | None:
    """Gives a fresh method the weights that its recipe starts from, if any; returns the record of their training.

    Positions count in the weights, or in the fresh ones, as much as the recipe says (see `balance`).

    The decoder that was published beside them is taken over, where the method has the same or, of a masked
    autoencoder, one for other patches or a wider encoder.

    Raises:
        SpecError: When they are of another architecture.
        UnknownModelError, WeightsError: See `medmim.create_model`.
    """
    model, seed = recipe.model, recipe.seed
    if model.weights is None:
        raise_positions(method.encoder, model.position_gain)
        return None
    args = {key: value for key, value in model.args.items() if not (model.widen and key in WIDTH)}
    encoder = create_model(model.weights, pretrained=True, **args)
    if encoder.spec.architecture != model.name and not model.widen:
        raise SpecError(f"model.weights are of {encoder.spec.architecture}, but model.name is {model.name}")
    state = widen_encoder(encoder, method.encoder, seed=seed) if model.widen else encoder.state_dict()
    method.encoder.load_state_dict(state)
    raise_positions(method.encoder, model.position_gain)
    weights = encoder.spec.weights
    if weights is None:
        return None
    if method.decoder_spec is not None and weights.decoder_spec is not None:
        state = _decoder_state(model.weights, weights.decoder_spec, method, widen=model.widen)
        if state is not None and model.widen:
            state = widen_decoder(state, method.encoder.num_features // encoder.num_features, seed=seed)
        if state is not None:
            method.decoder.load_state_dict(state)
    return weights.training


def _decoder_state(name: str, published: PartSpec, method: nn.Module, *, widen: bool) -> dict[str, Tensor] | None:
    """The weights of a published decoder, for the patches of a method; None where that has another network."""
    is_mae = published.kind == "mae"
    if published.kind != method.decoder_spec.kind or (widen and not is_mae):
        return None
    model = create_model(name, pretrained=True)
    there, here = _settings(published, model), _settings(method.decoder_spec, method.encoder)
    if any(there.get(key) != here.get(key) for key in {**there, **here} if not (is_mae and key in FITTED)):
        return None
    state = create_decoder(model).state_dict()
    if not is_mae or there["patch_size"] == here["patch_size"]:
        return state
    return state | {
        f"to_voxels.{key}": resize_patch_output(state[f"to_voxels.{key}"], there["patch_size"], here["patch_size"])
        for key in ("weight", "bias")
    }


def _settings(part: PartSpec, encoder: nn.Module) -> dict[str, Any]:
    """All arguments that a decoder behind an encoder is built with."""
    cls = decoder_class(part.kind)
    return as_arguments({**defaults_of(cls), **cls.of_encoder(encoder), **part.args})
