"""What to change where a plan does not fit: first what costs time alone, then precision, then size.

Each change is kept and the next is added, until the phase that was too large fits.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from wanjax.planning.plans import Phase, Plan, Request
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
    """The first of the changes after which the largest phase fits; None where none helps."""
    name, said = found.largest, []
    for option, request in changes(found.request, name):
        said.append(option)
        tried = compile_(request, found.target, found.mesh, (name,))
        if tried.fits:
            return Near(" ".join(_last_of_each(said)), tried)
    return None


def changes(request: Request, phase: str) -> Iterator[tuple[str, Request]]:
    """Ever smaller requests, each with the option that makes it from the one before."""
    if phase == "train":
        yield from _of_training(request)
        *_, (_, request) = [("", request), *_of_training(request)]
    elif phase == "denoise":
        yield from _of_sampling(request)
        *_, (_, request) = [("", request), *_of_sampling(request)]
    yield from _of_size(request)


def _of_training(request: Request) -> Iterator[tuple[str, Request]]:
    def having(name: str, value: object) -> tuple[str, Request]:
        nonlocal request
        settings = replace(request.settings, **{name: value})
        request = replace(request, settings=settings, base=settings.base)
        return f"--{name} {value}", request

    settings = request.settings
    if settings.remat in ("none", "save_attention"):
        yield having("remat", "full")
    if settings.residual == "float32":
        yield having("residual", "bfloat16")
    if settings.train == "lora" and settings.base == "bfloat16":
        yield having("base", "int8")
    if settings.remat != "offload":
        yield having("remat", "offload")
    if settings.train == "lora" and settings.base != "nf4":
        yield having("base", "nf4")


def _of_sampling(request: Request) -> Iterator[tuple[str, Request]]:
    def having(name: str, value: object) -> tuple[str, Request]:
        nonlocal request
        request = replace(request, **{name: value})
        return f"--{name} {value}", request

    if request.guided and request.branches == "together":
        yield having("branches", "in-turn")
    if request.residual == "float32":
        yield having("residual", "bfloat16")
    for base in ("int8", "nf4"):
        if request.base not in (base, "nf4"):
            yield having("base", base)


def _of_size(request: Request) -> Iterator[tuple[str, Request]]:
    for frames in SHORTER:
        if frames < request.frames:
            request = replace(request, frames=frames)
            yield f"--frames {frames}", request
    height, width = SMALLER
    if request.height * request.width > height * width:
        yield (
            f"--height {height} --width {width}",
            replace(request, height=height, width=width),
        )


def _last_of_each(options: list[str]) -> list[str]:
    """Of an option that was given twice the last."""
    return list({option.split()[0]: option for option in options}.values())
