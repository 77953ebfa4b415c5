"""Preparing scans, and the crops drawn from them."""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace

import blosc2
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread

from medmim.errors import MedmimError, OutputError, SpecError
from medmim.intensity import IntensityMap
from medmim.spec import VolumeSpec
from medmim.transforms import VolumeTransform
from medmim_training.store import prepare as prepare_module
from medmim_training.store.crops import CropDataset
from medmim_training.store.index import BLOCK, INDEX_FILE, PROBLEMS_FILE, Store, read_index
from medmim_training.store.inspect import counts, draw_contact_sheet, draw_histograms
from medmim_training.store.prepare import FOREGROUND, _identity, prepare
from medmim_training.store.sources import Source, find_sources
from scans import itk_image, write_dicom
from synthetic import write_scan

SIZE = (16, 32, 24)


def dataset(store, recipe, **args) -> CropDataset:
    return CropDataset(store, recipe.volume, **{"size": SIZE, "length": 64, "seed": 0, **args})


def test_stored_volumes_equal_the_transform_at_use(store, scans, recipe):
    """Preprocessing in pretraining is preprocessing at use: same voxels, but for the crop to the foreground."""
    transform = VolumeTransform(recipe.volume, img_size=(8, 8, 8), fit="pad")
    for position, entry in enumerate(store.entries):
        stored = store.intensity(position, recipe.volume).apply(store.array(position)[...].astype(np.float32))
        at_use = np.asarray(transform(scans / entry.source))
        foreground = np.nonzero((at_use > 0.05).any(axis=0))
        box = tuple(slice(line.min(), line.max() + 1) for line in foreground)
        np.testing.assert_array_equal(stored, at_use[(slice(None), *box)])


def test_integers_are_kept_as_integers(store):
    assert {store.array(i)[:, :1].dtype for i in range(len(store.entries))} == {np.dtype(np.int16)}


def test_preparing_again_adds_only_what_is_new(scans, tmp_path, recipe):
    folder = tmp_path / "store"
    sources = find_sources(scans)
    assert prepare(sources[:2], folder, volume=recipe.volume) == (2, 0)
    before = (folder / INDEX_FILE).read_text()
    assert prepare(sources, folder, volume=recipe.volume) == (1, 0)
    assert (folder / INDEX_FILE).read_text().startswith(before)
    assert len(Store(folder).entries) == 3


def test_a_scan_of_which_the_list_says_something_else_is_prepared_anew(scans, tmp_path, recipe):
    folder, path = tmp_path / "store", scans / "thorax.nii.gz"
    guessed = Source(path, "thorax.nii.gz")
    for source, modality in ((guessed, "CT"), (replace(guessed, modality="MR"), "MR"), (guessed, "MR")):
        prepare([source, Source(scans / "small.nii.gz", "small.nii.gz")], folder, volume=recipe.volume)
        small, thorax = Store(folder).entries
        assert (small.modality, thorax.modality) == ("MR", modality)
        # A rule of its own: the window of CT, or percentiles.
        assert (thorax.high == 1000) is (modality == "CT")
    assert prepare([replace(guessed, license="MIT")], folder, volume=recipe.volume) == (1, 0)
    assert [entry.license for entry in Store(folder).entries] == ["", "MIT"]


def test_two_series_of_the_same_name_are_two_scans(tmp_path, recipe):
    """A series is called by its folder's place below the one that was prepared, which others may have, too."""
    store = tmp_path / "store"
    for hospital, value in (("a", 100), ("b", 200), ("a", 300)):
        array = np.full((24, 24, 3), -1000, np.int16)
        array[4:20, 4:20] = value
        (tmp_path / hospital).mkdir(exist_ok=True)
        write_dicom(tmp_path / hospital / "ct", array, np.diag([2.0, 2.0, 2.0, 1.0]))
        assert prepare(find_sources(tmp_path / hospital), store, volume=recipe.volume) == (1, 0)
        assert prepare(find_sources(tmp_path / hospital), store, volume=recipe.volume) == (0, 0)
    assert sorted(entry.percentiles[-1] for entry in Store(store).entries) == [100, 200, 300]
    # An older medmim noted no digest; what it has is there.
    older = Store(store).entries[0].to_data() | {"sha256": None}
    (store / INDEX_FILE).write_text(json.dumps(older) + "\n")
    assert prepare(find_sources(tmp_path / "b"), store, volume=recipe.volume) == (0, 0)


