"""Models as Polygraphy runners: an .onnx in ONNX Runtime, an engine in TensorRT where a GPU is.

What Polygraphy's runners leave to the caller is done here: inputs are checked and fitted to each
model (a candidate with FP16 inputs gets the FP32 data cast), and Polygraphy's log stays silent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 and the 8-bit floats with np.dtype()
import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.session import Session, one_line, open_session
from onnxq.errors import OnnxqError, missing_package

Array = NDArray[Any]
Feed = Mapping[str, Array]

Device = Literal["auto", "cpu", "cuda"]

_ENGINE_SUFFIXES = (".plan", ".engine", ".trt")

# ONNX Runtime's fix: https://github.com/microsoft/onnxruntime/pull/32452
_ROUNDS_HALVES_FROM = (1, 30)

# Where onnxruntime's name of a dtype is not numpy's.
_ORT_NAMES = {"float32": "float", "float64": "double", "object": "string"}


class Samples(Protocol):
    """A sized iterable of feeds {input name: array} that can be gone through more than once."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Feed]: ...


class Port(NamedTuple):
    """An input or output as onnxruntime's NodeArg describes it, which is what Polygraphy reads."""

    name: str
    type: str  # "tensor(float)"
    shape: Sequence[int | str | None]


@dataclass
class Model:
    """A labelled model that runs one feed at a time; open it with `with`.

    Attributes:
        notes: what a reader of the figures must know (session options, casts), in order.
    """

    label: str
    runner: Any  # polygraphy.backend.base.BaseRunner
    notes: list[str] = field(default_factory=list)

    def __enter__(self) -> Model:
        with quiet():
            self.runner.activate()
        for note in getattr(getattr(self.runner, "sess", None), "notes", ()):
            self.note(note)
        return self

    def __exit__(self, *_: object) -> None:
        with quiet():
            self.runner.deactivate()

    def note(self, text: str) -> None:
        """Keep a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def infer(self, feed: Feed) -> dict[str, Array]:
        """Outputs by name. The arrays may be overwritten by the next call.

        Raises:
            OnnxqError: the feed lacks an input or has it in another rank, size or kind of dtype;
                or the model failed on it.
        """
        with quiet():
            metadata = self.runner.get_input_metadata(use_numpy_dtypes=False)
            fitted = {name: self._fit(name, feed, metadata[name]) for name in metadata}
            try:
                outputs = self.runner.infer(fitted, check_inputs=False)
            except OnnxqError as error:
                raise OnnxqError(f"{self.label!r}: {error.message}", error.hint) from error
            except Exception as error:
                raise OnnxqError(
                    f"{self.label!r} failed on a sample: {one_line(error)}",
                    "check the data's shapes against the model's inputs",
                ) from error
        return dict(outputs)

    def _fit(self, name: str, feed: Feed, meta: Any) -> Array:
        if name not in feed:
            raise OnnxqError(
                f"{self.label!r} takes the input {name!r}, which the data lacks",
                f"the data holds: {', '.join(feed)}",
            )
        array, shape = np.asarray(feed[name]), meta.shape
        if shape is not None and not _fits(array.shape, shape):
            raise OnnxqError(
                f"{self.label!r} takes {name!r} as {_dims(shape)}, "
                f"the data has {_dims(array.shape)}"
            )
        return self._cast(name, array, _numpy_dtype(meta.dtype) or array.dtype)

    def _cast(self, name: str, array: Array, wanted: np.dtype[Any]) -> Array:
        if array.dtype == wanted:
            return array
        fitted = array.astype(wanted) if _kind(array.dtype) == _kind(wanted) else None
        if fitted is None or (_kind(wanted) == "integer" and not np.array_equal(fitted, array)):
            raise OnnxqError(
                f"{self.label!r} takes {name!r} in {wanted}, the data has {array.dtype}"
            )
        self.note(f"input {name!r} cast from {array.dtype} to {wanted}")
        return fitted


class _SessionPorts:
    """Our session with the face of an onnxruntime.InferenceSession, for Polygraphy."""

    def __init__(self, label: str, session: Session, outputs: Sequence[str] | None) -> None:
        self._session = session
        names = session.output_names
        self._outputs = names if outputs is None else tuple(o for o in outputs if o in names)
        if not self._outputs:
            raise OnnxqError(
                f"{label!r} has none of the outputs to compare: {', '.join(outputs or ())}",
                f"it gives: {', '.join(names)}",
            )
        self.notes: Sequence[str] = session.notes

    def get_inputs(self) -> list[Port]:
        return [
            Port(spec.name, _ort_type(spec.dtype), list(spec.shape))
            for spec in self._session.inputs
        ]

    def get_outputs(self) -> list[Port]:
        return [Port(name, "", ()) for name in self._outputs]

    def run(self, _: None, feed: Feed) -> Any:
        return self._session.run(self._outputs, dict(feed))


def onnx_model(
    label: str,
    model: Path | bytes,
    *,
    folder: Path | None = None,
    outputs: Sequence[str] | None = None,
    device: Device = "auto",
) -> Model:
    """An ONNX model in ONNX Runtime.

    Args:
        model: a file, or the bytes of one whose external data lies in `folder`.
        outputs: the outputs to compute, of those it has; None = all.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    def load() -> _SessionPorts:
        return _SessionPorts(label, open_session(model, folder=folder, device=device), outputs)

    return Model(label, OnnxrtRunner(load, name=label))


