"""What goes wrong only at the real size, seen in the true programs of I2V-14B without running them.

Each look at a program has a counterpart that it must find: a program which does have the fault.
"""

import itertools
import json
import math
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params

from tests.real_size import CONFIG, equations, tokens, trace_denoise_step, trace_train_step
from tests.scripts import ROOT, start
from tests.test_attention import on
from wanjax.training import TrainConfig

pytestmark = pytest.mark.compiles

LEAST_QUERIES = 128
# A length may be filled up to whole chunks or blocks.
FILLED = 4096


@cache
def program(name: str, size: str):
    """The jaxpr of `denoise_step`, or of `train_step` by its kind of training ("lora int8")."""
    if name == "denoise":
        return trace_denoise_step(size).jaxpr.jaxpr
    kind, _, base = name.partition(" ")
    settings = TrainConfig(train=kind, targets="all", base=base or "bfloat16")
    return trace_train_step(size, settings=settings).jaxpr.jaxpr


def whole_scores(jaxpr, length: int) -> list[tuple[int, ...]]:
    """Shapes of arrays in which every token meets every token, in whatever order of axes."""
    found = []
    for equation in equations(jaxpr):
        for variable in equation.outvars:
            shape = tuple(getattr(variable.aval, "shape", ()))
            if math.prod(shape) >= length**2 and _spans_twice(shape, length):
                found.append(shape)
    return found


def _spans_twice(shape: tuple[int, ...], length: int) -> bool:
    """Whether two separate groups of axes each run over all tokens (a chunk is an axis too)."""
    axes = range(len(shape))
    groups = [
        set(group)
        for size in (1, 2, 3)
        for group in itertools.combinations(axes, size)
        if length <= math.prod(shape[i] for i in group) < length + FILLED
        and all(shape[i] > 1 for i in group)
    ]
    return any(a.isdisjoint(b) for a, b in itertools.combinations(groups, 2))


def kernel_gradients(jaxpr) -> list[tuple[int, ...]]:
    """Products over tokens that have the shape of a block's kernel."""
    d, f = CONFIG.dim, CONFIG.ffn_dim
    kernels = {(d, d), (d, f), (f, d)}
    shapes = [
        tuple(n for n in equation.outvars[0].aval.shape if n > 1)
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    return [shape for shape in shapes if shape in kernels]


def queries_at_once(jaxpr, length: int) -> list[int]:
    """For every product of queries with all keys: how many queries take part in it."""
    counts = []
    for equation in equations(jaxpr):
        if equation.primitive.name != "dot_general":
            continue
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        left, right = (v.aval.shape for v in equation.invars)
        if math.prod(left[i] for i in contracted) != CONFIG.head_size:
            continue
        shared = math.prod(left[i] for i in batched)
        sides = sorted(math.prod(x) // CONFIG.head_size // shared for x in (left, right))
        if length <= sides[1] < length + FILLED:
            counts.append(sides[0])
    return counts


PROGRAMS = [("denoise", "720p81"), ("lora", "720p33"), ("lora", "480p33"), ("lora", "720p81")]


@pytest.mark.parametrize("name, size", PROGRAMS)
def test_no_array_holds_every_token_against_every_token(name, size):
    assert whole_scores(program(name, size), tokens(size)) == []


def test_what_keeps_its_softmax_is_found():
    """The gradient of chunks that are not checkpointed keeps the softmax of each."""
    length, chunk = tokens("480p33"), 360

    def attend(q, k):
        scores = jax.lax.map(lambda part: jax.nn.softmax(part @ k.T), q.reshape(-1, chunk, 128))
        return scores.sum(-1).sum()

    like = jax.ShapeDtypeStruct((length, 128), jnp.float32)
    found = whole_scores(jax.make_jaxpr(jax.grad(attend))(like, like).jaxpr, length)
    assert (length // chunk, chunk, length) in found
    plain = jax.make_jaxpr(lambda q, k: q @ k.T)(like, like).jaxpr
    assert whole_scores(plain, length) == [(length, length)]


def test_adapters_alone_are_differentiated():
    assert kernel_gradients(program("lora", "720p33")) == []
    assert kernel_gradients(program("lora int8", "720p33")) == []
    # Four of self-attention, six of cross-attention, two of the feed-forward.
    assert len(kernel_gradients(program("full", "480p33"))) >= 12


def self_attentions(jaxpr, kernel: str) -> int:
    """How often a kernel runs over as many keys as queries; what has no results is never run."""
    if jaxpr.eqns and not jaxpr.outvars:
        return 0
    count = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars if v.aval.dtype == jnp.bfloat16]
        names = equation.primitive.name, str(equation.params.get("name"))
        if any(kernel in name for name in names) and shapes[0] == shapes[1] == shapes[2]:
            count += 1
        count += sum(self_attentions(inner, kernel) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "mha_fwd"), ("gpu", "attention_fwd")])
