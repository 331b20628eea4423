"""`python -m convert inspect`: what a file or folder is, and what of it would not map."""

import dataclasses
import io
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from convert.groups import Group, find_groups, read_group, read_json
from convert.mapping import leaf_shapes, native_plan
from convert.networks import TABLES, layers, recognise
from convert.sources import Source, kind_of, open_source
from convert.table import expand
from wanjax.errors import UserError
from wanjax.models import Config
from wanjax.models.check import check_runs
from wanjax.models.dit import DiTConfig
from wanjax.tensor_files import read_safetensors
from wanjax.weights import read_manifest

_LISTED = 8  # names shown of many
_KINDS = {"official": "an official checkpoint folder", "diffusers": "a diffusers folder"}
_DOWN = re.compile(r"^(.+?)\.(lora_A|lora_down)(\.default)?\.weight$")
_OTHER_ADAPTERS = {"hada_w1_a": "LoHa", "lokr_w": "LoKr", "dora_scale": "DoRA"}
Lines = list[tuple[str, str]]


def inspect(path: Path) -> str:
    """A report for reading. Raises `UserError` where there is nothing that can be read."""
    if not path.exists():
        raise UserError(f"There is no file or folder '{path}'; check its name.")
    if (path / "run.json").is_file():
        return _render(f"{path}: a run of train.py", [("", _run(path))])
    kind = kind_of(path)
    if kind == "native":
        return _render(f"{path}: a native wanjax checkpoint", _native(path))
    places = find_groups(path)
    if not places:
        raise UserError(f"{path} holds no safetensors or .pth file; give a file or another folder.")
    if not path.is_dir():
        return _render(f"{path}: a file of weights", [("", _group(read_group(path)))])
    blocks = [(str(place.relative_to(path)), _place(place)) for place in places]
    return _render(f"{path}: {_KINDS.get(kind, 'a folder of weights')}", blocks)


def _place(place: Path) -> Lines:
    """One network's block; a file that cannot be read spoils only its own."""
    try:
        return _group(read_group(place))
    except UserError as error:
        return [("cannot be read", str(error))]


def _render(title: str, blocks: Iterable[tuple[str, Lines]]) -> str:
    """A table of facts for each block, below a title."""
    width = max(shutil.get_terminal_size().columns, 100)
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    for name, lines in blocks:
        table = Table(title=name or None, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in lines:
            table.add_row(label, text)
        console.print(table, markup=False)
    return console.file.getvalue().rstrip()


def _group(group: Group) -> Lines:
    if str(group.metadata.get("format")).startswith("wanjax-lora"):
        return _native_adapter(group)
    if family := _adapter_family(group.tensors):
        return _adapter(group, family)
    known = recognise(group.tensors)
    if known is None:
        first = ", ".join(list(group.tensors)[:_LISTED])
        return [("kind", "unknown: no network of Wan2.1"), *_size(group), ("first names", first)]
    lines = [("kind", f"{known[0]}, {known[1]} names"), *_size(group)]
    try:
        source = open_source(group)
        return [*lines, *_config(source.config), *_dropped(source), *_amiss(source)]
    except UserError as error:
        return [*lines, ("does not map", str(error))]


def _size(group: Group) -> Lines:
    tensors = group.tensors.values()
    types = Counter(str(t.dtype) for t in tensors)
    parameters = sum(math.prod(t.shape) for t in tensors)
    size = decimal(sum(t.nbytes for t in tensors))
    return [
        ("tensors", f"{len(group.tensors):,} of {parameters:,} parameters, {size}"),
        ("types", ", ".join(f"{name} ({count:,})" for name, count in types.most_common())),
    ]


def _config(config: Config) -> Lines:
    kind = [("model", config.kind)] if isinstance(config, DiTConfig) else []
    fields = {k: v for k, v in dataclasses.asdict(config).items() if not k.startswith("latents_")}
    return [*kind, ("config", ", ".join(f"{name}={value}" for name, value in fields.items()))]


def _dropped(source: Source) -> Lines:
    return [("would drop", _some(source.named.dropped))] if source.named.dropped else []


def _amiss(source: Source) -> Lines:
    """Missing and stray names, all of them; else whatever else the conversion would refuse."""
    named, config = source.named, source.config
    rows = TABLES[named.network].rows(config)
    expected = {entry.theirs for entry in expand(rows, named.layout, layers(config))}
    present = set(named.tensors)
    lines = [
        (label, _some(sorted(names)))
        for label, names in (("missing", expected - present), ("stray", present - expected))
        if names
    ]
    if lines:
        return lines
    try:
        native_plan(named.network, config, named.layout, named.tensors, str(source.path))
        return [("maps", "wholly, to the native layout")]
    except UserError as error:
        return [("does not map", str(error))]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _native(path: Path) -> list[tuple[str, Lines]]:
    blocks = []
    for network, config in read_manifest(path).networks.items():
        file = read_safetensors(path / f"{network}.safetensors")
        shapes = leaf_shapes(network, config)
        odd = {n for n in shapes.keys() | file.tensors if n not in file.tensors or n not in shapes}
        odd |= {n for n in shapes.keys() - odd if shapes[n] != file.tensors[n].shape}
        amiss = [("does not fit the config", _some(sorted(odd)))] if odd else []
        try:
            check_runs(config, f"The {network}")
        except UserError as error:
            amiss.append(("does not run", str(error)))
        lines = [*_size(Group(file.path, file.tensors, {})), *_config(config), *amiss]
        blocks.append((network, lines))
    tokenizer = "there" if (path / "tokenizer/tokenizer.json").is_file() else "missing"
    return [*blocks, ("", [("tokenizer", tokenizer)])]


def _run(path: Path) -> Lines:
    settings = read_json(path / "run.json")
    steps = [p.name for p in (path / "checkpoints").glob("*") if p.name.isdigit()]
    text = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "format")
    return [("settings", text), ("checkpoints", ", ".join(sorted(steps, key=int)) or "none")]