@pytest.mark.parametrize("suffix", ["mhd", "nhdr", "dcm"])
def test_the_voxels_of_a_scan_are_told_apart_in_whichever_file_they_are(tmp_path, recipe, suffix):
    """A header that names another file, and a slice that stands for its series, do not change with them."""
    store = tmp_path / "store"
    for value in (100, 200):
        array = np.full((24, 24, 3), -1000, np.int16)
        array[4:20, 4:20] = 300
        array[4:20, 4:20, 2] = value
        folder = tmp_path / str(value)
        write_dicom(folder, array, np.diag([2.0, 2.0, 2.0, 1.0]))
        if suffix == "dcm":
            (folder / "1.2.3.4-99.dcm").replace(folder / "scan.dcm")
            (folder / "scan.dcm").write_bytes((tmp_path / "100/scan.dcm").read_bytes())  # it is written with the time
        else:
            sitk.WriteImage(itk_image(array, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"scan.{suffix}")
        source = Source(folder / f"scan.{suffix}", "scan")
        assert prepare([source], store, volume=recipe.volume) == (1, 0)
        assert prepare([source], store, volume=recipe.volume) == (0, 0)
    assert sorted(entry.percentiles[1] for entry in Store(store).entries) == [100, 200]


def test_a_z_score_does_not_take_the_darker_half_of_the_tissue_for_background(tmp_path, recipe):
    """Its 0 is the mean of the tissue; what it passes over, the minimum, is background."""
    volume = VolumeSpec.parse({**recipe.volume.to_data(), "intensity": {"MR": {"kind": "zscore"}}}, source="test")
    array = np.zeros((30, 30, 30), np.int16)
    array[3:27, 3:27, 3:27] = 100  # cortex
    array[9:21, 9:21, 9:21] = 1000
    nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(tmp_path / "brain.nii.gz")
    prepare(find_sources(tmp_path), tmp_path / "store", volume=volume)
    (entry,) = Store(tmp_path / "store").entries
    assert (entry.shape, entry.offset, entry.foreground) == ((24,) * 3, (3,) * 3, 24**3)


def test_rounding_of_a_background_is_no_foreground(tmp_path, recipe):
    """Resampled, a background that is not 0 differs in its last bits: as in the statistics, it stays background."""
    volume = VolumeSpec.parse({**recipe.volume.to_data(), "intensity": {"MR": {"kind": "zscore"}}}, source="test")
    array = np.full((60, 60, 60), 100.3, np.float32)
    array[20:40, 20:40, 20:40] = 1000
    nib.Nifti1Image(array, np.diag([1.3, 1.3, 1.3, 1.0])).to_filename(tmp_path / "brain.nii.gz")
    prepare(find_sources(tmp_path), tmp_path / "store", volume=volume)
    (entry,) = Store(tmp_path / "store").entries
    assert all(side <= 20 * 1.3 / 2 + 4 for side in entry.shape)  # the cube, and what interpolation adds around it


def test_a_scan_that_may_not_be_read_does_not_stop_the_others(scans, tmp_path, recipe, monkeypatch):
    digest = prepare_module.sha256_of

    def refused(path):
        if path.name == "large.nii.gz":  # tests may run as one who may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return digest(path)

    monkeypatch.setattr(prepare_module, "sha256_of", refused)
    told = []
    assert prepare(
        find_sources(scans), tmp_path, volume=recipe.volume, report=lambda name, problem: told.append(problem)
    ) == (2, 1)
    assert re.fullmatch(r".*large\.nii\.gz: cannot be read \(Permission denied\); .*", told[0])


def test_a_full_disk_ends_the_preparation_in_a_sentence(scans, tmp_path, recipe, monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("Error while creating the NDArray")  # what blosc2 makes of a full disk

    sources = find_sources(scans)
    prepare(sources[:1], tmp_path, volume=recipe.volume)
    monkeypatch.setattr(blosc2, "asarray", refused)
    with pytest.raises(OutputError, match=r"\.b2nd: cannot be written .*make room, and the same command goes on"):
        prepare(sources, tmp_path, volume=recipe.volume)
    assert len(Store(tmp_path).entries) == 1
    assert len(list((tmp_path / "volumes").iterdir())) == 1


class Deadly:
    """Ends the process that reads it from a pipe, as the system ends one that takes too much memory."""

    name = "deadly"

    def __reduce__(self):
        return os._exit, (9,)


def test_a_process_that_is_killed_is_told_in_a_sentence(tmp_path, recipe):
    with pytest.raises(MedmimError, match="take fewer workers, and the same command goes on"):
        prepare([Deadly()], tmp_path, volume=recipe.volume, workers=2)


def test_names_of_arrays_differ_for_as_many_scans_as_there_may_be():
    """Thousands of scans are called "ct.nii.gz", each in its folder: 32 bits would not tell so many apart."""
    names = [f"{case}/ct.nii.gz" for case in range(200_000)]
    assert len({_identity(name, None) for name in names}) == len(names)


def test_a_line_cut_short_is_done_again(scans, tmp_path, recipe):
    folder = tmp_path / "store"
    sources = find_sources(scans)
    prepare(sources, folder, volume=recipe.volume)
    whole = read_index(folder)
    content = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(content[:-40])
    assert len(read_index(folder)) == 2
    assert prepare(sources, folder, volume=recipe.volume) == (1, 0)
    assert read_index(folder) == whole


def test_broken_scans_are_reported_and_do_not_stop_the_others(tmp_path, recipe):
    scans = tmp_path / "scans"
    scans.mkdir()
    write_scan(scans / "good.nii.gz")
    (scans / "empty.nii.gz").touch()
    (scans / "text.nii.gz").write_text("no scan")
    seen = []
    counts = prepare(
        find_sources(scans), tmp_path / "store", volume=recipe.volume, report=lambda *event: seen.append(event)
    )
    assert counts == (1, 2)
    problems = [json.loads(line) for line in (tmp_path / "store" / PROBLEMS_FILE).read_text().splitlines()]
    assert [problem["source"] for problem in problems] == ["empty.nii.gz", "text.nii.gz"]
    assert [name for name, problem in seen if problem] == ["empty.nii.gz", "text.nii.gz"]


def test_two_processes_prepare_what_one_does(scans, store, tmp_path, recipe):
    prepare(find_sources(scans), tmp_path / "store", volume=recipe.volume, workers=2)
    assert read_index(tmp_path / "store") == store.entries


def test_other_preprocessing_is_refused(store, recipe):
    other = VolumeSpec.parse({**recipe.volume.to_data(), "spacing": [1, 1, 1]}, source="test")
    with pytest.raises(SpecError, match="spacing"):
        store.check(other)
    with pytest.raises(SpecError, match="other preprocessing"):
        prepare([], store.folder, volume=other)


def test_statistics_are_never_taken_from_what_is_left_of_a_scan(store, recipe):
    """At use they are taken from the whole scan, air included; a window needs none."""
    intensity = recipe.volume.to_data()["intensity"]
    wider, other = (
        VolumeSpec.parse({**recipe.volume.to_data(), "intensity": intensity | changes}, source="test")
        for changes in ({"CT": {"kind": "window", "low": -200, "high": 300}}, {"MR": {"kind": "zscore"}})
    )
    store.check(wider)
    thorax = next(i for i, entry in enumerate(store.entries) if entry.modality == "CT")
    assert store.intensity(thorax, wider) == IntensityMap(-200, 300, clip=True)
    with pytest.raises(SpecError, match=r"percentile, low 0\.5, high 99\.5 for MR but the recipe says kind zscore"):
        store.check(other)


def test_a_folder_that_is_no_store_is_named(tmp_path):
    with pytest.raises(SpecError, match="medmim-train prepare"):
        Store(tmp_path)


def test_csv_lists_are_filtered_by_column(tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text(
        "file,split,modality,licence\na.nii,train,MR T1w (crop),MIT\nb.nii,test,CT,MIT\nc.nii,pool,PET (SUV),GPL-2.0\n"
    )
    assert [s.modality for s in find_sources(listing)] == ["MR", "CT", "PET"]
    assert [s.name for s in find_sources(listing, ["split=train,pool"])] == ["a.nii", "c.nii"]
    assert [s.name for s in find_sources(listing, ["split!=test", "licence!=GPL*"])] == ["a.nii"]
    with pytest.raises(SpecError, match="no scan found where"):
        find_sources(listing, ["split=nothing"])
    with pytest.raises(SpecError, match="column=pattern"):
        find_sources(listing, ["spilt=train"])


def test_a_scan_that_is_listed_twice_is_one_scan(tmp_path):
    (tmp_path / "list.csv").write_text("file,lesion\na.nii.gz,1\na.nii.gz,2\nb.nii.gz,1\n")
    told = []
    assert [source.name for source in find_sources(tmp_path / "list.csv", tell=told.append)] == ["a.nii.gz", "b.nii.gz"]
    assert told == [f"{tmp_path / 'list.csv'}: takes each scan once, 2 of 3 rows"]


@pytest.mark.parametrize("other", ["a.nii.gz,CT", "./a.nii.gz,MR"])
def test_rows_of_one_scan_that_do_not_agree_are_refused(tmp_path, other):
    (tmp_path / "list.csv").write_text(f"file,modality\na.nii.gz,MR\n{other}\nb.nii.gz,MR\n")
    with pytest.raises(SpecError, match=r"list\.csv: its rows of .*a\.nii\.gz differ in name, modality, "):
        find_sources(tmp_path / "list.csv")


def test_crops_are_a_function_of_seed_and_index(store, recipe):
    first, again = dataset(store, recipe), dataset(store, recipe)
    list(map(first.__getitem__, range(5)))  # whatever was read before does not matter
    assert torch.equal(first[7]["x"], again[7]["x"])
    assert not torch.equal(first[7]["x"], first[8]["x"])
    assert not torch.equal(first[7]["x"], dataset(store, recipe, seed=1)[7]["x"])
    assert first[0]["x"].shape == (1, 1, *SIZE)
    assert first[0]["x"].dtype == torch.float32


def test_consecutive_crops_share_a_volume(store, recipe):
    crops = dataset(store, recipe, crops_per_volume=4)
    volumes = [int(crops[index]["volume"]) for index in range(64)]
    assert volumes == [crops.volume_of(index - index % 4) for index in range(64)]


def test_volumes_are_drawn_by_their_foreground(store, recipe):
    crops = dataset(store, recipe)
    draws = np.bincount([crops.volume_of(index) for index in range(3000)], minlength=3)
    weights = np.array([min(entry.foreground, np.prod(SIZE)) for entry in store.entries])
    np.testing.assert_allclose(draws / 3000, weights / weights.sum(), atol=0.04)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_power_of_the_foreground_evens_volumes_out(store, recipe, power):
    crops = dataset(store, recipe, foreground_power=power)
    draws = np.bincount([crops.volume_of(index) for index in range(3000)], minlength=3)
    weights = np.array([min(entry.foreground, np.prod(SIZE)) for entry in store.entries]) ** power
    np.testing.assert_allclose(draws / 3000, weights / weights.sum(), atol=0.04)


def test_the_index_says_where_the_foreground_is(store):
    for position, entry in enumerate(store.entries):
        foreground = entry.intensity.apply(store.array(position)[...].astype(np.float32))[0] > FOREGROUND
        assert entry.foreground == foreground.sum()
        blocks = {tuple(block[1:]): block[0] for block in entry.occupied_blocks()}
        for corner in np.ndindex(*(-(-side // BLOCK) for side in entry.shape)):
            first = tuple(BLOCK * place for place in corner)
            here = foreground[tuple(slice(start, start + BLOCK) for start in first)].sum()
            assert blocks.get(first, 0) == np.ceil(255 * here / BLOCK**3)


def test_crops_around_foreground(scans, recipe, tmp_path):
    """Of a volume whose foreground is in two far corners, a crop there is drawn as often as there is foreground."""
    array = np.zeros((120, 20, 20), dtype=np.int16)
    array[:8], array[-8:, :10] = 100, 100
    nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])).to_filename(tmp_path / "corners.nii.gz")
    prepare(find_sources(tmp_path), tmp_path / "store", volume=recipe.volume)
    size = (16, 16, 16)

    def shares(share: float) -> tuple[float, float]:
        crops = dataset(Store(tmp_path / "store"), recipe, size=size, foreground_share=share)
        starts = np.array([crops[index]["boxes"][0, 0] * 120 for index in range(400)])
        return float((starts < 8).mean()), float((starts > 96).mean())

    near, far = shares(1.0)
    assert near + far == 1
    assert near == pytest.approx(2 / 3, abs=0.07)
    near, far = shares(0.5)
    assert near + far == pytest.approx(0.5 + 0.5 * 16 / 105, abs=0.07)
    near, far = shares(0.0)
    assert near + far == pytest.approx(16 / 105, abs=0.06)


def test_a_store_of_an_older_version_is_read_and_says_what_it_lacks(store, recipe, tmp_path):
    shutil.copytree(store.folder, tmp_path / "old")
    lines = [json.loads(line) for line in (tmp_path / "old" / INDEX_FILE).read_text().splitlines()]
    older = [{key: value for key, value in line.items() if key != "occupancy"} for line in lines]
    (tmp_path / "old" / INDEX_FILE).write_text("".join(json.dumps(line) + "\n" for line in older))
    old = Store(tmp_path / "old")
    assert torch.equal(dataset(old, recipe)[3]["x"], dataset(store, recipe)[3]["x"])
    with pytest.raises(SpecError, match="older medmim"):
        dataset(old, recipe, foreground_share=0.5)


@pytest.mark.parametrize("axes", [(), (0, 1, 2)])
def test_a_crop_says_where_it_is_inside_its_volume(store, recipe, axes):
    crops = dataset(store, recipe, mirror_axes=axes)
    smaller = 0
    for index in range(24):
        sample = crops[index]
        entry = store.entries[int(sample["volume"])]
        box = [slice(*line) for line in sample["inside"][0].tolist()]
        sides = [line.stop - line.start for line in box]
        assert sides == [min(stored, side) for stored, side in zip(entry.shape, SIZE, strict=True)]
        beyond = torch.ones(SIZE, dtype=torch.bool)
        beyond[*box] = False
        outside = entry.intensity.apply(np.float32(entry.minimum))
        assert torch.all(sample["x"][0, 0][beyond] == float(outside))
        smaller += bool(beyond.any())
    assert smaller  # the small scan was among them


def test_a_crop_is_a_part_of_its_volume(store, recipe):
    crops = dataset(store, recipe)
    for index in range(12):
        x, position = crops[index]["x"][0, 0].numpy(), int(crops[index]["volume"])
        entry = store.entries[position]
        volume = entry.intensity.apply(store.array(position)[...].astype(np.float32))[0]
        outside = entry.intensity.apply(np.float32(entry.minimum))
        padding = [(side, side) for side in SIZE]
        padded = np.pad(volume, padding, constant_values=outside)
        windows = np.lib.stride_tricks.sliding_window_view(padded, SIZE)
        probe = tuple(side // 2 for side in SIZE)
        candidates = np.argwhere(windows[..., *probe] == x[probe])
        assert any(np.array_equal(windows[tuple(c)], x) for c in candidates)


def test_mirrored_crops_are_mirrored_along_that_axis_alone(store, recipe):
    plain, mirrored = dataset(store, recipe), dataset(store, recipe, mirror_axes=(1,))
    outcomes = []
    for index in range(16):
        a, b = plain[index]["x"], mirrored[index]["x"]
        assert torch.equal(a, b) or torch.equal(a.flip(3), b)
        outcomes.append(torch.equal(a, b))
    assert 2 < sum(outcomes) < 14


def test_decathlon_and_monai_lists(tmp_path):
    listing = tmp_path / "dataset.json"
    decathlon = {
        "modality": {"0": "CT"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "test": ["./imagesTs/b.nii.gz"],
    }
    listing.write_text(json.dumps(decathlon))
    found = find_sources(listing)
    assert [(s.path, s.modality) for s in found] == [
        (tmp_path / "imagesTr/a.nii.gz", "CT"),
        (tmp_path / "imagesTs/b.nii.gz", "CT"),
    ]
    assert len(find_sources(listing, ["split=training"])) == 1
    listing.write_text(json.dumps({"modality": {"0": "FLAIR"}, "validation": [{"image": "c.nii"}]}))
    assert [s.modality for s in find_sources(listing)] == ["MR"]


def decathlon_folder(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_of_a_decathlon_folder_the_scans_are_taken_that_are_no_test(tmp_path):
    names = [f"{part}/{case}.nii.gz" for part in ("imagesTr", "labelsTr", "imagesTs") for case in "ab"]
    folder, told = decathlon_folder(tmp_path, *names, "imagesTr/._a.nii.gz"), []
    found = find_sources(folder, tell=told.append)
    assert [(s.name, s.modality) for s in found] == [("imagesTr/a.nii.gz", None), ("imagesTr/b.nii.gz", None)]
    assert told.pop() == f"{folder}: takes 2 scans of imagesTr; leaves out imagesTs, labelsTr"

    listed = {
        "modality": {"0": "MRI"},
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": "x"} for case in "bc"],
        "test": ["./imagesTs/a.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(listed))
    found = find_sources(folder, tell=told.append)
    assert [(s.path, s.modality) for s in found] == [(folder / "imagesTr/b.nii.gz", "MR")]
    assert "takes 1 scans of imagesTr; leaves out imagesTs, labelsTr; 1 that dataset.json lists" in told[0]
    assert [s.name for s in find_sources(folder, ["split=test"])] == ["./imagesTs/a.nii.gz"]

    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "numTraining": 2}))  # of nnU-Net
    assert [(s.name[-8], s.modality) for s in find_sources(folder)] == [("a", "CT"), ("b", "CT")]


def test_of_an_nnunet_folder_each_file_has_the_modality_of_its_channel(tmp_path):
    names = [f"imagesTr/{case}_000{channel}.nii.gz" for case in "ab" for channel in (0, 1)]
    folder = decathlon_folder(tmp_path, *names)
    expected = [(name, modality) for name, modality in zip(names, ["CT", "PET"] * 2, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}}))
    assert [(s.name, s.modality) for s in find_sources(folder)] == expected
    # The first nnU-Net listed cases, by names that are of no file.
    listed = {"modality": {"0": "CT", "1": "PET"}, "training": [{"image": f"./imagesTr/{c}.nii.gz"} for c in "ab"]}
    (folder / "dataset.json").write_text(json.dumps(listed))
    assert [(s.name, s.modality) for s in find_sources(folder)] == expected
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "training": [f"./{names[1]}"]}))
    assert [s.modality for s in find_sources(folder)] == ["MR"]  # the first channel of case 1