def test_saved_attention_is_not_run_again(platform, kernel, monkeypatch):
    """In a training step of two loops over the blocks its kernel stands once, otherwise twice."""
    for asked in ("check_cudnn_version", "check_compute_capability"):  # of a GPU that is not here
        monkeypatch.setattr(fused_attention_stablehlo, asked, lambda *_: 91_000)
    for remat, times in (("none", 1), ("save_attention", 1), ("full", 2), ("offload", 2)):
        with on(platform, "chip"):
            traced = trace_train_step("480p33", settings=TrainConfig(remat=remat))
        assert self_attentions(traced.jaxpr.jaxpr, kernel) == times, remat


def test_the_reference_keeps_what_a_name_saves():
    """Its forward products of queries with keys are in a step once less."""
    counts = {}
    for remat in ("save_attention", "full"):
        traced = trace_train_step("480p33", settings=TrainConfig(remat=remat))
        counts[remat] = len(queries_at_once(traced.jaxpr.jaxpr, tokens("480p33")))
    assert counts["full"] - counts["save_attention"] == 1


@pytest.mark.parametrize("name, size", PROGRAMS)
def test_a_chunk_of_attention_is_worth_reading_the_keys_for(name, size):
    counts = queries_at_once(program(name, size), tokens(size))
    assert counts and min(counts) >= LEAST_QUERIES


def test_a_length_without_divisors_has_chunks_as_large():
    """27,997 is a prime; as a number of tokens it is 1 x 1 x 27,997 patches."""
    from wanjax.attention import attention

    length = 27_997
    like = jax.ShapeDtypeStruct((1, length, 2, CONFIG.head_size), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(attention)(like, like, like).jaxpr
    counts = queries_at_once(jaxpr, length)
    assert counts and min(counts) >= LEAST_QUERIES
    assert whole_scores(jaxpr, length) == []


@pytest.fixture(scope="module")
def partitioned() -> dict[str, list]:
    """Collectives of the programs on eight devices: `[kind, shapes, times]`."""
    process = start("-m", "tests.real_size", cwd=ROOT)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]
    return {line["program"]: line["collectives"] for line in lines}


PARTITIONED = [("denoise", 1), ("lora", 2), ("save_attention", 2)]


@pytest.mark.parametrize("name, times", PARTITIONED)
def test_weights_are_gathered_block_by_block(name, times, partitioned):
    """Never those of all blocks at once; each block's once, or twice in training."""
    d, f, n = CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_layers
    gathers = [
        ([size for size in shape if size > 1], count)
        for kind, shapes, count in partitioned[name]
        if kind == "all-gather"
        for shape in shapes
    ]
    assert [shape for shape, _ in gathers if shape[:1] == [n] and math.prod(shape) > d * f] == []
    for kernel in ([d, f], [f, d]):
        assert sum(count for shape, count in gathers if shape == kernel) == n * times


@pytest.mark.parametrize("name", [name for name, _ in PARTITIONED])
def test_attention_exchanges_tokens_for_heads_and_gathers_none(name, partitioned):
    """No array of all tokens is gathered: queries, keys and values go through all-to-alls."""
    length = tokens("480p33")
    sent = partitioned[name]
    gathered = [s for kind, shapes, _ in sent if kind == "all-gather" for s in shapes]
    assert [s for s in gathered if length in s and math.prod(s) > length * CONFIG.head_size] == []
    exchanges = sum(
        count
        for kind, shapes, count in sent
        if kind == "all-to-all" and shapes[0][-1] == CONFIG.head_size
    )
    # Four a block; in training forward, again for the gradient, and backward.
    assert exchanges == CONFIG.num_layers * (4 if name == "denoise" else 12)
