"""wanjax: fine-tune and run Wan2.1 image-to-video models in JAX.

    from wanjax import Pipeline
    pipeline = Pipeline.load("checkpoint", dtype="bfloat16", lora=[("runs/film", 1.0)])
    video = pipeline.sample(image="first.png", prompt="A horse gallops through surf")

Where things are: `models/` the four networks, `lora` adapters, `flow` the objective, `solvers`,
`conditioning` picture to condition, `pipeline` sampling, `training` the step, `loop` around it,
`weights` and `checkpoint` what is read and written, `data/` films to features.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanjax.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline"]


def __getattr__(name: str):
    """`wanjax.Pipeline` is imported when it is asked for, so that `import wanjax` is instant."""
    if name == "Pipeline":
        from wanjax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'wanjax' has no attribute '{name}'")
