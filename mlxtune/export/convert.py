"""`mlxtune convert`: a model into GGUF, or into a folder, whole or packed."""

from __future__ import annotations

import glob
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxtune.device import on_cpu
from mlxtune.export.calibrate import importance_of
from mlxtune.export.runtime import RuntimeCheck, check_in_llamacpp, installed
from mlxtune.export.source import Convertible, language_model, open_source, require_whole
from mlxtune.export.verify import SAMPLE, Readback, read_back, read_back_folder
from mlxtune.files import atomic_files, atomic_folder, require_apart
from mlxtune.fuse import dense_config, write_configs
from mlxtune.gguf.architectures import for_config
from mlxtune.gguf.tensors import SourceTensor
from mlxtune.gguf.writer import Importance, Written, write_gguf
from mlxtune.memory import GB, memory_budget
from mlxtune.models.fields import with_all_fields
from mlxtune.models.folder import dense_pieces, packable, packed_pieces
from mlxtune.models.safetensors import write_safetensors
from mlxtune.models.tokenizer_files import save_tokenizer

Progress = Callable[[str], None]


def _quiet(_: str) -> None:
    pass


@dataclass(frozen=True)
class Verified:
    """What was seen of a written file.

    Attributes:
        readback: its tensors, tokenizer and template, read back.
        llamacpp: what it says there; None where that is not installed, and of folders.
        tried_on: `records` of the run, or `texts` that come with mlxtune; None if not tried.
        not_run: why llama.cpp was not asked though it is installed; None where it was.
    """

    readback: Readback
    llamacpp: RuntimeCheck | None
    tried_on: str | None = None
    not_run: str | None = None


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: the GGUF or folder.
        files: names of the weight files in it.
        nbytes: of them together.
        types: how many tensors have which type.
        verified: how it differs from its source; None if it was not looked at.
        unweighed: how many matrices the importance that was given says nothing of.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int
    types: dict[str, int]
    verified: Verified | None
    unweighed: int = 0

    def as_json(self) -> str:
        """For `--json`."""
        return json.dumps(asdict(self), indent=2, default=str)


def convert(
    source: str,
    output: Path,
    *,
    file_type: str = "f16",
    imatrix: Path | None = None,
    calibration: Path | None = None,
    save_imatrix: Path | None = None,
    pre: str | None = None,
    split_max_bytes: int = 0,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress = _quiet,
) -> Conversion:
    """Write a model as GGUF.

    Args:
        source: a run, a folder, a GGUF or a hub id.
        output: the file, `*.gguf`.
        file_type: of `FILE_TYPES`.
        imatrix: llama.cpp's importance matrix.
        calibration: in its place, texts to find the importance by.
        save_imatrix: where to keep what was found.
        pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.
        split_max_bytes: begin a new file beyond that.
        verify: read the file back and compare it.
        overwrite: replace a file that is there.
        progress: is told what is being done.

    Raises:
        ExportError: the model cannot be written, or came out wrong.
        DataError: the texts to calibrate on cannot be read.
        OutputExists, StorageError: nothing was written.
    """
    progress("opening")
    model = language_model(open_source(source))
    for_config(model.config)
    require_whole(model, source)
    parts = f"{glob.escape(output.stem)}-?????-of-?????.gguf" if split_max_bytes else None
    given = [path for path in (imatrix, calibration) if path is not None]
    for place in (output, *(output.parent.glob(parts) if parts else ())):
        require_apart(place, (*model.places, *given), beside=True)
    if save_imatrix is not None:
        require_apart(save_imatrix, (*model.places, *given), beside=True)
    with atomic_files(output, overwrite=overwrite, parts=parts) as folder:
        importance = importance_of(
            model.load,
            file_type,
            imatrix=imatrix,
            calibration=calibration,
            save=save_imatrix,
            overwrite=overwrite,
            progress=progress,
        )
        written, verified = write_model(
            folder / output.name,
            model,
            file_type=file_type,
            importance=importance,
            pre=pre,
            split_max_bytes=split_max_bytes,
            verify=verify,
            progress=progress,
        )
        names = tuple(file.name for file in written.files)
        size = sum(file.stat().st_size for file in written.files)
    types, unweighed = _counted(written), len(written.unweighed)
    return Conversion(output.with_name(names[0]), names, size, types, verified, unweighed)


