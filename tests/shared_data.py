"""Where the workplace has real data: ../shared/data beside the repository, or $SST_SHARED_DATA."""

import os
from pathlib import Path

DATA = Path(os.environ.get("SST_SHARED_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
