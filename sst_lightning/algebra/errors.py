"""Errors a user can act on: one sentence that names the file, the key and the remedy."""


class SSTMergeError(ValueError):
    """Base of every error caused by the user's input rather than by a defect of the program.

    The command line prints the message without a traceback and exits with status 2.
    """


class AdapterError(SSTMergeError):
    """A LoRA adapter folder cannot be read, holds bad values or does not fit the others."""


class FisherError(SSTMergeError):
    """A Fisher file cannot be read or belongs to another merge."""


class DataError(SSTMergeError):
    """A data file has missing columns, empty rows or bad encoding."""


class BackboneError(SSTMergeError):
    """A base model cannot be found or loaded."""


class OutputExistsError(SSTMergeError):
    """An output is already there and overwriting was not asked for."""


class JudgeError(SSTMergeError):
    """A judge of answers is missing, or gave what is not a score."""


class DiskFullError(SSTMergeError):
    """An output does not fit on its disk; what was there before is unchanged."""


class CheckpointError(SSTMergeError):
    """A checkpoint cannot be read, or belongs to another model."""
