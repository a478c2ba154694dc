"""The configuration of a run: schema, loading, and the DeepSpeed JSON that goes with it."""

from megalr.config.loading import (
    dump_config,
    load_run_config,
)
from megalr.config.resuming import (
    ABSENT,
    KEYS_FREE_ON_RESUME,
    diff_configs,
    differences_that_forbid_resume,
)
from megalr.config.schema import RunConfig

__all__ = [
    "ABSENT",
    "KEYS_FREE_ON_RESUME",
    "RunConfig",
    "diff_configs",
    "differences_that_forbid_resume",
    "dump_config",
    "load_run_config",
]