def write_model(
    path: Path,
    model: Convertible,
    *,
    file_type: str,
    importance: Importance | None = None,
    pre: str | None = None,
    split_max_bytes: int = 0,
    verify: bool = True,
    rows: Callable[[], Sequence[Sequence[int]] | None] = lambda: None,
    progress: Progress = _quiet,
) -> tuple[Written, Verified | None]:
    """Write an opened model as GGUF, read it back, and run it where llama.cpp is at hand.

    Args:
        path: the file.
        model: what to write.
        file_type, importance, pre, split_max_bytes, progress: as in `convert`.
        verify: compare the file with the model.
        rows: gives token ids for which llama.cpp and MLX are compared, or None for those of
            some texts. Asked only where that is done.

    Raises:
        ExportError: the model cannot be written, or came out wrong.
    """
    tokenizer = model.tokenizer()._tokenizer
    written = write_gguf(
        path,
        config=model.config,
        tensors=model.tensors(),
        tokenizer=model.vocabulary(pre),
        file_type=file_type,
        name=_told_name(model),
        importance=importance,
        split_max_bytes=split_max_bytes,
        progress=progress,
    )
    if not verify:
        return written, None
    texts = [text.lstrip(" ") for text in SAMPLE] if model.only_pieces else SAMPLE
    readback = read_back(
        written.files[0],
        model.config,
        model.tensors(),
        tokenizer,
        texts,
        importance=importance,
        # transformers puts none before a text where it is told nothing, others do.
        begins=not model.only_pieces,
        progress=progress,
    )
    if not installed():
        return written, Verified(readback, None)
    needed, budget = _running_bytes(model, written), memory_budget(None)
    if needed > budget:
        why = f"it would take some {needed / GB:.1f} GB, and {budget / GB:.1f} are there"
        return written, Verified(readback, None, not_run=why)
    progress("running it in llama.cpp")
    records = rows()
    tried = [tokenizer(text).input_ids for text in SAMPLE] if records is None else records
    check = check_in_llamacpp(written.files[0], model.load().model, tried, file_type, tokenizer)
    return written, Verified(readback, check, "texts" if records is None else "records")


def _running_bytes(model: Convertible, written: Written) -> int:
    """What the model takes in MLX and in llama.cpp at the same time."""
    wide = 4 if on_cpu() else 2
    weights = sum(math.prod(tensor.shape) for tensor in model.tensors())
    return wide * weights + sum(file.stat().st_size for file in written.files)


_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
_PHI3_MARKS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def _told_name(model: Convertible) -> str:
    """`general.name`, by which llama.cpp decides that marks swallow the space behind them.

    It does so where the name says Phi 3, as Phi 3 needs it, and loads no such file whose
    vocabulary lacks Phi 3's marks.
    """
    has_marks = set(model.tokenizer().get_vocab()) >= _PHI3_MARKS
    if model.config["model_type"] == "phi3" and has_marks:
        return model.name if _PHI3.search(model.name) else f"{model.name} (Phi-3)"
    return _PHI3.sub("phi_3", model.name)


def convert_to_folder(
    source: str,
    output: Path,
    *,
    dtype: str | None = None,
    mlx_bits: int | None = None,
    group_size: int = 64,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress = _quiet,
) -> Conversion:
    """Write a model as a folder that transformers and mlx-lm load, or packed for mlx-lm.

    Args:
        source: a run, a folder, a GGUF or a hub id.
        output: the folder.
        dtype: of the weights; as the source stores its own by default.
        mlx_bits: pack matrices to so many bits with MLX.
        group_size: weights that share a scale when packed.
        verify: read the folder back and compare it.
        overwrite: replace a folder that is there.
        progress: is told what is being done.

    Raises:
        ModelError: there is no model, or it is damaged.
        ExportError: the folder came out wrong.
        OutputExists, StorageError: nothing was written.
    """
    progress("opening")
    model = language_model(open_source(source))
    require_apart(output, model.places)
    require_whole(model, source)
    dtype = dtype or model.dtype
    config = dense_config(with_all_fields(model.config, model.places[0]), dtype)

    def kind(tensor: SourceTensor) -> str:
        return f"{mlx_bits} bits" if mlx_bits and packable(tensor, group_size) else dtype

    with atomic_folder(output, overwrite=overwrite, marker="config.json") as folder:
        save_tokenizer(folder, model.tokenizer())
        if mlx_bits is None:
            pieces = dense_pieces(model.tensors(), dtype, config)
        else:
            packing = {"group_size": group_size, "bits": mlx_bits, "mode": "affine"}
            config |= {"quantization": packing, "quantization_config": packing}
            pieces = packed_pieces(
                model.tensors(), bits=mlx_bits, group_size=group_size, dtype=dtype
            )
        write_configs(folder, config, model.tokenizer(), model.places[0])
        write_safetensors(folder, pieces, progress=progress)
        files = sorted(folder.glob("model*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        names = tuple(file.name for file in files)
        verified = None
        if verify:
            tokenizer = model.tokenizer()._tokenizer
            readback = read_back_folder(
                folder, model.config, model.tensors(), tokenizer, kind, progress=progress
            )
            verified = Verified(readback, None)
        types = Counter(kind(tensor) for tensor in model.tensors())
    return Conversion(output, names, size, dict(types), verified)


def _counted(written: Written) -> dict[str, int]:
    return dict(Counter(type_.name for type_ in written.types.values()))
