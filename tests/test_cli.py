"""The command line: what it prints, what it writes, how it ends."""

import os
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

import medmim
from medmim import hub, inference, reconstruction
from medmim.heads.mae import MAEDecoder
from medmim.samples import sample_scans
from synthetic import write_scan
from test_volumes import BROKEN, changed_compressed_mha, compressed_mha_of_no_size, truncated_mha

COMMANDS = (
    *("list", "info", "embed", "segment", "classify", "reconstruct", "demo"),
    *("export", "cards", "push", "mirror", "verify"),
)
PNG = b"\x89PNG"
DECODER = {"embed_dim": 24, "depth": 1, "num_heads": 2}
WEIGHTS = {
    "tag": "random",
    "license": "Apache-2.0",
    "citation": "nobody",
    "decoder_spec": {"kind": "mae", "args": DECODER},
    "volume": {
        "spacing": [2, 2, 2],
        "intensity": {"CT": {"kind": "window", "low": -1000, "high": 1000}, "MR": {"kind": "percentile"}},
    },
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The name of a small model with random weights and a decoder, in a folder."""
    folder = tmp_path_factory.mktemp("model")
    encoder = medmim.create_model(
        "vit_t_mae3d", img_size=(64, 96, 64), patch_size=(16, 16, 8), embed_dim=24, depth=1, num_heads=2
    )
    decoder = MAEDecoder(24, encoder.grid_size, patch_size=encoder.patch_size, **DECODER)
    medmim.save_pretrained(encoder, folder, decoder=decoder, weights=WEIGHTS)
    return f"local-dir:{folder}"


def scan_file(folder, name="scan.nii.gz", **options):
    write_scan(folder / name, **options)
    return folder / name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- help, list, info -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"Example: medmim {command} " in out


def test_list_imports_nothing_heavy():
    """Which is what makes it quick; `training/benchmarks/loading.py` measures how quick."""
    script = (
        "import sys; from medmim.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(*{'torch', 'monai', 'timm', 'nibabel', 'matplotlib', 'SimpleITK'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script, "list"], capture_output=True, text=True, check=True).stdout
    assert "vit_t_mae3d" in out
    assert out.splitlines()[-1] == ""


def test_list_filters(call):
    code, out, _ = call("list", "vit_[st]_mae3d")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["model", "vit_s_mae3d", "vit_t_mae3d"]


def test_list_without_a_match_says_so(call):
    code, out, err = call("list", "resnet*")
    assert (code, out) == (1, "")
    assert err == "medmim: error: no model matches 'resnet*'; `medmim list` shows all\n"


@pytest.mark.parametrize("pattern", ["tiny.fake", "tiny.*", "tiny"])
@pytest.mark.parametrize("pretrained", [[], ["--pretrained"]])
def test_list_of_a_full_name(call, tiny_weights, registry, pattern, pretrained):
    registry.register_model("tiny_without", family="vit")
    other = tiny_weights.weights.model_copy(update={"tag": "other"})
    registry.register_model("tiny_other", family="vit", weights=[other])
    code, out, _ = call("list", pattern, *pretrained)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [["model", "weights"], ["tiny", "tiny.fake"]]
    assert call("list", "tiny.another")[0] == 1


def test_list_marks_weights_that_did_not_come_with_medmim(call, tiny_weights, registry):
    other = tiny_weights.weights.model_copy(update={"tag": "other"})
    registry.register_model("tiny_other", family="vit", weights=[other])
    out = call("list", "tiny*", "--pretrained")[1]
    found = [line.split(maxsplit=1)[1].strip() for line in out.splitlines()]
    assert found == ["weights", "tiny.fake", "tiny_other.other (not installed)"]
    assert medmim.list_pretrained("tiny*") == ["tiny.fake", "tiny_other.other"]


def test_version(call):
    assert call("--version") == (0, f"medmim {medmim.__version__}\n", "")


def test_info_of_a_model(call):
    code, out, _ = call("info", "vit_b_mae3d")
    assert code == 0
    assert "embed_dim 768" in out


@pytest.mark.parametrize("name", medmim.list_pretrained())
def test_info_of_weights(call, name):
    code, out, _ = call("info", name)
    weights = medmim.model_info(name).weights[0]
    assert code == 0
    assert name in out
    assert weights.license in out


def test_info_has_every_run_that_weights_went_through(call):
    (weights,) = medmim.model_info("vit_t_mae3d.open_mix").weights
    out = call("info", "vit_t_mae3d.open_mix")[1]
    found = re.findall(r"^(?:trained|then) on +(\d+) volumes, (\d+) crops", out, re.MULTILINE)
    runs, run = [], weights.training
    while run is not None:
        runs.insert(0, (str(run.volumes), str(run.crops)))
        run = run.before
    assert len(runs) > 1
    assert found == runs


def test_info_of_a_folder(call, model, tmp_path):
    code, out, err = call("info", model)
    assert (code, err) == (0, "")
    assert re.search(r"^licence +Apache-2.0 *$", out, re.MULTILINE)
    assert "embed_dim 24" in out
    segmenter = medmim.create_segmenter(model, "light", classes=("background", "ball"), pretrained=True)
    medmim.save_pretrained(segmenter, tmp_path / "model.v1")
    assert re.search(r"^segmentation +background, ball *$", call("info", f"local-dir:{tmp_path}/model.v1")[1], re.M)
    code, _, err = call("info", f"local-dir:{tmp_path}/nothing")
    assert code == 1
    assert f"{tmp_path}/nothing" in err


def test_info_of_a_wrong_name_gives_the_nearest(call):
    code, out, err = call("info", "vit_t_mea3d")
    assert (code, out) == (1, "")
    assert err.startswith("medmim: error: there is no model 'vit_t_mea3d'; nearest: vit_t_mae3d")
    assert err.endswith("; medmim.list_models() has all, and so has `medmim list`\n")


# --- reconstruct ------------------------------------------------------------------------------------------------------


def test_reconstruct_draws_and_compares(call, model, tmp_path):
    scan, picture = scan_file(tmp_path, ct=True), tmp_path / "out" / "picture.png"
    code, out, _ = call("reconstruct", scan, "-o", picture, "-m", model)
    assert code == 0
    assert picture.read_bytes().startswith(PNG)
    errors = {name: float(error) for name, error in re.findall(r"^(\w+(?: \w+)?) +(\d+\.\d+) *$", out, re.MULTILINE)}
    assert errors.keys() == {"model", "nearest visible", "mean fill"}
    assert errors["mean fill"] == pytest.approx(1, abs=0.1)
    assert out.splitlines()[-1] == str(picture)


def test_reconstruct_is_decided_by_the_seed(call, model, tmp_path):
    scan, picture = scan_file(tmp_path), tmp_path / "picture.png"
    outs = [call("reconstruct", scan, "-o", picture, "-m", model, "--seed", seed)[1] for seed in (0, 0, 1)]
    assert outs[0] == outs[1] != outs[2]


PRINTED = (
    truncated_mha,
    changed_compressed_mha,
    compressed_mha_of_no_size,
)  # by the MetaImage library, past ITK's switch


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_reconstruct_of_a_broken_scan_is_one_line(call, model, tmp_path, make):
    (tmp_path / "in").mkdir()
    scan = make(tmp_path / "in")
    before = names(tmp_path / "in")
    code, out, err = call("reconstruct", scan, "-o", tmp_path / "picture.png", "-m", model)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[-1].startswith(f"medmim: error: {scan}: ")
    assert len(lines) == 1 or make in PRINTED
    assert names(tmp_path) == ["in"]
    assert names(tmp_path / "in") == before


def test_reconstruct_of_a_folder_names_a_scan_of_it(call, model, tmp_path):
    scan, _ = scan_file(tmp_path), scan_file(tmp_path, "second.nii.gz")
    code, _, err = call("reconstruct", tmp_path, "-o", tmp_path / "picture.png", "-m", model)
    assert code == 1
    assert err == (
        f"medmim: error: {tmp_path}: is a folder, and one scan is read here; give a file of it, such as {scan}\n"
    )


def test_reconstruct_of_a_scan_smaller_than_a_patch(call, model, tmp_path):
    scan, picture = scan_file(tmp_path, shape=(5, 4, 3)), tmp_path / "picture.png"
    code, out, err = call("reconstruct", scan, "-o", picture, "-m", model, "--modality", "MR")
    assert (code, out) == (1, "")
    assert err.startswith(f"medmim: error: {scan}: has 1 patch(es) of 16 x 16 x 8 voxels")
    assert not picture.exists()


def test_reconstruct_of_a_scan_smaller_than_a_window(call, model, tmp_path):
    scan, picture = scan_file(tmp_path, shape=(9, 60, 14)), tmp_path / "picture.png"
    code, _, err = call("reconstruct", scan, "-o", picture, "-m", model, "--modality", "MR")
    assert (code, err) == (0, "")
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.slow
def test_reconstruct_of_512_x_512_x_600(model, tmp_path):
    """Right, and in bounded memory: the interpreter takes 0.8 GB, the scan 0.3 GB, in float32 0.6 GB."""
    scan, picture = tmp_path / "scan.nii", tmp_path / "picture.png"
    slices = np.sin(np.linspace(0, 40, 600)) * 300
    voxels = np.full((512, 512, 600), -1000, dtype=np.int16, order="F")
    voxels[60:450, 100:400] = slices.astype(np.int16)
    nib.Nifti1Image(voxels, np.diag([0.7, 0.7, 0.8, 1])).to_filename(scan)
    del voxels
    script = (
        "import resource; from medmim.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    arguments = ["reconstruct", str(scan), "-o", str(picture), "-m", model]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    mean_fill, peak = re.search(r"mean fill +(\S+)", done.stdout)[1], int(done.stdout.splitlines()[-1])
    assert float(mean_fill) == pytest.approx(1, abs=0.05)
    assert picture.read_bytes().startswith(PNG)
    assert peak < 4 * 2**20  # in KiB


# --- embed ------------------------------------------------------------------------------------------------------------


def test_embed_reports_a_broken_scan_and_goes_on(call, model, tmp_path):
    folder = tmp_path / "scans"
    (folder / "b").mkdir(parents=True)
    first, same_name = scan_file(folder, ct=True), scan_file(folder / "b", shape=(20, 60, 33))
    empty, last = tmp_path / "empty.nii.gz", scan_file(tmp_path, "last.nii.gz")
    empty.touch()
    output = tmp_path / "features.safetensors"
    code, out, err = call("embed", folder, empty, last, "-o", output, "-m", model)
    assert code == 1
    assert err == f"medmim: error: {empty}: the file is empty; copy or export it again\n"
    assert out == f"{output}: 3 of 4 scans\n"
    with safe_open(output, "np") as file:
        embedded = {key.rpartition("/")[0] for key in file.keys()}  # noqa: SIM118 (it is no dict)
        assert embedded == {"scan", "b/scan", "last"}
        assert file.metadata()["b/scan/scan"] == str(same_name)
        assert file.get_tensor("last/pooled").shape == (24,)
        assert file.get_tensor("b/scan/features").shape == (24, 4, 6, 8)
        assert np.isfinite(file.get_tensor("scan/features")).all()
    assert call("embed", first, same_name, "-o", output, "-m", model)[0] == 0
    with safe_open(output, "np") as file:
        assert {file.metadata()[f"{name}/scan"] for name in ("scans/scan", "b/scan")} == {str(first), str(same_name)}
    assert f"{first}: given twice; leave one out" in call("embed", first, first, "-o", output, "-m", model)[2]


def test_embed_of_broken_scans_alone_writes_nothing(call, model, tmp_path):
    (tmp_path / "empty.nii.gz").touch()
    output = tmp_path / "features.safetensors"
    code, out, _ = call("embed", tmp_path / "empty.nii.gz", "-o", output, "-m", model)
    assert (code, out) == (1, f"{output}: 0 of 1 scans\n")
    assert names(tmp_path) == ["empty.nii.gz"]


@pytest.mark.parametrize(("error", "ending"), [(KeyboardInterrupt, 130), (MemoryError, None)])
def test_embed_that_is_stopped_writes_what_was_done(call, model, tmp_path, monkeypatch, error, ending):
    scans = [scan_file(tmp_path, name) for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")]
    encode = inference.embed

    def stopped(encoder, scan, **options):
        if scan == scans[1]:
            raise error
        return encode(encoder, scan, **options)

    monkeypatch.setattr(inference, "embed", stopped)
    output = tmp_path / "features.safetensors"
    with nullcontext() if ending else pytest.raises(error):
        code, out, _ = call("embed", *scans, "-o", output, "-m", model)
        assert (code, out) == (ending, f"{output}: 1 of 3 scans\n")
    with safe_open(output, "np") as file:
        assert {key.rpartition("/")[0] for key in file.keys()} == {"a"}  # noqa: SIM118 (it is no dict)


def test_embed_into_a_file_goes_on_and_loses_nothing_when_it_is_stopped_again(call, model, tmp_path, monkeypatch):
    scans = [scan_file(tmp_path, name) for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")]
    output, encode = tmp_path / "features.safetensors", inference.embed
    assert call("embed", scans[1], "-o", output, "-m", model)[:2] == (0, f"{output}: 1 of 1 scans\n")
    before = load_file(output)

    def stopped(encoder, scan, **options):
        if scan != scans[0]:
            raise KeyboardInterrupt
        return encode(encoder, scan, **options)

    monkeypatch.setattr(inference, "embed", stopped)
    code, out, _ = call("embed", *scans, "-o", output, "-m", model)
    assert {key.rpartition("/")[0] for key in load_file(output)} == {"a", "b"}
    assert (code, out) == (130, f"{output}: 1 of 2 scans, 1 were there already\n")
    monkeypatch.setattr(inference, "embed", encode)
    assert call("embed", *scans, "-o", output, "-m", model)[0] == 0
    after = load_file(output)
    assert {key.rpartition("/")[0] for key in after} == {"a", "b", "c"}
    assert all(np.array_equal(after[key], value) for key, value in before.items())


def test_embed_into_a_folder_skips_what_is_done(call, model, tmp_path):
    folder, output = tmp_path / "scans", tmp_path / "scans" / "features"  # which is no scan of the next call
    (folder / "b").mkdir(parents=True)
    first, second = scan_file(folder, ct=True), scan_file(folder / "b", "x.nii.gz")
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    code, out, err = call("embed", folder, empty, "-o", output, "-m", model)
    assert (code, out) == (1, f"{output}: 2 of 3 scans\n")
    assert err == f"medmim: error: {empty}: the file is empty; copy or export it again\n"
    files = {first: output / "scan.safetensors", second: output / "b" / "x.safetensors"}
    for scan, file in files.items():
        with safe_open(file, "np") as embedded:
            name = file.relative_to(output).with_suffix("").as_posix()
            assert embedded.metadata()[f"{name}/scan"] == str(scan)
            assert embedded.get_tensor(f"{name}/features").shape[0] == 24
    written = {file: file.stat().st_mtime_ns for file in files.values()}
    assert call("embed", folder, "-o", output, "-m", model)[:2] == (
        0,
        f"{output}: 0 of 0 scans, 2 were there already\n",
    )
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_embed_adds_to_no_folder_of_another_model(call, model, tmp_path):
    scan, output = scan_file(tmp_path), tmp_path / "features"
    assert call("embed", scan, "-o", output, "-m", model)[0] == 0
    folder = tmp_path / "model"
    medmim.save_pretrained(medmim.create_model(model, img_size=64), folder, weights=WEIGHTS)  # new numbers
    code, _, err = call("embed", scan, "-o", output, "-m", f"local-dir:{folder}")
    assert code == 1
    assert re.fullmatch(
        r".*/scan\.safetensors: is of vit_t_mae3d\.random sha256:\w{16}, not of vit_t_mae3d\.random sha256:\w{16}; "
        r"choose another output\n",
        err,
    )
    (output / "scan.safetensors").write_bytes(b"cut")
    assert "scan.safetensors: not a whole safetensors file (" in call("embed", scan, "-o", output, "-m", model)[2]


def test_embed_takes_no_scan_of_one_name_for_another(call, model, tmp_path, monkeypatch):
    for site in ("siteA", "siteB"):
        (tmp_path / site).mkdir()
        scan_file(tmp_path / site)
    output = tmp_path / "features"
    monkeypatch.chdir(tmp_path)
    assert call("embed", "siteA", "-o", output, "-m", model)[0] == 0
    code, out, err = call("embed", "siteB", "-o", output, "-m", model)
    ours, theirs = (tmp_path / site / "scan.nii.gz" for site in ("siteB", "siteA"))
    assert (code, out) == (1, "")
    assert f"scan.safetensors: is of {theirs}, not of {ours}; choose another output" in err
    monkeypatch.chdir(tmp_path / "siteA")  # the same scan, spelled in another way
    assert call("embed", "scan.nii.gz", "-o", output, "-m", model)[:2] == (
        0,
        f"{output}: 0 of 0 scans, 1 were there already\n",
    )


@pytest.mark.parametrize("output", ["features", "features.safetensors"])
def test_embed_of_a_file_whose_name_is_no_text(call, model, tmp_path, output):
    scan = scan_file(tmp_path, os.fsdecode(b"\xff.nii.gz"))
    assert call("embed", scan, "-o", tmp_path / output, "-m", model)[0] == 0
    file = tmp_path / output if "." in output else tmp_path / output / "\\udcff.safetensors"
    with safe_open(file, "np") as embedded:
        assert embedded.metadata()["\\udcff/scan"] == f"{tmp_path}/\\udcff.nii.gz"


# --- push, mirror, verify ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Where a local hub may be made; that --hub sets MEDMIM_HUB is undone after the test."""
    monkeypatch.setenv("MEDMIM_HUB", "")
    return tmp_path / "hub"


@pytest.fixture
def card(tmp_path):
    (tmp_path / "card.md").write_text("# A card")
    return tmp_path / "card.md"


def test_push_says_what_goes_where_before_and_the_commit_after(call, model, hub_folder, card):
    source = model.removeprefix("local-dir:")
    arguments = ["push", source, "org/name", "--hub", hub_folder, "--card", card, "--tag", "v1"]
    code, planned, err = call(*arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert f"to org/name at the local hub {hub_folder}, a new repository" in planned
    assert planned.endswith("nothing was sent\n")
    assert not hub_folder.exists()

    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith(planned.removesuffix("nothing was sent\n"))
    (version,) = (hub_folder / "org/name/snapshots").iterdir()
    files = {path.name: path.stat().st_size for path in version.iterdir() if path.name != "SHA256SUMS"}
    assert {*files} == {*names(Path(source)), "README.md", "golden.safetensors"}
    for name, size in {**files, "in all": sum(files.values())}.items():
        assert re.search(rf"^{name} +{size:,} bytes *$", planned, re.MULTILINE)
    assert f"published: {version}" in out
    assert f'create_model("hf-hub:org/name@{version.name}", pretrained=True)' in out
    place, _, text = out.partition("for the catalog: ")[2].partition(":\n\n")
    assert place == '"random" among the weights of vit_t_mae3d, and medmim/catalog/weights/vit_t_mae3d.random.toml'
    entry = tomllib.loads(text)
    assert (entry["repo"], entry["revision"]) == ("org/name", version.name)

    _, out, _ = call("push", f"hf-hub:org/name@{version.name}", "org/name", "--hub", hub_folder, "--dry-run")
    assert f"now at {version.name}" in out
    assert "stays as it is there: README.md" in out


def test_push_of_what_nobody_should_publish(call, tmp_path, hub_folder):
    medmim.save_pretrained(medmim.create_model("vit_t_mae3d", embed_dim=24, depth=1), tmp_path / "model")
    code, out, err = call("push", tmp_path / "model", "org/name", "--hub", hub_folder)
    assert (code, out) == (1, "")
    assert "weights.license and weights.volume missing" in err
    assert len(err.splitlines()) == 1


def test_push_to_a_server_that_is_down(call, model, card, hub_folder):
    arguments = ["--card", card, "--endpoint", "http://127.0.0.1:9"]
    code, out, err = call("push", model, "org/name", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("medmim: error: publishing org/name on http://127.0.0.1:9 failed: ")
    assert len(err.splitlines()) == 1


def test_mirror_reports_what_is_not_there_and_goes_on(call, model, hub_folder, tmp_path, card):
    call("push", model, "org/name", "--hub", hub_folder, "--card", card)
    code, out, err = call("mirror", "vit_x", "hf-hub:org/other", "hf-hub:org/name", "-o", tmp_path / "copy")
    assert code == 1
    assert [line.partition(": ")[2].split(";")[0] for line in err.splitlines()] == [
        "error: there is no model 'vit_x'",
        f"error: the local hub {hub_folder} has no model org/other",
    ]
    (version,) = (tmp_path / "copy/org/name/snapshots").iterdir()
    assert out == f"org/name@{version.name}: {version}\n"


def test_a_card_saved_with_a_mark_keeps_its_front_matter(call, model, hub_folder, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n# A card", encoding="utf-8-sig")
    call("push", model, "org/name", "--hub", hub_folder, "--card", tmp_path / "card.md")
    (version,) = (hub_folder / "org/name/snapshots").iterdir()
    assert (version / "README.md").read_bytes().startswith(b"---\nlicense: mit\n")


def test_verify_has_a_line_for_each_and_an_exit_code(call, model, hub_folder, tmp_path, card):
    call("push", model, "org/name", "--hub", hub_folder, "--card", card)
    code, out, err = call("verify", hub_folder)
    assert (code, err) == (0, "")
    (version,) = (hub_folder / "org/name/snapshots").iterdir()
    files = [path for path in names(version) if path != "SHA256SUMS"]
    checks = sorted([*files, "golden outputs"])
    assert sorted(out.splitlines()) == [f"local-dir:{version}: {check}: ok" for check in checks]
    (version / "README.md").write_text("# Another")
    code, out, err = call("verify", f"hf-hub:org/name@{version.name}", tmp_path / "nothing")
    assert code == 1
    assert sum(line.endswith(": ok") for line in out.splitlines()) == len(files) - 1
    assert f"hf-hub:org/name@{version.name}: README.md: its sha256 is" in out
    assert err.splitlines()[-1].startswith(f"medmim: error: 1 of {len(files)} are not as published")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nope", "there is no model 'nope'"), ("hf-hub:org/nope", "the local hub {hub} has no model org/nope")],
)
def test_verify_of_what_is_not_there_says_nothing_of_damage(call, hub_folder, name, message):
    code, out, err = call("verify", name, "--hub", hub_folder)
    assert (code, out) == (1, "")
    assert err.startswith(f"medmim: error: {message.format(hub=hub_folder)}")
    assert len(err.splitlines()) == 1


def test_verify_goes_on_after_a_folder_that_has_no_models(call, tiny_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, err = call("verify", tmp_path / "empty", tiny_folder[0])
    assert code == 1
    assert "model.safetensors: ok" in out
    assert "empty: neither a model folder nor a local hub" in err


def test_verify_of_the_weights_that_ship(call, hub_folder):
    code, out, err = call("verify")
    assert (code, err) == (0, "")
    for name in medmim.list_pretrained():
        if (hub.PACKAGED / name).is_dir():
            assert f"{name}: golden outputs: ok" in out


def test_a_hub_is_used_wherever_a_model_is(call, model, hub_folder, tmp_path, card):
    call("push", model, "org/name", "--hub", hub_folder, "--card", card)
    name, scan = "hf-hub:org/name", scan_file(tmp_path)
    for arguments, message in (
        (["embed", scan, "-o", tmp_path / "features.safetensors", "-m", name], ""),
        (["reconstruct", scan, "-o", tmp_path / "picture.png", "-m", name], ""),
        (["export", name, "--to", "monai-bundle", "-o", tmp_path / "bundle"], ""),
        # Found, and of another kind.
        (["segment", scan, "-o", tmp_path / "masks", "-m", name], "does not segment"),
        (["classify", scan, "-o", tmp_path / "classes.csv", "-m", name], "does not classify"),
    ):
        os.environ["MEDMIM_HUB"] = ""
        code, _, err = call(*arguments, "--hub", hub_folder)
        assert code == bool(message)
        assert message in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("command", ["embed", "reconstruct"])
def test_a_gpu_is_used_where_there_is_one(call, model, tmp_path, command):
    torch.cuda.reset_peak_memory_stats()
    output = tmp_path / {"reconstruct": "picture.png", "embed": "features.safetensors"}[command]
    assert call(command, scan_file(tmp_path), "-o", output, "-m", model)[0] == 0
    assert output.is_file()
    assert torch.cuda.max_memory_allocated() > 0


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reconstruct", "scan.nii.gz"], "--output"),
        (["reconstruct", "scan.nii.gz", "-o", "picture.jpg"], "must end in .png"),
        (["reconstruct", "scan.nii.gz", "-o", "picture.png", "--ratio", "1"], "--ratio"),
        (["reconstruct", "scan.nii.gz", "-o", "picture.png", "--modality", "XR"], "--modality"),
        (["embed", "-o", "features.safetensors"], "SCANS"),
        (["embed", "scan.nii.gz", "-o", "features.npz"], "must end in .safetensors"),
        (["export", "vit_t_mae3d", "--to", "onnx", "-o", "model.pt2"], "must end in .onnx"),
        (["export", "vit_t_mae3d", "--to", "torchscript", "-o", "model.pt"], "--to"),
        (["segment"], "segment"),
        (["segment", "scan.nii.gz", "-o", ""], "an argument is empty ('')"),
        (["list", "--hub="], "an argument is empty (--hub=)"),
    ],
)
def test_wrong_usage_exits_with_2(call, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message.lower() in err.lower()
    assert names(tmp_path) == []


def test_a_modality_that_the_weights_do_not_cover(call, model, tmp_path):
    scan = scan_file(tmp_path)
    code, _, err = call("reconstruct", scan, "-o", tmp_path / "picture.png", "-m", model, "--modality", "pet")
    assert code == 1
    assert err.startswith("medmim: error: modality='PET' is not covered by these weights")
    assert names(tmp_path) == ["scan.nii.gz"]


def test_weights_that_are_not_there(call, tmp_path):
    code, _, err = call("reconstruct", scan_file(tmp_path), "-o", tmp_path / "picture.png", "-m", "vit_l_mae3d")
    assert code == 1
    assert err.startswith("medmim: error: vit_l_mae3d has no weights yet")
    assert len(err.splitlines()) == 1


def test_an_interrupt_leaves_nothing_behind(call, model, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruction, "reconstruct", interrupt)
    code, _, err = call("reconstruct", scan_file(tmp_path), "-o", tmp_path / "picture.png", "-m", model)
    assert code == 130
    assert "Traceback" not in err
    assert names(tmp_path) == ["scan.nii.gz"]


@pytest.mark.parametrize("command", ["reconstruct", "embed"])
def test_an_output_that_cannot_be_written_is_one_line(call, model, tmp_path, command):
    scan = scan_file(tmp_path)
    name = {"reconstruct": "picture.png", "embed": "features.safetensors"}[command]
    (tmp_path / name).mkdir()
    for output in (scan / name, tmp_path / name, Path("/proc") / name):
        code, _, err = call(command, scan, "-o", output, "-m", "local-dir:nowhere")  # before the model is loaded
        assert code == 1
        assert re.fullmatch(rf"medmim: error: {output}: cannot be written \(.*\); choose another output\n", err)
    assert names(tmp_path) == sorted([name, scan.name])


# --- demo -------------------------------------------------------------------------------------------------------------

SAMPLES = [scan.name for scan in sample_scans()]


def test_demo_writes_a_picture_of_each_sample_and_the_features_of_all(call, model, tmp_path):
    folder = tmp_path / "demo"
    code, out, err = call("demo", "-o", folder, "-m", model)
    assert (code, err) == (0, "")
    assert names(folder) == sorted([*(f"{name}.png" for name in SAMPLES), "features.safetensors"])
    assert all((folder / f"{name}.png").read_bytes().startswith(PNG) for name in SAMPLES)
    assert all(name in out for name in (*SAMPLES, str(folder / "features.safetensors")))
    with safe_open(folder / "features.safetensors", "np") as file:
        assert {key.partition("/")[0] for key in file.keys()} == set(SAMPLES)  # noqa: SIM118


@pytest.mark.skipif(not medmim.is_model("vit_t_mae3d.open_mix"), reason="the weights are not there yet")
def test_demo_with_the_weights_that_ship(call, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work, threads that wait for each other take several times longer
    try:
        code, out, _ = call("demo", "-o", tmp_path / "demo")
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    for name in SAMPLES:
        errors = [float(error) for error in re.findall(r"\d+\.\d+", re.search(rf"^{name} .*$", out, re.MULTILINE)[0])]
        assert errors[0] == min(errors), f"{name}: model, nearest visible, mean fill: {errors}"
