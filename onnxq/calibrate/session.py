"""ONNX Runtime, opened the way onnxq needs it: from bytes, quietly, on the device asked for.

session = open_session(model_bytes, folder=Path("where/the/weights/are"))
hidden, logits = session.run(["hidden", "logits"], {"input_ids": ids})
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError, missing_package
from onnxq.files import refuse_unreadable

Device = Literal["auto", "cpu", "cuda"]
Array = NDArray[Any]

# What ONNX Runtime calls its tensor types.
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn),
    "tensor(float8e5m2)": np.dtype(ml_dtypes.float8_e5m2),
}
# Those that ONNX Runtime's numpy interface does not know, with onnx.TensorProto's numbers for them
# (this room does not import onnx).
_FOREIGN: dict[np.dtype[Any], int] = {
    np.dtype(ml_dtypes.bfloat16): 16,
    np.dtype(ml_dtypes.float8_e4m3fn): 17,
    np.dtype(ml_dtypes.float8_e5m2): 19,
}
_QUIET = 4  # ONNX Runtime's severity FATAL: what fails is raised, and onnxq says it in one line
_NO_QDQ_FUSION = "session.disable_quant_qdq"
_NO_KERNEL = ("type error", "could not find an implementation", "failed to find kernel")
_TWO_TYPES = ("quantizelinear", "output_dtype", "zero_point type")


@dataclass(frozen=True)
class InputSpec:
    """A model input; `shape` holds an int where a dimension is fixed, else its name or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        dims = ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}[{dims}] {self.dtype.name}"


@dataclass(frozen=True)
class Session:
    """A loaded model. `notes` say what was done to make it load; `provider` is where it runs."""

    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    provider: str
    notes: tuple[str, ...]
    _session: Any = field(repr=False)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.outputs)

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """The named outputs (None: all), in that order, BF16 and FP8 as ml_dtypes arrays.

        On the CPU the arrays are ONNX Runtime's own buffers, not copies.

        Raises:
            OnnxqError: ONNX Runtime fails, with its message.
        """
        names = list(self.output_names if outputs is None else outputs)
        dtypes = {output.name: output.dtype for output in self.outputs}
        feed = {spec.name: feed[spec.name] for spec in self.inputs if spec.name in feed}
        used = {array.dtype for array in feed.values()} | {dtypes[name] for name in names}
        try:
            if used & _FOREIGN.keys():
                arrays = self._run_bound(names, feed, dtypes)
            else:
                arrays = self._session.run(names, dict(feed))
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise OnnxqError(
                f"ONNX Runtime could not run the model: {one_line(error)}",
                "check that the data is what this model expects",
            ) from error
        return list(arrays)

    def _run_bound(
        self, names: list[str], feed: Mapping[str, Array], dtypes: Mapping[str, np.dtype[Any]]
    ) -> list[Array]:
        """The outputs where BF16 or FP8 goes in or out, which `run` does not take or give."""
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, _ort_value(array))
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values = zip(binding.get_outputs(), names, strict=True)
        return [_array(value, dtypes[name]) for value, name in values]


def open_session(
    model: Path | bytes,
    *,
    folder: Path | None = None,
    device: Device = "auto",
    threads: int | None = None,
    arena: bool = True,
) -> Session:
    """Load a model into ONNX Runtime.

    Args:
        model: a file, or a serialized ModelProto.
        folder: where the external weights of serialized `model` lie. They are read from there;
            nothing is written.
        device: `auto` takes CUDA where ONNX Runtime has it; `cuda` insists.
        threads: ONNX Runtime's intra-op threads; None: one per core.
        arena: keep freed buffers for the next ones. Without, memory is what the tensors alive take:
            3.8 GB instead of 5.2 GB and more for SDXL's first attentions.

    Raises:
        OnnxqError: no onnxruntime, no CUDA though asked for, or the model does not load.
    """
    ort = _onnxruntime()
    providers, notes = _providers(ort, device)
    options = _options(ort, folder, threads)
    options.enable_cpu_mem_arena = arena
    if isinstance(model, Path):
        refuse_unreadable(model, "the model", "name the .onnx file itself")
    try:
        session = _load(ort, model, options, providers)
    except Exception as error:
        if not _is_qdq_fusion(error):
            raise _load_error(model, error) from error
        options.add_session_config_entry(_NO_QDQ_FUSION, "1")
        try:
            session = _load(ort, model, options, providers)
        except Exception as second:
            raise _load_error(model, second) from second
        notes.append(
            f"loaded with the session option {_NO_QDQ_FUSION}=1: with its default options this "
            "ONNX Runtime turns 8-bit layers into a form it has no kernel for"
        )
    provider = session.get_providers()[0]
    if device == "cuda" and provider != "CUDAExecutionProvider":
        raise _no_cuda("it is there but could not be started (driver or CUDA libraries missing)")
    if device == "auto" and len(providers) > 1 and provider != "CUDAExecutionProvider":
        notes.append("ONNX Runtime could not start CUDA; the model runs on the CPU")
    return Session(
        inputs=tuple(_spec(node) for node in session.get_inputs()),
        outputs=tuple(_spec(node) for node in session.get_outputs()),
        provider=provider,
        notes=tuple(notes),
        _session=session,
    )


