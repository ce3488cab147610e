"""What all DataModules share: choosing a source, splitting, sampling, tokenising and batching."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.batching import Batch, EncodedDataset, LengthBucketBatchSampler, collate
from sst_lightning.data.lazy_tokenizer import LazyTokenizer
from sst_lightning.data.random_blocks import RandomBlocks, RandomBlockSampler
from sst_lightning.data.resumable import ResumableLoader
from sst_lightning.data.rows import Row, fingerprint_rows
from sst_lightning.data.sources import Table, read_file, read_hub
from sst_lightning.data.splits import MINIMAL_SIZES, SPLITS, Split, sample, split_by_group
from sst_lightning.data.tokenization import Encoded, encode_all


class TextDataModule(LazyTokenizer, LightningDataModule, ABC):
    """Prompts with responses, split into train, calibration and test rows.

    After `setup`, ``rows[split]`` holds the rows of "train", "calibration" and "test" (a Security
    module adds "harmless_train", "harmless_calibration" and "harmless_test"). Splits share no row
    and no group, and which split a row is in depends on the data alone (see
    `sst_lightning.data.splits`).

    Args:
        tokenizer: Alias ("smollm2-135m"), hub id or local folder of the model's tokenizer.
        source: "embedded" (the small set that ships with the project), "local" (a json, jsonl, csv
            or parquet file at ``path``) or "hub" (``datasets.load_dataset``).
        path: File of source "local"; data set id of source "hub" where it is not the usual one.
        mode: "full" uses every row; "minimal" at most 200 training, 96 calibration, 64 test rows.
        max_samples: Most training rows; takes the place of the mode's number.
        calibration_samples: Most calibration rows, likewise.
        test_samples: Most test rows, likewise.
        calibration_share: Fraction of a file's rows that is held out for calibration.
        test_share: Fraction of a file's rows that is held out for the test.
        hub_split: Split of the hub data set; None means the usual one.
        skip_empty: Leave out rows with an empty required cell instead of stopping with an error;
            always so for the hub, whose rows nobody can repair.
        batch_size: Sequences per batch and process.
        max_length: Most tokens of prompt and completion; see
            `sst_lightning.data.tokenization.encode` for what a longer row loses.
        seed: Draws training and calibration samples and the order of batches; test rows do not
            depend on it.
        num_workers: Processes that collate batches; rows are already tokenised, so 0 is fast.
    """

    name: str = ""
    hub_id: str | None = None
    usual_hub_split: str = "train"

    def __init__(
        self,
        tokenizer: str = "smollm2-135m",
        source: Literal["embedded", "local", "hub"] = "embedded",
        path: str | None = None,
        mode: Literal["minimal", "full"] = "full",
        max_samples: int | None = None,
        calibration_samples: int | None = None,
        test_samples: int | None = None,
        calibration_share: float = 0.15,
        test_share: float = 0.15,
        hub_split: str | None = None,
        skip_empty: bool = False,
        batch_size: int = 8,
        max_length: int = 512,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if source == "local" and path is None:
            raise DataError("source: local needs path, the file to read")
        if source == "embedded" and path is not None:
            raise DataError(f"path {path!r} has no effect with source: embedded; use source: local")
        if min(test_share, calibration_share) <= 0 or test_share + calibration_share >= 1:
            raise DataError(
                f"calibration_share {calibration_share} and test_share {test_share} must be above "
                "0 and leave room for training rows"
            )
        self.tokenizer_name = tokenizer
        self.source = source
        self.path = path
        self.mode = mode
        self.limits: dict[Split, int | None] = {
            "train": max_samples,
            "calibration": calibration_samples,
            "test": test_samples,
        }
        for split, limit in self.limits.items():
            if limit is not None and limit < 1:
                raise DataError(f"the number of {split} rows must be at least 1, got {limit}")
            if limit is None and mode == "minimal":
                self.limits[split] = MINIMAL_SIZES[split]
        self.calibration_share = calibration_share
        self.test_share = test_share
        self.hub_split = hub_split or self.usual_hub_split
        self.skip_empty = skip_empty or source == "hub"
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.num_workers = num_workers
        self.rows: dict[str, list[Row]] = {}
        self.random_blocks: dict[str, RandomBlocks] = {}

    @abstractmethod
    def embedded_rows(self) -> dict[str, list[Row]]:
        """Return the rows of the embedded set by split."""

    @abstractmethod
    def table_rows(self, table: Table) -> list[Row]:
        """Return the rows of a table.

        Raises:
            DataError: A column is missing or a cell is empty.
        """

    def prepare_data(self) -> None:
        """Download a hub data set once per machine, before every process reads it from its cache.

        Raises:
            DataError: It cannot be loaded.
        """
        if self.source == "hub":
            self.read_table()

    def setup(self, stage: str | None = None) -> None:
        """Read, split and sample the rows, once.

        Args:
            stage: Ignored; every stage uses the same splits.

        Raises:
            DataError: The data cannot be used; the message names file, row and column.
        """
        if not self.rows:
            self.rows = self.load_rows()
            counts = ", ".join(f"{len(rows)} {split}" for split, rows in self.rows.items())
            rank_zero_info(f"{type(self).__name__} ({self.path or self.source}): {counts} rows")

    def load_rows(self) -> dict[str, list[Row]]:
        """Read, split and sample the rows.

        Raises:
            DataError: The data cannot be used, or a split is empty.
        """
        if self.source == "embedded":
            splits: dict[str, list[Row]] = self.embedded_rows()
        else:
            splits = self.split_table(self.read_table())
        for split in SPLITS:
            if not splits[split]:
                raise DataError(
                    f"{self.path or self.source}: no rows left for the {split} split. Use a file "
                    "with more rows and groups (documents, families), or other shares"
                )
        return self.sample_splits(splits)

    def read_table(self) -> Table:
        """Return the table of source "local" or "hub".

        Raises:
            DataError: It cannot be read.
        """
        if self.source == "local" and self.path is not None:
            return read_file(self.path)
        dataset = self.path or self.hub_id
        if dataset is None:
            raise DataError(f"source: hub needs path, the data set id, for {type(self).__name__}")
        return read_hub(dataset, self.hub_split)

    def split_table(self, table: Table) -> dict[str, list[Row]]:
        """Split the rows of a table by group."""
        rows = self.table_rows(table)
        splits = split_by_group(rows, self.calibration_share, self.test_share)
        return {split: splits[split] for split in SPLITS}

    def sample_splits(self, splits: dict[str, list[Row]], prefix: str = "") -> dict[str, list[Row]]:
        """Cut each split to its limit.

        Args:
            splits: Split name, with ``prefix``, to rows.
            prefix: In front of the names in ``splits``.
        """
        return {
            prefix + split: sample(
                splits[prefix + split], self.limits[split], None if split == "test" else self.seed
            )
            for split in SPLITS
        }

    def keep(self, table: Table, number: int, columns: Sequence[str]) -> bool:
        """Whether a row is complete; False only with ``skip_empty``.

        Args:
            table: The table.
            number: Row number counted from 1.
            columns: Columns that must not be empty.

        Raises:
            DataError: A cell is empty and ``skip_empty`` is off.
        """
        texts = [table.text(number, column, optional=self.skip_empty) for column in columns]
        return all(texts)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches."""
        return self.make_loader(self.rows["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Calibration batches: what a Fisher is estimated on."""
        items = self.encode(self.rows["calibration"])
        return self.loader_of(items, blocks=self.random_blocks.get("calibration"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches."""
        return self.make_loader(self.rows["test"])

    def make_loader(
        self, rows: Sequence[Row], shuffle: bool = False, batch_size: int | None = None
    ) -> DataLoader[Batch]:
        """Return batches of any rows, sorted by length (see `LengthBucketBatchSampler`).

        Args:
            rows: The rows.
            shuffle: Another order each epoch.
            batch_size: Sequences per batch; None means the module's.

        Raises:
            DataError: There are no rows.
        """
        return self.loader_of(self.encode(rows), shuffle, batch_size)

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """Tokenise rows to at most ``max_length`` tokens each."""
        return encode_all(rows, self.tokenizer, self.max_length)

    def loader_of(
        self,
        items: Sequence[Encoded],
        shuffle: bool = False,
        batch_size: int | None = None,
        blocks: RandomBlocks | None = None,
        even: bool = True,
    ) -> DataLoader[Batch]:
        """Return batches of tokenised rows; other arguments as of :meth:`make_loader`.

        Args:
            items: Tokenised rows.
            shuffle: Another order each epoch.
            batch_size: Sequences per batch; None means the module's.
            blocks: Take the rows in random blocks (see `RandomBlockSampler`), unshuffled.
            even: Give every process the same number of batches.

        Raises:
            DataError: There are no rows.
        """
        if not items:
            raise DataError("a data loader needs at least one row, got an empty set")
        lengths, size = [len(item) for item in items], batch_size or self.batch_size
        if blocks is None:
            sampler = LengthBucketBatchSampler(lengths, size, shuffle, self.seed, even=even)
        else:
            sampler = RandomBlockSampler(lengths, size, blocks, self.seed)
        return ResumableLoader(
            EncodedDataset(items),
            batch_size=None,
            sampler=sampler,
            collate_fn=partial(collate, pad_id=self.pad_id),
            num_workers=self.num_workers,
        )

    @property
    def pad_id(self) -> int:
        """Token put where nothing is."""
        pad_id = self.tokenizer.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move the tensors of a batch; its rows (frozen dataclasses) stay as they are."""
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        return Batch(**moved)  # type: ignore[typeddict-item]

    @property
    def validation_names(self) -> list[str]:
        """Name of each validation dataloader, for `callbacks.FisherCollector`."""
        return ["calibration"]

    def validation_fingerprint(self, name: str) -> str:
        """Return `fingerprint` of the rows behind a validation dataloader."""
        return self.fingerprint(name)

    def fingerprint(self, split: str) -> str:
        """Return the sha256 hex digest of a split's ids, prompts and responses."""
        return fingerprint_rows(self.rows[split])
