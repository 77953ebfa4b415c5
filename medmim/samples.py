"""The sample scans that come with medmim: real, small, openly licensed; see README.md beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medmim.errors import ScanError

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE.parent / "examples" / "data", PACKAGE / "sample_scans")  # in a checkout, in an installed wheel


@dataclass(frozen=True)
class SampleScan:
    """One sample scan.

    Attributes:
        name: File name without suffixes.
        path: The NIfTI file.
        modality: "CT" or "MR".
        licence: SPDX identifier; `LICENSE-<name>.txt` beside the file has the terms and whom to credit.
        credit: Whom to name beside a picture of it.
    """

    name: str
    path: Path
    modality: str
    licence: str
    credit: str


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
            ),
            SampleScan("thorax_ct", folder / "thorax_ct.nii.gz", "CT", "MIT", "CTChest4 of slicerio"),
        )
        if all(scan.path.is_file() for scan in scans):
            return scans
    raise ScanError(f"{FOLDERS[-1]}: this installation lacks the sample scans; install medmim again")
