"""`python -m convert lora-info`, `lora-merge`, `lora-extract` and `lora-resize`."""

import re

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from convert.export import export
from convert.loaders import takers
from convert.lora import convert_lora, open_lora
from convert.lora_merge import lora_merge
from convert.lora_svd import lora_extract, lora_resize
from tests.adapters import (
    FAMILIES,
    assert_same_change,
    in_family,
    merged,
    merged_by_us,
    random_pairs,
    save,
)
from tests.toy import SMALL, toy_dit
from wanjax.errors import UserError
from wanjax.tensor_files import read_safetensors
from wanjax.weights import save_native

OUTSIDE = {
    "diffusion_model.time_embedding.2.lora_A.weight": (3, 48),
    "diffusion_model.time_embedding.2.lora_B.weight": (48, 3),
    "diffusion_model.blocks.1.norm3.diff": (48,),
    "diffusion_model.blocks.2.self_attn.q.diff_b": (48,),
    "diffusion_model.blocks.0.diff_m": (1, 6, 48),
    "diffusion_model.head.head.diff": (64, 48),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A native folder of a small denoiser in fp32."""
    folder = tmp_path_factory.mktemp("base") / "ck"
    save_native(folder, {"dit": toy_dit()})
    return folder


@pytest.fixture
def adapter(tmp_path):
    """A file with pairs of several ranks and alphas, and changes of every kind."""
    rng = np.random.default_rng(9)
    tensors = in_family(
        "comfyui", random_pairs(SMALL, ranks=(2, 4)), lambda n: np.float32(1 + n % 2)
    )
    tensors |= {k: 0.3 * rng.standard_normal(s, np.float32) for k, s in OUTSIDE.items()}
    return save(tmp_path / "a.safetensors", tensors)


def leaves(folder) -> dict[str, np.ndarray]:
    return read_safetensors(folder / "dit.safetensors").tensors


def by_hand(adapter, strength=1.0) -> dict[str, np.ndarray]:
    """What an adapter file adds, by official name, in their layout."""
    tensors, found = read_safetensors(adapter).tensors, {}
    for key, tensor in tensors.items():
        module, _, end = key.removeprefix("diffusion_model.").rpartition(".")
        if key.endswith(".lora_A.weight"):
            module, stem = module.removesuffix(".lora_A"), key.removesuffix(".lora_A.weight")
            scale = tensors.get(f"{stem}.alpha", np.float32(len(tensor))) / len(tensor)
            found[f"{module}.weight"] = scale * tensors[f"{stem}.lora_B.weight"] @ tensor
        elif end in ("diff", "diff_b", "diff_m"):
            name = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}[end]
            found[f"{module}.{name}"] = tensor
    return {name: strength * change for name, change in found.items()}


@pytest.mark.parametrize("format", ["native", "official", "diffusers", "comfyui"])
def test_merged_is_the_base_with_all_changes_added(format, base, adapter, tmp_path):
    """Two adapters with strengths; in every layout the same tensors."""
    out = tmp_path / ("m.safetensors" if format == "comfyui" else "m")
    said = lora_merge(base, out, [(adapter, 0.5), (adapter, -2.0)], format)
    assert re.search(r"\n  (100|99\.99\d*) % of the change survives", said)
    lora_merge(base, tmp_path / "native", [(adapter, 0.5), (adapter, -2.0)])
    export(tmp_path / "native", tmp_path / "expected.safetensors", "comfyui")
    export(base, tmp_path / "before.safetensors", "comfyui")
    before = read_safetensors(tmp_path / "before.safetensors").tensors
    change = by_hand(adapter, -1.5)
    for name, tensor in read_safetensors(tmp_path / "expected.safetensors").tensors.items():
        wanted = before[name] + change.get(name, 0)
        np.testing.assert_allclose(tensor, wanted, rtol=1e-5, atol=1e-5)
        assert name in change or (tensor == before[name]).all()
    if format in ("official", "diffusers"):
        export(tmp_path / "native", tmp_path / "again", format)
        files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.safetensors")}
        assert files and all((tmp_path / "again" / p).read_bytes() == b for p, b in files.items())
    elif format == "comfyui":
        assert out.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_a_small_change_of_a_base_in_bfloat16_is_summed_first_and_its_share_is_told(tmp_path):
    """Weights near 1, changes of a fifth of a step: one is lost wholly, five together are not."""
    model = toy_dit(dtype=ml_dtypes.bfloat16)
    kernel = model.blocks.self_attn.q.kernel
    kernel[...] = np.full(kernel.shape, 1.5, ml_dtypes.bfloat16)
    save_native(tmp_path / "ck", {"dit": model})
    step = 2.0**-7  # between the numbers of bfloat16 from 1 to 2
    pair = {(0, "self_attn.q"): (np.full((1, 48), 0.2 * step, "f"), np.ones((48, 1), "f"))}
    path = save(tmp_path / "a.safetensors", in_family("comfyui", pair))
    assert "\n  0 % of the change" in lora_merge(tmp_path / "ck", tmp_path / "one", [(path, 1.0)])
    said = lora_merge(tmp_path / "ck", tmp_path / "five", [(path, 1.0)] * 5)
    assert re.search(r"\n  (100|99\.\d+) % of the change", said)
    got = leaves(tmp_path / "five")["blocks.self_attn.q.kernel"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got[0], np.full((48, 48), 1.5 + step, np.float32))
    assert (got[1:] == leaves(tmp_path / "ck")["blocks.self_attn.q.kernel"][1:]).all()


def test_merging_refuses_what_does_not_fit_and_leaves_nothing(base, tmp_path):
    wide = random_pairs(SMALL, layers=("ffn.0",))
    wide = {key: (np.ones((4, 50), "f"), b) for key, (_, b) in wide.items()}
    path = save(tmp_path / "a.safetensors", in_family("comfyui", wide))
    with pytest.raises(UserError, match="of 50 to 80 channels, and this one has 3 of 48 to 80"):
        lora_merge(base, tmp_path / "m", [(path, 1.0)])
    assert not (tmp_path / "m").exists()


def test_the_difference_of_two_checkpoints_gives_the_second_back(base, adapter, tmp_path):
    """At full rank, with norms, biases, modulation and layers outside of the blocks."""
    lora_merge(base, tmp_path / "tuned", [(adapter, 1.0)])
    said = lora_extract(base, tmp_path / "tuned", tmp_path / "e.safetensors", 64)
    assert "100 % of the change of the matrices" in said
    lora_merge(base, tmp_path / "again", [(tmp_path / "e.safetensors", 1.0)])
    tuned = leaves(tmp_path / "tuned")
    for name, tensor in leaves(tmp_path / "again").items():
        np.testing.assert_allclose(tensor, tuned[name], atol=2e-5, rtol=1e-5, err_msg=name)
    touched = {n for n, t in tuned.items() if (t != leaves(base)[n]).any()}
    lora = open_lora(tmp_path / "e.safetensors")
    names = {f"blocks.{n}.kernel" if n.startswith(("self", "cross", "ffn")) else f"{n}.kernel"
             for n in lora.layers}  # fmt: skip
    assert names | set(lora.changes) == touched


def test_of_a_lesser_rank_it_is_the_best_approximation(base, tmp_path):
    """Against NumPy's SVD, from a checkpoint in another layout."""
    pairs = random_pairs(SMALL, ranks=(9,), blocks=(1,))
    save(tmp_path / "a.safetensors", in_family("musubi", pairs))
    lora_merge(base, tmp_path / "t.safetensors", [(tmp_path / "a.safetensors", 1.0)], "comfyui")
    said = lora_extract(base, tmp_path / "t.safetensors", tmp_path / "e.safetensors", 4)
    got, kept, total = merged_by_us(open_lora(tmp_path / "e.safetensors")), 0, 0
    for key, change in merged(pairs).items():
        u, values, v = np.linalg.svd(change)
        best = (u[:, :4] * values[:4]) @ v[:4]
        np.testing.assert_allclose(got[key], best, atol=1e-4 * np.abs(best).max())
        kept, total = kept + (values[:4] ** 2).sum(), total + (values**2).sum()
    share = float(re.search(r"\n([\d.]+) % of the change", said)[1])
    assert share == pytest.approx(100 * kept / total, rel=1e-3) and 40 < share < 99


def test_extraction_refuses_other_architectures_and_equal_weights(base, tmp_path):
    save_native(tmp_path / "wide", {"dit": toy_dit(ffn_dim=88)})
    with pytest.raises(UserError, match="ffn_dim 80 and 88"):
        lora_extract(base, tmp_path / "wide", tmp_path / "e.safetensors", 4)
    with pytest.raises(UserError, match="nothing to extract"):
        lora_extract(base, base, tmp_path / "e.safetensors", 4)
    with pytest.raises(UserError, match="rank 0"):
        lora_extract(base, base, tmp_path / "e.safetensors", 0)


@pytest.mark.parametrize("alpha", [None, lambda n: np.float32(3 + n % 3)])
def test_a_lesser_rank_is_the_best_approximation_and_the_whole_rank_the_same(alpha, tmp_path):
    pairs = random_pairs(SMALL, ranks=(2, 6, 8))
    save(tmp_path / "a.safetensors", in_family("VideoX-Fun", pairs, alpha))
    expected = merged(pairs, alpha)
    lora_resize(tmp_path / "a.safetensors", tmp_path / "8.safetensors", 8, "kohya")
    assert_same_change(merged_by_us(open_lora(tmp_path / "8.safetensors")), expected, 2e-6)
    lora_resize(tmp_path / "a.safetensors", tmp_path / "3.safetensors", 3, "diffusers")
    got = merged_by_us(open_lora(tmp_path / "3.safetensors"))
    for key, change in expected.items():
        u, values, v = np.linalg.svd(change)
        best = (u[:, :3] * values[:3]) @ v[:3]
        np.testing.assert_allclose(got[key], best, atol=1e-5 * np.abs(best).max())
    with pytest.raises(UserError, match="use 1 to 8"):
        lora_resize(tmp_path / "a.safetensors", tmp_path / "o.safetensors", 9)


def test_info_tells_rank_scale_and_norm_of_every_layer(tmp_path, capsys):
    alpha = lambda n: np.float32(4) if n % 2 else None  # noqa: E731
    pairs = random_pairs(SMALL, ranks=(2, 8), layers=("self_attn.q", "ffn.2"))
    tensors = in_family("musubi", pairs, alpha)
    tensors["lora_te_x.alpha"] = np.float32(1).reshape(1)
    tensors["lora_unet_blocks_1_norm3.diff"] = np.full(48, 2, np.float32)
    path = save(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "8"})
    main(["lora-info", str(path)])
    said = capsys.readouterr().out
    rows = {tuple(line.split()[:4]): float(line.split()[4]) for line in said.splitlines()[2:5]}
    norm = lambda layer: np.sqrt(sum((c**2).sum() for (_, name), c in  # noqa: E731
                                     merged(pairs, alpha).items() if name == layer))  # fmt: skip
    assert rows["self_attn.q", "0-2", "2", "1"] == pytest.approx(norm("self_attn.q"), rel=1e-3)
    assert rows["ffn.down", "0-2", "8", "0.5"] == pytest.approx(norm("ffn.2"), rel=1e-3)
    assert rows["blocks.norm_cross.scale", "1", "whole", "1"] == pytest.approx(
        2 * 48**0.5, rel=1e-3
    )
    assert "16 matched, 1 unmatched" in said and "ss_network_dim: 8" in said
    assert "not for ComfyUI ('lora_te_x.alpha' is not loaded)" in said


