"""Use inside a MONAI pipeline: medmim's preprocessing among MONAI's transforms, medmim's network in MONAI's training.

Takes about 80 seconds on 2 CPU cores. A CT of a thorax and its labels are read, prepared and cropped by one `Compose`;
a pretrained encoder with the decoder of UNETR learns bone, lung and other tissue from the lower half of the scan, and
MONAI's sliding window and metric measure it on the upper half. It prints the loss, and the Dice of each class before
and after. Both halves are one patient's: it shows that the parts fit together, not how well they do in another patient.
"""

import os

import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    MapLabelValued,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    ResampleToMatchd,
    SpatialCropd,
)
from monai.utils import set_determinism

import medmim
from medmim.samples import sample_scans

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs
STEPS, SIDE = (2, 32) if SMOKE else (70, 64)
CLASSES = ("background", "bone", "lung", "other tissue")
BOTH = ("image", "label")

set_determinism(0)
chest, brain, thorax = sample_scans()
model = medmim.create_segmenter(
    "vit_t_mae3d",
    "unetr",
    classes=CLASSES,
    pretrained=True,
    img_size=(SIDE, SIDE, SIDE),
    decoder_args={"feature_size": 8},
)

# What medmim's transform makes of a path is a MetaTensor with an affine, so MONAI's transforms go on from there.
prepare = [
    Lambdad("image", medmim.create_transform(model, fit="pad")),
    LoadImaged("label"),
    EnsureChannelFirstd("label"),
    ResampleToMatchd("label", key_dst="image", mode="nearest"),
    MapLabelValued("label", orig_labels=range(8), target_labels=[0, 1, 1, 1, 1, 2, 2, 3]),
]
across = slice(60, 130) if SMOKE else slice(None)
lower, upper = ([across, across, half] for half in (slice(0, 85), slice(85, None)))
training = Compose(
    [
        *prepare,
        SpatialCropd(BOTH, roi_slices=lower),
        RandCropByLabelClassesd(BOTH, "label", (SIDE, SIDE, SIDE), num_classes=len(CLASSES), num_samples=2),
        RandGaussianNoised("image", std=0.02),
    ]
)
testing = Compose([*prepare, SpatialCropd(BOTH, roi_slices=upper)])
record = {"image": thorax.path, "label": thorax.labels}
loader = DataLoader(CacheDataset([record] * 2, training, progress=False), batch_size=1)
case = testing(record)


def show_dice(when: str) -> None:
    """Prints the Dice of each class on the upper half."""
    model.eval()
    with torch.inference_mode():
        scores = sliding_window_inference(case["image"][None], model.img_size, 2, model, overlap=0.25)
    metric = DiceMetric(include_background=False, reduction="none", num_classes=len(CLASSES))
    dice = metric(scores.argmax(dim=1, keepdim=True), case["label"][None])[0]
    print(f"{when}:", *(f"{name} {value:.3f}" for name, value in zip(CLASSES[1:], dice.tolist(), strict=True)))


show_dice("Dice before")
loss_function = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
# The new decoder starts at background everywhere, and has few steps to leave it.
rates = [{"params": model.encoder.parameters(), "lr": 3e-4}, {"params": model.decoder.parameters(), "lr": 1e-2}]
optimizer = torch.optim.AdamW(rates, weight_decay=0.05)
step = 0
while step < STEPS:
    for batch in loader:
        model.train()
        loss = loss_function(model(batch["image"]), batch["label"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
show_dice("Dice after")
