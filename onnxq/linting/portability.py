"""Rules on names, opsets and what other readers of the file make of it.

ONNX Runtime's part was seen with 1.31 and 1.32 on a CPU, under its default optimizations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from onnxq.graph.elements import minimum_opset, newest_opset
from onnxq.graph.ir import Constant, Node
from onnxq.graph.qdq import MOVING
from onnxq.graph.query import label, producer
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.subject import Subject

LONGEST_NAME = 4095
"""Characters of a node's or tensor's name that TensorRT takes."""
THINNEST = 16
"""Channels and matrix sides below which TensorRT's documentation promises no fast 8-bit kernel."""

_OWNERS = {"com.microsoft": "ONNX Runtime", "trt": "TensorRT"}
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_MOVED_BY_ORT = MOVING - {"Neg", "Dropout", "Expand", "Tile"} | {"MaxPool"}


def repeated_name(subject: Subject) -> Iterator[Found]:
    """Node names given twice."""
    counts = Counter(str(n.name) for n in subject.nodes if n.name)
    seen: set[str] = set()
    for node in subject.nodes:
        name = str(node.name)
        if not name:
            continue
        if name in seen:
            severity = Severity.REFUSED if node.op in _QDQ else Severity.PORTABILITY
            who = "TensorRT" if severity is Severity.REFUSED else "ONNX Runtime"
            reason = f"{counts[name]} nodes have this name, which {who} refuses"
            yield Found(node, reason, severity)
        seen.add(name)


def long_name(subject: Subject) -> Iterator[Found]:
    """Names longer than TensorRT takes."""
    for node in subject.nodes:
        names = [str(node.name), *(t.name for t in node.outputs)]
        if any(len(name) > LONGEST_NAME for name in names):
            yield Found(
                node, f"a name of {max(map(len, names))} characters; the limit is {LONGEST_NAME}"
            )


def opset(subject: Subject) -> Iterator[Found]:
    """Q/DQ that the file's opset does not define, and opsets nobody reads yet."""
    version = subject.model.opset
    if version > newest_opset():
        yield Found("opset", f"opset {version} is newer than the newest, {newest_opset()}")
    worst: dict[str, tuple[int, Node, int]] = {}
    for q in subject.quantizers:
        if q.node.domain:
            continue
        needed = {q.codes.upper(): minimum_opset(q.codes)}
        if subject.type(q.scale) in ("fp16", "bf16"):
            needed["a 16-bit scale"] = 19
        if q.blocked:
            needed["blocks"] = 21
        for what, least in needed.items():
            if least > version:
                count = worst[what][2] + 1 if what in worst else 1
                worst[what] = (least, worst[what][1] if what in worst else q.node, count)
    for what, (least, node, count) in worst.items():
        more = f" ({count} nodes)" if count > 1 else ""
        yield Found(
            node, f"opset {version} has no {node.op} with {what}{more}: it takes opset {least}"
        )


def scale_type(subject: Subject) -> Iterator[Found]:
    """QuantizeLinear whose scale has another type than its input, which ONNX has from 23 on."""
    for q in subject.quantizers:
        if q.node.op != "QuantizeLinear":
            continue
        words = subject.type(q.node.inputs[0]), subject.type(q.scale)
        if words[0] == words[1] or "?" in words:
            continue
        if q.codes == "fp8" and words[1] != "fp32":
            yield Found(
                q.node,
                f"its input is {words[0].upper()} and its scale {words[1].upper()}, which the "
                "compiler takes in INT8 alone",
                Severity.REFUSED,
            )
        elif subject.model.opset < 23:
            yield Found(q.node, f"its input is {words[0].upper()} and its scale {words[1].upper()}")


def contrib_domain(subject: Subject) -> Iterator[Found]:
    """Operators of a tool's own that TensorRT takes by their name."""
    for node in subject.nodes:
        if node.domain in _OWNERS:
            yield Found(node, f"{node.op} is {_OWNERS[node.domain]}'s, not ONNX's")


def two_formats(subject: Subject) -> Iterator[Found]:
    """INT8 and FP8 in one graph."""
    found: dict[str, Node] = {}
    for product in subject.quantized:
        if product.right.codes in ("int8", "fp8"):
            found.setdefault(product.right.codes, product.node)
    if len(found) > 1:
        one, other = (f"{word.upper()} ({label(node)!r})" for word, node in found.items())
        yield Found(
            list(found.values())[1],
            f"the graph multiplies {one} and {other}; TensorRT 11.3 was reported to refuse both "
            "in one graph before Blackwell",
        )


