"""The benchmarks run and say what they should, at sizes that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread
from torch.autograd import DeviceType

from medmim_training.plan import make_plan

FOLDER = Path(__file__).parents[2] / "training" / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_ratios_are_of_the_same_round():
    from common import compare

    result = compare({"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 6.0, 12.0]}, "ours")
    assert result["times_ours"] == {"theirs": {"median": 3.0, "quartiles": [3.0, 3.0]}}
    assert result["seconds"]["ours"]["median"] == 2.0


def test_crops(tmp_path):
    import crops

    crops.main(shape=(40, 36, 32), side=16, rounds=2, out=tmp_path / "crops.json")
    [result] = json.loads((tmp_path / "crops.json").read_text())
    assert {"medmim", "torch.load (PersistentDataset)", "nii.gz"} <= set(result["seconds"])
    assert result["machine"]["torch"]


def test_growth_plans_the_network_that_it_measures():
    import growth
    import step

    network = step.Network(
        side=48, width=64, depth=3, heads=4, ratio=0.5, decoder_width=48, decoder_depth=2, decoder_heads=3
    )
    plan = make_plan(growth.recipe_of(network, "fp32", 2))
    made = step.make_step("medmim", *step.of_medmim(network), network, 2, "fp32")
    assert plan.flops_per_crop * 2 == step._flops(made)


def test_segmenting(tmp_path):
    import segmenting

    segmenting.main(side=48, window=32, classes=3, rounds=1, out=tmp_path / "segmenting.json")
    [result] = json.loads((tmp_path / "segmenting.json").read_text())
    assert set(result["times_medmim"]) == {"MONAI", "MONAI, memory kept"}
    assert all(peak["median"] > 0 for peak in result["peak_megabytes"].values())


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # MONAI's
def test_a_step(tmp_path):
    import step

    network = step.Network(side=32, width=96, depth=2, heads=2, decoder_width=48, decoder_depth=1, decoder_heads=2)
    step.measure(network, batch=2, precision="fp32", rounds=2, out=tmp_path / "step.json")
    [result] = json.loads((tmp_path / "step.json").read_text())
    assert set(result["times_medmim"]) == {"monai", "monai, memory kept", "timm"}
    assert set(result["peak_megabytes"]) == set(result["seconds"])
    assert 0 < result["share_of_matrix_product_rate"] < 1
    assert sum(result["time_goes_to"].values()) == pytest.approx(1, abs=0.01)
    weights = result["million_weights"]
    assert weights["timm"] == weights["medmim"]
    assert weights["monai"] == pytest.approx(weights["medmim"], rel=0.02)  # it has a class token


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_kernel_counts_once_with_its_operator(on_gpu):
    from step import shares

    def event(key, device, cpu, gpu):
        return SimpleNamespace(key=key, device_type=device, self_cpu_time_total=cpu, self_device_time_total=gpu)

    events = [
        event("aten::addmm", DeviceType.CPU, 30, 75),
        event("aten::gelu", DeviceType.CPU, 70, 25),
        event("sm90_gemm_bf16", DeviceType.CUDA, 0, 75),
        event("vectorized_elementwise_kernel", DeviceType.CUDA, 0, 25),
    ]
    expected = {"matrix products": 0.75, "activation": 0.25} if on_gpu else {"activation": 0.7, "matrix products": 0.3}
    assert shares(events, on_gpu=on_gpu) == expected


def test_curves(finished, tmp_path):
    import curves

    curves.main([finished[1]], out=tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png")[..., :3].std() > 0.05
    np.testing.assert_allclose(curves.smooth(np.arange(30.0))[[0, 1, 29]], [0, 0.5, 24.5])


def test_curves_of_a_run_that_was_killed(finished, tmp_path):
    import curves

    (tmp_path / "recipe.yaml").write_bytes((finished[1] / "recipe.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_bytes((finished[1] / "metrics.jsonl").read_bytes()[:-10])
    _, crops, loss = curves.read_run(tmp_path)
    assert crops.tolist() == [4 * step for step in range(1, 20)]
    assert len(loss) == 19


def test_a_benchmark_keeps_the_newest_record_of_each_machine(tmp_path, monkeypatch):
    import common

    path, here = tmp_path / "name.json", common.machine()
    for processor, seconds in (("A", 1), ("B", 2), ("A", 3)):
        monkeypatch.setattr(common, "machine", lambda processor=processor: {**here, "processor": processor})
        common.write_result(path, {"seconds": seconds})
    kept = {record["machine"]["processor"]: record["seconds"] for record in common.read_records(path)}
    assert kept == {"A": 3, "B": 2}


def test_the_page_is_that_of_the_records():
    import page

    assert (page.RESULTS / page.PAGE).read_text(encoding="utf-8") == page.page(page.RESULTS)
