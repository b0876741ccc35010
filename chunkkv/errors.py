"""What can go wrong in the library. Every error is a ``ChunkKVError``."""


class ChunkKVError(Exception):
    """Base of all errors of this library."""


class InvalidPolicyError(ChunkKVError, ValueError):
    """A compression policy has a value out of range."""


class InvalidInputError(ChunkKVError, ValueError):
    """Tensors, caches or models do not fit together."""


class FormatError(ChunkKVError):
    """Bytes are not an object of a format version that this library reads."""


class CorruptError(ChunkKVError):
    """Bytes are damaged: cut short, or a checksum does not match."""


class MismatchError(ChunkKVError):
    """An object is intact but belongs to another model, or is another object."""


class DatasetError(ChunkKVError):
    """Evaluation data is missing, or is not in the format that was published."""
