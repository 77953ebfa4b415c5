"""How long a pretrained ViT-B takes to load and how much memory, beside the ways of timm and MONAI; and `list_models`.

    python training/benchmarks/loading.py

Both peers build the network, initialise it and copy the weights over. Every load is the first of a new process, after
its imports, with the files in the page cache. medmim hashes files when they are loaded for the first time on a machine;
that is a variant of its own. The variants take turns, and a ratio is taken within each round, so that whatever else the
machine does meets all of them. Linux, because the peak of memory is read from /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from resident import PeakSince

MODEL = "vit_b_mae3d"
COMMIT = "0" * 40  # of the repository in the cache
NOTES = "notes"  # where medmim keeps which files it has hashed
RESULTS = Path(__file__).parent / "results" / "loading.json"
PACKAGES = ("medmim", "torch", "safetensors", "timm", "monai", "huggingface_hub")
RECORD = {
    "tag": "none",
    "license": "Apache-2.0",
    "citation": "none",
    "volume": {"intensity": {"CT": {"kind": "window", "low": -1000, "high": 1000}}},
}

# What is compared, and to what: (ours, peer).
OURS = ("medmim, folder, first time", "medmim, folder", "medmim, Hub cache")
LOADS = [(ours, peer) for ours in OURS for peer in ("timm", "MONAI")]
LISTS = [("medmim, list", "timm, list")]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is run.")] = 7,
    out: Path = RESULTS,
) -> None:
    """Runs all variants in turn and writes the ratios."""
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="medmim-loading-") as folder:
        _in_new_process("prepare", Path(folder))
        print("prepared", flush=True)
        for number in range(rounds):
            names = list(VARIANTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                runs[name].append(_in_new_process(name, Path(folder)))
            print(f"round {number + 1}: " + _line({name: run[-1]["seconds"] for name, run in runs.items()}), flush=True)
    checksums = {run["checksum"] for name in (*OURS, "timm") for run in runs[name]}
    assert len(checksums) == 1, "the variants that read the same weights hold different ones"

    from common import spread, write_result  # here: it imports torch, which the processes that are timed must not

    seconds = {name: [run["seconds"] for run in each] for name, each in runs.items()}
    result = {
        "what": "first load of a pretrained ViT-B in a new process after its imports; import and list_models",
        "packages": {name: version(name) for name in PACKAGES},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": {
            f"{ours} / {peer}": spread([b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)])
            for ours, peer in LOADS + LISTS
        },
        "peak_memory_over_weights": {
            name: spread([run["peak"] / run["bytes"] for run in each])
            for name, each in runs.items()
            if "list" not in name
        },
    }
    write_result(out, result)


def _in_new_process(name: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--child", name, str(folder)]
    # Off the network: a client that asks for anything else than weights would be timed with its server.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ASSETS_CACHE": str(folder / NOTES)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


# --- in the child -----------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> dict:
    """Writes the same random weights as a model folder, in a Hub cache and as one file; and MONAI's."""
    import shutil

    from safetensors.torch import save_file

    import medmim

    model = medmim.create_model(MODEL)
    spec = medmim.save_pretrained(model, folder / "model", weights=RECORD)
    snapshot = folder / "cache" / "models--org--name" / "snapshots" / COMMIT
    shutil.copytree(folder / "model", snapshot)
    save_file(model.state_dict(), folder / "timm.safetensors")
    save_file(_monai().state_dict(), folder / "monai.safetensors")
    _load_from_folder(folder)  # hashes, and takes note of it
    _load_from_cache(folder)
    for path in folder.rglob("*.safetensors"):
        path.read_bytes()
    return {"tag": spec.weights.tag}


def _load_from_folder(folder: Path):
    import medmim

    return medmim.from_pretrained(folder / "model")


def _load_from_cache(folder: Path):
    import medmim

    return medmim.from_pretrained("org/name", revision=COMMIT, cache_dir=folder / "cache", local_files_only=True)


def _load_with_timm(folder: Path):
    from safetensors.torch import load_file

    model = _timm()
    model.load_state_dict(load_file(folder / "timm.safetensors"))
    return model.eval()


def _load_with_monai(folder: Path):
    from safetensors.torch import load_file

    model = _monai()
    model.load_state_dict(load_file(folder / "monai.safetensors"))
    return model.eval()


def _timm():
    """A ViT for volumes of timm's own blocks, initialised by timm's own function: medmim's, with the same names."""
    from timm.models import named_apply
    from timm.models.vision_transformer import Block, init_weights_vit_timm
    from torch import nn

    from medmim.registry import model_info

    args = model_info(MODEL).args
    dim = args["embed_dim"]
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv3d(args["in_chans"], dim, args["patch_size"], args["patch_size"])
    model.blocks = nn.ModuleList(Block(dim, args["num_heads"], qkv_bias=True) for _ in range(args["depth"]))
    model.norm = nn.LayerNorm(dim)
    return named_apply(init_weights_vit_timm, model)


def _monai():
    from monai.networks.nets import ViT

    from medmim.registry import model_info

    args = model_info(MODEL).args
    return ViT(
        args["in_chans"],
        args["img_size"],
        args["patch_size"],
        hidden_size=args["embed_dim"],
        mlp_dim=4 * args["embed_dim"],
        num_layers=args["depth"],
        num_heads=args["num_heads"],
        qkv_bias=True,
    )


def _first_load(folder: Path) -> dict:
    """The load of a folder whose files no note says anything of."""
    import shutil

    shutil.rmtree(folder / NOTES)
    return measure_load(_load_from_folder, IMPORTS, folder)


def measure_load(load: Callable, imports: str, folder: Path) -> dict:
    """The seconds of a load, what it added to resident memory at its peak, and what it loaded, in bytes and in sum."""
    exec(imports, {})
    peak = PeakSince()
    start = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak": peak.bytes(),
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "checksum": sum(parameter.double().sum().item() for parameter in model.parameters()),
    }


def measure_list(package: str, folder: Path) -> dict:
    """The seconds of an import and of listing all models, without the start of Python."""
    start = time.perf_counter()
    __import__(package).list_models()
    return {"seconds": time.perf_counter() - start}


IMPORTS = "import medmim.factory, medmim.models.vit, safetensors.torch, huggingface_hub.file_download"
VARIANTS: dict[str, Callable[[Path], dict]] = {
    "medmim, folder, first time": _first_load,
    "medmim, folder": lambda folder: measure_load(_load_from_folder, IMPORTS, folder),
    "medmim, Hub cache": lambda folder: measure_load(_load_from_cache, IMPORTS, folder),
    "timm": lambda folder: measure_load(_load_with_timm, "import timm, medmim.registry, safetensors.torch", folder),
    "MONAI": lambda folder: measure_load(
        _load_with_monai, "import monai.networks.nets, medmim.registry, safetensors.torch", folder
    ),
    "medmim, list": lambda folder: measure_list("medmim", folder),
    "timm, list": lambda folder: measure_list("timm", folder),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, chosen, place = sys.argv
        print(json.dumps({"prepare": prepare, **VARIANTS}[chosen](Path(place))))
    else:
        typer.run(main)