@pytest.mark.parametrize(
    "keys, where",
    [
        (("blocks.0.self_attn.q", "blocks.2.self_attn.q"), "2 adapted matrices, in 2 blocks"),
        (("time_embedding.2",), "1 adapted matrices, outside of the blocks"),
        (
            ("blocks.1.self_attn.q", "time_embedding.2"),
            "2 adapted matrices, in 1 blocks and outside of them",
        ),
    ],
)
def test_info_tells_where_the_layers_are(keys, where, tmp_path, capsys):
    ones = {"lora_A": np.ones((2, 48), "f"), "lora_B": np.ones((48, 2), "f")}
    tensors = {f"diffusion_model.{k}.{x}.weight": one for k in keys for x, one in ones.items()}
    main(["lora-info", str(save(tmp_path / "a.safetensors", tensors))])
    assert capsys.readouterr().out.splitlines()[0].endswith(where)


def test_info_tells_the_same_of_a_native_file(adapter, tmp_path, capsys):
    """Its matrices and its changes, in which blocks, with which norm."""
    convert_lora(adapter, tmp_path / "n.safetensors", "native")
    convert_lora(tmp_path / "n.safetensors", tmp_path / "o.safetensors", "comfyui")
    said = []
    for name in ("n.safetensors", "o.safetensors"):
        main(["lora-info", str(tmp_path / name)])
        first, *lines = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in lines if " whole " in line]
        said.append((first.partition(": ")[2], rows))
    assert said[0] == said[1]
    assert ["blocks.norm_cross.scale", "1", "whole"] in [row[:3] for row in said[0][1]]


