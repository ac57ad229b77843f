"""llama.cpp's own quantizer, through whichever of its bindings is installed."""

from __future__ import annotations

from pathlib import Path

from qatc.export.gguf.llama_cpp import binding

FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""llama.cpp's numbers of what a file is quantized to."""


def quantize(source: Path, path: Path, kind: str, threads: int = 1) -> Path:
    """Let llama.cpp quantize a file of floats to a key of :data:`FILE_TYPES`."""
    if binding() == "llama_cpp":
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = FILE_TYPES[kind], threads
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), options)
        assert failed == 0, f"llama.cpp could not write {path.name}"
    else:
        from cyllama.llama import llama_cpp as own

        own.disable_logging()
        params = own.LlamaModelQuantizeParams()
        params.ftype, params.nthread = FILE_TYPES[kind], threads
        own.model_quantize(str(source), str(path), params)
    return path
