"""What frozen features know: nearest neighbours and logistic regression on them, with no training loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from medmim.errors import ScanError, SpecError
from medmim.factory import create_model
from medmim.files import atomic_write, write_csv, write_text
from medmim.identity import weights_digest
from medmim.inference import evaluating
from medmim.registry import is_model, model_info
from medmim.spec import VolumeSpec
from medmim.tasks import encoder_of
from medmim.transforms import VolumeTransform, create_transform
from medmim_training.balance import raise_positions
from medmim_training.tasks.cases import Case, split_cases
from medmim_training.tasks.classification import check_classes
from medmim_training.tasks.labelled import find_labelled
from medmim_training.tasks.metrics import ClassScores, area_under_curve, score_classes
from medmim_training.tasks.recipe import ProbeRecipe

NEIGHBOURS = (5, 20)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, of features of unit variance
RESULTS = "probe"


@dataclass(frozen=True)
class ProbeResult:
    """How well one way of using the features does.

    Attributes:
        probe: "knn" (cosine similarity, each neighbour one vote) or "logistic".
        setting: Neighbours, or C.
        side: Which cases: "validation" or "test". C was chosen by the AUC of the validation cases, so their scores are
            a little too good.
    """

    probe: str
    setting: float
    side: str
    cases: int
    scores: ClassScores

    def to_data(self) -> dict:
        """Flat, as JSON and CSV have it."""
        data = asdict(self)
        return data | data.pop("scores")


def probe(
    recipe: ProbeRecipe,
    folder: str | Path,
    *,
    test: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ProbeResult]:
    """Encodes all cases once and measures what can be told from their pooled features.

    Args:
        recipe: Which encoder and which cases.
        folder: `probe.json` and `probe.csv`, the results, and the features, which are not computed again for the same
            weights, preprocessing and files.
        test: Also for the test cases: once, at the very end.
        progress: Called with cases encoded and cases in all.

    Returns:
        The results, by probe and side.

    Raises:
        SpecError: For data or settings that cannot be used.
        ScanError: For a scan that cannot be read.
    """
    folder = Path(folder)
    cases, classes = find_labelled(recipe.data, recipe.splits, recipe.classes)
    split = split_cases(cases, recipe.fold, source=recipe.splits or recipe.data)
    check_classes(split, classes, source=recipe.data)
    sides = {"training": split.training, "validation": split.validation} | ({"test": split.test} if test else {})
    if test and len({case.label for case in split.test}) < 2:
        raise SpecError(f"{recipe.data}: its test cases are not of two classes")
    encoder, total, done = build_encoder(recipe), sum(map(len, sides.values())), 0
    transform = create_transform(encoder, modality=recipe.modality, volume=_preprocessing(encoder, recipe))
    settings = [encoder.spec.architecture, encoder.spec.args, transform.spec.to_data(), transform.img_size]
    fingerprint = _fingerprint(encoder, [*settings, recipe.modality])
    features = {}
    for side, chosen in sides.items():
        features[side] = _features(
            encoder,
            transform,
            chosen,
            folder / f"{side}.safetensors",
            _key(fingerprint, chosen),
            recipe.batch_size,
            lambda more, start=done: progress(start + more, total),
        )
        done += len(chosen)
    labels = {side: np.array([case.label for case in chosen]) for side, chosen in sides.items()}

    def scored(classifier, name: str, setting: float) -> list[ProbeResult]:
        return [
            ProbeResult(name, setting, side, len(labels[side]), score_classes(labels[side], predicted))
            for side in sides
            if side != "training"
            for predicted in [classifier.predict_proba(features[side])]
        ]

    results = []
    for neighbours in sorted({min(number, len(labels["training"])) for number in NEIGHBOURS}):
        nearest = KNeighborsClassifier(neighbours, metric="cosine")
        results += scored(nearest.fit(features["training"], labels["training"]), "knn", neighbours)
    results += scored(*_best_regression(features, labels))
    _write(folder, results)
    return results


def _best_regression(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple:
    """The regression that is best in validation, fitted to the training cases; "logistic"; its C."""

    def fitted(strength: float):
        regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000)
        return make_pipeline(StandardScaler(), regression).fit(features["training"], labels["training"])

    def quality(strength: float) -> float:
        return float(area_under_curve(labels["validation"], candidates[strength].predict_proba(features["validation"])))

    candidates = {strength: fitted(strength) for strength in STRENGTHS}
    best = max(STRENGTHS, key=quality)
    return candidates[best], "logistic", best


# --- features ---------------------------------------------------------------------------------------------------------


def build_encoder(recipe: ProbeRecipe) -> nn.Module:
    """The recipe's encoder, on a GPU where there is one, without a classifier."""
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else None
    model = create_model(recipe.model.name, recipe.model.pretrained, device=device, **recipe.model.args)
    encoder = encoder_of(model)
    raise_positions(encoder, recipe.model.position_gain)
    return encoder


