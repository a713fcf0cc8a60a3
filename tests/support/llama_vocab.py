"""llama.cpp's own tokenizer, out of the runtime's library: the judge of tokenizer tests."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from mlxtune.gguf.reader import Numbers
from mlxtune.gguf.writer import Writer

WIDTH = 32  # of the model that a vocabulary needs around it: as small as llama.cpp loads
LLAMA = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": WIDTH,
    "attention.head_count": 1,
}
ERROR = 4


class _Params(ctypes.Structure):
    """`llama_model_params`: only handed on, so its fields need not be known, only room."""

    _fields_ = (("bytes", ctypes.c_uint8 * 512),)


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class LlamaVocab:
    """Tokenizes as llama.cpp does with a vocabulary.

    Args:
        metadata: `tokenizer.*` of a GGUF, and `general.name` where that matters.
        folder: for a file, gone when the constructor returns.

    Raises:
        ValueError: llama.cpp refuses the vocabulary; its words are the message.
    """

    def __init__(self, metadata: dict[str, Any], folder: Path) -> None:
        path = folder / "vocab.gguf"
        _write(path, metadata)
        self._said: list[str] = []
        self._library = _library()
        log = _LOG(self._log)
        self._library.llama_log_set(log, None)
        try:
            params = self._library.llama_model_default_params()
            self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
        finally:
            self._library.llama_log_set(_SILENT, None)
            path.unlink()
        if not self._model:
            raise ValueError("".join(self._said))
        self._vocab = self._library.llama_model_get_vocab(self._model)

    def __call__(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are read as such."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocab, raw, len(raw), ids, room, add_special, True
        )
        assert count >= 0
        return ids[:count]

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out."""
        room = 64 * len(ids) + 64
        text = ctypes.create_string_buffer(room)
        array = (ctypes.c_int32 * len(ids))(*ids)
        count = self._library.llama_detokenize(
            self._vocab, array, len(ids), text, room, False, True
        )
        assert count >= 0
        return text.raw[:count].decode()

    def ends(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        model, self._model = self._model, None
        if model:
            self._library.llama_model_free(model)

    def __enter__(self) -> LlamaVocab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log(self, level: int, text: bytes, _data: object) -> None:
        if level >= ERROR:
            self._said.append(text.decode(errors="replace"))


_SILENT = _LOG(lambda _level, _text, _data: None)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    ids = ctypes.POINTER(ctypes.c_int32)
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_log_set", None, [_LOG, pointer]),
        ("llama_model_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_model_free", None, [pointer]),
        (
            "llama_tokenize",
            integer,
            [pointer, ctypes.c_char_p, integer, ids, integer, flag, flag],
        ),
        (
            "llama_detokenize",
            integer,
            [pointer, ids, integer, ctypes.c_char_p, integer, flag, flag],
        ),
        ("llama_vocab_is_eog", flag, [pointer, integer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


def _write(path: Path, metadata: dict[str, Any]) -> None:
    """A model of zeros around the vocabulary."""
    writer = Writer(path, "llama")
    for key, number in LLAMA.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, list | Numbers):
            writer.add_array(key, list(value))
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in matrices}
    shapes |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output_norm.weight": (WIDTH,)}
    shapes |= {"token_embd.weight": (len(metadata["tokenizer.ggml.tokens"]), WIDTH)}
    packed = gguf.GGMLQuantizationType.Q4_0
    block, size = gguf.GGML_QUANT_SIZES[packed]
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(name, np.zeros(shape, np.float32))
        else:
            row = shape[1] // block * size
            writer.add_tensor(name, np.zeros((shape[0], row), np.uint8), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
