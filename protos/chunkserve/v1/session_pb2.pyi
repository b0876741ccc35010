import datetime

from chunkserve.v1 import types_pb2 as _types_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Session(_message.Message):
    __slots__ = ("session_id", "model", "version", "num_turns", "num_tokens", "num_kept_tokens", "stored_bytes", "compression", "create_time", "update_time", "expire_time", "ttl", "segments")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_TURNS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    version: int
    num_turns: int
    num_tokens: int
    num_kept_tokens: int
    stored_bytes: int
    compression: _types_pb2.CompressionPolicy
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    ttl: _duration_pb2.Duration
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., num_turns: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_kept_tokens: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("segment_id", "first_token", "num_tokens", "num_kept_tokens", "size_bytes", "kv_bytes", "compression", "recompression", "is_prefix")
    SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    RECOMPRESSION_FIELD_NUMBER: _ClassVar[int]
    IS_PREFIX_FIELD_NUMBER: _ClassVar[int]
    segment_id: str
    first_token: int
    num_tokens: int
    num_kept_tokens: int
    size_bytes: int
    kv_bytes: int
    compression: _types_pb2.CompressionPolicy
    recompression: Recompression
    is_prefix: bool
    def __init__(self, segment_id: _Optional[str] = ..., first_token: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_kept_tokens: _Optional[int] = ..., size_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., recompression: _Optional[_Union[Recompression, _Mapping]] = ..., is_prefix: _Optional[bool] = ...) -> None: ...

class Recompression(_message.Message):
    __slots__ = ("max_kept_tokens", "precision", "original_kept_tokens", "original_bytes", "original_segment_id", "by_pressure", "time")
    MAX_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_SEGMENT_ID_FIELD_NUMBER: _ClassVar[int]
    BY_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    max_kept_tokens: int
    precision: _types_pb2.Precision
    original_kept_tokens: int
    original_bytes: int
    original_segment_id: str
    by_pressure: bool
    time: _timestamp_pb2.Timestamp
    def __init__(self, max_kept_tokens: _Optional[int] = ..., precision: _Optional[_Union[_types_pb2.Precision, str]] = ..., original_kept_tokens: _Optional[int] = ..., original_bytes: _Optional[int] = ..., original_segment_id: _Optional[str] = ..., by_pressure: _Optional[bool] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("session_id", "model", "compression", "ttl")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    model: str
    compression: _types_pb2.CompressionPolicy
    ttl: _duration_pb2.Duration
    def __init__(self, session_id: _Optional[str] = ..., model: _Optional[str] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "new_session_id", "ttl")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    new_session_id: str
    ttl: _duration_pb2.Duration
    def __init__(self, session_id: _Optional[str] = ..., new_session_id: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class CompressSessionRequest(_message.Message):
    __slots__ = ("session_id", "compression")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    compression: _types_pb2.CompressionPolicy
    def __init__(self, session_id: _Optional[str] = ..., compression: _Optional[_Union[_types_pb2.CompressionPolicy, _Mapping]] = ...) -> None: ...

class CompressSessionResponse(_message.Message):
    __slots__ = ("session", "original_bytes", "original_kept_tokens")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    original_bytes: int
    original_kept_tokens: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., original_bytes: _Optional[int] = ..., original_kept_tokens: _Optional[int] = ...) -> None: ...

class ExportSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class SessionPiece(_message.Message):
    __slots__ = ("manifest", "segment_header", "segment_part", "end")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_PART_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    segment_header: bytes
    segment_part: bytes
    end: SessionEnd
    def __init__(self, manifest: _Optional[bytes] = ..., segment_header: _Optional[bytes] = ..., segment_part: _Optional[bytes] = ..., end: _Optional[_Union[SessionEnd, _Mapping]] = ...) -> None: ...

class SessionEnd(_message.Message):
    __slots__ = ("num_pieces", "sha256")
    NUM_PIECES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    num_pieces: int
    sha256: bytes
    def __init__(self, num_pieces: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class ExportSessionResponse(_message.Message):
    __slots__ = ("piece",)
    PIECE_FIELD_NUMBER: _ClassVar[int]
    piece: SessionPiece
    def __init__(self, piece: _Optional[_Union[SessionPiece, _Mapping]] = ...) -> None: ...

class ImportSessionRequest(_message.Message):
    __slots__ = ("piece", "new_session_id")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    piece: SessionPiece
    new_session_id: str
    def __init__(self, piece: _Optional[_Union[SessionPiece, _Mapping]] = ..., new_session_id: _Optional[str] = ...) -> None: ...

class ImportSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...