def one_line(error: BaseException, limit: int = 400) -> str:
    """An exception's text on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "running the model") from error
    return onnxruntime


def _providers(ort: Any, device: Device) -> tuple[list[Any], list[str]]:
    available = ort.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise _no_cuda(f"it has {', '.join(available)}")
    if device == "cpu" or "CUDAExecutionProvider" not in available:
        return ["CPUExecutionProvider"], []
    # TF32 keeps ten mantissa bits: ranges would depend on the GPU's generation.
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"], []


def _no_cuda(why: str) -> OnnxqError:
    return OnnxqError(
        f"the device 'cuda' was asked for, but this ONNX Runtime has no CUDA provider: {why}",
        "install onnxq[gpu] (onnxruntime-gpu) or use the device 'cpu'",
    )


def _options(ort: Any, folder: Path | None, threads: int | None) -> Any:
    """Session options. The arena and the memory pattern stay on: measured on SmolLM2, 512 tokens,

    without the arena a forward takes 3 times as long and its peak is a quarter higher (1.07 GB
    against 0.84 GB), because every buffer is asked of the system and cleared again.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads or 0
    # The arena reuses buffers by itself. Planning it beforehand takes time quadratic in the number
    # of tensors that live long: a UNet's ranges took 21 s of the CPU, and 5.4 s without, with the
    # same values and peak; SmolLM2 loads in 0.5 s instead of 0.75, and runs as fast.
    options.enable_mem_reuse = False
    # Its fusion of a 4-bit weight's DequantizeLinear with MatMul quantizes the activations to INT8
    # unless told to keep them: 39 dB where the model asks for 136.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
    return options


def _load(ort: Any, model: Path | bytes, options: Any, providers: list[Any]) -> Any:
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=providers)


def _is_qdq_fusion(error: Exception) -> bool:
    """Whether loading failed because ONNX Runtime rewrote Q/DQ: it fused 8-bit floats
    (MatMulIntegerToFloat, ...), or moved DequantizeLinear and put a pair of two types behind."""
    text = str(error).lower()
    no_kernel = "float8" in text and any(reason in text for reason in _NO_KERNEL)
    return no_kernel or all(word in text for word in _TWO_TYPES)


def _load_error(model: Path | bytes, error: Exception) -> OnnxqError:
    what = str(model) if isinstance(model, Path) else "the model"
    hint = "check that the file is a whole ONNX model and that its external data lies beside it"
    if "NOT_IMPLEMENTED" in str(error):
        hint = "this device has no kernel for that type: try --device cuda, or an FP32 original"
    return OnnxqError(f"ONNX Runtime cannot load {what}: {one_line(error)}", hint)


def _spec(node: Any) -> InputSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise OnnxqError(
            f"{node.name!r} is a {node.type}: onnxq handles tensors of numbers only",
            "take the string, sequence or optional out of the model's inputs and outputs",
        )
    return InputSpec(node.name, dtype, tuple(node.shape))


def _ort_value(array: Array) -> Any:
    ort = _onnxruntime()
    if array.dtype not in _FOREIGN:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _FOREIGN[array.dtype])


def _array(value: Any, dtype: np.dtype[Any]) -> Array:
    """A numpy array of an OrtValue in CPU memory; BF16 and FP8 through their bits."""
    if dtype not in _FOREIGN:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, dtype)
    kind = ctypes.c_uint16 if dtype.itemsize == 2 else ctypes.c_uint8
    bits = np.ctypeslib.as_array((kind * count).from_address(value.data_ptr()))
    return bits.reshape(shape).copy().view(dtype)  # a copy: the buffer goes with the OrtValue
