"""The sampling that a model ships with: what `generation_config.json` may say, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.model.headers import quote, read_json_object

# generation_config.json. What decides how tokens are drawn; what does not (token ids are read with the tokenizer, and a
# length limit only ends an answer: each token up to it is the same one); and what must have the value that does nothing
# (no value at all does nothing either).
HONOURED = frozenset({"do_sample", "temperature", "top_p", "top_k"})
INFORMATIONAL = frozenset(
    {
        *("transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("max_length", "max_new_tokens"),
    }
)
NEUTRAL: dict[str, Any] = {
    "min_length": 0,
    "min_new_tokens": 0,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
# config.json: every setting that a transformers GenerationConfig knows, less what a model's configuration has as well.
GENERATION = (
    HONOURED
    | NEUTRAL.keys()
    | {
        *("assistant_confidence_threshold", "assistant_early_exit"),
        *("assistant_ensemble_weight", "assistant_lookbehind", "cache_config"),
        *("cache_implementation", "compile_config", "constraints"),
        *("continuous_batching_config", "custom_generate", "disable_compile", "dola_layers"),
        *("exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id"),
        *("forced_decoder_ids", "forced_eos_token_id", "generation_kwargs", "is_assistant"),
        *("low_memory", "max_cache_len", "max_length", "max_matching_ngram_size"),
        *("max_new_tokens", "max_time", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "prefill_chunk_size"),
        *("prompt_lookup_num_tokens", "speculation_type", "stop_strings"),
        *("target_lookbehind", "top_h", "use_mtp", "watermarking_config"),
    }
) - {"use_cache", "output_attentions", "output_hidden_states"}

# With do_sample: what each number may be, and in words. The engine's limits, and a top_k of 32 bits as in all engines.
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 < value <= 100, "a number over 0 and at most 100 (greedy is do_sample false)"),
    "top_p": (lambda value: 0 < value <= 1, "a number over 0 and at most 1"),
    "top_k": (
        lambda value: 0 <= value < 2**31 and value == int(value),
        f"a whole number from 0 (off) to {2**31 - 1:,}",
    ),
}


def shipped_sampling(folder: Path) -> Sampling:
    """The sampling that a model folder ships with, as transformers reads `generation_config.json`.

    Greedy where the file is absent or `do_sample` is not true; else temperature 1, top-p 1 and top-k 50 unless it says
    otherwise. `max_tokens` is the battery's business. The list of settings is closed: raises FormatError for values out
    of range and for any setting in `config.json`, and SteelyardError for one that is not supported here, whether it
    changes what is generated or is unknown: the test would be of something else.
    """
    path = folder / "config.json"
    if path.is_file():
        # transformers obeys settings here too, where models of before generation_config.json kept them.
        stated = [key for key, value in read_json_object(path).items() if key in GENERATION and value is not None]
        if stated:
            raise FormatError(f"{path}: {stated[0]}: a setting of generation belongs into generation_config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return Sampling()
    config = read_json_object(path)
    for key, value in config.items():
        if value is None or key in HONOURED or key in INFORMATIONAL:
            continue
        if key not in NEUTRAL or value != NEUTRAL[key]:
            raise SteelyardError(f"{path}: {key}: {value!r} is not supported: ship the model without it and test that")
    if not isinstance(config.get("do_sample"), bool | None):
        raise FormatError(f"{path}: do_sample: {config['do_sample']!r} is neither true nor false")
    if not config.get("do_sample"):
        return Sampling()
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 50} | {
        key: config[key] for key in ("temperature", "top_p", "top_k") if config.get(key) is not None
    }
    for key, value in settings.items():
        allowed, words = _ALLOWED[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
            raise FormatError(f"{path}: {key}: {quote(value)} is not {words}")
    return Sampling(
        temperature=float(settings["temperature"]), top_p=float(settings["top_p"]), top_k=int(settings["top_k"])
    )
