"""What is computed on an accelerator is computed there: no table, mask or index of a network stays on the CPU.

No accelerator is needed. torch's fake tensors have shapes and a device but no values, and refuse what a real device
would: an operation on tensors of two devices.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import medmim
from fakes import FITTING, tiny_model
from medmim.heads.segmenter import Segmenter
from medmim.spec import PartSpec
from medmim_training.methods import METHODS, create_method
from medmim_training.methods.hiding import RULES

# A method, an encoder for it, and what a recipe may say of the method.
CASES = [
    *(("mae", "vit_t_mae3d", {"hiding": {"rule": rule}, "target": "normalised"}) for rule in RULES),
    ("simmim", "vit_t_simmim3d", {}),
    ("simmim", "swin_t_simmim3d", {}),
    ("simclr", "vit_t_simclr3d", {}),
    ("mae_cnn", "resenc_b_mae3d", {}),
]


@contextmanager
def on_accelerator(module: nn.Module):
    """Moves the module to a device that is made up; within, tensors can be made there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():  # not by `Module.to`, which copies values
            for name, weight in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="cuda")))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        yield


def test_every_method_is_tested():
    assert {name for name, _, _ in CASES} == set(METHODS)


@pytest.mark.parametrize(("name", "encoder", "args"), CASES)
def test_a_loss(name, encoder, args):
    method = create_method(name, tiny_model(encoder), args)
    shape = (2, method.views.count, method.encoder.in_chans, *method.encoder.img_size)
    with on_accelerator(method):
        assert method({"x": torch.empty(shape, device="cuda")}).loss.is_cuda


@pytest.mark.parametrize("name", medmim.list_models())
def test_scores_of_segmenters(name):
    for decoder in FITTING[medmim.model_info(name).family]:
        model = Segmenter(tiny_model(name), PartSpec(kind=decoder, args={}), num_classes=3)
        with on_accelerator(model):
            assert model(torch.empty(2, model.in_chans, *model.img_size, device="cuda")).is_cuda


@pytest.mark.parametrize("name", medmim.list_models())
def test_scores_of_classifiers(name):
    model = tiny_model(name, num_classes=3)
    with on_accelerator(model):
        assert model(torch.empty(2, model.in_chans, *model.img_size, device="cuda")).is_cuda
