"""The sample scans that come with medmim: real, small, openly licensed; see README.md beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medmim.errors import ScanError

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE.parent / "examples" / "data", PACKAGE / "sample_scans")  # in a checkout, in an installed wheel

BRAIN_CLASSES = ("background", "grey matter", "white matter")
THORAX_CLASSES = (
    "background",
    "ribs",
    "cervical vertebrae",
    "thoracic vertebrae",
    "lumbar vertebrae",
    "right lung",
    "left lung",
    "other tissue",
)


@dataclass(frozen=True)
class SampleScan:
    """One sample scan.

    Attributes:
        name: File name without suffixes.
        path: The NIfTI file.
        modality: "CT" or "MR".
        licence: SPDX identifier; `LICENSE-<name>.txt` beside the file has the terms and whom to credit.
        credit: Whom to name beside a picture of it.
        labels: A NIfTI file in the same voxels; None where there are none.
        classes: What the labels 0, 1, ... mean.
    """

    name: str
    path: Path
    modality: str
    licence: str
    credit: str
    labels: Path | None = None
    classes: tuple[str, ...] = ()


def sample_scans() -> tuple[SampleScan, ...]:
    """The sample scans.

    Raises:
        ScanError: When this installation has none.
    """
    for folder in FOLDERS:
        scans = (
            SampleScan(
                "chest_ct", folder / "chest_ct.nii.gz", "CT", "CC-BY-3.0", "LIDC-IDRI-0001, The Cancer Imaging Archive"
            ),
            SampleScan(
                "brain_t1",
                folder / "brain_t1.nii.gz",
                "MR",
                "LicenseRef-MNI",
                "ICBM 152 2009a, McConnell Brain Imaging Centre",
                folder / "brain_tissue.nii.gz",
                BRAIN_CLASSES,
            ),
            SampleScan(
                "thorax_ct",
                folder / "thorax_ct.nii.gz",
                "CT",
                "MIT",
                "CTChest4 of slicerio",
                folder / "thorax_labels.nii.gz",
                THORAX_CLASSES,
            ),
        )
        if all(scan.path.is_file() for scan in scans):
            return scans
    raise ScanError(f"{FOLDERS[-1]}: this installation lacks the sample scans; install medmim again")
