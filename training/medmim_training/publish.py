"""From a finished run to a model folder: weights, decoder, config, golden outputs, data list, card, catalog entry."""

from __future__ import annotations

from pathlib import Path

import torch

from medmim import hub
from medmim.cards import render_card
from medmim.cards.encoder import DATA_FILE, PICTURE_FILE, card_scan
from medmim.errors import SpecError, WeightsError
from medmim.factory import create_decoder, from_pretrained
from medmim.files import atomic_write, check_writable, write_csv, write_text
from medmim.limits import CONFIG_BYTES, read_csv, read_json
from medmim.pictures import reconstruction_picture
from medmim.publish import catalog_entry, save_with_golden
from medmim.reconstruction import reconstruct_scan
from medmim.resolution import resolve
from medmim.spec import Evidence, ModelSpec, TrainingRecord
from medmim_training.checkpoint import load_latest
from medmim_training.claims import check_store
from medmim_training.engine import CHECKPOINTS, CLAIM_FILE, RECIPE_FILE, RECORD_FILE, build_method
from medmim_training.recipe import load_recipe
from medmim_training.store.index import Store

CARD_FILE, ENTRY_FILE = "README.md", "catalog.toml"


def package(
    run: str | Path,
    folder: str | Path,
    *,
    store: Store,
    tag: str,
    license: str,
    citation: str,
    evidence: tuple[Evidence, ...] = (),
) -> ModelSpec:
    """Makes a model folder, in bfloat16, from the last checkpoint of a finished run: its average where it kept one.

    Args:
        run: Folder that `medmim_training.engine.pretrain` wrote.
        folder: Model folder to write.
        store: What the run was trained on, for the data list.
        tag: Names the training data.
        license: SPDX identifier, the strictest of the training data.
        citation: BibTeX.
        evidence: Results to put on the card.

    Returns:
        The spec that `config.json` holds.

    Raises:
        SpecError: When the run is not finished, or was on another store.
    """
    run, folder = Path(run), Path(folder)
    if not run.is_dir():
        raise SpecError(f"{run}: no such folder; give that of a run of `medmim-train pretrain`")
    if not (run / RECORD_FILE).is_file():
        raise SpecError(f"{run}: no finished run ({RECORD_FILE} is missing); `medmim-train pretrain` goes on with it")
    check_store(run / CLAIM_FILE, store)
    training = TrainingRecord.parse(read_json(run / RECORD_FILE, CONFIG_BYTES), source=str(run / RECORD_FILE))
    recipe = load_recipe(str(run / RECIPE_FILE))
    method = build_method(recipe)
    checkpoint = load_latest(run / CHECKPOINTS)
    check_writable(folder / hub.CONFIG)
    if checkpoint is None:
        raise SpecError(f"{run}: it has no checkpoint; `medmim-train pretrain` in a new folder makes one")
    try:
        method.load_state_dict(checkpoint.get("average") or checkpoint["method"])
    except RuntimeError as error:
        raise WeightsError(f"{run}: its checkpoint does not fit its recipe ({error})") from None

    before = _data_list_of(recipe.model.weights)
    spec = save_with_golden(  # takes what goes with another model out of the folder
        method.encoder.to(torch.bfloat16),
        folder,
        decoder=method.decoder.to(torch.bfloat16) if method.decoder_spec is not None else None,
        weights={
            "tag": tag,
            "license": license,
            "citation": citation,
            "volume": recipe.volume.to_data(),
            "training": training.to_data(),
            "decoder_spec": method.decoder_spec,
            "evidence": [each.to_data() for each in evidence],
        },
    )
    _write_data_list(folder / DATA_FILE, store, before)
    with atomic_write(folder / RECIPE_FILE) as path:
        path.write_bytes((run / RECIPE_FILE).read_bytes())
    picture = PICTURE_FILE if write_picture(folder) else None
    for name, text in ((CARD_FILE, render_card(spec, picture=picture)), (ENTRY_FILE, catalog_entry(spec))):
        write_text(folder / name, text)
    return spec


def write_picture(folder: str | Path) -> bool:
    """Draws what the card of a model folder shows: a sample scan, reconstructed from a quarter of its patches.

    Args:
        folder: Model folder, as `package` and `medmim.save_pretrained` write them.

    Returns:
        Whether there is something to draw: not without a decoder, nor for a modality without a sample scan.
    """
    model = from_pretrained(folder)
    scan = card_scan(model.spec.weights.volume)
    if model.spec.weights.decoder is None or scan is None:
        return False
    result, spacing = reconstruct_scan(
        model,
        create_decoder(model),
        scan.path,
        modality=scan.modality,
        ratio=0.75,
        generator=torch.Generator().manual_seed(0),
    )
    orientation = model.spec.weights.volume.orientation
    reconstruction_picture(
        result, Path(folder) / PICTURE_FILE, spacing=spacing, orientation=orientation, title=scan.name
    )
    return True


def _data_list_of(name: str | None) -> list[list[str]]:
    """The rows of the data list of weights that a run started from; none where they came without."""
    if name is None:
        return []
    _, place = resolve(name, None, hub.HubAccess(), needs_weights=True)
    path = place.find(DATA_FILE)
    return [] if path is None else [list(row.values()) for row in read_csv(path)[1]]


def _write_data_list(path: Path, store: Store, before: list[list[str]]) -> None:
    rows = [[e.source, e.sha256 or "", e.modality, e.group, e.license] for e in store.entries]
    seen = {row[1] or row[0] for row in rows}
    others = (row for row in before if (row[1] or row[0]) not in seen)
    write_csv(path, ("file", "sha256", "modality", "collection", "licence"), [*rows, *others])
