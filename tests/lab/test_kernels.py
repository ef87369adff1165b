"""What every configuration would take on a Hopper GPU: asked of the ops' own rules, with a device that is not here."""

import pytest

from kvlab.compose import compose, configs_dir, expand
from kvlab.hardware import HardwareConfig
from kvlab.lab.kernels import chosen_kernels, summary
from kvlab.lab.laboratory import Laboratory
from kvlab.ledger.states import LatentState, TokenState
from kvlab.models.config import ModelConfig, dtype_for
from pallas_kernels.selection import Device, as_if_on, recording, refusals, select

H200, A100, V5E = Device("gpu", "NVIDIA H200", "9.0"), Device("gpu", "NVIDIA A100", "8.0"), Device("tpu", "TPU v5e")
MIXERS = sorted(path.stem for path in (configs_dir() / "mixer").glob("*.yaml"))
OF_PAGES = {"paged_attention", "kv_write"}


def chosen(device, *overrides):
    return chosen_kernels(Laboratory.of(compose(overrides), abstract=True), device)


@pytest.mark.parametrize(("mixer", "task"), [*((mixer, "mqar") for mixer in MIXERS), ("hybrid", "text")])
def test_defaults_take_the_kernels_of_a_hopper_gpu(mixer, task):
    found = chosen(H200, f"mixer={mixer}", f"task={task}", f"model.dtype={dtype_for('gpu')}")
    of_pages = {op: choice for op, choice in found.items() if op in OF_PAGES}
    assert {choice.taken for choice in of_pages.values()} <= {"mosaic_gpu"}
    assert not any(choice.reason for choice in found.values())
    lab = Laboratory.of(compose([f"mixer={mixer}", f"task={task}"]), abstract=True)
    has_tokens = any(
        isinstance(spec, TokenState | LatentState) for layer in lab.model.states for spec in layer.values()
    )
    assert set(of_pages) == (OF_PAGES if has_tokens else set())


def test_every_chip_is_asked_for_the_kernels_of_its_kind():
    kinds = {name: HardwareConfig.build(name).device.platform for name in ("h100", "b200", "v5e", "v6e", "tpu7x")}
    assert kinds == {"h100": "gpu", "b200": "gpu", "v5e": "tpu", "v6e": "tpu", "tpu7x": "tpu"}


def test_a_kernel_that_is_passed_over_says_why():
    found = chosen(H200, "model.dtype=float32")
    assert found["paged_attention"].taken == "blocked"
    assert found["paged_attention"].reason.startswith("mosaic_gpu: pages of float32: ")
    assert found["kv_write"].reason.startswith("mosaic_gpu: tokens of float32: ")
    assert chosen(A100, "model.dtype=bfloat16")["paged_attention"].reason == (
        "mosaic_gpu: it needs a Hopper or Blackwell GPU, this is NVIDIA A100"
    )
    assert "head dims = (16, 16)" in chosen(V5E, "model.dtype=bfloat16")["paged_attention"].reason
    half = chosen(H200, "model.dtype=bfloat16", "memory.page_size=48")
    assert "page_size = 48" in half["paged_attention"].reason


def test_a_plan_asks_the_hardware_that_it_names():
    assert HardwareConfig("h200x2").device == Device("gpu", "h200", "9.0")
    assert HardwareConfig("v5e").device == Device("tpu", "v5e")
    assert HardwareConfig().device is None  # this machine
    assert not refusals("paged_attention", device=HardwareConfig("b200").device).keys() & {"mosaic_gpu"}


def test_the_dense_baseline_writes_rows_as_pages():
    assert set(chosen(H200, "memory=dense", "model.dtype=bfloat16")) == {"flash_attention", "kv_write"}


def test_on_a_cpu_nothing_is_passed_over():
    found = chosen(None)
    assert found["paged_attention"] == ("blocked", "")
    assert found["kv_write"] == ("reference", "")


def test_a_recording_has_the_reasons_of_those_who_named_nothing():
    runs = {"mosaic_cpu": abs, "blocked": abs}
    with recording() as taken:
        select("op", None, runs, {"mosaic_cpu": "pages of wood"})
        select("op", "mosaic_cpu", runs)
        select("other", "blocked", runs, {"mosaic_cpu": "pages of wood"})
    assert summary(taken) == {
        "op": ("blocked+mosaic_cpu", "mosaic_cpu: pages of wood"),
        "other": ("blocked", ""),  # asked for by name
    }


def test_an_absent_device_is_assumed_only_inside():
    with as_if_on(H200), recording() as taken:
        select("op", None, {"mosaic_gpu": abs, "blocked": abs}, {"mosaic_gpu": "pages of wood"})
        assert "mosaic_gpu" not in refusals("paged_attention")
    assert taken == {"op": {"blocked": {"mosaic_gpu: pages of wood"}}}
    assert refusals("paged_attention")["mosaic_gpu"] == "it needs a Hopper or Blackwell GPU, this is cpu"


def test_the_type_is_looked_up_when_a_config_is_made_and_part_of_its_identity():
    assert (dtype_for("cpu"), dtype_for("gpu"), dtype_for("tpu")) == ("float32", "bfloat16", "bfloat16")
    config = compose([])
    assert config.as_dict()["model"]["dtype"] == "float32"  # this is a CPU
    assert ModelConfig(dtype="auto") == ModelConfig()
    assert compose(["model.dtype=float32"]).run_id == config.run_id != compose(["model.dtype=bfloat16"]).run_id


def test_a_sweep_hands_the_type_over_so_that_no_machine_chooses_another():
    assert "model.dtype=float32" in expand(["seed=0,1"], multirun=True)[1]
    assert expand(["seed=0,1", "model.dtype=bfloat16"], multirun=True)[1] == ["seed=0,1", "model.dtype=bfloat16"]
