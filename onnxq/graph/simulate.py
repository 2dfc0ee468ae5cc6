"""Models that ONNX Runtime lacks kernels for, as exactly the same arithmetic in operators it has.

FP4 weights           every value of E2M1 is one of E4M3: the same codes in 8 bits, the same scales
E8M0 scales           powers of two: the same in FP32
TensorRT's operators  see `tensorrt_ops`
BF16 on the CPU       see `simulate_bf16`
FP16 to integers      QuantizeLinear reads FP32, where ONNX Runtime's own of FP16 cuts off

Nothing else of the graph changes; its FP16 stays FP16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.files import scratch
from onnxq.graph.constants import hoist_constants
from onnxq.graph.dtypes import Array, from_bytes, graph_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import label, type_number
from onnxq.graph.reading import read_proto
from onnxq.graph.save import save
from onnxq.graph.simulate_bf16 import uses_bf16, widen
from onnxq.graph.tensorrt_ops import OPERATORS
from onnxq.graph.weights import DerivedValues, Values, constant_type, original
from onnxq.progress import Progress, silent

_T = onnx.TensorProto
_FP8 = int(_T.FLOAT8E4M3FN)
_NARROW = {
    int(getattr(_T, name)): becomes
    for name, becomes in (("FLOAT4E2M1", _FP8), ("FLOAT8E8M0", int(_T.FLOAT)))
    if hasattr(_T, name)  # an older onnx package does not know it, nor reads a file that has it
}
"""What ONNX Runtime does not compute with -> the type that holds the same values."""

_TENSORRT = "trt"
_PART = 1 << 18  # bytes looked up at a time: numpy makes eight of each for the index


@contextmanager
def runnable(
    path: Path, progress: Progress = silent, *, rounds_halves: bool = True, bf16: bool = True
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A model to run in place of the one at `path`, and what must be said of that.

    It is the file itself where ONNX Runtime has every kernel; else a simulated copy in a temporary
    folder (TMPDIR), gone afterwards. Its weights are streamed there, FP4 at a byte each.

    Args:
        rounds_halves: whether its QuantizeLinear from FP16 to integers rounds, as ONNX asks.
        bf16: whether it computes in BF16.

    Raises:
        OnnxqError: an operator of TensorRT in a form that is not simulated, or no space.
    """
    if path.suffix != ".onnx" or not _lacks_kernels(path, rounds_halves, bf16):
        yield path, ()
        return
    model = Model.load(path)
    notes = simulate(model)
    if not rounds_halves:
        notes += _quantize_in_fp32(model)
    count = 0 if bf16 else widen(model)
    if count:
        notes += (f"{count} nodes of BF16 ran in FP32, rounded to BF16: no kernels on this device",)
    with scratch() as folder:
        written = save(model, folder / path.name, external=True, progress=progress)
        yield written[0], notes


def simulate(model: Model) -> tuple[str, ...]:
    """Replace, in place, what ONNX Runtime has no kernel for; returns a note on what, if anything.

    Raises:
        OnnxqError: an operator of TensorRT in a form that is not simulated.
    """
    hoist_constants(model, only=_gives_narrow)
    editor, counts = Editor(model), Counter[str]()
    for node in list(model.graph.nodes):
        if _is_tensorrts(node):
            OPERATORS[node.op](editor, node)
            counts[node.op] += 1
    counts.update(_widen(editor))
    editor.finish()
    _retype(model)
    if not counts:
        return ()
    what = ", ".join(f"{count} {name}" for name, count in counts.items())
    return (f"ran as a simulated graph, exact in ONNX operators: ONNX Runtime lacks {what}",)


def _quantize_in_fp32(model: Model) -> tuple[str, ...]:
    """Let each QuantizeLinear from FP16 to integers read the same numbers in FP32."""
    hoist_constants(model)
    editor, count = Editor(model), 0
    for node in list(model.graph.nodes):
        types = [constant_type(t) if isinstance(t, gs.Constant) else 0 for t in node.inputs]
        if not _cuts_halves(node.op, types):
            continue
        (x, scale), name = node.inputs[:2], f"{label(node)}_Cast"
        count += 1
        node.inputs[0] = editor.node(
            "Cast", name, [x], f"{name}_out", np.dtype(np.float32), x.shape, node, to=int(_T.FLOAT)
        )
        wide = original(scale).astype(np.float32)
        node.inputs[1] = editor.constant(f"{scale.name}_fp32", wide)
    editor.finish()
    if not count:
        return ()
    return (
        f"{count} QuantizeLinear of FP16 ran in FP32: this ONNX Runtime cuts off where it must "
        "round, as all do before 1.30; in your own sessions its figures are wrong",
    )


