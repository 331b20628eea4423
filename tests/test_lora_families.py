"""Adapter files of every family, as their trainers write them: read, written, and read again."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert.loaders import takers
from convert.lora import convert_lora, open_lora
from convert.lora_names import modules, parse
from tests.adapters import (
    FAMILIES,
    LAYERS,
    assert_same_change,
    in_family,
    merged,
    merged_by_us,
    random_pairs,
    save,
)
from tests.checkpoints import random_tensors
from tests.toy import SMALL
from wanjax.errors import UserError
from wanjax.tensor_files import SafetensorsWriter, read_safetensors

ALPHAS = {
    "none": None,
    "as fp16 of shape [1]": lambda n: np.asarray([2], np.float16),
    "of every layer its own": lambda n: np.float32(1 + n % 5),
    "in half of the layers": lambda n: np.float32(7.5) if n % 2 else None,
    "a whole number": lambda n: np.asarray(16),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_family_is_read_as_what_it_adds(family, alpha, tmp_path):
    """With ranks that differ from layer to layer."""
    pairs = random_pairs(SMALL, ranks=(2, 4, 8))
    save(tmp_path / "a.safetensors", in_family(family, pairs, ALPHAS[alpha]))
    got = merged_by_us(open_lora(tmp_path / "a.safetensors"))
    assert_same_change(got, merged(pairs, ALPHAS[alpha]))


@pytest.mark.parametrize("format", ["comfyui", "diffusers", "kohya", "musubi", "native"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_is_written_adds_the_same_when_it_is_read_again(format, alpha, tmp_path):
    pairs = random_pairs(SMALL, ranks=(2, 4, 8))
    save(tmp_path / "a.safetensors", in_family("musubi", pairs, ALPHAS[alpha]))
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 0.02), ("float16", 0.003)):
        out = tmp_path / f"{dtype}.safetensors"
        convert_lora(tmp_path / "a.safetensors", out, format, dtype)
        assert_same_change(merged_by_us(open_lora(out)), merged(pairs, ALPHAS[alpha]), tolerance)


@pytest.mark.parametrize(
    "layers", [("self_attn.q",), ("cross_attn.k_img",), ("ffn.2", "cross_attn.v")]
)
def test_partial_targets_and_blocks_go_through_every_format(layers, tmp_path):
    pairs = random_pairs(SMALL, blocks=(0, 2), layers=layers)
    path = save(tmp_path / "a.safetensors", in_family("bare", pairs))
    for format in ("kohya", "diffusers", "native", "comfyui"):
        convert_lora(path, path := tmp_path / f"{format}.safetensors", format)
    got = merged_by_us(open_lora(path))
    zero = {key: change for key, change in got.items() if key not in pairs}
    assert_same_change({key: got[key] for key in pairs}, merged(pairs))
    assert not any(change.any() for change in zero.values())  # the other image projection


@pytest.mark.parametrize("k_img, v_img", [((0, 1), (0,)), ((1,), (0, 2)), ((2,), ())])
def test_comfyui_has_both_image_projections_of_a_block_or_none(k_img, v_img, tmp_path):
    """Zeros, where one of them is missing; diffusers takes a file that has both somewhere."""
    pairs = random_pairs(SMALL, blocks=k_img, layers=("cross_attn.k_img",), ranks=(2,))
    pairs |= random_pairs(SMALL, blocks=v_img, layers=("cross_attn.v_img",))
    tensors = in_family("comfyui", pairs)
    assert bool(takers(list(tensors))["diffusers"]) == (not v_img)
    path = save(tmp_path / "a.safetensors", tensors)
    convert_lora(path, tmp_path / "o.safetensors", "comfyui")
    assert not takers(list(read_safetensors(tmp_path / "o.safetensors").tensors))["diffusers"]
    got = merged_by_us(open_lora(tmp_path / "o.safetensors"))
    both = {(i, f"cross_attn.{x}_img") for i in (*k_img, *v_img) for x in "kv"}
    assert got.keys() == both
    assert_same_change({key: got[key] for key in pairs}, merged(pairs))
    assert not any(got[key].any() for key in both - pairs.keys())


def test_bfloat16_is_read(tmp_path):
    pairs = random_pairs(SMALL, layers=("self_attn.v",))
    rounded = {k: tuple(x.astype(ml_dtypes.bfloat16) for x in pair) for k, pair in pairs.items()}
    tensors = in_family("comfyui", rounded, dtype=ml_dtypes.bfloat16)
    header = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "a.safetensors", header) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert_same_change(merged_by_us(open_lora(tmp_path / "a.safetensors")), merged(rounded))


@pytest.mark.parametrize(
    ("entry", "settings", "scale"),
    [
        ("lora_adapter_metadata", {"transformer.r": 4, "transformer.lora_alpha": 6}, 1.5),
        ("lora_adapter_metadata", {"transformer.lora_alpha": 6, "transformer.use_rslora": True}, 3),
        ("lora_config", {"r": 4, "lora_alpha": 2}, 0.5),
        ("lora_adapter_metadata", {}, 1),
    ],
)
def test_alpha_may_stand_in_the_metadata(entry, settings, scale, tmp_path):
    pairs = random_pairs(SMALL)
    save(tmp_path / "a.safetensors", in_family("diffusers", pairs), {entry: json.dumps(settings)})
    expected = {key: scale * change for key, change in merged(pairs).items()}
    assert_same_change(merged_by_us(open_lora(tmp_path / "a.safetensors")), expected)


def test_an_alpha_pattern_of_the_metadata_is_of_the_layers_that_it_names(tmp_path):
    pairs = random_pairs(SMALL)
    settings = {"lora_alpha": 4, "alpha_pattern": {"blocks.1.attn1.to_q": 8, "net.2": 2}}
    text = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    save(tmp_path / "a.safetensors", in_family("diffusers", pairs), {"lora_adapter_metadata": text})
    expected = merged(pairs)
    for block, layer in expected:
        expected[block, layer] *= {(1, "self_attn.q"): 2}.get((block, layer), 1)
        expected[block, layer] *= 0.5 if layer == "ffn.2" else 1
    assert_same_change(merged_by_us(open_lora(tmp_path / "a.safetensors")), expected)


OTHERS = {
    "lokr_w1": "LoKr",
    "hada_w1_a": "LoHa",
    "dora_scale": "DoRA",
    "lora_mid.weight": "lora_mid",
    "set_weight": "set_weight",
}


@pytest.mark.parametrize("part", OTHERS)
def test_other_kinds_of_adapters_are_refused_by_name(part, tmp_path):
    tensors = in_family("musubi", random_pairs(SMALL, layers=("ffn.0",)))
    tensors[f"lora_unet_blocks_1_ffn_0.{part}"] = np.ones((2, 2), np.float32)
    save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=rf"blocks_1_ffn_0\.{part}', which is .*{OTHERS[part]}"):
        open_lora(tmp_path / "a.safetensors")


def test_keys_that_match_no_layer_are_refused_and_counted_or_left_out_when_asked(tmp_path):
    pairs = random_pairs(SMALL, layers=("ffn.0",))
    stray = {"lora_te_text_model.lora_down.weight": np.ones((2, 2), np.float32)}
    path = save(tmp_path / "a.safetensors", in_family("musubi", pairs) | stray)
    with pytest.raises(UserError, match=r"lora_te_.*6 of its tensors match and 1 do not"):
        open_lora(path)
    assert_same_change(merged_by_us(open_lora(path, skip_unmatched=True)), merged(pairs))
    save(tmp_path / "none.safetensors", stray)
    for skip in (False, True):
        with pytest.raises(UserError, match="none of its 1 tensors is"):
            open_lora(tmp_path / "none.safetensors", skip_unmatched=skip)


@pytest.mark.parametrize(
    "module",
    ["blocks.0.self_attn.norm_q", "blocks.0.self_attn", "blocks.0", "blocks_0.self_attn_q", "x"],
)
def test_a_pair_for_what_is_no_matrix_is_refused(module, tmp_path):
    tensors = in_family("bare", random_pairs(SMALL, layers=("ffn.0",)))
    tensors[f"{module}.lora_A.weight"] = np.ones((2, 48), np.float32)
    with pytest.raises(UserError, match=f"'{module}.lora_A.weight'.*not of the form"):
        open_lora(save(tmp_path / "a.safetensors", tensors))


def test_an_alpha_that_is_no_number_or_of_nothing_is_refused(tmp_path):
    tensors = in_family("musubi", random_pairs(SMALL, layers=("ffn.0",)))
    for key, value, said in (
        ("lora_unet_blocks_0_ffn_0.alpha", np.float32(np.nan), "no number"),
        ("lora_unet_blocks_0_ffn_0.alpha", np.ones(2, np.float32), "no number"),
        ("lora_unet_blocks_0_ffn_2.alpha", np.float32(1), "no weights"),
    ):
        path = save(tmp_path / "a.safetensors", tensors | {key: np.asarray(value)})
        with pytest.raises(UserError, match=said):
            open_lora(path)


def test_the_same_matrix_under_two_names_is_refused(tmp_path):
    pairs = random_pairs(SMALL, blocks=(0,), layers=("ffn.0",))
    both = in_family("musubi", pairs) | in_family("comfyui", pairs)
    with pytest.raises(UserError, match=r"of 'blocks\.0\.ffn\.0' twice"):
        open_lora(save(tmp_path / "a.safetensors", both))


def test_every_module_is_found_by_all_of_its_names():
    for module in modules():
        for name in (module.official, module.diffusers):
            dots = name.replace("{i}", "12")
            for key in (f"diffusion_model.{dots}.diff", f"lora_unet_{dots.replace('.', '_')}.diff"):
                found = parse(key)
                assert found.module == module and found.part == "diff", key
                assert found.block == (12 if "{i}" in name else None)


def comfyui_key_map(names: list[str]) -> dict[str, str]:
    """`model_lora_keys_unet` as the page has it: module names with dots, and with underscores."""
    found = {}
    for name in names:
        module = name.removesuffix(".weight")
        found[f"diffusion_model.{module}"] = name
        found[f"lora_unet_{module.replace('.', '_')}"] = name
    return found


COMFYUI_SUFFIXES = (
    *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"),
    *(".alpha", ".diff", ".diff_b"),
)


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("layers", [tuple(LAYERS), ("self_attn.q", "cross_attn.v_img")])
def test_comfyui_takes_every_key_that_is_written(format, layers, tmp_path):
    pairs = random_pairs(SMALL, layers=layers)
    save(tmp_path / "a.safetensors", in_family("bare", pairs))
    convert_lora(tmp_path / "a.safetensors", tmp_path / "o.safetensors", format, "bfloat16")
    assert_comfyui_takes(tmp_path / "o.safetensors")


def assert_comfyui_takes(path, config=SMALL):
    """Every key, each with the weight that it is added to in shape."""
    shapes = {n: t.shape for n, t in random_tensors("dit", "official", config).items()}
    key_map = comfyui_key_map(list(shapes))
    tensors = read_safetensors(path).tensors
    for key, tensor in tensors.items():
        suffix = next(s for s in COMFYUI_SUFFIXES if key.endswith(s))
        module = key.removesuffix(suffix)
        weight = key_map[module]
        if suffix in (".lora_A.weight", ".lora_down.weight"):
            assert tensor.shape[1] == shapes[weight][1]
        elif suffix in (".lora_B.weight", ".lora_up.weight"):
            assert tensor.shape[0] == shapes[weight][0]
        elif suffix == ".diff":
            assert tensor.shape == shapes[weight]
        elif suffix == ".diff_b":
            assert tensor.shape == shapes[weight.removesuffix(".weight") + ".bias"]
