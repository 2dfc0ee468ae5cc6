# Two commands: `make demo` runs the main job on a real model, `make test` passes the tests.
# Both need Python 3.10 or later and a package registry, nothing else.

PYTHON ?= python3
OUT := models/out
DEMO := .venv-demo
TEST := .venv-test
EXPORT := .venv-export
SMOLLM2 := $(OUT)/smollm2-fp32
WIKI := $(OUT)/wiki
RESULT := $(OUT)/demo
EXPORTED := minilm minilm-legacy smollm2-torch smollm2-torch-fp16 smollm2-torch-decode \
    sdxl-unet-tiny-fp16 sdxl-unet-tiny-fp16-dynamic sdxl-unet-full-fp16
SHAPES := --shapes input_ids:1x1,1x256,4x512 --shapes attention_mask:1x1,1x256,4x512
# How much text the demo calibrates on and measures with.
SAMPLES ?= 64
WINDOWS ?= 16
TEXT := --tokenizer $(SMOLLM2)/tokenizer.json --text
# Two threads on two busy cores spin; one per process is faster and steadier.
export OMP_NUM_THREADS ?= 1
# Tests at a time: each takes up to 4 GB.
JOBS ?= 2

.PHONY: demo test check models bench bench-peers clean room-demo room-models room-test

demo: room-demo $(DEMO)/ready
	mkdir -p $(RESULT)
	$(DEMO)/bin/python -m models.smollm2
	$(DEMO)/bin/python -m models.wiki
	$(DEMO)/bin/onnxq quantize $(SMOLLM2)/model.onnx -o $(RESULT)/model.fp8.onnx --recipe fp8-gptq \
	    $(TEXT) $(WIKI)/wiki_calib.txt --samples $(SAMPLES) \
	    --report $(RESULT)/quantize.json
	$(DEMO)/bin/onnxq build $(RESULT)/model.fp8.onnx -o $(RESULT)/model.plan --target sm89 \
	    $(SHAPES) --strict --report $(RESULT)/build.json
	$(DEMO)/bin/onnxq compare $(SMOLLM2)/model.onnx $(RESULT)/model.fp8.onnx \
	    $(TEXT) $(WIKI)/wiki_eval.txt --samples 4 --report $(RESULT)/compare.json
	$(DEMO)/bin/onnxq evaluate perplexity $(RESULT)/model.fp8.onnx \
	    --reference $(SMOLLM2)/model.onnx $(TEXT) $(WIKI)/wiki_eval.txt --limit $(WINDOWS) \
	    --report $(RESULT)/perplexity.json
	$(DEMO)/bin/python -m tools.demo_table $(RESULT)

# A file's tests stay in one process: they share what they compiled.
test: room-test check models
	$(TEST)/bin/python -m pytest -q -n $(JOBS) --dist loadfile

# Fails at once, with one line, where the disk is too small.
room-demo room-models room-test: room-%:
	$(PYTHON) -m tools.room $*

# Style and types, before anything slow.
check: $(TEST)/ready
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy

# The models the tests use; what is there already is not built again. Exporting needs torch, which
# onnxq itself never does: it has an environment of its own.
models: room-models $(TEST)/ready
	$(TEST)/bin/python -m models.wiki
	$(TEST)/bin/python -m models.smollm2
	$(TEST)/bin/python -m models.smollm2 --dtype fp16
	$(TEST)/bin/python -m models.ppocr
	$(MAKE) $(EXPORTED:%=$(OUT)/%/model.onnx)
	$(TEST)/bin/python -m models.minilm_data

$(OUT)/minilm/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.minilm
$(OUT)/minilm-legacy/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.minilm --exporter legacy
$(OUT)/sdxl-unet-tiny-fp16/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.sdxl_unet --size tiny
$(OUT)/sdxl-unet-tiny-fp16-dynamic/model.onnx: | $(EXPORT)/ready  # half a minute
	$(EXPORT)/bin/python -m models.sdxl_unet --size tiny --dynamic
$(OUT)/sdxl-unet-full-fp16/model.onnx: | $(EXPORT)/ready  # 5.1 GB, two minutes, 6 GB of memory
	$(EXPORT)/bin/python -m models.sdxl_unet --size full
$(OUT)/smollm2-torch/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.smollm2_torch
$(OUT)/smollm2-torch-fp16/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.smollm2_torch --dtype fp16
$(OUT)/smollm2-torch-decode/model.onnx: | $(EXPORT)/ready
	$(EXPORT)/bin/python -m models.smollm2_torch --graph decode

bench: models
	$(TEST)/bin/python -m tools.bench

# Beside the peers, each in an environment of its own (the first time 3 GB of packages).
bench-peers: models
	$(TEST)/bin/python -m tools.bench --models minilm,smollm2 --peers modelopt,onnxruntime,nncf,onnxsim

$(DEMO)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install -q '.[cpu]' 'gguf>=0.10' 'rich>=13.7'
	touch $@

$(TEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install -q -e '.[cpu,dev]'
	touch $@

# torch first and pinned: the CPU build. Anything else pulls gigabytes of CUDA.
$(EXPORT)/ready:
	$(PYTHON) -m venv $(EXPORT)
	$(EXPORT)/bin/pip install -q torch==2.13.0
	$(EXPORT)/bin/pip install -q 'transformers>=5' 'diffusers>=0.36' gguf onnx onnxscript onnxruntime
	touch $@

clean:
	rm -rf $(DEMO) $(TEST) $(EXPORT) .venv-peer-* build dist *.egg-info
