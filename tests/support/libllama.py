"""llama.cpp's own library, which quantizes whole files."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from mlxtune.gguf.mixing import FILE_TYPES
from mlxtune.gguf.reader import GGUFFile


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params` of llama.h; the room behind is for later fields."""

    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor")),
        *((name, ctypes.c_bool) for name in ("only_copy", "pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("room", ctypes.c_byte * 64),
    ]


class ImatrixData(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    ]


class LibLlama:
    def __init__(self, folder: Path) -> None:
        for pattern in ("libggml-base.so*", "libggml.*so*"):
            for path in sorted(folder.glob(pattern)):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(next(iter(sorted(folder.glob("libllama.*so*"))))))
        self.lib.llama_model_quantize_default_params.restype = Parameters
        self.lib.llama_model_quantize.restype = ctypes.c_uint32
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.log: list[str] = []
        self.keep = callback(lambda level, text, data: self.log.append(text.decode()))
        self.lib.llama_log_set(self.keep, None)

    def quantize(
        self,
        source: Path,
        path: Path,
        file_type: str,
        importance: dict[str, np.ndarray] | None = None,
    ) -> GGUFFile:
        parameters = self.lib.llama_model_quantize_default_params()
        assert (parameters.nthread, parameters.ftype) == (0, 7), "another llama.h"
        assert not parameters.imatrix and parameters.quantize_output_tensor
        parameters.nthread = 1
        parameters.allow_requantize = True  # the real model is packed
        parameters.ftype = int(FILE_TYPES[file_type].number)
        if importance:
            data = (ImatrixData * (len(importance) + 1))()
            for entry, (name, values) in zip(data, importance.items(), strict=False):
                entry.name, entry.size = name.encode(), values.size
                entry.data = values.ctypes.data
            parameters.imatrix = ctypes.cast(data, ctypes.c_void_p)
        arguments = str(source).encode(), str(path).encode(), ctypes.byref(parameters)
        assert self.lib.llama_model_quantize(*arguments) == 0, "".join(self.log[-3:])
        return GGUFFile(path)
