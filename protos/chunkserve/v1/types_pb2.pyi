from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scorer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORER_UNSPECIFIED: _ClassVar[Scorer]
    SCORER_WINDOW: _ClassVar[Scorer]
    SCORER_RECONSTRUCTION: _ClassVar[Scorer]
    SCORER_KEY_DIFF: _ClassVar[Scorer]
    SCORER_HEAVY_HITTER: _ClassVar[Scorer]
    SCORER_RECENCY: _ClassVar[Scorer]
    SCORER_EXPECTED_ATTENTION: _ClassVar[Scorer]
    SCORER_KEY_NORM: _ClassVar[Scorer]
    SCORER_RECALL: _ClassVar[Scorer]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_NATIVE: _ClassVar[Precision]
    PRECISION_FP8: _ClassVar[Precision]
    PRECISION_INT8: _ClassVar[Precision]
    PRECISION_INT4: _ClassVar[Precision]

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_CHUNK: _ClassVar[Unit]
    UNIT_TOKEN: _ClassVar[Unit]
    UNIT_SENTENCE: _ClassVar[Unit]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_HEAD: _ClassVar[Scope]
    SCOPE_LAYER: _ClassVar[Scope]
    SCOPE_GROUP: _ClassVar[Scope]
    SCOPE_GLOBAL: _ClassVar[Scope]

class BudgetSpread(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_SPREAD_UNSPECIFIED: _ClassVar[BudgetSpread]
    BUDGET_SPREAD_UNIFORM: _ClassVar[BudgetSpread]
    BUDGET_SPREAD_PYRAMID: _ClassVar[BudgetSpread]
    BUDGET_SPREAD_ADAPTIVE: _ClassVar[BudgetSpread]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
SCORER_UNSPECIFIED: Scorer
SCORER_WINDOW: Scorer
SCORER_RECONSTRUCTION: Scorer
SCORER_KEY_DIFF: Scorer
SCORER_HEAVY_HITTER: Scorer
SCORER_RECENCY: Scorer
SCORER_EXPECTED_ATTENTION: Scorer
SCORER_KEY_NORM: Scorer
SCORER_RECALL: Scorer
PRECISION_UNSPECIFIED: Precision
PRECISION_NATIVE: Precision
PRECISION_FP8: Precision
PRECISION_INT8: Precision
PRECISION_INT4: Precision
UNIT_UNSPECIFIED: Unit
UNIT_CHUNK: Unit
UNIT_TOKEN: Unit
UNIT_SENTENCE: Unit
SCOPE_UNSPECIFIED: Scope
SCOPE_HEAD: Scope
SCOPE_LAYER: Scope
SCOPE_GROUP: Scope
SCOPE_GLOBAL: Scope
BUDGET_SPREAD_UNSPECIFIED: BudgetSpread
BUDGET_SPREAD_UNIFORM: BudgetSpread
BUDGET_SPREAD_PYRAMID: BudgetSpread
BUDGET_SPREAD_ADAPTIVE: BudgetSpread
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class ChatMessage(_message.Message):
    __slots__ = ("role", "content", "cache_breakpoint")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    CACHE_BREAKPOINT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    cache_breakpoint: bool
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ..., cache_breakpoint: _Optional[bool] = ...) -> None: ...

class ChatInput(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class CompressionPolicy(_message.Message):
    __slots__ = ("keep_ratio", "max_kept_tokens", "scorer", "unit", "scope", "spread", "precision", "chunk_size", "window_size", "sink_tokens", "reuse_interval", "max_kv_tokens", "prefix_scorer", "pool_size", "head_floor", "gating", "merge_layers", "preset", "prefix_preset", "vote_power")
    KEEP_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    SPREAD_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SIZE_FIELD_NUMBER: _ClassVar[int]
    SINK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSE_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    MAX_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SCORER_FIELD_NUMBER: _ClassVar[int]
    POOL_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FLOOR_FIELD_NUMBER: _ClassVar[int]
    GATING_FIELD_NUMBER: _ClassVar[int]
    MERGE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRESET_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PRESET_FIELD_NUMBER: _ClassVar[int]
    VOTE_POWER_FIELD_NUMBER: _ClassVar[int]
    keep_ratio: float
    max_kept_tokens: int
    scorer: Scorer
    unit: Unit
    scope: Scope
    spread: BudgetSpread
    precision: Precision
    chunk_size: int
    window_size: int
    sink_tokens: int
    reuse_interval: int
    max_kv_tokens: int
    prefix_scorer: Scorer
    pool_size: int
    head_floor: float
    gating: float
    merge_layers: bool
    preset: str
    prefix_preset: str
    vote_power: int
    def __init__(self, keep_ratio: _Optional[float] = ..., max_kept_tokens: _Optional[int] = ..., scorer: _Optional[_Union[Scorer, str]] = ..., unit: _Optional[_Union[Unit, str]] = ..., scope: _Optional[_Union[Scope, str]] = ..., spread: _Optional[_Union[BudgetSpread, str]] = ..., precision: _Optional[_Union[Precision, str]] = ..., chunk_size: _Optional[int] = ..., window_size: _Optional[int] = ..., sink_tokens: _Optional[int] = ..., reuse_interval: _Optional[int] = ..., max_kv_tokens: _Optional[int] = ..., prefix_scorer: _Optional[_Union[Scorer, str]] = ..., pool_size: _Optional[int] = ..., head_floor: _Optional[float] = ..., gating: _Optional[float] = ..., merge_layers: _Optional[bool] = ..., preset: _Optional[str] = ..., prefix_preset: _Optional[str] = ..., vote_power: _Optional[int] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("text", "token_ids", "first_token_index", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    first_token_index: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., first_token_index: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "matched_stop", "num_generated_tokens", "num_total_tokens", "seed", "session_version", "first_token_ms", "decode_ms", "commit_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SESSION_VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_MS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    matched_stop: str
    num_generated_tokens: int
    num_total_tokens: int
    seed: int
    session_version: int
    first_token_ms: float
    decode_ms: float
    commit_ms: float
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., matched_stop: _Optional[str] = ..., num_generated_tokens: _Optional[int] = ..., num_total_tokens: _Optional[int] = ..., seed: _Optional[int] = ..., session_version: _Optional[int] = ..., first_token_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ..., commit_ms: _Optional[float] = ...) -> None: ...
