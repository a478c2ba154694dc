"""In: YAML files and ``section.key=value`` overrides.
Out: a checked, frozen RunConfig; what may differ on a resume; one line per mistake.
Must not know: DeepSpeed, torch, or how any option is implemented.
"""

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
