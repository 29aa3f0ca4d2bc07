"""`python tests/mutation`, from the root of the project; see docs/mutation.md."""

import os
import sys
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if "tests" not in sys.modules or not sys.modules["tests"].__path__:
    ours = ModuleType("tests")  # another distribution may have installed a package of this name
    ours.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["tests"] = ours

if __name__ == "__main__":
    from tests.mutation.run import main

    sys.exit(main())
