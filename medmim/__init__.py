"""3-D medical image encoders pretrained by masked image modelling, and the preprocessing their weights expect.

Names are loaded when they are first used, so that importing medmim and listing models cost no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# ruff: noqa: F401
if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`; a test holds the two together
    from medmim.classification import classify
    from medmim.errors import MedmimError, ScanError, SpecError, UnknownModelError, WeightsError
    from medmim.export import export_model
    from medmim.factory import create_decoder, create_model, from_pretrained
    from medmim.inference import embed
    from medmim.publish import push_to_hub
    from medmim.registry import is_model, list_models, list_pretrained, model_info, register_model
    from medmim.saving import save_pretrained
    from medmim.segmentation import segment
    from medmim.spec import ModelSpec, TaskSpec, VolumeSpec, WeightsSpec
    from medmim.tasks import create_segmenter, name_classes
    from medmim.timm_models import register_with_timm
    from medmim.transforms import create_transform
    from medmim.volumes import Volume, load_volume

__version__ = "0.1.0"

_MODULE_OF = {
    "MedmimError": "errors",
    "ModelSpec": "spec",
    "ScanError": "errors",
    "SpecError": "errors",
    "TaskSpec": "spec",
    "UnknownModelError": "errors",
    "Volume": "volumes",
    "VolumeSpec": "spec",
    "WeightsError": "errors",
    "WeightsSpec": "spec",
    "classify": "classification",
    "create_decoder": "factory",
    "create_model": "factory",
    "create_segmenter": "tasks",
    "create_transform": "transforms",
    "embed": "inference",
    "export_model": "export",
    "from_pretrained": "factory",
    "is_model": "registry",
    "list_models": "registry",
    "list_pretrained": "registry",
    "load_volume": "volumes",
    "model_info": "registry",
    "name_classes": "tasks",
    "push_to_hub": "publish",
    "register_model": "registry",
    "register_with_timm": "timm_models",
    "save_pretrained": "saving",
    "segment": "segmentation",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'medmim' has no attribute {name!r}")
    value = getattr(import_module(f"medmim.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
