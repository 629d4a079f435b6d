"""What a job may say but this version cannot do yet.

The keys exist so that job files keep their form; asking for something that would silently not happen is refused here.
"""

from ltx_titan.config.errors import Problem
from ltx_titan.config.job import JobConfig


def support_problems(job: JobConfig) -> list[Problem]:
    """One problem per request of `job` that this version cannot fulfil."""
    table = [
        (
            "activation_checkpoint.mode",
            job.activation_checkpoint.mode,
            job.activation_checkpoint.mode in ("selective", "every_k"),
            'this kind of recomputation; set it to "full" or "none"',
        ),
        ("parallelism.cp", job.parallelism.cp, job.parallelism.cp > 1, "context parallelism; set it to 1"),
        ("parallelism.tp", job.parallelism.tp, job.parallelism.tp > 1, "tensor parallelism; set it to 1"),
        ("float8.recipe", job.float8.recipe, job.float8.recipe != "none", 'float8; set it to "none"'),
    ]
    return [
        Problem(key, value, "a value that this version supports", f"it does not do {missing}")
        for key, value, asked, missing in table
        if asked
    ]