TAKEN = {  # by the page: who loads a file of each family that has all layers
    "comfyui": {"ComfyUI", "diffusers", "diffusion-pipe"},
    "comfyui, kohya names": {"ComfyUI", "diffusers"},
    "whole model": set(),
    "diffusers": {"diffusers"},
    "diffusers, default": set(),
    "musubi": {"ComfyUI", "musubi-tuner"},
    "VideoX-Fun": {"ComfyUI"},
    "bare": set(),
    "peft": set(),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_who_would_take_a_file(family):
    found = takers(list(in_family(family, random_pairs(SMALL))))
    assert {program for program, reason in found.items() if not reason} == TAKEN[family]


def test_diffusers_takes_underscores_with_every_layer_and_alpha_only():
    one = lambda n: np.float32(1)  # noqa: E731
    whole = in_family("musubi", random_pairs(SMALL), one)
    assert not takers(list(whole))["diffusers"]
    part = in_family("musubi", random_pairs(SMALL, layers=("self_attn.q",)), one)
    assert "all layers" in takers(list(part))["diffusers"]


def test_the_commands_say_what_they_wrote(base, tmp_path, capsys):
    pairs = random_pairs(SMALL, ranks=(4,))
    path = save(tmp_path / "a.safetensors", in_family("bare", pairs))
    main(["lora", str(path), str(tmp_path / "o.safetensors")])
    main(["lora-merge", str(base), str(tmp_path / "m"), f"{path}:0.5", str(path)])
    main(["lora-resize", str(path), str(tmp_path / "r.safetensors"), "--rank", "2"])
    out = capsys.readouterr().out
    assert "\nfor ComfyUI, diffusers, diffusion-pipe; not for musubi-tuner (its conv" in out
    assert "12 layers in 3 blocks, rank 4" in out and "survives the rounding" in out
    assert_same_change(merged_by_us(open_lora(tmp_path / "o.safetensors")), merged(pairs))
    q = (
        leaves(tmp_path / "m")["blocks.self_attn.q.kernel"]
        - leaves(base)["blocks.self_attn.q.kernel"]
    )
    expected = 1.5 * merged(pairs)[0, "self_attn.q"].T
    np.testing.assert_allclose(q[0], expected, atol=1e-5)
    with pytest.raises(UserError, match="after its last colon"):
        main(["lora-merge", str(base), str(tmp_path / "x"), "a:strong"])
    convert_lora(tmp_path / "r.safetensors", tmp_path / "n.safetensors", "native")
    main(["lora-info", str(tmp_path / "n.safetensors")])
    assert "36 adapted matrices, in 3 blocks" in capsys.readouterr().out


def test_what_a_model_has_not_is_left_out_only_when_asked(base, tmp_path, capsys):
    """An adapter of an image-to-video model, for a text-to-video one."""
    save_native(tmp_path / "t2v", {"dit": toy_dit(image_dim=None, in_channels=16)})
    pairs = random_pairs(SMALL)
    norm = {"lora_unet_blocks_0_cross_attn_norm_k_img.diff": np.ones(48, np.float32)}
    path = save(tmp_path / "a.safetensors", in_family("musubi", pairs) | norm)
    words = ["lora", str(path), str(tmp_path / "o.safetensors"), "--for", str(tmp_path / "t2v")]
    with pytest.raises(UserError, match="it adapts 'cross_attn.k_img', which this one has not"):
        main(words)
    main([*words, "--skip-unmatched"])
    said = capsys.readouterr().out
    assert (
        "left out: blocks.cross_attn.norm_k_img.scale, cross_attn.k_img, cross_attn.v_img" in said
    )
    kept = {key: change for key, change in merged(pairs).items() if "_img" not in key[1]}
    assert_same_change(merged_by_us(open_lora(tmp_path / "o.safetensors")), kept)
    main(["lora", str(path), str(tmp_path / "p.safetensors"), "--for", str(base)])
    assert "\nleft out: " not in capsys.readouterr().out
