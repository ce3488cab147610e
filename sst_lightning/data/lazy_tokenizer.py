"""The tokenizer of a DataModule."""

from typing import Any


class LazyTokenizer:
    """Loads the tokenizer at first use, so that making a DataModule needs no model files.

    Attributes:
        tokenizer_name: alias, hub id or folder of the model.
    """

    tokenizer_name: str
    _tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; tests may assign one."""
        if self._tokenizer is None:
            from sst_lightning.modules.backbone import load_tokenizer

            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
