"""Networks of MONAI, to be trained by the same loop as ours: everything but their last layer is an encoder.

A U-Net without its last layer gives a feature map at full resolution; the decoders `light` and `linear` put a
convolution of 1 behind such a map, which is that layer. They are registered when asked for, and no part of the catalog.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn

from medmim.layers.tokens import Size, to_grid_size
from medmim.registry import is_model, register_model


class Peer(nn.Module):
    """A network from volumes (B, in_chans, D, H, W) to features (B, channels[0], D, H, W), with an encoder's contract.

    Args:
        body: The network.
        img_size: Voxels along (D, H, W), of crops and windows; each side divides by two as often as `body` does.
        in_chans: Channels of the volume.
        channels: At full resolution, at half of it, and so on.
    """

    num_prefix_tokens = num_classes = 0

    def __init__(self, body: nn.Module, *, img_size: Size, in_chans: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.spec = None  # set by whoever builds it
        self.body, self.in_chans, self.num_features = body, in_chans, channels[0]
        self.patch_size = (2 ** (len(channels) - 1),) * 3
        self.feature_info = [{"module": "body", "num_chs": self.num_features, "reduction": (1, 1, 1)}]
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size) -> None:
        """Changes the size of windows; no weight depends on it."""
        self.img_size, self.grid_size = tuple(img_size), to_grid_size(tuple(img_size), self.patch_size)

    def reset_classifier(self, num_classes: int) -> None:
        """Nothing to reset: there is no classifier."""

    def init_buffers(self) -> None:
        """Nothing to rebuild: files store everything."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return set()

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to features (B, channels[0], D, H, W)."""
        return self.body(x)


class MonaiUNet(Peer):
    """MONAI's `UNet`, with two residual units a level as in its tutorials."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int, int] = (96, 96, 96),
        in_chans: int = 1,
        channels: tuple[int, ...] = (16, 32, 64, 128, 256),
    ) -> None:
        body = UNet(3, in_chans, channels[0], channels, (2,) * (len(channels) - 1), num_res_units=2)
        super().__init__(body, img_size=img_size, in_chans=in_chans, channels=channels)


class MonaiDynUNet(Peer):
    """MONAI's `DynUNet`, its reimplementation of the network of nnU-Net, without deep supervision."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int, int] = (96, 96, 96),
        in_chans: int = 1,
        channels: tuple[int, ...] = (32, 64, 128, 256, 320),
    ) -> None:
        strides = (1, *[2] * (len(channels) - 1))
        body = DynUNet(
            3, in_chans, channels[0], [3] * len(channels), strides, strides[1:], filters=channels, norm_name="instance"
        )
        # Second names of what skip_layers has, which is what is run; no file can hold weights under two names.
        for name in ("input_block", "downsamples", "bottleneck", "upsamples"):
            delattr(body, name)
        super().__init__(body, img_size=img_size, in_chans=in_chans, channels=channels)


PEERS: dict[str, Any] = {"monai_unet": MonaiUNet, "monai_dynunet": MonaiDynUNet}


def register_peers() -> None:
    """Makes the names of `PEERS` known to `create_model` for the rest of the process."""
    for name, cls in PEERS.items():
        if not is_model(name):
            register_model(name, cls=cls, description=cls.__doc__.splitlines()[0])
