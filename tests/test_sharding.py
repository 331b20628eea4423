"""Sharded equals unsharded, on virtual devices (run by `tests/meshes.py`); what is refused."""

import json

import jax
import pytest
from jax.sharding import PartitionSpec

from tests.meshes import ALL, ALL_AXES, OTHER_REMAT, TESTED, TOLERANCE, named
from tests.scripts import ROOT, start
from wanjax.errors import UserError
from wanjax.sharding import check_heads, check_rows, make_mesh, spec

pytestmark = pytest.mark.compiles

MOVED = "data=2,ring=1,ulysses=4 to data=2,ring=2,ulysses=2"


@pytest.fixture(scope="module")
def reports(world) -> dict[str, dict]:
    process = start("-m", "tests.meshes", "--world", world, cwd=ROOT)
    out, errors = process.communicate(timeout=1500)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == len(TESTED) + len(OTHER_REMAT) + 3, errors
    return {line["mesh"]: line for line in lines}


def test_every_mesh_is_in_the_table():
    assert len(ALL) == 20 and len(TESTED) == 8


@pytest.mark.parametrize("sizes", TESTED, ids=named)
def test_loss_gradients_and_samples_equal_the_unsharded(sizes, reports):
    report = reports[named(sizes)]
    assert report["loss"] <= TOLERANCE
    assert report["gradient"] <= TOLERANCE
    # Guidance has two rows: with more of `data` there is nothing to sample.
    assert report["sample"] <= TOLERANCE if sizes["data"] <= 2 else "sample" not in report
    assert report["share"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("how", [*OTHER_REMAT, "in turn"])
def test_gradients_equal_the_unsharded_whatever_is_computed_again_or_in_turn(how, reports):
    report = reports[f"{named(ALL_AXES)} {how}"]
    assert report["loss"] <= TOLERANCE and report["gradient"] <= TOLERANCE


def test_a_run_goes_on_on_another_mesh(reports):
    report = reports[MOVED]
    assert report["loss"] <= TOLERANCE and report["parameter"] <= TOLERANCE
    assert report["moved"] > 100 * TOLERANCE  # the steps did change something
    assert report["programs"] == 2  # one for each mesh: no second step compiles again


def test_validation_is_the_same_on_every_mesh(reports):
    assert reports[MOVED]["validation"] <= TOLERANCE


def test_a_video_of_a_pipeline_equals_the_unsharded(reports):
    assert reports["pipeline"]["sample"] <= TOLERANCE and reports["pipeline"]["programs"] == 1


def test_specs_name_only_axes_that_divide():
    assert len(jax.devices()) == 1
    mesh = jax.sharding.AbstractMesh((2, 1, 2), ("data", "ring", "ulysses"))
    assert spec(("embed", "mlp"), (8, 12), mesh) == PartitionSpec(("data", "ulysses"))
    assert spec(("embed", "mlp"), (3, 8, 12), mesh) == PartitionSpec(None, ("data", "ulysses"))
    assert spec(("embed",), (6,), mesh) == PartitionSpec()  # 4 do not divide 6: it stays whole
    assert spec(("batch", "tokens", None), (2, 6, 5), mesh) == PartitionSpec("data", "ulysses")


def test_what_does_not_divide_is_refused_with_the_nearest_that_does():
    with pytest.raises(UserError, match="needs 2 devices and there are 1; choose"):
        make_mesh(ring=2)
    with pytest.raises(UserError, match="ulysses=16 does not .* 40 heads; use ulysses=20"):
        check_heads(40, 16)
    check_heads(40, 8)
    mesh = jax.sharding.AbstractMesh((4, 1, 2), ("data", "ring", "ulysses"))
    with pytest.raises(UserError, match="video has 2 rows .* data=4; use data=2"):
        check_rows(2, mesh, "A guided video")
    check_rows(8, mesh, "A batch")
    check_rows(1, None, "A batch")