@pytest.mark.parametrize("text", ["US", "MG", "x-ray"])
def test_a_modality_that_is_unknown_is_refused(tmp_path, text):
    listing = tmp_path / "list.csv"
    listing.write_text(f"file,modality\na.nii,T1w\nb.nii,\nc.nii,{text}\nd.nii,mr_flair\n")
    with pytest.raises(SpecError, match=f"row 3: the modality '{text}' is none of CT, PET, .*FLAIR"):
        find_sources(listing)
    assert [s.modality for s in find_sources(listing, ["file!=c*"])] == ["MR", None, "MR"]
    listing = tmp_path / "dataset.json"
    listing.write_text(json.dumps({"modality": {"0": text}, "training": ["a.nii"]}))
    with pytest.raises(SpecError, match=f"row 1: the modality '{text}'"):
        find_sources(listing)


@pytest.mark.parametrize("column", ["Modality", " modality", "MODALITY "])
def test_a_column_that_is_written_in_another_way_counts(tmp_path, column):
    """PET is never guessed: of a modality that is passed over, it would be prepared as MR without a word."""
    (tmp_path / "list.csv").write_text(f"file,{column},Group,Licence\na.nii, PET,x,MIT\n")
    assert find_sources(tmp_path / "list.csv") == [Source(tmp_path / "a.nii", "a.nii", "PET", "x", "MIT")]