def _features(
    encoder: nn.Module,
    transform: VolumeTransform,
    cases: Sequence[Case],
    path: Path,
    key: str,
    batch_size: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """The pooled features of some cases, (n, C); from `path` when they are there."""
    known = _read(path, key)
    if known is not None:
        progress(len(cases))
        return known
    parameter, rows = next(encoder.parameters()), []
    with evaluating(encoder), torch.inference_mode():
        for start in range(0, len(cases), batch_size):
            batch = cases[start : start + batch_size]
            x = torch.stack([transform(case.image).as_tensor() for case in batch])
            rows.append(encoder(x.to(parameter)).float().cpu())
            progress(start + len(batch))
    features = torch.cat(rows).numpy()
    with atomic_write(path) as temporary:
        save_file({"features": features}, temporary, metadata={"key": key})
    return features


def _preprocessing(encoder: nn.Module, recipe: ProbeRecipe) -> VolumeSpec:
    """The recipe's, else that of the weights; without them that of those of the name, so that both see the same."""
    name, volume = recipe.model.name, recipe.volume or encoder.spec.volume
    if volume is None and is_model(name) and model_info(name).weights:
        volume = model_info(name).weights[0].volume
    if volume is None:
        raise SpecError(f"{name}: nothing says how to prepare a scan; give volume=")
    return volume


def _fingerprint(encoder: nn.Module, settings: list) -> bytes:
    """What the features of all cases depend on, in short: preprocessing and weights."""
    return hashlib.sha256(json.dumps([*settings, weights_digest(encoder)]).encode()).digest()


def _key(fingerprint: bytes, cases: Sequence[Case]) -> str:
    """What the features of some cases depend on, in short."""
    digest = hashlib.sha256(fingerprint)
    for case in cases:
        if isinstance(case.image, np.ndarray):
            what = np.ascontiguousarray(case.image).tobytes()
        else:
            what = _state_of(case.image).encode()
        digest.update(what)
    return digest.hexdigest()


def _state_of(scan: Path) -> str:
    """Where a scan is, and the size and time of its file or, of a DICOM series in a folder, its files."""
    try:
        files = sorted(scan.iterdir()) if scan.is_dir() else [scan]
        states = [(file.name, file.stat()) for file in files]
    except OSError as error:
        raise ScanError(f"{scan}: cannot be read ({error.strerror}); check the path") from None
    return f"{scan.resolve()} {[(name, state.st_size, state.st_mtime_ns) for name, state in states]}"


def _read(path: Path, key: str) -> np.ndarray | None:
    """The features in a file, when they are those of the key."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("features") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):  # none there, or half of one
        return None


def _write(folder: Path, results: list[ProbeResult]) -> None:
    data = [result.to_data() for result in results]
    write_text(folder / f"{RESULTS}.json", json.dumps(data, indent=1) + "\n")
    rows = (
        (each["probe"], each["setting"], each["side"], each["cases"], metric, *(f"{value:.6g}" for value in numbers))
        for each in data
        for metric in ("auc", "balanced_accuracy", "accuracy")
        for numbers in [(each[metric], *each[f"{metric}_interval"])]
    )
    write_csv(folder / f"{RESULTS}.csv", ("probe", "setting", "side", "cases", "metric", "value", "low", "high"), rows)
