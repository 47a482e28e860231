"""Imported once by the server that forks the ranks of tests: the slow modules, and gkl_vl with its shapes checked."""

import pkgutil
from importlib import import_module

from jaxtyping import install_import_hook

install_import_hook("gkl_vl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
import gkl_vl  # noqa: E402

SLOW = ["torch.distributed.nn", "torch._dynamo", "accelerate", "open_clip", "pytest", "hypothesis", "datasets"]

for name in [*SLOW, *(module.name for module in pkgutil.walk_packages(gkl_vl.__path__, "gkl_vl."))]:
    import_module(name)
