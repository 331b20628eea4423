"""Configs and shapes that no model has: one sentence, whatever they say, and nothing allocated."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.configs import to_diffusers
from convert.groups import Group
from convert.inspect import inspect
from convert.mapping import leaf_shapes, native_plan
from convert.sources import open_source
from tests.checkpoints import CONFIGS, DIT, hub_config, random_tensors
from wanjax.errors import UserError
from wanjax.models import NETWORKS
from wanjax.models.check import check_config
from wanjax.models.presets import ARCHITECTURES
from wanjax.weights import parse_config, read_config, read_manifest

ODD = {
    "text": "40",
    "long text": "x" * 9999,
    "minus one": -1,
    "zero": 0,
    "a fraction": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "huge": 10**12,
    "of 4,000 digits": 10**4000,
    "a list": [1],
    "an empty list": [],
    "nested": [[1, 2], {"a": None}],
    "an object": {"a": 1},
    "a long list": [1] * 100_000,
    "true": True,
    "null": None,
}
MAY_BE_NULL = {"image_dim", "image_positions", "projection_dim", "pos_embed_seq_len"}
CONFIG_OF = {**CONFIGS, "dit": replace(DIT, num_layers=1)}


def is_refused(act, field: str, value: object) -> None:
    """Refused in a sentence, unless the value is one that the field may have."""
    try:
        act()
    except UserError as error:
        assert len(str(error)) < 700 and "\n" not in str(error), error
    else:
        fine = value is None and field in MAY_BE_NULL
        whole = value == 1 and not isinstance(value, bool)
        assert fine or whole or isinstance(value, list | float), (field, value)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("network", NETWORKS)
def test_odd_values_in_our_own_configs(network, value):
    kind, good = NETWORKS[network][1], asdict(CONFIG_OF[network])
    for field in good:
        is_refused(lambda f=field: parse_config(kind, good | {f: value}, "here"), field, value)
    for other in (None, [], "x", 3):
        with pytest.raises(UserError, match="no JSON object"):
            parse_config(kind, other, "x")


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("network", NETWORKS)
def test_odd_values_in_the_configs_of_others(network, value, tmp_path):
    config = CONFIG_OF[network]
    good = {"diffusers": to_diffusers(network, config)}
    if network == "dit":
        good["official"] = hub_config(config)
    for layout, data in good.items():
        tensors = random_tensors(network, layout, config)
        group = Group(tmp_path / "model.safetensors", tensors, {})

        def read(changed, group=group):
            (tmp_path / "config.json").write_text(json.dumps(changed))
            source = open_source(group)
            layout, where = source.named.layout, str(group.path)
            native_plan(source.network, source.config, layout, source.named.tensors, where)

        read(data)
        for field in data:
            if field not in ("_class_name", "architectures", "model_type", "torch_dtype"):
                try:
                    read(data | {field: value})
                except UserError as error:
                    assert len(str(error)) < 700 and "\n" not in str(error), error


def test_a_whole_clips_config_must_hold_its_towers(tmp_path):
    data = {"model_type": "clip_vision_model", "vision_config": 3}
    (tmp_path / "config.json").write_text(json.dumps(data))
    tensors = random_tensors("image_encoder", "diffusers")
    with pytest.raises(UserError, match="'vision_config' in .* is no JSON object"):
        open_source(Group(tmp_path / "model.safetensors", tensors, {}))


@pytest.mark.parametrize("preset", ARCHITECTURES)
def test_the_presets_are_in_range(preset):
    for config in ARCHITECTURES[preset].values():
        assert check_config(config, preset) is config


BAD = {
    "heads that do not divide": ("dit", {"num_heads": 3}, "heads of an even size"),
    "heads of an odd size": ("dit", {"dim": 66}, "heads of an even size"),
    "an eps of two": ("dit", {"eps": 2.0}, "a number from 0 to 1"),
    "positions and no picture": (
        "dit",
        {"image_dim": None, "in_channels": 16, "image_positions": 514},
        "image_dim, having image_positions",
    ),
    "too few statistics": ("vae", {"latents_mean": (0.0,) * 4}, "z_dim values"),
    "a deviation of zero": ("vae", {"latents_std": (0.0,) * 16}, "a number from 0"),
    "a stage too many": ("vae", {"dim_mult": (1, 2, 4, 4, 4)}, "one value fewer"),
    "CLIP's patches": ("image_encoder", {"patch_size": 15}, "divides image_size"),
    "umT5's buckets": ("text_encoder", {"max_distance": 8}, "num_buckets"),
    "a million layers": ("dit", {"num_layers": 10**6}, "from 1 to 1,000"),
}


@pytest.mark.parametrize(("network", "changes", "match"), BAD.values(), ids=BAD)
def test_fields_that_do_not_go_together(network, changes, match):
    with pytest.raises(UserError, match=f"here .*{match}"):
        check_config(replace(CONFIGS[network], **changes), "here")


def native_folder(folder, **changes) -> None:
    data = {"format": "wanjax", "version": 1, "networks": {}, "source": {}} | changes
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "changes", [{"image_dim": None}, {"in_channels": 48}, {"in_channels": 48, "out_channels": 48}]
)
def test_a_native_folder_of_another_model_is_not_run(changes, tmp_path):
    """Such as an older wanjax made of a Wan2.2 expert."""
    config = replace(DIT, **changes)
    native_folder(tmp_path, networks={"dit": asdict(config)})
    save_file({}, tmp_path / "dit.safetensors")
    assert read_manifest(tmp_path).networks == {"dit": config}
    with pytest.raises(UserError, match="The dit in .* output channels .* none of Wan2.1's"):
        read_config(tmp_path)
    assert "does not run" in inspect(tmp_path)


def test_a_native_folder_that_is_not_laid_out_as_one(tmp_path):
    for changes, match in (
        ({"networks": [1]}, "'networks' in .* is no JSON object"),
        ({"source": 3}, "'source' in .* is no JSON object"),
        ({"source": {"dit": 3}}, "'dit' in .* is no JSON object"),
    ):
        native_folder(tmp_path, **changes)
        with pytest.raises(UserError, match=match):
            read_manifest(tmp_path)


NOTES = ["{", "[]", "3", '{"dit": 3}', '{"dit": {"dim": 8}}', "[" * 9999]


@pytest.mark.parametrize("note", NOTES)
def test_a_spoilt_note_of_our_own_in_a_file(note, tmp_path):
    tensors = random_tensors("dit", "official", CONFIG_OF["dit"])
    with pytest.raises(UserError):
        open_source(Group(tmp_path / "x.safetensors", tensors, {"wanjax.config": note}))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_shapes_that_no_model_has(network, layout, tmp_path):
    """Each tensor in turn with an axis less, more, of none, or huge."""
    config = CONFIG_OF[network]
    good = {
        name: np.broadcast_to(np.float32(0), tensor.shape)
        for name, tensor in random_tensors(network, layout, config).items()
    }
    for i, (name, tensor) in enumerate(good.items()):
        shape = tensor.shape
        odds = [(), (0,) * len(shape), (*shape, 1), shape[1:], (1 << 40, *shape[1:]), (0,)]
        for odd in (odds[i % 6], odds[(i + 1) % 6]):
            spoilt = good | {name: np.broadcast_to(np.float32(0), odd)}
            try:
                source = open_source(Group(tmp_path / "x.safetensors", spoilt, {}))
                native_plan(network, source.config, layout, source.named.tensors, "x")
            except UserError as error:
                assert len(str(error)) < 700, error
            else:
                assert odd == shape, (name, odd)


@pytest.mark.parametrize("number", ["99999999", "1" * 5000, "1000"])
def test_a_layer_of_a_huge_number_is_not_allocated(number, tmp_path):
    tensors = random_tensors("dit", "official", CONFIG_OF["dit"])
    for name in [n for n in tensors if n.startswith("blocks.0.")]:
        tensors[name.replace("blocks.0.", f"blocks.{number}.")] = tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="blocks.1|blocks.9"):
        source = open_source(Group(tmp_path / "x.safetensors", tensors, {}))
        native_plan("dit", source.config, "official", source.named.tensors, "x")
    vae = random_tensors("vae", "official")
    vae["encoder.downsamples.99999999.residual.2.weight"] = np.zeros((8, 8, 3, 3, 3), np.float32)
    with pytest.raises(UserError, match="99999999"):
        open_source(Group(tmp_path / "vae.safetensors", vae, {}))


def test_leaf_shapes_are_those_of_the_toys():
    """What the tests above start from is sound."""
    for network, config in CONFIG_OF.items():
        assert all(all(shape) for shape in leaf_shapes(network, config).values())
