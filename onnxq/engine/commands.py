"""The command lines that build and check the same engine on the machine with the GPU.

trtexec's grammar: `--minShapes=name:1x3,other:4`, a name with a colon or comma in single quotes
of its own, a scalar as nothing after the colon. Polygraphy's: `--trt-min-shapes name:[1,3]`, once
a profile. Both from their own help (TensorRT 10.13, Polygraphy 0.53).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from onnxq.engine.shapes import Profile, Shape, format_shape
from onnxq.gpus import target


def trtexec_commands(
    model: Path, engine: Path, profiles: Sequence[Profile], sparse: bool = False
) -> list[str]:
    """`trtexec` for the GPU at hand; with several profiles one command, and engine, a profile.

    `--stronglyTyped` makes TensorRT 10 take the types from the file, as later ones always do.
    """
    commands = []
    for index, profile in enumerate(profiles or [()]):
        name = engine if len(profiles) < 2 else engine.with_name(f"{engine.name}.{index}")
        words = ["trtexec", f"--onnx={model}", f"--saveEngine={name}", "--stronglyTyped"]
        words += ["--sparsity=enable"] if sparse else []
        words += _trtexec_shapes(profile)
        words += ["--profilingVerbosity=detailed", f"--exportLayerInfo={name}.layers.json"]
        commands.append(shlex.join(words))
    return commands


def rtx_command(
    model: Path, engine: Path, profiles: Sequence[Profile], targets: Sequence[str]
) -> str:
    """TensorRT for RTX's own tool, which compiles ahead of time too (first profile only)."""
    numbers = ",".join("{}{}".format(*target(name).capability) for name in targets)
    words = ["tensorrt_rtx", f"--onnx={model}", f"--saveEngine={engine}"]
    words += [f"--computeCapabilities={numbers}"] if numbers else []
    words += _trtexec_shapes(profiles[0] if profiles else ())
    return shlex.join([*words, "--skipInference"])


def polygraphy_convert(
    model: Path, engine: Path, profiles: Sequence[Profile], sparse: bool = False
) -> str:
    """`polygraphy convert` for the GPU at hand, with all profiles."""
    words = ["polygraphy", "convert", str(model), "-o", str(engine), "--strongly-typed"]
    words += ["--sparse-weights"] if sparse else []
    for profile in profiles:
        words += _polygraphy_shapes(profile)
    return shlex.join(words)


def polygraphy_run(model: Path, profiles: Sequence[Profile], inputs: Path | None = None) -> str:
    """`polygraphy run` comparing TensorRT with ONNX Runtime on the same inputs.

    Without `inputs` (Polygraphy's own JSON) the first profile's optimum shapes are filled.
    """
    words = ["polygraphy", "run", str(model), "--trt", "--onnxrt", "--strongly-typed"]
    for profile in profiles:
        words += _polygraphy_shapes(profile)
    if inputs is not None:
        words += ["--load-inputs", str(inputs)]
    elif profiles and profiles[0]:
        words.append("--input-shapes")
        words += [f"{entry.name}:{_listed(entry.optimum)}" for entry in profiles[0]]
    return shlex.join(words)


def _trtexec_shapes(profile: Profile) -> list[str]:
    if not profile:
        return []
    return [
        f"--{word}Shapes=" + ",".join(f"{_quoted(x.name)}:{format_shape(shape)}" for x, shape in of)
        for word, of in (
            ("min", [(x, x.minimum) for x in profile]),
            ("opt", [(x, x.optimum) for x in profile]),
            ("max", [(x, x.maximum) for x in profile]),
        )
    ]


def _polygraphy_shapes(profile: Profile) -> list[str]:
    if not profile:
        return []
    words = ["--trt-min-shapes", *(f"{x.name}:{_listed(x.minimum)}" for x in profile)]
    words += ["--trt-opt-shapes", *(f"{x.name}:{_listed(x.optimum)}" for x in profile)]
    return [*words, "--trt-max-shapes", *(f"{x.name}:{_listed(x.maximum)}" for x in profile)]


def _listed(shape: Shape) -> str:
    return "[" + ",".join(str(dim) for dim in shape) + "]"


def _quoted(name: str) -> str:
    return f"'{name}'" if ":" in name or "," in name else name