def engine_model(label: str, engine: Path) -> Model:
    """A TensorRT engine; needs a GPU and the TensorRT that built it.

    Raises:
        OnnxqError: no GPU, no TensorRT, or not a readable file.
    """
    if not engine.is_file():
        raise OnnxqError(f"{engine} does not exist")
    if not gpu_present():
        raise OnnxqError(
            f"{engine} is a compiled engine and needs an NVIDIA GPU to run; this machine has none",
            "compare the .onnx files here, and the engine on the machine it was compiled for",
        )
    backend = next(filter(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx")), None)
    if backend is None:
        raise missing_package("tensorrt", f"running {engine}")
    import polygraphy.config

    # Polygraphy's own process-wide choice; it must be made before its TensorRT backend is imported.
    polygraphy.config.USE_TENSORRT_RTX = backend == "tensorrt_rtx"
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return Model(label, TrtRunner(EngineFromBytes(BytesFromPath(str(engine))), name=label))


def any_model(label: str, model: Path, outputs: Sequence[str] | None, device: Device) -> Model:
    """`onnx_model` or `engine_model`, by the file's suffix."""
    if model.suffix.lower() in _ENGINE_SUFFIXES:
        return engine_model(label, model)
    return onnx_model(label, model, outputs=outputs, device=device)


def runnable(path: Path) -> contextlib.AbstractContextManager[tuple[Path, tuple[str, ...]]]:
    """`graph.simulate.runnable` for the ONNX Runtime that is installed."""
    from onnxq.graph import simulate

    return simulate.runnable(path, rounds_halves=_rounds_halves(), bf16=_computes_bf16())


def _rounds_halves() -> bool:
    """Whether ONNX Runtime's QuantizeLinear rounds FP16; before 1.30 it cuts off on the CPU."""
    try:
        import onnxruntime
    except ImportError:  # whoever opens a session says so
        return True
    major, minor = onnxruntime.__version__.split(".")[:2]
    return (int(major), int(minor)) >= _ROUNDS_HALVES_FROM


def _computes_bf16() -> bool:
    """Whether ONNX Runtime may find BF16 kernels: its CPU has none."""
    try:
        import onnxruntime
    except ImportError:
        return True
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def gpu_present() -> bool:
    """True if the CUDA driver is there and counts at least one device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    ) and count.value > 0


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Polygraphy's logger writes to stdout; the library must not."""
    from polygraphy.logger import G_LOGGER

    manager: contextlib.AbstractContextManager[Any] = G_LOGGER.verbosity(G_LOGGER.CRITICAL)
    return manager


def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The numpy dtype of a polygraphy DataType (float8e4m3fn is ml_dtypes' float8_e4m3fn)."""
    return np.dtype(dtype.name.replace("float8e", "float8_e")) if dtype else None


def _ort_type(dtype: Any) -> str:
    """onnxruntime's name of a numpy dtype: tensor(float), tensor(bfloat16), tensor(int64)."""
    name = np.dtype(dtype).name
    return f"tensor({_ORT_NAMES.get(name, name)})"


def _kind(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iu":
        return "integer"
    return "float" if dtype.kind == "f" or "float" in dtype.name else dtype.kind


def _fits(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or want < 0 or want == got
        for got, want in zip(shape, wanted, strict=True)
    )


def _dims(shape: Sequence[Any]) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