def test_spaces_and_capitals_keep_no_test_scan_in(tmp_path):
    (tmp_path / "list.csv").write_text("File, Split\na.nii,train\nb.nii, Test\nc.nii,TEST\n")
    for where in ("split!=test", "Split=Train"):
        assert [s.name for s in find_sources(tmp_path / "list.csv", [where])] == ["a.nii"]


@pytest.mark.parametrize(
    "lists",
    [
        {"modality": "PET", "training": ["a.nii"]},
        {"training": [{"image": "a.nii", "modality": "PET"}]},
        {"modality": {"0": "CT"}, "training": [{"image": "a.nii", "modality": "PET"}]},
    ],
)
def test_a_modality_counts_wherever_a_json_list_says_it(tmp_path, lists):
    (tmp_path / "list.json").write_text(json.dumps(lists))
    assert [s.modality for s in find_sources(tmp_path / "list.json")] == ["PET"]


def test_a_list_that_a_spreadsheet_saved(tmp_path):
    (tmp_path / "list.csv").write_text("file,group\r\na.nii,x\r\n,\r\n\r\n,\r\n", encoding="utf-8-sig")
    assert [s.name for s in find_sources(tmp_path / "list.csv")] == ["a.nii"]
    (tmp_path / "list.csv").write_text("file,group\na.nii,x\n,y\n")
    with pytest.raises(SpecError, match="row 2 has no file"):
        find_sources(tmp_path / "list.csv")


