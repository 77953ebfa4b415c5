"""Continue pretraining on your own scans: from the weights that ship to weights that have seen your data.

    python examples/continue_pretraining.py [FOLDER]

Takes about 40 seconds on 2 CPU cores without a folder; your scans are then one chest CT. It prints the loss, and the
error of reconstructing 75 % of the patches before and after: of the first scan that was trained on, which must become
better, and of one of another patient, which may not. So few steps on one scan are an example, not a way to get good
weights.

On the command line, with RECIPE being small/continued/vit_t_mae3d:

    medmim-train prepare scans/ -o store --recipe RECIPE
    medmim-train pretrain RECIPE --data store -o run model.weights=vit_t_mae3d
    medmim-train package run -o ours --data store --tag ours --license CC-BY-4.0 --citation ours.bib
    medmim-train evaluate local-dir:ours other-scans/
"""

import os
import sys
import tempfile
from pathlib import Path

import medmim
from medmim.samples import sample_scans
from medmim_training.engine import pretrain
from medmim_training.evaluate import evaluate_reconstruction
from medmim_training.publish import package
from medmim_training.recipe import load_recipe
from medmim_training.store.index import Store
from medmim_training.store.prepare import prepare
from medmim_training.store.sources import Source, find_sources

SMOKE = "MEDMIM_SMOKE" in os.environ  # the tests only look whether it runs
STEPS, BATCH = (2, 2) if SMOKE else (40, 8)

chest, brain, thorax = sample_scans()
trained, other = (brain, brain) if SMOKE else (chest, thorax)
scans = find_sources(sys.argv[1]) if len(sys.argv) > 1 else [Source(trained.path, trained.name, trained.modality)]
folder = Path(tempfile.mkdtemp(prefix="medmim-"))


def errors(model: str) -> str:
    """Squared error of hidden voxels over their variance, for a scan that is trained on and another."""
    encoder = medmim.create_model(model, pretrained=True)
    sources = [Source(scan.path, scan.name, scan.modality, group=scan.name) for scan in (scans[0], other)]
    results = evaluate_reconstruction(encoder, medmim.create_decoder(encoder), sources)
    return ", ".join(f"{each.dataset} {each.value:.4f}" for each in results)


recipe = load_recipe(
    "small/continued/vit_t_mae3d",
    [
        "model.weights=vit_t_mae3d",
        "optimizer.lr=1e-4",  # at that of the recipe, so few steps make the weights worse
        f"batch_size={BATCH}",
        f"schedule={{steps: {STEPS}, warmup: {STEPS // 8}}}",
        "output.log_every=10",
        "data.workers=0",
    ],
)
added, refused = prepare(scans, folder / "store", volume=recipe.volume)
store = Store(folder / "store")
print(f"{added} scan(s) prepared, {refused} refused")
print("before:", errors("vit_t_mae3d"))
pretrain(recipe, store, folder / "run", watch=lambda report: print(f"step {report.step}: loss {report.loss:.4f}"))
package(folder / "run", folder / "ours", store=store, tag="ours", license="CC-BY-4.0", citation="@misc{ours}")
print("after:", errors(f"local-dir:{folder / 'ours'}"))
print(f'yours now: medmim.create_model("local-dir:{folder / "ours"}", pretrained=True)')
