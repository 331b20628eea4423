"""The command line over the presets: `SCRIPT PRESET --option value ...`."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar, get_args

import tyro
from jax.sharding import Mesh

from configs.presets import PRESETS, Preset
from wanjax.errors import UserError, nearest
from wanjax.sharding import make_mesh

Job = TypeVar("Job")
Fixed = tuple[str, Mapping[str, Any]]
_INVALID = re.compile(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?)\)")


def command_line(
    job_of: Callable[[Preset], Job],
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    fixed: Callable[[Job], Fixed] = lambda job: ("", {}),
) -> tuple[str, Job]:
    """The chosen preset's name and the job, with the options of the command line put in.

    `fixed` says what of a job some option sets for others: that option, and the values by field,
    which an option of the command line may not contradict. Raises `UserError`, a sentence with the
    nearest name, for what cannot be understood.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        choices = {name: (preset.summary, job_of(preset)) for name, preset in PRESETS.items()}
        tyro.extras.overridable_config_cli(choices, description=description, args=arguments)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"Give the preset first, before all options{nearest('', PRESETS)}")
    name, *options = arguments
    if name not in PRESETS:
        raise UserError(f"There is no preset '{name}'{nearest(name, PRESETS)}")
    return name, parse_job(job_of(PRESETS[name]), options, description, fixed=fixed)


def parse_job(
    job: Job,
    options: Sequence[str],
    description: str,
    *,
    fixed: Callable[[Job], Fixed] = lambda job: ("", {}),
) -> Job:
    """The job with the options of a command line put in, for a script that has no presets.

    Raises `UserError`, a sentence with the nearest name, for what cannot be understood.
    """
    known = dict(_options(job))
    stray, given = _grouped(options, known, _texts(job), _switches(job))
    if {"-h", "--help"} & set(options):
        return _parse(job, options, description)
    _check_names(given, known)
    words = [word for option, values in given.items() for word in _words(option, values)]
    job = _parse(job, [*stray, *words], description)
    for option, reason in job.unread().items():
        if option in given:
            raise UserError(f"{option} says nothing with {reason}; leave one of them out.")
    return _fix(job, given, *fixed(job))


def _fix(job: Job, given: Mapping[str, Any], reason: str, values: Mapping[str, Any]) -> Job:
    """The job with what another option sets, unless the command line says otherwise."""
    said = dict(_options(job))
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if option in given and said[option] != value:
            raise contradiction(f"{option} {' '.join(given[option])}", reason, value)
    return _with(job, values)


def contradiction(said: str, reason: str, value: Any) -> UserError:
    """That `said` is not the value that the option `reason` sets; None has nothing to show."""
    does = "sets that itself" if value is None else f"makes it {value}"
    return UserError(f"{said} contradicts {reason}, which {does}; leave one of them out.")


def _with(job: Any, values: Mapping[str, Any]) -> Any:
    """The job with these values, of its own fields or of those of a dataclass in a field."""
    found = {}
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = _with(value, values)
        elif field.name in values:
            found[field.name] = values[field.name]
    return dataclasses.replace(job, **found)


def _options(job: Any) -> Iterator[tuple[str, Any]]:
    """Every option with its default; those of a dataclass in a field stand beside the others."""
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value)
        else:
            yield "--" + field.name.replace("_", "-"), value


def _texts(job: Any) -> set[str]:
    """The options that take any text."""
    return {
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(job)
        if field.type in (str, str | None)
    }


def _switches(job: Any) -> set[str]:
    """The options that take True and False, whatever else they may take."""
    found = set()
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if dataclasses.is_dataclass(value):
            found |= _switches(value)
        elif bool in (field.type, *get_args(field.type)):
            found.add("--" + field.name.replace("_", "-"))
    return found


def _grouped(
    words: Sequence[str],
    known: Mapping[str, Any],
    texts: AbstractSet[str],
    switches: AbstractSet[str],
) -> tuple[list[str], dict[str, list[str]]]:
    """The words before all options, and those of each option.

    `--prompt "-a dash"` is a text and no option. A switch may stand alone, or as `--no-SWITCH`. An
    option that takes a list may be given again, which adds to it; any other is refused.
    """
    stray: list[str] = []
    given: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}  # as it was given: a switch may be --no-SWITCH
    values = stray
    last = ""
    for word in words:
        option, equals, value = word.partition("=")
        option = spelling = option.replace("_", "-")
        is_text = last in texts and not values and option not in known
        if is_text or not word.startswith("--"):
            values.append(word)
            continue
        if not (equals or option in known) and _switched_on(option) in switches:
            option, equals, value = _switched_on(option), "=", "False"
        if option in given and not isinstance(known.get(option), tuple):
            raise UserError(_given_again(spelled[option], spelling))
        spelled[option] = spelling
        last, values = option, given.setdefault(option, [])
        values += [value] if equals else []
    for option, values in given.items():
        if option in switches and not values:
            values.append("True")
    return stray, given


def _given_again(first: str, second: str) -> str:
    what = f"{first} is given twice" if first == second else f"{first} and {second} are both given"
    return f"{what}; leave one of them out."


def _switched_on(option: str) -> str:
    """`--remat` for `--no-remat`."""
    return "--" + option.removeprefix("--no-") if option.startswith("--no-") else option


def _words(option: str, values: Sequence[str]) -> list[str]:
    return [f"{option}={values[0]}"] if len(values) == 1 else [option, *values]


def _check_names(given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    for option in given:
        if option not in options:
            raise UserError(f"There is no option '{option}'{nearest(option, options)}")
    for option, default in options.items():
        if default is tyro.MISSING and option not in given:
            raise UserError(f"The option {option} is missing, and has no default; see --help.")


def _parse(job: Job, options: Sequence[str], description: str) -> Job:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(job),
                default=job,
                description=description,
                args=options,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(_sentence(said.getvalue())) from None


def _sentence(box: str) -> str:
    """What stands in the first part of the box that tyro draws around an error."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    ends = [i for i, line in enumerate(lines) if "──" in line]
    text = " ".join(lines[: ends[0] if ends else None])
    if found := _INVALID.search(text):
        value, option, choices = found.groups()
        names = re.findall("'(.*?)'", choices)
        return f"'{value}' is no {option}{nearest(value, names)}"
    return f"{text[:1].upper()}{text[1:].rstrip('.')}; see --help."


def parse_mesh(text: str | None) -> Mesh | None:
    """`data=2,ring=1,ulysses=4` as a mesh; None stays None."""
    return None if text is None else make_mesh(**parse_axes(text))


def parse_axes(text: str) -> dict[str, int]:
    """`data=2,ulysses=4` as sizes by their axes."""
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "ring", "ulysses"):
            hint = nearest(name, ("data", "ring", "ulysses"))
            raise UserError(f"--mesh has an unknown axis '{name}'{hint}")
        if not (size.isascii() and size.isdecimal()):
            raise UserError(f"--mesh {text}: '{part}' is not AXIS=NUMBER; e.g. data=2,ulysses=4.")
        axes[name] = int(size)
    return axes
