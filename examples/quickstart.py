# %% [markdown]
"""Quickstart: a pretrained encoder, the preprocessing that it expects, and features of an MR of the brain.

Takes about 10 seconds on 2 CPU cores, without a network. It prints the shapes of what an encoder gives: a vector of the
middle of a scan, maps of its blocks, a vector for each patch of the whole scan; and that a saved model gives the same.
"""

# %%
import tempfile

import torch

import medmim
from medmim.samples import sample_scans

chest, brain, thorax = sample_scans()
print("weights there are:", *medmim.list_pretrained())

# %% [markdown]
# A model comes with the preprocessing of its weights. The transform reads the file, turns and resamples it, scales its
# intensities, and takes the middle, as much as the model's input holds.

# %%
model = medmim.create_model("vit_t_mae3d", pretrained=True)
transform = medmim.create_transform(model)

original = medmim.load_volume(brain.path)
x = transform(brain.path)
print(f"the file has {original.array.shape[1:]} voxels of {original.spacing} mm, axes {original.orientation}")
print(f"the model takes {tuple(x.shape[1:])} of {transform.spec.spacing} mm, here from {x.min():.1f} to {x.max():.1f}")

# %% [markdown]
# One vector of the scan, and feature maps of chosen blocks. The interface is timm's.

# %%
with torch.inference_mode():
    batch = x.as_tensor()[None]  # (B, channels, D, H, W)
    pooled = model(batch)
    maps = model.forward_intermediates(batch, [3, 7, 11], intermediates_only=True)
print("pooled:", tuple(pooled.shape))
print("maps:", *(tuple(each.shape) for each in maps))

# %% [markdown]
# A whole scan, of any size, goes through in windows. Each patch has a vector and a place in the patient.

# %%
embedding = medmim.embed(model, brain.path)
place = embedding.affine @ torch.tensor([3, 4, 3, 1.0], dtype=torch.float64)
print("patches:", tuple(embedding.features.shape), "of the scan:", tuple(embedding.pooled.shape))
print(
    "patch (3, 4, 3) is at", [round(mm) for mm in place[:3].tolist()], "mm, right, anterior and superior of the origin"
)

# %% [markdown]
# A model folder holds weights and preprocessing, and gives the same features when it is loaded.

# %%
with tempfile.TemporaryDirectory() as folder:
    medmim.save_pretrained(model, folder)
    loaded = medmim.from_pretrained(folder)
with torch.inference_mode():
    print("saved, loaded and the same:", torch.equal(loaded(batch), pooled))
