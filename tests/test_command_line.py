"""The command line over the presets: what is text and what is an option."""

import pytest

from configs import command_line
from wanjax.errors import UserError

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
