"""How well hidden voxels are reconstructed on scans that were not trained on, beside fills that need no network."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean

import torch
from torch import nn

from medmim.errors import MedmimError, ScanError
from medmim.reconstruction import compare, reconstruct_scan
from medmim.spec import Evidence
from medmim_training.store.sources import Source


def evaluate_reconstruction(
    model: nn.Module,
    decoder: nn.Module,
    sources: list[Source],
    *,
    ratio: float = 0.75,
    report: Callable[[str, str | None], None] = lambda name, problem: None,
) -> list[Evidence]:
    """Normalised MSE of hidden voxels, a mean over the scans of each group and over all.

    What is hidden depends on the scan's name and nothing else, so that two models see the same.

    Args:
        model: Token encoder with its weights.
        decoder: Its pretraining decoder.
        sources: Scans; a broken one is reported and left out.
        ratio: Share of the patches to hide.
        report: Called with each scan's name and its problem, or None when it went well.

    Returns:
        One record a group and one for all scans, with the fills as baselines; nothing when no scan could be used.
    """
    errors = defaultdict(list)
    for source in sources:
        try:
            errors[source.group].append(_errors(model, decoder, source, ratio))
        except MedmimError as error:
            report(source.name, str(error))
        else:
            report(source.name, None)
    groups = [_evidence(group, rows, ratio) for group, rows in sorted(errors.items()) if group]
    every = [row for rows in errors.values() for row in rows]
    return [*groups, _evidence("all", every, ratio)] if every else []


def _errors(model: nn.Module, decoder: nn.Module, source: Source, ratio: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(zlib.crc32(source.name.encode()))
    result, _ = reconstruct_scan(
        model, decoder, source.path, modality=source.modality, ratio=ratio, generator=generator
    )
    errors = compare(result)
    if not all(map(math.isfinite, errors.values())):
        raise ScanError(f"{source.path}: of this few patches none was hidden or none was visible, so it does not count")
    return errors


def _evidence(group: str, rows: list[dict[str, float]], ratio: float) -> Evidence:
    means = {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}
    return Evidence(
        dataset=group,
        protocol=f"{ratio:.0%} of the patches hidden at random, hidden voxels only, mean over scans",
        metric="normalised MSE",
        value=means.pop("model"),
        baselines=means,
        cases=len(rows),
    )