@pytest.mark.parametrize("text", ["{", "[]", '{"training": [{"label": "a"}]}', '{"training": []}'])
def test_a_list_that_is_none_is_named(tmp_path, text):
    listing = tmp_path / "dataset.json"
    listing.write_text(text)
    with pytest.raises(SpecError, match=r"dataset\.json"):
        find_sources(listing)


def test_a_folder_of_dicom_series(tmp_path):
    for name in ("study/ct/1.dcm", "study/ct/2.dcm", "study/mr/1.dcm", "scan.NII.GZ", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [source.name for source in find_sources(tmp_path)] == ["scan.NII.GZ", "study/ct", "study/mr"]


def test_what_an_entry_says_of_its_volume(store, scans):
    for position, entry in enumerate(store.entries):
        array = store.array(position)[...]
        assert entry.shape == array.shape[1:]
        assert entry.percentiles[0] == array.min()
        assert entry.percentiles[-1] == array.max()
        assert list(entry.percentiles) == sorted(entry.percentiles)
        whole = np.asarray(nib.load(scans / entry.source).dataobj)
        assert np.array_equal(
            array[0], whole[tuple(slice(o, o + s) for o, s in zip(entry.offset, entry.shape, strict=True))]
        )


def test_a_look_at_a_store(store, tmp_path):
    assert [(modality, volumes) for _, modality, volumes, _ in counts(store)] == [("CT", 1), ("MR", 2)]
    for draw in (draw_histograms, draw_contact_sheet):
        draw(store, tmp_path / "picture.png")
        picture = imread(tmp_path / "picture.png")
        assert picture[..., :3].std() > 0.05


def test_spacings_are_not_drawn_as_those_of_the_stored_axes(store, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("medmim_training.store.inspect._write", lambda figure, path: drawn.append(figure))
    draw_histograms(store, tmp_path / "picture.png")
    spacing, side, _ = ([text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn[0].axes)
    assert spacing == ["axis 0 of the file", "axis 1 of the file", "axis 2 of the file"]
    assert side == ["D", "H", "W"]


def test_scans_without_foreground_are_drawn_alike(store, recipe):
    """Also where crops are to be around foreground: there is none to be around."""
    empty = Store(store.folder)
    blocks = [base64.b64encode(bytes(math.prod(-(-side // 16) for side in e.shape))).decode() for e in store.entries]
    changed = [{"foreground": 0, "occupancy": each} for each in blocks]
    empty.entries = [entry.model_copy(update=each) for entry, each in zip(store.entries, changed, strict=True)]
    crops = dataset(empty, recipe, length=60, foreground_share=1.0)
    assert {int(crops[index]["volume"]) for index in range(60)} == {0, 1, 2}


def test_a_volume_that_goes_missing_or_is_damaged_is_named(store, recipe, tmp_path):
    shutil.copytree(store.folder, tmp_path / "store")
    crops = dataset(Store(tmp_path / "store"), recipe)
    path = tmp_path / "store" / "volumes" / f"{store.entries[crops.volume_of(0)].id}.b2nd"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(len(whole) - 300) + whole[-100:])
    with pytest.raises(SpecError, match=rf"{path.name}: .*prepare again"):
        crops[0]
    path.unlink()
    with pytest.raises(SpecError, match=rf"{path.name}: cannot be opened"):
        dataset(Store(tmp_path / "store"), recipe)[0]
