"""What a run starts from: the weights of another, as they are, widened, balanced, or for other patches."""

from __future__ import annotations

from torch import Tensor, nn

from medmim.errors import SpecError
from medmim.factory import create_decoder, create_model
from medmim.layers.adapt import resize_patch_output
from medmim.spec import PartSpec, TrainingRecord
from medmim_training.balance import raise_positions
from medmim_training.recipe import Recipe
from medmim_training.widening import WIDTH, widen_decoder, widen_encoder


def start_from_weights(method: nn.Module, recipe: Recipe) -> TrainingRecord | None:
    """Gives a fresh method the weights that its recipe starts from, if any; returns the record of their training.

    The decoder that was published beside them is taken over, where the method has the same or, of a masked
    autoencoder, one for other patches or a wider encoder.

    Raises:
        SpecError: When they are of another architecture.
        UnknownModelError, WeightsError: See `medmim.create_model`.
    """
    model, seed = recipe.model, recipe.seed
    if model.weights is None:
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
        state = _decoder_state(model.weights, weights.decoder_spec, method.decoder_spec, widen=model.widen)
        if state is not None and model.widen:
            state = widen_decoder(state, method.encoder.num_features // encoder.num_features, seed=seed)
        if state is not None:
            method.decoder.load_state_dict(state)
    return weights.training


def _decoder_state(name: str, published: PartSpec, wanted: PartSpec, *, widen: bool) -> dict[str, Tensor] | None:
    """The weights of a published decoder, for the patches that are wanted; None where it is another network."""
    if widen and published.kind != "mae":
        return None
    patches = [part.args.get("patch_size") for part in (published, wanted)]
    same = [{**part.args, "patch_size": None} for part in (published, wanted)]
    if published.kind != wanted.kind or same[0] != same[1]:
        return None
    state = create_decoder(create_model(name, pretrained=True)).state_dict()
    if patches[0] == patches[1]:
        return state
    return state | {
        f"to_voxels.{key}": resize_patch_output(state[f"to_voxels.{key}"], *map(tuple, patches))
        for key in ("weight", "bias")
    }
