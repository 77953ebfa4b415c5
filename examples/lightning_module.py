"""Use inside PyTorch Lightning: a pretrained encoder fine-tuned by a `LightningModule`, with rates that decay by layer.

Takes about 80 seconds on 2 CPU cores; needs `pip install lightning`. The volumes are MONAI's: noise with balls of
random size and brightness in it, whose labels are exact. It prints the Dice of the balls in volumes that were not
trained on, before and after, for pretrained and for random weights. The task is easy, and synthetic: the weights have
seen scans.
"""

import os
import warnings

import lightning as L
import numpy as np
import torch
from monai.data import create_test_image_3d
from monai.losses import DiceLoss
from timm.optim import param_groups_layer_decay
from torch.utils.data import DataLoader, TensorDataset

import medmim

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs
EPOCHS, VOLUMES, SIDE = (1, 2, 32) if SMOKE else (10, 12, 48)


class BallSegmenter(L.LightningModule):
    """Balls in noise; any segmenter of medmim in the middle."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        self.model = medmim.create_segmenter(
            "vit_t_mae3d",
            "unetr",
            classes=("background", "ball"),
            pretrained=pretrained,
            img_size=(SIDE, SIDE, SIDE),
            decoder_args={"feature_size": 8},
        ).train()  # with weights it comes in evaluation mode
        self.loss = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, labels = batch
        return self.loss(self.model(x), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, labels = batch
        found = self.model(x).argmax(dim=1, keepdim=True)
        self.log("dice", 2 * (found * labels).sum() / (found.sum() + labels.sum()), batch_size=len(x))

    def configure_optimizers(self) -> dict:
        # As timm fine-tunes: blocks near the input change less. A segmenter knows its layers, as timm's models do.
        groups = param_groups_layer_decay(self.model, weight_decay=0.05, layer_decay=0.75)
        optimizer = torch.optim.AdamW([group | {"lr": 1e-3 * group.pop("lr_scale")} for group in groups])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_volumes(number: int, seed: int) -> DataLoader:
    """Volumes (1, SIDE, SIDE, SIDE) in 0..1 and labels of the same shape."""
    state = np.random.RandomState(seed)
    pairs = [
        create_test_image_3d(SIDE, SIDE, SIDE, num_objs=4, rad_max=SIDE // 5, num_seg_classes=1, random_state=state)
        for _ in range(number)
    ]
    images, labels = (torch.from_numpy(np.stack(arrays)).float()[:, None] for arrays in zip(*pairs, strict=True))
    return DataLoader(TensorDataset(images, labels.long()), batch_size=2, shuffle=seed == 0)


warnings.filterwarnings("ignore", ".*does not have many workers")  # the volumes are in memory
for pretrained in (False, True):
    L.seed_everything(0, verbose=False)
    module = BallSegmenter(pretrained)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=EPOCHS,
    )
    training, validation = make_volumes(VOLUMES, seed=0), make_volumes(VOLUMES // 2, seed=1)
    (before,) = trainer.validate(module, validation, verbose=False)
    trainer.fit(module, training, validation)
    after = trainer.callback_metrics["dice"].item()
    print(f"{'pretrained' if pretrained else 'random'} weights: Dice {before['dice']:.3f} before, {after:.3f} after")
