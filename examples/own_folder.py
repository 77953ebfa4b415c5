"""Bring your own folder of NIfTI files: features of each scan, whatever its axes, size and faults.

    python examples/own_folder.py [FOLDER]

Takes about 10 seconds on 2 CPU cores without a folder; it then makes one: a chest CT, a brain MR, the same MR with its
axes stored in another order, and a file of which half is missing. It prints what each file holds and how similar the
scans are, and writes their features to `features.safetensors` in the folder. The MR with other axes is the same scan,
so that its features must be too; the broken file is reported and does not stop the others.

`medmim embed FOLDER/*.nii.gz -o features.safetensors` does the same, for NRRD, MetaImage and DICOM, too.
"""

import os
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import medmim
from medmim.samples import sample_scans

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs


def make_folder() -> Path:
    """A folder as one finds them."""
    folder = Path(tempfile.mkdtemp(prefix="medmim-"))
    chest, brain, _ = sample_scans()
    if not SMOKE:
        nib.load(chest.path).to_filename(folder / "chest.nii.gz")
    scan = nib.load(brain.path)
    scan.to_filename(folder / "brain.nii.gz")
    turned = nib.io_orientation(scan.affine)[[2, 0, 1]] * [1, -1]  # other order, other directions
    scan.as_reoriented(turned).to_filename(folder / "brain_turned.nii.gz")
    content = brain.path.read_bytes()
    (folder / "broken.nii.gz").write_bytes(content[: len(content) // 2])
    return folder


folder = Path(sys.argv[1]) if len(sys.argv) > 1 else make_folder()
model = medmim.create_model("vit_t_mae3d", pretrained=True)
features = {}
for path in sorted(folder.glob("*.nii*")):
    try:
        scan = medmim.load_volume(path)
        features[path.name] = medmim.embed(model, scan).pooled
    except medmim.ScanError as error:
        print("left out:", error)
    else:
        spacing = " x ".join(f"{side:.2f}" for side in scan.spacing)
        print(f"{path.name}: {scan.array.shape[1:]} voxels of {spacing} mm, axes {scan.orientation}")

if not features:
    sys.exit(f"{folder}: has no NIfTI file that can be used")
save_file(features, folder / "features.safetensors")
print(f"{folder / 'features.safetensors'}: {len(features)} scans, {model.num_features} features each")

vectors = F.normalize(torch.stack(list(features.values())), dim=1)
for name, row in zip(features, (vectors @ vectors.T).tolist(), strict=True):
    print(f"{name:>20}", *(f"{similarity:.4f}" for similarity in row))