def _lacks_kernels(path: Path, rounds_halves: bool, bf16: bool) -> bool:
    try:
        proto, _ = read_proto(path)
    except OnnxqError:  # whoever opens it says what is wrong
        return False
    graph = proto.graph
    types = {t.name: t.data_type for t in graph.initializer}
    inside = ((n, a) for n in graph.node if n.op_type == "Constant" for a in n.attribute)
    types |= {node.output[0]: attribute.t.data_type for node, attribute in inside}
    own = any(n.domain == _TENSORRT and n.op_type in OPERATORS for n in graph.node)
    cut = (_cuts_halves(n.op_type, [types.get(name, 0) for name in n.input]) for n in graph.node)
    return (
        own
        or bool(set(types.values()) & _NARROW.keys())
        or (not rounds_halves and any(cut))
        or (not bf16 and uses_bf16(graph))
    )


def _cuts_halves(op: str, types: Sequence[int]) -> bool:
    """Whether an operator quantizes FP16 to integers; types are those of its constants, or 0."""
    return op == "QuantizeLinear" and types[1] == _T.FLOAT16 and _FP8 not in types[2:]


def _is_tensorrts(node: gs.Node) -> bool:
    return node.domain == _TENSORRT and node.op in OPERATORS


def _gives_narrow(node: gs.Node) -> bool:
    value = node.attrs.get("value")
    return isinstance(value, gs.Constant) and constant_type(value) in _NARROW


def _widen(editor: Editor) -> Iterator[str]:
    """Let narrow constants be of the type that holds their values; what each was."""
    narrow = {
        t.name: t
        for node in editor.model.graph.nodes
        for t in node.inputs
        if isinstance(t, gs.Constant) and constant_type(t) in _NARROW
    }
    for old in narrow.values():
        number, name = constant_type(old), editor.unique(old.name)
        new = _Pairs(name, old._values) if _NARROW[number] == _FP8 else _floats(name, old)
        editor.redirect(old, gs.Constant(name, new))
        yield f"{_T.DataType.Name(number)} tensors"


class _Pairs(Values):
    """E2M1 as E4M3: a byte of two codes becomes two bytes, a piece of the file at a time."""

    def __init__(self, name: str, codes: Values) -> None:
        super().__init__(_T(name=name, data_type=_FP8, dims=codes.shape, data_location=_T.EXTERNAL))
        self.codes = codes

    def load(self) -> Array:
        raw = np.frombuffer(b"".join(self.pieces()), np.uint8)
        return from_bytes(raw, _FP8, self.shape)

    def pieces(self) -> Iterator[memoryview]:
        left = self.nbytes  # a half byte may be left over
        for piece in self.codes.pieces():
            for start in range(0, len(piece), _PART):
                pairs = _E4M3_OF_E2M1[np.frombuffer(piece[start : start + _PART], np.uint8)]
                made = memoryview(pairs.view(np.uint8))[:left]
                left -= len(made)
                yield made


def _table() -> Any:
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    wide = codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    byte = np.arange(256)
    return (wide[byte & 15] | wide[byte >> 4].astype(np.uint16) << 8).astype("<u2")


_E4M3_OF_E2M1 = _table()
"""A byte of two E2M1 codes, the first in its low half -> the two as E4M3, the first in front."""


def _floats(name: str, old: gs.Constant) -> Values:
    """E8M0 as FP32."""
    return DerivedValues(
        name, int(_T.FLOAT), tuple(old.shape), lambda: original(old).astype(np.float32)
    )


def _retype(model: Model) -> None:
    """Computed tensors that pass such values on have the wider type too."""
    for tensor in model.graph.tensors().values():
        if isinstance(tensor, gs.Variable) and type_number(tensor) in _NARROW:
            tensor.dtype = graph_dtype(_NARROW[type_number(tensor)])
