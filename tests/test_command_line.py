"""The command line over the presets: what is text and what is an option."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs import PRESETS, check_preset, command_line
from wanjax.errors import UserError
from wanjax.models.presets import ARCHITECTURES
from wanjax.pictures import choose_size

WORDS = ["nano", "--checkpoint", "c"]


def sampled(*words):
    return command_line(lambda preset: preset.sample, "", [*WORDS, *words])[1]


@pytest.mark.parametrize("text", ["- a dog", "-a dog", "--a dog", "-1", "--", "—", "a=b", "--x=y"])
@pytest.mark.parametrize("joined", [False, True])
def test_prompts_may_begin_with_a_dash(text, joined):
    words = [f"--negative_prompt={text}"] if joined else ["--negative_prompt", text]
    job = sampled("--prompt", text, *words, "--seed", "3")
    assert (job.prompt, job.negative_prompt, job.seed) == (text, text, 3)


def test_an_option_is_no_prompt():
    with pytest.raises(UserError, match="Missing value for argument '--prompt'"):
        sampled("--prompt", "--seed", "3")
    with pytest.raises(UserError, match="no option '--sed'; did you mean '--seed'"):
        sampled("--prompt", "a", "--sed", "3")


def encoded(*words):
    given = [*WORDS, "--data", "d", "--out", "o", *words]
    return command_line(lambda preset: preset.encode, "", given)[1]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--skip-short"], True),
        (["--skip_short", "--fps", "8"], True),
        (["--skip-short", "True"], True),
        (["--skip-short=False"], False),
        (["--no-skip-short"], False),
        (["--no_skip_short"], False),
        ([], False),
    ],
)
def test_a_switch_stands_alone_or_with_a_value_or_as_no(words, value):
    assert encoded(*words).skip_short is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--remat", "save_attention"], "save_attention"),
        (["--remat=offload"], "offload"),
        (["--remat", "True"], "full"),
        (["--remat"], "full"),
        (["--remat", "False"], "none"),
        (["--no-remat"], "none"),
        ([], "none"),
    ],
)
def test_a_switch_may_have_names_too(words, value):
    given = [*WORDS, "--features", "f", "--run", "r", *words]
    job = command_line(lambda preset: preset.train, "", given)[1]
    assert job.settings.remat == value


def test_what_is_no_switch_has_no_no():
    with pytest.raises(UserError, match="no option '--no-fps'"):
        encoded("--no-fps")
    with pytest.raises(UserError, match="'perhaps' is no --skip-short"):
        encoded("--skip-short", "perhaps")


def test_lists_add_up_and_all_else_is_given_once():
    assert sampled("--lora", "a", "--lora", "b:0.5", "c").lora == ("a", "b:0.5", "c")
    assert sampled("--lora=a", "--seed", "3", "--lora=b").lora == ("a", "b")
    for words in (["--seed", "1", "--seed", "1"], ["--prompt", "a", "--prompt=b"]):
        with pytest.raises(UserError, match=f"{words[0]} is given twice"):
            sampled(*words)


@pytest.mark.parametrize("words", [("--fast", "--no-fast"), ("--no-fast", "--fast")])
def test_a_switch_on_and_off_is_told_as_both(words):
    with pytest.raises(UserError, match=f"{words[0]} and {words[1]} are both given; leave one"):
        sampled(*words)
    with pytest.raises(UserError, match=f"{words[0]} is given twice"):
        sampled(words[0], words[0])


@pytest.mark.parametrize(
    ("words", "option", "other"),
    [
        (["--sigmas", "1", "0", "--steps", "1"], "--steps", "--sigmas"),
        (["--height", "32", "--width", "32", "--area", "1024"], "--area", "--height"),
    ],
)
def test_options_that_say_nothing_are_refused(words, option, other):
    with pytest.raises(UserError, match=f"{option} says nothing with {other}; leave one"):
        sampled(*words)


def test_presets_are_for_their_kind_and_size():
    kinds = {name: networks["dit"] for name, networks in ARCHITECTURES.items()}
    for name, config in kinds.items():
        check_preset(name, Path("c"), config)
    for name, other in (
        ("i2v_14b_480p", "t2v_14b"),
        ("t2v_14b", "i2v_14b_720p"),
        ("flf2v_14b_720p", "i2v_14b_480p"),
        ("t2v_1_3b", "t2v_14b"),
        ("nano", "i2v_14b_720p"),
        ("i2v_14b_480p", "nano"),
    ):
        with pytest.raises(UserError, match=f"preset {name} is for .* c holds .* use .*{other}"):
            check_preset(name, Path("c"), kinds[other])
    unknown = replace(kinds["i2v_14b_480p"], dim=640)
    check_preset("i2v_14b_480p", Path("c"), unknown)
    check_preset("nano", Path("c"), unknown)
    with pytest.raises(UserError, match="t2v_14b"):
        check_preset("t2v_14b", Path("c"), unknown)


def test_text_to_video_has_the_sizes_of_wan():
    for name, size in (("t2v_1_3b", (480, 832)), ("t2v_14b", (720, 1280))):
        assert choose_size(None, None, PRESETS[name].sample.area, ()) == size
    assert PRESETS["flf2v_14b_720p"].train.settings.shift == 5
