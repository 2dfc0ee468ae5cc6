"""Raise the standard opset of a graph, touching only nodes whose operator changed in between.

onnx's version converter takes a whole model through a representation of its own that knows no
sequences, optionals or rare attributes, drops metadata and fails on any operator it has no schema
for. Here it gets just the nodes whose schema differs, as a small model of their own, one for each
graph: the main one and each body. What it rewrote is put in place of the node.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import version_converter

from onnxq.errors import OnnxqError
from onnxq.graph.check import TOOL_ERRORS, tool_reason
from onnxq.graph.excerpt import IR_VERSION, excerpt, is_standard, only, small_constants, types_of
from onnxq.graph.group_norm import CHANNELWISE, FIRST, channelwise
from onnxq.graph.names import bodies, taken

_BODIES_UNCHANGED_SINCE = {"If": 1, "Loop": 1, "Scan": 9, "SequenceMap": 17}


def require_versions(proto: onnx.ModelProto, opset: int) -> None:
    """Refuse a model that uses standard operators and does not say of which version.

    Args:
        opset: where to look operators up.
    """
    said = any(entry.domain in ("", "ai.onnx") for entry in proto.opset_import)
    if not said and any(is_standard(n) and _schema(n, opset) for n in proto.graph.node):
        raise OnnxqError(
            "it does not say which version of ONNX's operators it uses (no opset_import)",
            "export the model again",
        )


def convert(proto: onnx.ModelProto, inferred: onnx.ModelProto, old: int, new: int) -> int:
    """Raise the standard opset of `proto` in place.

    Args:
        inferred: the same model with its types inferred.

    Returns:
        How many nodes were rewritten.

    Raises:
        OnnxqError: a node that cannot be raised.
    """
    raising = _Raising(old, new, set(taken(proto.graph)))
    changed = raising.graph(proto.graph, inferred.graph, ChainMap(), ChainMap()) if old else 0
    standard = [entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    for entry in standard or [proto.opset_import.add()]:
        entry.version = new
    return changed


@dataclass
class _Raising:
    """One run from opset `old` to `new`; `names` are those in use anywhere in the model."""

    old: int
    new: int
    names: set[str]

    def graph(
        self,
        graph: onnx.GraphProto,
        inferred: onnx.GraphProto,
        outer_types: ChainMap[str, onnx.TypeProto],
        outer_constants: ChainMap[str, onnx.TensorProto],
    ) -> int:
        types = outer_types.new_child(types_of(inferred))
        constants = outer_constants.new_child(small_constants(graph))
        changed = 0
        for node, typed in zip(graph.node, inferred.node, strict=True):
            for body, typed_body in zip(bodies(node), bodies(typed), strict=True):
                changed += self.graph(body, typed_body, types, constants)
            changed += self._repeat(graph, node, types, constants)
        affected = [i for i, node in enumerate(graph.node) if self._changes(node, types)]
        if affected:
            small = excerpt([graph.node[i] for i in affected], types, constants, self.old)
            changed += self._put_in(graph, affected, self._converted(small))
        return changed

    def _repeat(
        self,
        graph: onnx.GraphProto,
        node: onnx.NodeProto,
        types: Mapping[str, onnx.TypeProto],
        constants: Mapping[str, onnx.TensorProto],
    ) -> bool:
        """Give a GroupNormalization its scales per channel; whether it is one that needs them."""
        if not self._gets_channels(node):
            return False
        try:
            repeated = list(channelwise(node, types, constants))
        except ValueError as error:
            raise self._refused(node, str(error)) from None
        for index, tensor in enumerate(repeated, 1):
            tensor.name = self._unique(f"{node.input[index]}_per_channel")
            graph.initializer.append(tensor)
            node.input[index] = tensor.name
        return True

    def _gets_channels(self, node: onnx.NodeProto) -> bool:
        crossed = FIRST <= self.old < CHANNELWISE <= self.new
        return crossed and node.op_type == "GroupNormalization" and is_standard(node)

    def _changes(self, node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> bool:
        """Whether the converter must see the node."""
        if not is_standard(node) or node.op_type == "Constant" or self._gets_channels(node):
            return False
        before, after = _schema(node, self.old), _schema(node, self.new)
        if before is None or (after and after.since_version == before.since_version):
            return False  # of a plugin that uses the standard domain, or the same operator
        if any(True for _ in bodies(node)):
            since = _BODIES_UNCHANGED_SINCE.get(node.op_type, self.new)
            if before.since_version < since:
                raise self._refused(node, f"its body's form changed in opset {since}")
            return False
        self._check(node, before)
        if node.op_type == "Hardmax" and before.since_version < 13 and not _is_last(node, types):
            raise self._refused(node, "before opset 13 it was one over all axes from `axis` on")
        return True

    def _check(self, node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> None:
        """Refuse a node that does not fit its operator: the converter's C++ takes it on trust."""
        if not schema.min_input <= len(node.input) <= schema.max_input:
            raise self._refused(node, f"it has {len(node.input)} inputs")
        if not node.output or len(node.output) > schema.max_output:
            raise self._refused(node, f"it has {len(node.output)} outputs")
        try:
            onnx.checker.check_node(node, _context(self.old))
        except onnx.checker.ValidationError as error:
            raise self._refused(node, tool_reason(error)) from None

    def _converted(self, small: onnx.ModelProto) -> onnx.GraphProto:
        try:
            return version_converter.convert_version(small, self.new).graph
        except TOOL_ERRORS as error:
            if len(small.graph.node) == 1:
                raise self._refused(small.graph.node[0], tool_reason(error)) from None
            for node in small.graph.node:  # which of them was it?
                self._converted(only(small, node))
            raise self._refused(small.graph.node[0], tool_reason(error)) from None

    def _refused(self, node: onnx.NodeProto, why: str) -> OnnxqError:
        return OnnxqError(
            f"opset {self.old} cannot be raised to {self.new} for node "
            f"{(node.name or [*node.output, '?'][0])!r} ({node.op_type}): {why}",
            f"export the model at opset {self.new} or later",
        )

    def _put_in(
        self, graph: onnx.GraphProto, affected: list[int], converted: onnx.GraphProto
    ) -> int:
        """Replace the affected nodes by what became of them; how many differ."""
        originals = {i: graph.node[i] for i in affected}
        own = {name for node in originals.values() for name in (*node.input, *node.output)}
        renamed = {t.name: self._unique(t.name) for t in converted.initializer if t.name not in own}
        for tensor in converted.initializer:
            if tensor.name in renamed:
                graph.initializer.add().CopyFrom(tensor)
                graph.initializer[-1].name = renamed[tensor.name]
        rewritten = _Rewritten(converted, own)
        nodes, changed = [], 0
        for index, node in enumerate(graph.node):
            if index not in originals:
                nodes.append(node)
                continue
            replacements = rewritten.of(node)
            if len(replacements) == 1 and _is_same(node, replacements[0]):
                nodes.append(node)
                continue
            changed += 1
            nodes += [self._adapted(node, new, own, renamed) for new in replacements]
        if not changed:
            return 0
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        graph.ClearField("node")
        graph.node.extend(copies)
        return changed

    def _adapted(
        self,
        old: onnx.NodeProto,
        new: onnx.NodeProto,
        own: set[str],
        renamed: dict[str, str],
    ) -> onnx.NodeProto:
        """A node the converter made, with the old one's metadata and with names of its own."""
        out = onnx.NodeProto()
        out.CopyFrom(old)
        if new.op_type != old.op_type:
            base = old.name or old.output[0]
            out.name = self._unique(f"{base}_{new.op_type}")
            out.ClearField("doc_string")
        for name in (*new.input, *new.output):
            if name and name not in own and name not in renamed:
                renamed[name] = self._unique(f"{old.output[0]}_opset{self.new}")
        attributes = {a.name: a for a in old.attribute}
        out.op_type = new.op_type
        for field in ("input", "output", "attribute"):
            out.ClearField(field)
        out.input.extend(renamed.get(name, name) for name in new.input)
        out.output.extend(renamed.get(name, name) for name in new.output)
        out.attribute.extend(_kept(a, attributes.get(a.name)) for a in new.attribute)
        if new.op_type == "Resize" and self.old < 11:
            _sample_as_before_11(out)
        return out

    def _unique(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.names:
            count += 1
            candidate = f"{name}_{count}"
        self.names.add(candidate)
        return candidate


class _Rewritten:
    """What the converter made of a few nodes."""

    def __init__(self, graph: onnx.GraphProto, own: set[str]) -> None:
        self.nodes, self.own = list(graph.node), own
        self.maker = {name: i for i, n in enumerate(self.nodes) for name in n.output if name}
        self.used: set[int] = set()

    def of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that stand for `node`: the makers of its outputs, and their helpers."""
        waiting = [self.maker[name] for name in node.output if name in self.maker]
        found: set[int] = set()
        while waiting:
            index = waiting.pop()
            if index in found or index in self.used:
                continue
            found.add(index)
            helpers = (n for n in self.nodes[index].input if n in self.maker and n not in self.own)
            waiting.extend(self.maker[name] for name in helpers)
        self.used |= found
        return [self.nodes[i] for i in sorted(found)]


def _is_last(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> bool:
    """Whether the node's axis (1 where it says none) is known to be the last."""
    found = types.get(node.input[0])
    if found is None or not found.tensor_type.HasField("shape"):
        return False
    rank = len(found.tensor_type.shape.dim)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    return axis in (-1, rank - 1)


def _sample_as_before_11(resize: onnx.NodeProto) -> None:
    """Say what Upsample and the first Resize did; the converter leaves them to other defaults."""
    modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for name, value in modes.items():
        if all(a.name != name for a in resize.attribute):
            resize.attribute.append(onnx.helper.make_attribute(name, value))


def _schema(node: onnx.NodeProto, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _context(opset: int) -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = IR_VERSION, {"": opset}
    return context


def _is_same(old: onnx.NodeProto, new: onnx.NodeProto) -> bool:
    """Whether the converter left the node as it was."""
    before = {a.name: a for a in old.attribute}
    return (
        old.op_type == new.op_type
        and list(old.input) == list(new.input)
        and list(old.output) == list(new.output)
        and len(before) == len(new.attribute)
        and all(a.name in before and _kept(a, before[a.name]) is not a for a in new.attribute)
    )


def _kept(new: onnx.AttributeProto, old: onnx.AttributeProto | None) -> onnx.AttributeProto:
    """The old attribute, with its doc string, where the new one says the same."""
    if old is None:
        return new
    plain = []
    for attribute in (old, new):
        bare = onnx.AttributeProto()
        bare.CopyFrom(attribute)
        bare.ClearField("doc_string")
        plain.append(bare.SerializeToString(deterministic=True))
    return old if plain[0] == plain[1] else new
