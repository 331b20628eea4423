"""What to change where a plan does not fit: first what costs time alone, then precision, then size.

Each change is kept and the next is added, until every phase fits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from wanjax.planning.plans import Phase, Plan, Request, meshes
from wanjax.planning.targets import Target

Compile = Callable[[Request, Target, Mapping[str, int], tuple[Phase, ...]], Plan]
SHORTER = (81, 49, 33, 17)
SMALLER = (480, 832)


@dataclass(frozen=True)
class Near:
    """A plan that fits, and the options that lead from the first one to it."""

    options: str
    plan: Plan


def nearest_that_fits(found: Plan, compile_: Compile) -> Near | None:
    """The first of the changes after which all fits; None where none helps."""
    name, said = found.largest, []
    rest = tuple(other for other in found.phases if other != name)
    for option, changed in changes(found.request, name, found.mesh.get("data", 1)):
        said.append(option)
        axes = _mesh_for(changed, found)
        tried = compile_(changed, found.target, axes, (name,))
        if tried.fits and rest:
            others = compile_(changed, found.target, axes, rest)
            tried = replace(tried, phases=tried.phases | others.phases)
        if tried.fits:
            if axes != found.mesh:
                said.append("--mesh " + ",".join(f"{axis}={n}" for axis, n in axes.items()))
            return Near(" ".join(_last_of_each(said)), tried)
    return None


def _mesh_for(request: Request, found: Plan) -> Mapping[str, int]:
    """The mesh of before, or another where its `data` no longer divides the rows."""
    if request.rows % found.mesh.get("data", 1) == 0:
        return found.mesh
    return meshes(request, len(found.target.devices))[0]


def changes(request: Request, phase: str, data: int = 1) -> Iterator[tuple[str, Request]]:
    """Ever smaller requests, each with the option that makes it from the one before; on a mesh of
    so many rows at once."""
    by_phase = {"train": _of_training(request, data), "denoise": _of_sampling(request)}
    for option, request in by_phase.get(phase, ()):  # noqa: B020 the last one goes on below
        yield option, request
    yield from _of_size(request)


def _of_training(request: Request, data: int) -> Iterator[tuple[str, Request]]:
    def having(**values: object) -> tuple[str, Request]:
        nonlocal request
        settings = replace(request.settings, **values)
        request = replace(request, settings=settings, base=settings.base)
        return " ".join(f"--{name} {value}" for name, value in values.items()), request

    settings = request.settings
    if settings.batch > data:
        yield having(batch=data, accumulate=settings.accumulate * settings.batch // data)
    if settings.remat in ("none", "save_attention"):
        yield having(remat="full")
    if settings.train == "lora" and settings.dtype == "float32":
        yield having(dtype="bfloat16")
    if settings.residual == "float32":
        yield having(residual="bfloat16")
    if settings.train == "lora" and settings.base == "bfloat16":
        yield having(base="int8")
    if settings.remat != "offload":
        yield having(remat="offload")
    if settings.train == "lora" and settings.base != "nf4":
        yield having(base="nf4")


def _of_sampling(request: Request) -> Iterator[tuple[str, Request]]:
    def having(name: str, value: object) -> tuple[str, Request]:
        nonlocal request
        request = replace(request, **{name: value})
        return f"--{name} {value}", request

    if request.residency == "stay":
        yield having("residency", "auto")
    if request.guided and request.branches == "together":
        yield having("branches", "in-turn")
    if request.dtype == "float32":
        yield having("dtype", "bfloat16")
    if request.residual == "float32":
        yield having("residual", "bfloat16")
    if request.base == "bfloat16":
        yield having("base", "int8")
    if request.base != "nf4":
        yield having("base", "nf4")


def _of_size(request: Request) -> Iterator[tuple[str, Request]]:
    for frames in SHORTER:
        if frames < request.frames:
            request = replace(request, frames=frames)
            yield f"--frames {frames}", request
    height, width = SMALLER if request.height <= request.width else SMALLER[::-1]
    if request.height * request.width > height * width:
        yield (
            f"--height {height} --width {width}",
            replace(request, height=height, width=width),
        )


def _last_of_each(options: list[str]) -> list[str]:
    """Of an option that was given twice the last."""
    return list({option.split()[0]: option for option in options}.values())
