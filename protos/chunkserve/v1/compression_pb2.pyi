from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CompressRequest(_message.Message):
    __slots__ = ("tenant", "session_id", "compression")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    session_id: str
    compression: _types_pb2.CompressionPolicy
    def __init__(self, tenant: _Optional[str] = ..., session_id: _Optional[str] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ...) -> None: ...

class CompressResponse(_message.Message):
    __slots__ = ("session_version", "original_bytes", "original_kept_tokens")
    SESSION_VERSION_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_version: int
    original_bytes: int
    original_kept_tokens: int
    def __init__(self, session_version: _Optional[int] = ..., original_bytes: _Optional[int] = ..., original_kept_tokens: _Optional[int] = ...) -> None: ...
