"""What a diffusers pipeline feeds its UNet, captured from one with random weights."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from onnxq.calibrate.steps import denoising_step

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-export/bin/python"


@pytest.mark.skipif(not PYTHON.exists(), reason="make models makes the environment with diffusers")
def test_captures_of_an_sdxl_pipeline(tmp_path: Path) -> None:
    script = Path(__file__).with_name("capture_pipeline.py")
    done = subprocess.run(
        [PYTHON, script, tmp_path, tmp_path / "captures"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 2 prompts, 6 samples" in done.stdout
    files = sorted((tmp_path / "captures").iterdir())
    assert [f.stem for f in files] == [f"000{i}-000{j}" for i in range(2) for j in range(3)]
    calls = [dict(np.load(file)) for file in files]
    shapes = {
        "sample": (2, 4, 8, 8),
        "timestep": (2,),
        "encoder_hidden_states": (2, 77, 64),
        "text_embeds": (2, 32),
        "time_ids": (2, 6),
    }
    assert all({name: a.shape for name, a in call.items()} == shapes for call in calls)
    # 1000 training steps, every 333rd from 1 on
    assert [denoising_step(call) for call in calls] == [667.0, 334.0, 1.0] * 2
    first, *_, other = calls[0], calls[3]
    for call in (first, other):  # one latent under the negative and the wanted condition
        np.testing.assert_array_equal(call["sample"][0], call["sample"][1])
        assert (call["encoder_hidden_states"][0] != call["encoder_hidden_states"][1]).any()
        assert 0.8 < call["sample"].std() < 1.2  # as the UNet sees it: scaled to variance 1
        assert call["time_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]
    assert (first["encoder_hidden_states"][1] != other["encoder_hidden_states"][1]).any()
    assert (first["sample"] != other["sample"]).any()
