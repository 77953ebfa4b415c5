"""What "auto" stands for."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest
import torch

from medmim_training.precision import resolve_precision


@pytest.mark.parametrize(
    ("machine", "supported", "native", "expected"),
    [
        ("x86_64", True, True, "bf16"),
        ("AMD64", True, False, "fp32"),  # AVX-512 that imitates it
        ("x86_64", False, False, "fp32"),
        ("aarch64", True, False, "bf16"),
        ("aarch64", False, False, "fp32"),
    ],
)
def test_auto_is_what_the_processor_multiplies_in(monkeypatch, machine, supported, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert resolve_precision("auto") == expected


def test_auto_is_fp32_where_torch_has_no_mkldnn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert resolve_precision("auto") == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_what_the_gpu_multiplies_in(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_precision("auto") == expected


def test_what_is_asked_for_stays():
    assert resolve_precision("fp16") == "fp16"
