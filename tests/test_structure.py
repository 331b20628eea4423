"""The import direction of the design, and what `import wanjax` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each row imports only rows before it.
ROWS = [
    ["types", "errors", "progress", "chips"],
    ["precision", "sharding", "rope", "outputs", "residency", "text_files", "user_cache", "remat"],
    ["attention", "tensor_files", "metrics", "programs", "devices"],
    ["nn", "program_file"],
    ["causal", "quantisation"],
    ["models", "placement"],
    ["lora", "flow", "solvers", "text", "work"],
    ["slots", "denoising", "conditioning", "weights", "checkpoint", "prompt_cache", "latents"]
    + ["data"],
    ["pictures", "eval"],
    ["pipeline", "training", "loop"],
    ["planning"],
]
# CLIP-SIM takes any CLIP of Hugging Face's, with its own tokenizer and preparation of pictures.
TOKENIZES = ROOT / "wanjax/eval/clip.py"
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, as dotted names."""
    return [name for node in ast.walk(ast.parse(path.read_text())) for name in named(node)]


def named(node: ast.AST) -> list[str]:
    """What one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part(dotted: str) -> str | None:
    """`models` for wanjax.models.dit; None for what is not ours, or for the package itself."""
    pieces = dotted.split(".")
    return pieces[1] if pieces[0] == "wanjax" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", sources("wanjax"), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    own = path.relative_to(ROOT / "wanjax").parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package's table of contents may name anything
    assert own in RANK, f"{own} has no row in the import order"
    for name in imports(path):
        assert not name.startswith(("convert", "configs")), f"wanjax may not import {name}"
        other = part(name)
        if other is not None and other != own:
            assert RANK[other] < RANK[own], f"{own} may not import {other}"


def test_networks_never_import_each_other():
    networks = {"dit", "vae", "umt5", "clip"}
    for path in sources("wanjax/models"):
        if path.stem in networks:
            for name in imports(path):
                assert not name.startswith("wanjax.models"), f"{path.name} imports {name}"


def test_torch_stays_in_the_tests():
    scripts = sorted(ROOT.glob("*.py"))
    for path in [*sources("wanjax"), *sources("convert"), *sources("configs"), *scripts]:
        roots = {name.split(".")[0] for name in imports(path)}
        foreign = {"torch", "diffusers", "transformers", "peft"}
        if path == TOKENIZES:
            foreign.remove("transformers")
        assert not roots & foreign, path


def test_what_the_evaluation_needs_is_imported_when_it_is_used():
    """The extra [eval] is no part of the library: nothing of it is imported at a module's top."""
    extra = {"transformers", "skimage", "cv2", "scipy", "statsmodels"}
    for path in sources("wanjax"):
        top = ast.parse(path.read_text()).body
        found = {name.split(".")[0] for node in top for name in named(node)}
        assert not found & extra, path


def test_orbax_has_one_door():
    users = [p.name for p in sources("wanjax") if any("orbax" in n for n in imports(p))]
    assert users == ["checkpoint.py"]


def test_importing_wanjax_is_instant():
    code = "import sys, wanjax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
