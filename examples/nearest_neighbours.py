"""Features and nearest neighbours: find the level of one patient's chest in the CT of another.

Takes about 10 seconds on 2 CPU cores. Slabs of 64 mm are cut every 32 mm from the feet to the head, and for each slab
of one chest CT the most similar one is looked up among those of the two other sample scans, one of which is a brain.

It prints which slab was found for each, and the rank correlation of where slabs and their neighbours lie: 1 when all
are in order. The same is done with two things that have learned nothing, random weights and the voxels themselves. On
this task random weights do as well: before you credit pretraining with a result, look at what it takes without.
"""

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import medmim
from medmim.samples import sample_scans

SLAB = (96, 96, 32)  # voxels of 2 mm

chest, brain, thorax = sample_scans()
model = medmim.create_model("vit_t_mae3d", pretrained=True, img_size=SLAB)
torch.manual_seed(0)
untrained = medmim.create_model("vit_t_mae3d", img_size=SLAB).eval()
transform = medmim.create_transform(model, fit="pad")  # the whole scan, not its middle alone


def slabs(scan) -> torch.Tensor:
    """The middle of each level of a scan: (levels, 1, *SLAB), from the feet to the head."""
    x = transform(scan.path).as_tensor()  # (1, D, H, W), axes to the right, the front and the head
    d, h = (x.shape[1] - SLAB[0]) // 2, (x.shape[2] - SLAB[1]) // 2
    middle = x[:, d : d + SLAB[0], h : h + SLAB[1]]
    return middle.unfold(3, SLAB[2], SLAB[2] // 2).permute(3, 0, 1, 2, 4)  # (levels, 1, D, H, W)


queries = slabs(thorax)
library = torch.cat([slabs(chest), slabs(brain)])
names = [f"{scan.name} {level}" for scan in (chest, brain) for level in range(len(slabs(scan)))]

for what, encode in {"pretrained": model, "random weights": untrained, "voxels": lambda x: x.flatten(1)}.items():
    with torch.inference_mode():
        ours, theirs = (F.normalize(encode(x), dim=1) for x in (queries, library))
    nearest = (ours @ theirs.T).argmax(dim=1)  # by cosine similarity
    order = spearmanr(range(len(queries)), nearest).statistic
    print(f"{what}: rank correlation {order:.2f}, {', '.join(names[found] for found in nearest.tolist())}")
