# %% [markdown]
"""Segmentation: fine-tune the encoder to tell grey and white matter, and segment a part of the brain it never saw.

Takes about 80 seconds on 2 CPU cores. The MR and its labels are cut into three: the back of the head trains, the middle
validates, the front is for the test. It prints the Dice of each class on the front, in the voxels of the file, before
and after training. One brain, an average of 152 people, is an example; what it scores says nothing of a patient.
"""

# %%
import csv
import json
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

import medmim
from medmim.samples import sample_scans
from medmim_training.recipe import load_recipe
from medmim_training.tasks.finetuning import finetune
from medmim_training.tasks.recipe import FineTuneRecipe
from medmim_training.tasks.segmentation import build_segmenter

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs
STEPS, SIDE = (2, 32) if SMOKE else (60, 48)

# %% [markdown]
# The data: a folder as the Medical Segmentation Decathlon has it, and a table that says who trains and who tests.

# %%
chest, brain, thorax = sample_scans()
folder = Path(tempfile.mkdtemp(prefix="medmim-"))
parts = {"back": slice(0, 52), "middle": slice(52, 72), "front": slice(72, 117)}
for kind, path in (("imagesTr", brain.path), ("labelsTr", brain.labels)):
    (folder / "data" / kind).mkdir(parents=True)
    for name, part in parts.items():
        nib.load(path).slicer[:, part].to_filename(folder / "data" / kind / f"{name}.nii.gz")

names = {str(label): name for label, name in enumerate(brain.classes)}
(folder / "data" / "dataset.json").write_text(json.dumps({"labels": names}))
rows = [("case", "fold", "split"), ("back", 1, "train"), ("middle", 0, "train"), ("front", 0, "test")]
with open(folder / "data" / "subjects.csv", "w", newline="") as file:
    csv.writer(file).writerows(rows)

# %% [markdown]
# The recipe. On the command line this is `medmim-train finetune finetune/vit_t_unetr data=FOLDER ... -o RUN`.

# %%
recipe = load_recipe(
    "finetune/vit_t_unetr",
    [
        f"data={folder / 'data'}",
        "fold=0",
        "volume.spacing=[2, 2, 2]",
        f"model.args.img_size=[{SIDE}, {SIDE}, {SIDE}]",
        f"schedule={{steps: {STEPS}, warmup: {STEPS // 10}}}",
        f"head_warmup={STEPS // 10}",
        "optimizer.lr_scale={decoder: 20}",  # which starts at background everywhere, and has few steps to leave it
        f"output.checkpoint_every={STEPS // 2}",
        "overlap=0.25",
    ],
    kind=FineTuneRecipe,
)


# %% [markdown]
# The test: a file goes in, and labels in the voxels of that file come out.


# %%
def show_dice(model, when: str) -> None:
    """Prints the Dice of each class on the front of the brain."""
    found = medmim.segment(model, folder / "data" / "imagesTr" / "front.nii.gz", overlap=0.25)
    truth = np.asarray(nib.load(folder / "data" / "labelsTr" / "front.nii.gz").dataobj)
    for label, name in list(enumerate(found.classes))[1:]:
        ours, theirs = found.labels == label, truth == label
        print(f"{when}: Dice of {name} {2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()):.3f}")


show_dice(build_segmenter(recipe), "before")

# %%
finetune(
    recipe,
    folder / "run",
    watch=lambda report: print(f"step {report.step}: loss {report.loss:.3f}"),
    watch_validation=lambda found: print(f"step {found.step}: Dice {found.dice:.3f} on the middle"),
)
show_dice(medmim.from_pretrained(folder / "run" / "model"), "after")
print(f"use it: medmim segment SCANS -m local-dir:{folder / 'run' / 'model'} -o masks")
