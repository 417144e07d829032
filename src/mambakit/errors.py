"""What a user can cause, as exceptions. Each message names the argument or file, what it got and what it wanted.

    MambakitError
    ├── ArgumentError (ValueError)   a wrong argument of a function
    │   ├── ShapeError               a size that does not fit
    │   └── DtypeError               a dtype that does not fit
    ├── ConfigError (ValueError)     a wrong or unknown field of a config
    ├── BackendError                 the named backend cannot run here
    ├── DataError                    a corpus, token file or tokenizer that cannot be used
    ├── CheckpointError              a checkpoint that cannot be read or written
    └── TrainingError                a run that cannot go on (non-finite loss)

The command line prints the message on one line and exits with 2. Our own invariants are `assert`s instead.
"""

from __future__ import annotations


class MambakitError(Exception):
    """Base of every error that a user of mambakit can cause and mend."""


class ArgumentError(MambakitError, ValueError):
    """An argument has a value that the function cannot work with."""


class ShapeError(ArgumentError):
    """The shape of an argument disagrees with the others or with the definition."""


class DtypeError(ArgumentError):
    """The dtype of an argument is not one that the function takes."""


class ConfigError(MambakitError, ValueError):
    """A config has an unknown field, or a field has a value outside its range."""


class BackendError(MambakitError, RuntimeError):
    """The backend that was asked for cannot run this call on this machine."""


class DataError(MambakitError):
    """A text source, token file or tokenizer is missing, malformed or too small."""


class CheckpointError(MambakitError):
    """A checkpoint is missing, damaged, of another model, or from a newer version."""


class TrainingError(MambakitError):
    """Training cannot continue."""