def _native_adapter(group: Group) -> Lines:
    downs = {n: t for n, t in group.tensors.items() if n.endswith(".down")}
    ranks = Counter(t.shape[-1] for t in downs.values() if t.ndim)
    return [
        ("kind", "native adapter"),
        *_size(group),
        ("rank", _counts(ranks)),
        ("roles", _some(sorted(n.removesuffix(".down") for n in downs))),
        *_not_finite(group),
        *_metadata(group.metadata),
    ]


def _adapter_family(names: Iterable[str]) -> str | None:
    """Which of the five families of LoRA files these names are of."""
    down = [name for name in names if _DOWN.match(name)]
    others = [n for n in names if any(key in n for key in _OTHER_ADAPTERS)]
    if not down and not others:
        return None
    text = "\n".join(down or others)
    if "lora_unet__" in text:
        return "VideoX-Fun (lora_unet__, underscores)"
    if "lora_unet_" in text:
        return "kohya and musubi-tuner (lora_unet_, underscores)"
    if ".attn1." in text or ".attn2." in text:
        return "diffusers and PEFT (transformer., attn1.to_q)"
    if "diffusion_model." in text:
        kohya = ".lora_down." in text
        return f"ComfyUI, original names ({'lora_down' if kohya else 'lora_A'})"
    return "DiffSynth, bare original names"


def _adapter(group: Group, family: str) -> Lines:
    downs = {m[1]: t for n, t in group.tensors.items() if (m := _DOWN.match(n))}
    ranks = Counter(t.shape[0] for t in downs.values() if t.ndim)
    alphas = Counter(
        float(np.asarray(t, np.float32).reshape(-1)[0])
        for n, t in group.tensors.items()
        if n.endswith(".alpha") and t.size
    )
    number = re.compile(r"(?<=blocks[._])\d+(?=[._])")
    roles = sorted({number.sub("N", module) for module in downs})
    used = ("alpha", "lora_A", "lora_B", "lora_up", "lora_down")
    extra = [n for n in group.tensors if not any(part in n for part in used)]
    types = {label for key, label in _OTHER_ADAPTERS.items() if any(key in n for n in extra)}
    lines = [
        ("kind", f"LoRA adapter: {family}"),
        *_size(group),
        ("modules", f"{len(downs):,}"),
        ("rank", _counts(ranks)),
        ("alpha", _counts(alphas) or "none: as the rank"),
        ("roles", _some(roles)),
    ]
    if types:
        lines.append(("does not map", f"{' and '.join(sorted(types))} adapters are not supported"))
    if extra:
        lines.append(("beside them", _some(extra)))
    return [*lines, *_not_finite(group), *_metadata(group.metadata)]


def _not_finite(group: Group) -> Lines:
    """The tensors of an adapter whose run diverged."""
    bad = [n for n, t in group.tensors.items() if not np.isfinite(np.asarray(t, np.float32)).all()]
    return [("does not load", f"NaN or infinity in {_some(bad)}")] if bad else []


def _counts(values: Mapping[object, int]) -> str:
    return ", ".join(f"{value} (in {count:,})" for value, count in sorted(values.items()))


def _metadata(metadata: Mapping[str, str]) -> Lines:
    text = {k: v if len(v) < 80 else v[:77] + "..." for k, v in metadata.items()}
    return [("metadata", json.dumps(text))] if text else []
