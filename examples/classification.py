"""Classification: fine-tune an encoder with a plain loop, save it, and classify a scan from a file.

Takes about 30 seconds on 2 CPU cores. The task is to tell the right side of a chest from the left in a cube of 96 mm;
it is trained on cubes from one patient's CT and tested on cubes from another's. The place that a cube was cut from is
the truth. It prints the share of the test cubes that is right, for pretrained and for random weights after as many
steps, and what the model, saved and loaded, says of a file with the right half of the test scan.

One patient to train on is far too few for anything but an example.
"""

import os
import tempfile
from pathlib import Path

import nibabel as nib
import torch
import torch.nn.functional as F

import medmim
from medmim.samples import sample_scans

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs
STEPS, TEST_CUBES = (1, 2) if SMOKE else (40, 64)
SIZE, CLASSES = (48, 48, 48), ("left", "right")  # voxels of 2 mm


def draw_cubes(x: torch.Tensor, number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Cubes (number, 1, *SIZE) of a scan (1, D, H, W), left and right in turn, and their classes (number,)."""
    labels = torch.arange(number) % 2
    shift = torch.stack([torch.randint(-12, 13, (number,), generator=generator) for _ in SIZE], dim=1)
    cubes = []
    for label, (right, front, up) in zip(labels.tolist(), shift.tolist(), strict=True):
        middle = x.shape[1] // 2 + (36 if label else -36) + right, x.shape[2] // 2 + front, x.shape[3] // 2 + 2 * up
        d, h, w = (slice(centre - side // 2, centre + side // 2) for centre, side in zip(middle, SIZE, strict=True))
        cubes.append(x[:, d, h, w])
    return torch.stack(cubes), labels


def accuracy(model: torch.nn.Module, cubes: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of cubes whose class is right."""
    model.eval()
    with torch.inference_mode():
        return (model(cubes).argmax(dim=1) == labels).float().mean().item()


chest, brain, thorax = sample_scans()
for pretrained in (False, True):
    torch.manual_seed(0)
    model = medmim.create_model("vit_t_mae3d", pretrained, num_classes=len(CLASSES), img_size=SIZE)
    volume = medmim.model_info("vit_t_mae3d").weights[0].volume  # the same preprocessing for random weights
    transform = medmim.create_transform(model, fit="pad", volume=volume)
    training, testing = transform(chest.path).as_tensor(), transform(thorax.path).as_tensor()
    generator = torch.Generator().manual_seed(0)
    test = draw_cubes(testing, TEST_CUBES, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.05)
    print(f"{'pretrained' if pretrained else 'random'} weights: {accuracy(model, *test):.2f} right before", end=", ")
    for _ in range(STEPS):
        model.train()
        cubes, labels = draw_cubes(training, 16, generator)
        F.cross_entropy(model(cubes), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"{accuracy(model, *test):.2f} after {STEPS} steps, on another patient")

folder = Path(tempfile.mkdtemp(prefix="medmim-"))
medmim.name_classes(model, CLASSES)
medmim.save_pretrained(model, folder / "side")
scan = nib.load(thorax.path)
scan.slicer[scan.shape[0] // 2 :].to_filename(folder / "half.nii.gz")  # its first axis points to the right
print("a file with the right half:", medmim.classify(medmim.from_pretrained(folder / "side"), folder / "half.nii.gz"))
print(f"on the command line: medmim classify {folder}/half.nii.gz -m local-dir:{folder}/side -o classes.csv")
