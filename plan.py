"""Does it fit, and how long does a step take? `python plan.py PRESET --job train --target h100:1`.

The true programs are compiled for the target, which need not be here, with the options of train.py,
sample.py or encode.py: memory and bytes on the wire are the compiler's. Without --mesh the meshes
that make sense are tried and the best is planned. It takes seconds to a minute for GPUs and minutes
for TPUs, in an environment of its own: `make plan-env`, then `.venv-plan/bin/python plan.py ...`.
docs/planning.md has a table of the common cases.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

# Nothing here touches a chip.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

from configs import command_line, parse_axes
from configs.plan import PlanJob, defaults, kind_of, request_of
from wanjax.conditioning import check_size
from wanjax.errors import UserError, run_script
from wanjax.outputs import require_writable, whole_file
from wanjax.planning.nearest import nearest_that_fits
from wanjax.planning.plans import PHASES, Plan, Request, meshes, plan
from wanjax.planning.report import as_json, describe, title, verdict, where
from wanjax.planning.targets import Target, parse_target
from wanjax.progress import phase
from wanjax.sharding import check_heads, check_rows, make_mesh
from wanjax.training import check_config


def main() -> None:
    kind = kind_of(sys.argv[1:])
    preset, job = command_line(lambda preset: defaults(kind, preset), __doc__)
    request = request_of(preset, job)
    check_size(request.frames, request.height, request.width)
    for path in (job.json, job.hlo):
        check_place(path)
    target = parse_target(job.target)
    axes = chosen_axes(job, request, target)
    check_mesh(request, target, axes)
    found = planned(job, request, target, axes)
    sys.stdout.write(describe(found))
    if job.json is not None:
        with whole_file(job.json, replace=True) as partial:
            partial.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if found.fits is False:
        sys.stdout.write("\n" + advice(found) + "\n")


def chosen_axes(job: PlanJob, request: Request, target: Target) -> dict[str, int]:
    """The mesh that was asked for, or the best of those that make sense."""
    if job.mesh is not None:
        return parse_axes(job.mesh)
    if request.job == "train":
        check_config(request.settings)
    candidates = meshes(request, len(target.devices))
    if len(candidates) == 1:
        return candidates[0]
    step = ("denoise" if request.job == "sample" else PHASES[request.job][-1],)
    tried = [compiled(request, target, axes, step) for axes in candidates]
    if job.search:
        for found in tried:
            sys.stdout.write(f"{where(found)}: {verdict(found)}\n")
        sys.stdout.write("\n")
    return min(tried, key=lambda found: (found.fits is not True, found.seconds)).mesh


def check_mesh(request: Request, target: Target, axes: dict[str, int]) -> None:
    """Refuse a mesh that the job's own script would refuse."""
    mesh = make_mesh(**axes, devices=target.devices)
    check_heads(request.dit.num_heads, mesh.shape["ulysses"])
    if request.job == "train":
        check_config(request.settings, mesh)
    if request.job == "sample":
        check_rows(request.rows, mesh, "A video")


def check_place(path: Path | None) -> None:
    """Refuse, before anything is compiled, a file that could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    require_writable(path)


def planned(job: PlanJob, request: Request, target: Target, axes: dict[str, int]) -> Plan:
    """The plan of all phases, or of the one that was asked for."""
    phases = PHASES[request.job] if job.phase is None else (job.phase,)
    wanted = job.phase or ("denoise" if request.job == "sample" else phases[-1])

    def keep(name: str, program: jax.stages.Compiled) -> None:
        if job.hlo is not None and name == wanted:
            write_text(job.hlo, program)

    return compiled(request, target, axes, phases, keep)


def write_text(path: Path, program: jax.stages.Compiled) -> None:
    """Write the optimised program."""
    try:
        text = program.as_text()
    except Exception as error:
        raise UserError(
            f"This target gives no text of its programs; leave --hlo {path} out."
        ) from error
    with whole_file(path, replace=True) as partial:
        partial.write_text(text)


def compiled(request: Request, target: Target, axes: dict[str, int], phases, keep=None) -> Plan:
    """`plan`, phase by phase, each with its name and a clock."""
    sizes = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1)
    found = {}
    for name in phases:
        with phase(f"Compiling {name} for {target.name} {sizes}".rstrip()):
            part = plan(request, target, axes, (name,), *([keep] if keep else []))
        found |= part.phases
    return replace(part, phases=found)


def advice(found: Plan) -> str:
    """What to change so that it fits."""
    sys.stderr.write("Looking for the nearest that fits\n")
    near = nearest_that_fits(found, compiled)
    if near is None:
        return "Nothing near it fits; use more or larger devices, fewer frames or a smaller size."
    return (
        f"The nearest that fits: {near.options}\n{title(near.plan.request)}:\n{verdict(near.plan)}"
    )


if __name__ == "__main__":
    run_script(main)
