"""medmim's models under the names that `timm.create_model` and `timm.list_models` know.

timm's builder takes 2-D images; only its registry is used here, and only what `timm.models` exports. Building and
loading stay medmim's: strict, verified, with medmim's arguments. To timm this is a module of entry points like its own,
with one function a model and `default_cfgs` for their weights; both are filled by `register_with_timm`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, is_model, model_entrypoint, register_model
from torch import nn

from medmim import hub, registry
from medmim.errors import SpecError
from medmim.factory import create_model

__all__ = ["register_with_timm"]

default_cfgs: dict[str, DefaultCfg] = {}


def register_with_timm() -> list[str]:
    """Makes the models of the catalog, and those registered since, known to timm.

    From then on `timm.create_model("vit_t_mae3d.open_mix", pretrained=True)` is what `medmim.create_model` is;
    `timm.list_models(module="timm_models")` lists them. It may be called again after `medmim.register_model`.

    Returns:
        The names that were not registered before.

    Raises:
        SpecError: When timm has a model of such a name already; nothing is registered then.
    """
    names = [name for name in registry.list_models() if name not in default_cfgs]
    for name in names:
        if is_model(name):
            module = model_entrypoint(name).__module__
            raise SpecError(f"timm has a model {name!r} already, from {module}; use medmim.create_model instead")
    for name in names:
        default_cfgs[name] = _weights_for_timm(name)
        globals()[name] = register_model(_entry_point(name))
    return names


def _entry_point(architecture: str) -> Callable[..., nn.Module]:
    """What timm calls to build a model: named as the model, in this module."""

    def build(
        pretrained: bool = False,
        *,
        pretrained_cfg: str | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        # timm gives the tag that was asked for as `pretrained_cfg`, whether it exists or not; for "local-dir:" and
        # "hf-hub:" what it understands of the config, not where that was.
        if pretrained_cfg_overlay or not isinstance(pretrained_cfg, str | None):
            raise SpecError(
                f"{architecture}: weights are chosen by their tag, so give no pretrained_cfg; those of a folder or a "
                "repository are loaded by medmim.create_model"
            )
        name = f"{architecture}.{pretrained_cfg}" if pretrained_cfg else architecture
        return create_model(name, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = architecture
    build.__doc__ = registry.model_info(architecture).description
    return build


def _weights_for_timm(architecture: str) -> DefaultCfg:
    """The tags of a model's weights, the default one first; timm wants one also of a model without weights."""
    configs = {
        weights.tag: PretrainedCfg(
            hf_hub_id=weights.repo,
            file=None if weights.repo else str(hub.PACKAGED / f"{architecture}.{weights.tag}"),
            license=weights.license.lower(),
        )
        for weights in registry.model_info(architecture).weights
    } or {"": PretrainedCfg()}
    return DefaultCfg(tags=deque(configs), cfgs=configs, is_pretrained="" not in configs)
