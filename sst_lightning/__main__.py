"""``python -m sst_lightning`` is the same program as ``sst-merge``."""

from sst_lightning.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
