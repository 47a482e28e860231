"""Imported once by the server that forks the ranks of tests: the slow modules, and gkl_vl with its shapes checked."""

import pkgutil
from importlib import import_module

from jaxtyping import install_import_hook

install_import_hook("gkl_vl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
import gkl_vl  # noqa: E402

SLOW = ["torch.distributed.nn", "torch._dynamo", "accelerate", "open_clip", "pytest", "hypothesis", "datasets"]

APPLICATIONS = ("gkl_vl.demo", "gkl_vl.export.__main__")  # no rank runs them, and the first needs an optional package

names = [module.name for module in pkgutil.walk_packages(gkl_vl.__path__, "gkl_vl.")]
for name in [*SLOW, *(name for name in names if not name.startswith(APPLICATIONS))]:
    import_module(name)
