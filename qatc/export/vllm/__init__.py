"""vLLM's formats, :mod:`qatc.export.vllm.format`, and itself, :mod:`qatc.export.vllm.engine`."""
