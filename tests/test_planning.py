"""The planner: what it makes of a compiler's answers, and its plans of nano on this CPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from configs.command_line import command_line
from configs.plan import PlanSample, PlanTrain, defaults, kind_of, request_of
from tests.scripts import ROOT
from wanjax.chips import CHIPS, GIB
from wanjax.errors import UserError
from wanjax.models.presets import ARCHITECTURES
from wanjax.planning import table, traces
from wanjax.planning.nearest import changes, nearest_that_fits
from wanjax.planning.plans import (
    Memory,
    PhasePlan,
    Plan,
    Request,
    Seconds,
    asked_for,
    link_of,
    memory_of,
    meshes,
    plan,
)
from wanjax.planning.report import _digits, as_json, describe, verdict
from wanjax.planning.targets import Target
from wanjax.sharding import one_device
from wanjax.training import TrainConfig
from wanjax.weights import random_network

NANO = ARCHITECTURES["nano"]
SMALL = {"frames": 9, "height": 32, "width": 48}
SETTINGS = TrainConfig(rank=2, dtype="float32")
CPU = Target("cpu", None, tuple(jax.devices()[:1]))


def analysis(argument=10, temp=5, output=2, alias=1, **others):
    sizes = {"argument": argument, "temp": temp, "output": output, "alias": alias}
    return SimpleNamespace(**{f"{k}_size_in_bytes": v for k, v in sizes.items()}, **others)


def test_the_compilers_peak_counts_where_it_gives_one():
    assert memory_of(analysis(peak_memory_in_bytes=14), 3, 20) == Memory(10, 5, 14, 3, 20)
    assert memory_of(analysis(), 0, 20).total == 10 + 5 + 2 - 1
    assert memory_of(analysis(peak_memory_in_bytes=0), 0, 20).total == 16
    offloaded = analysis(peak_memory_in_bytes=21, host_temp_size_in_bytes=6)
    assert memory_of(offloaded, 0, 20) == Memory(10, 5, 16, 0, 20, host=6)


@pytest.mark.parametrize(
    "given",
    [
        None,
        analysis(0, 0, 0, 0),
        analysis(-1, -1, -1, -1),
        analysis(temp=None),
        analysis(temp=0),
        analysis(0, 5, 2, 1),
    ],
)
def test_what_a_platform_does_not_tell_is_unknown_and_never_fits(given):
    memory = memory_of(given, 3, 1 << 40)
    assert memory is None
    found = Plan(None, CPU, {}, {"train": PhasePlan(memory, 1.0, None, Seconds(1, None, 1))})
    assert found.fits is None
    assert "Unknown" in verdict(found)
    told = as_json(found)
    assert told["fits"] is None and told["memory_per_device"]["total"] is None
    assert told["seconds_per_step"] is None


@pytest.mark.parametrize(
    "said, size",
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
         "required for HLO temporaries (240.00G) exceeds available HBM (15.75G).", 240 * GIB),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 17.50G of 15.75G hbm.", int(17.5 * GIB)),
        ("INVALID_ARGUMENT: no (12.0G) at all", None),
    ],
)  # fmt: skip
def test_how_much_a_compiler_asked_for(said, size):
    assert asked_for(said) == size


def phases(**sizes: int) -> dict[str, PhasePlan]:
    seconds = Seconds(1.0, 0.5, 0.1)
    return {
        name: PhasePlan(Memory(1, 1, size, 0, 100), 1.0, {"all_gather": 4}, seconds)
        for name, size in sizes.items()
    }


def test_the_largest_phase_decides():
    found = Plan(Request("sample", NANO, **SMALL), CPU, {}, phases(denoise=90, decode=120))
    assert found.fits is False and found.largest == "decode"
    assert "decode" in verdict(found) and "Does not fit" in verdict(found)
    told = as_json(found)
    assert told["memory_per_device"]["total"] == 120
    assert told["flops_per_step"] == 1.0 and told["seconds_per_step"] == 1.0


def test_a_compiler_that_gave_up_is_a_plan_that_does_not_fit():
    gave_up = PhasePlan(None, 1.0, None, Seconds(None, None, None), too_large=7 * GIB)
    found = Plan(Request("sample", NANO, **SMALL), CPU, {}, {"denoise": gave_up})
    assert found.fits is False and "7.00 GiB" in verdict(found)
    assert as_json(found)["memory_per_device"]["total"] == 7 * GIB
    assert "over 7.00" in describe(found)


@pytest.mark.parametrize("devices", [1, 3, 8, 64])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_meshes_use_all_devices_and_divide_rows_and_heads(devices, batch):
    model = {**NANO, "dit": replace(NANO["dit"], num_heads=40)}
    request = Request("train", model, **SMALL, settings=replace(SETTINGS, batch=batch))
    found = meshes(request, devices)
    assert found
    for axes in found:
        assert np.prod(list(axes.values())) == devices
        assert batch % axes["data"] == 0 and 40 % axes["ulysses"] == 0
    least = min(axes["ring"] for axes in found)
    assert found[0]["ring"] == least


@pytest.mark.compiles
def test_what_is_given_is_counted_whether_the_program_looks_at_it_or_not(quickly):
    """Arguments and idle weights together are the bytes of the arrays that are really there."""
    mesh = one_device()
    program = traces.denoise(NANO["dit"], (3, 4, 6), mesh, dtype="float32")
    compiled = program.traced.lower().compile()
    dit = random_network("dit", NANO["dit"], dtype="float32")
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(dit)))
    rest = sum(traces.bytes_of(x) for x in jax.tree.leaves(program.given[1:]))
    found = compiled.memory_analysis().argument_size_in_bytes + program.idle()
    assert program.idle() > 0
    assert found == pytest.approx(weights + rest, rel=1e-3)


@pytest.mark.compiles
def test_nano_is_planned_here_from_end_to_end(quickly):
    request = Request("sample", NANO, **SMALL, dtype="float32")
    found = plan(request, CPU, {"data": 1})
    assert list(found.phases) == ["text", "encode", "denoise", "decode"]
    assert all(p.memory.total > 0 and p.flops > 0 for p in found.phases.values())
    assert found.fits is None  # nobody knows what this CPU may use
    assert found.phases["denoise"].collective_bytes["all_gather"] == 0
    told = json.loads(json.dumps(as_json(found)))
    assert set(told) == {
        "target", "devices", "mesh", "phases", "memory_per_device", "fits", "flops_per_step",
        "collective_bytes", "seconds_per_step",
    }  # fmt: skip
    text = describe(found)
    assert "Sampling 9 frames of 32x48" in text and "**Unknown**" in text


@pytest.mark.compiles
def test_more_windows_are_more_work(quickly):
    of = lambda batch: plan(  # noqa: E731
        Request("train", NANO, **SMALL, settings=replace(SETTINGS, batch=batch)), CPU, {"data": 1}
    ).phases["train"]
    one, two = of(1), of(2)
    assert two.flops == 2 * one.flops
    assert two.memory.total > one.memory.total


def test_the_nearest_that_fits_is_the_first_change_that_does():
    request = Request("train", NANO, 81, 720, 1280, settings=SETTINGS)
    start = Plan(request, CPU, {"data": 1}, phases(train=120))

    def compiles(asked, target, axes, names):
        assert names == ("train",)
        fits = asked.base == "int8"
        return Plan(asked, target, dict(axes), phases(train=99 if fits else 101))

    near = nearest_that_fits(start, compiles)
    assert near.plan.fits and near.plan.request.settings.base == "int8"
    assert near.options.endswith("--base int8")
    never = lambda asked, target, axes, names: start  # noqa: E731
    assert nearest_that_fits(start, never) is None


def test_changes_end_with_few_frames_of_a_small_size():
    for phase, job in (("train", "train"), ("denoise", "sample"), ("decode", "sample")):
        request = Request(job, NANO, 81, 720, 1280, settings=SETTINGS)
        *_, (_, last) = changes(request, phase)
        assert (last.frames, last.height, last.width) == (17, 480, 832)
        assert (last.base == "nf4") == (phase != "decode")


def asked(*words: str):
    kind = kind_of(words)
    return command_line(lambda preset: defaults(kind, preset), "", words)


def test_a_command_line_of_train_is_one_of_plan():
    words = ("i2v_14b_480p", "--job", "train", "--target", "h100:1", "--features", "nowhere")
    _, job = asked(*words, "--run", "runs/x", "--batch", "2", "--rank", "64")
    assert isinstance(job, PlanTrain) and job.settings.rank == 64
    request = request_of("i2v_14b_480p", replace(job, features=None))
    assert (request.frames, request.height, request.width) == (33, 480, 832)
    assert request.rows == 2
    preset, job = asked("i2v_14b_720p", "--job=sample", "--target", "h100:1", "--guidance", "1")
    assert isinstance(job, PlanSample)
    request = request_of(preset, job)
    assert (request.frames, request.grid) == (81, (21, 90, 160)) and request.rows == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (("i2v_14b_720p", "--target", "h100:1"), "--job train"),
        (("i2v_14b_720p", "--target", "h100:1", "--job", "trian"), "did you mean 'train'"),
        (("i2v_14b_720p", "--job", "train"), "--target is missing"),
        (("i2v_14b_720p", "--job", "train", "--target", "x", "--stpes", "3"), "--steps"),
    ],
)
def test_what_cannot_be_planned_is_said(words, said):
    with pytest.raises(UserError, match=said):
        asked(*words)


def test_a_phase_of_another_job_is_refused():
    preset, job = asked("nano", "--job", "train", "--target", "h100:1", "--phase", "decode")
    with pytest.raises(UserError, match="no phase 'decode'"):
        request_of(preset, job)


def test_the_table_stands_on_the_page():
    rows = table.rows()
    assert len({row.key for row in rows}) == len(rows) > 20
    assert table.as_table(rows) in (ROOT / "docs" / "planning.md").read_text()
    for row in rows:
        chip = CHIPS[row.target.partition(":")[0]]
        held = row.peak + (row.idle or 0)
        assert row.fits == (row.idle is not None and held <= row.capacity), row.key
        assert row.capacity == chip.capacity


def test_a_batch_becomes_turns_before_anything_is_lost():
    settings = replace(SETTINGS, batch=8, accumulate=2)
    request = Request("train", NANO, **SMALL, settings=settings)
    option, first = next(iter(changes(request, "train", 2)))
    assert option == "--batch 2 --accumulate 8"
    assert first.settings.batch * first.settings.accumulate == 16 and first.rows == 2


def test_a_portrait_stays_one():
    request = Request("sample", NANO, 17, 1280, 720)
    *_, (option, last) = changes(request, "decode")
    assert option == "--height 832 --width 480" and last.height > last.width


def test_all_phases_of_the_nearest_fit_on_a_mesh_that_takes_its_rows():
    request = Request("sample", NANO, 17, 64, 64)
    target = Target("some", None, tuple(jax.devices()[:1]) * 2)
    start = Plan(request, target, {"data": 2, "ring": 1, "ulysses": 1}, phases(denoise=120))
    start = replace(start, phases=start.phases | phases(decode=110))

    def compiles(asked, target, axes, names):
        assert asked.rows % axes["data"] == 0
        sizes = {"denoise": 50, "decode": 50 if asked.base == "nf4" else 105}
        return Plan(asked, target, dict(axes), phases(**{name: sizes[name] for name in names}))

    near = nearest_that_fits(start, compiles)
    assert near.plan.fits and near.plan.request.base == "nf4"
    assert "--branches in-turn" in near.options and "--mesh data=1" in near.options


@pytest.mark.compiles
def test_muon_is_planned_too(quickly):
    settings = replace(SETTINGS, train="full", optimizer="muon", remat="none")
    found = plan(Request("train", NANO, **SMALL, settings=settings), CPU, {"data": 1})
    assert found.phases["train"].memory.total > 0


def test_gpus_of_several_hosts_send_at_the_speed_between_them():
    assert link_of(CHIPS["h100"], 8) == 450e9 > link_of(CHIPS["h100"], 16)
    assert link_of(CHIPS["v6e"], 256) == CHIPS["v6e"].link


@pytest.mark.parametrize("value, said", [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (52.43, "52.4"), (1234.5, "1,234")])  # fmt: skip # noqa: E501
def test_three_digits(value, said):
    assert _digits(value) == said