def thin(subject: Subject) -> Iterator[Found]:
    """Quantized products too thin to gain anything."""
    for product in subject.quantized:
        shape = product.node.inputs[1].shape
        weight = product.weight
        if weight is None or shape is None or not all(isinstance(d, int) for d in shape):
            continue
        if product.right.codes not in ("int8", "fp8") or product.kind not in ("linear", "conv"):
            continue
        dims = [int(d) for d in shape]
        if product.kind == "linear" and len(dims) == 2 and min(dims) < THINNEST:
            yield Found(product.node, f"its weight is {dims[0]} x {dims[1]}")
        elif product.kind == "conv" and len(dims) > 2:
            group = int(product.node.attrs.get("group", 1))
            least = min(dims[1], dims[0] // max(group, 1))
            if least < THINNEST:
                plural = "" if least == 1 else "s"
                yield Found(product.node, f"it has {least} channel{plural} in a group")


def ort_layout(subject: Subject) -> Iterator[Found]:
    """Q/DQ that ONNX Runtime moves across a layout operator, to a form it has no kernel for."""
    old = subject.model.opset < 21
    for q in subject.quantizers:
        if q.codes not in ("int8", "fp8") or isinstance(q.node.inputs[0], Constant):
            continue
        if q.node.op == "DequantizeLinear":
            after = next((n for n in q.node.outputs[0].outputs if _breaks(n, q.codes, old)), None)
            if after is not None:
                yield Found(q.node, f"{after.op} {label(after)!r} follows it")
        elif q.codes == "fp8" and old:
            before = producer(q.node.inputs[0])
            if before is not None and before.op in _MOVED_BY_ORT - {"MaxPool"}:
                yield Found(q.node, f"{before.op} {label(before)!r} stands before it")


def _breaks(node: Node, codes: str, old: bool) -> bool:
    """Whether a reader of a DequantizeLinear makes ONNX Runtime fail."""
    if codes == "int8":
        return not old and (_is_moved(node) or _joins_bias(node))
    return _is_moved(node) and (old or node.op in ("Slice", "Unsqueeze", "Squeeze"))


def _is_moved(node: Node) -> bool:
    """Whether ONNX Runtime moves a DequantizeLinear behind this node, and makes a pair there."""
    following = node.outputs[0].outputs
    return node.op in _MOVED_BY_ORT and not (
        following and all(n.op == "QuantizeLinear" for n in following)
    )


def _joins_bias(node: Node) -> bool:
    """Whether ONNX Runtime makes one Gemm of a product and its bias, with a Reshape before it."""
    if node.op != "MatMul" or len(node.inputs[1].shape or ()) != 2:
        return False
    shape, following = node.inputs[0].shape, node.outputs[0].outputs
    flat = shape is not None and len(shape) > 2 and all(isinstance(d, int) for d in shape)
    if not flat or len(following) != 1 or following[0].op != "Add":
        return False
    return any(isinstance(t, Constant) and len(t.shape) == 1 for t in following[0].inputs)


def ort_fp8(subject: Subject) -> Iterator[Found]:
    """FP8 products that ONNX Runtime before 1.32 turns into integer operators."""
    for product in subject.products:
        if product.node.op != "MatMul":
            continue
        if not all(o.reaches and o.codes == "fp8" for o in product.operands):
            continue
        if any(n.op == "Cast" for o in product.operands for n in o.path):
            continue
        sources = [o.source for o in product.operands if o.source is not None]
        if all(subject.type(q.scale) == "fp32" for q in sources):
            yield Found(product.node, "before 1.32, an FP8 MatMul with FP32 scales")
        elif any(p.values is product.node for p in subject.attentions):
            yield Found(product.node, "before 1.32, an FP8 product of probabilities")


_ORT_CURE = "set session.disable_quant_qdq=1 in ONNX Runtime (TensorRT is not concerned)"

RULES = (
    Rule(
        "repeated-name",
        Severity.REFUSED,
        repeated_name,
        "give every node a name of its own",
        fixable=True,
        tensorrt=False,
    ),
    Rule("long-name", Severity.REFUSED, long_name, "shorten the name"),
    Rule("opset", Severity.PORTABILITY, opset, "raise the opset", tensorrt=False),
    Rule(
        "scale-type",
        Severity.PORTABILITY,
        scale_type,
        "give the scale its input's type, or raise the opset to 23",
        tensorrt=False,
    ),
    Rule(
        "contrib-domain",
        Severity.PORTABILITY,
        contrib_domain,
        "use ONNX's own operators; for Q/DQ, raise the opset to 21 and leave the domain out",
        fixable=True,
    ),
    Rule("two-formats", Severity.PORTABILITY, two_formats, "quantize the model to one format"),
    Rule(
        "thin",
        Severity.PORTABILITY,
        thin,
        f"leave it in floating point: fast 8-bit kernels are documented from {THINNEST} on; "
        "tensorrt-rtx 1.7.1 pads",
    ),
    Rule("onnxruntime-layout", Severity.PORTABILITY, ort_layout, _ORT_CURE, tensorrt=False),
    Rule(
        "onnxruntime-fp8",
        Severity.PORTABILITY,
        ort_fp8,
        f"take ONNX Runtime 1.32, or {_ORT_CURE}",
        tensorrt=False,
    ),
)
