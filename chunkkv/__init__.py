"""ChunkKV: keep the chunks of a KV cache that matter. Tensors in, tensors or bytes out.

Source: https://arxiv.org/abs/2502.00299.
"""

from chunkkv.attention import QueryProbe, make_observable, observable
from chunkkv.cache import KVCache
from chunkkv.codec import EncodedKV, Header, decode, encode, read_header
from chunkkv.compressed import CompressedKV, LayerKV, LayerShape, SpanShape, size_bytes
from chunkkv.compressor import compress
from chunkkv.errors import (
    ChunkKVError,
    CorruptError,
    DatasetError,
    FormatError,
    InvalidInputError,
    InvalidPolicyError,
    MismatchError,
)
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy, Precision
from chunkkv.policy_file import policy_from_file, write_policy
from chunkkv.prefill import generation_inputs, prefill, run_prefill
from chunkkv.prefilled import Prefilled
from chunkkv.presets import PRESETS, Preset, preset
from chunkkv.recompress import is_prunable, recompress
from chunkkv.scoring import key_diff_scores, recollect, reconstruct, repeat, window_scores
from chunkkv.selection import Selection, select, select_positions
from chunkkv.sentence_ends import sentence_ending_tokens
from chunkkv.units import Units, chunks, sentences

__all__ = [
    "PRESETS",
    "ChunkKVError",
    "CompressedKV",
    "CompressionPolicy",
    "CorruptError",
    "DatasetError",
    "EncodedKV",
    "FormatError",
    "Header",
    "InvalidInputError",
    "InvalidPolicyError",
    "KVCache",
    "LayerKV",
    "LayerShape",
    "MismatchError",
    "Precision",
    "Prefilled",
    "Preset",
    "QueryProbe",
    "Selection",
    "SpanShape",
    "Units",
    "chunks",
    "compress",
    "decode",
    "encode",
    "generation_inputs",
    "is_prunable",
    "key_diff_scores",
    "make_observable",
    "model_fingerprint",
    "observable",
    "policy_from_file",
    "prefill",
    "preset",
    "read_header",
    "recollect",
    "recompress",
    "reconstruct",
    "repeat",
    "run_prefill",
    "select",
    "select_positions",
    "sentence_ending_tokens",
    "sentences",
    "size_bytes",
    "window_scores",
    "write_policy",
]
