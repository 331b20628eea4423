"""The small files of official and diffusers folders, and weights in shards with an index."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from convert.stream import Advance, Planned, write_safetensors
from wanjax.models.dit import DiTConfig
from wanjax.outputs import require_space, whole_folder
from wanjax.progress import progress_bar

SHARD_BYTES = 10_000_000_000
TORCH = {"format": "pt"}  # without it transformers refuses a safetensors file


@contextmanager
def new_folder(
    label: str, out: Path, plans: Mapping[str, Sequence[Planned]]
) -> Iterator[tuple[Path, Advance]]:
    """A folder to fill, which becomes `out` when whole, and a bar over the bytes of all plans."""
    total = sum(tensor.nbytes for planned in plans.values() for tensor in planned)
    require_space(out, total)
    with whole_folder(out) as folder, progress_bar(label, total, unit="bytes") as bar:
        yield folder, bar.advance


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write_shards(folder: Path, stem: str, planned: Sequence[Planned], advance: Advance) -> None:
    """One file, or shards of at most `SHARD_BYTES` and the index that names them."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", planned, TORCH, advance)
        return
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_safetensors(folder / name, shard, TORCH, advance)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in planned)},
        "weight_map": {t.name: name for name, shard in zip(names, shards) for t in shard},
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_pipeline_files(
    folder: Path, dit: DiTConfig, networks: Collection[str], size: int
) -> None:
    """`model_index.json`, the scheduler and CLIP's preprocessing (`size` pixels a side)."""
    index = {
        "_class_name": "WanImageToVideoPipeline" if dit.image_dim else "WanPipeline",
        "_diffusers_version": "0.33.0",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", _tokenizer_class(folder / "tokenizer/tokenizer_config.json")],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if "image_encoder" in networks:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "image_processor").mkdir()
        write_json(folder / "image_processor/preprocessor_config.json", _preprocessor(size))
    write_json(folder / "model_index.json", index)
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.33.0",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 16.0 if dit.image_positions else 3.0,  # as on the hub
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
        "timestep_spacing": "linspace",
    }
    write_json(folder / "scheduler/scheduler_config.json", scheduler)


def _tokenizer_class(config: Path) -> str:
    """The class that the tokenizer asks for, in its form that needs no sentencepiece."""
    data = json.loads(config.read_text()) if config.is_file() else {}
    return data.get("tokenizer_class", "T5Tokenizer").removesuffix("Fast") + "Fast"


def _preprocessor(size: int) -> dict[str, object]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
