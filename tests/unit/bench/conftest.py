"""Makes ``bench`` importable, which is run from the root of a checkout and never installed."""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench"

# Not the root itself on sys.path: then `engine` and `ipc` could be imported under the wrong names.
specification = importlib.util.spec_from_file_location(
    "bench", BENCH / "__init__.py", submodule_search_locations=[str(BENCH)]
)
assert specification is not None
assert specification.loader is not None
package = importlib.util.module_from_spec(specification)
sys.modules["bench"] = package
specification.loader.exec_module(package)
