"""Small transformers models with random weights, built the same in every version of transformers."""

import copy
import inspect

import torch
import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(name):
    if name == "llama":
        return transformers.LlamaConfig(**_SMALL), transformers.LlamaForCausalLM
    if name == "qwen2":
        return transformers.Qwen2Config(**_SMALL), transformers.Qwen2ForCausalLM
    if name == "qwen3":
        return transformers.Qwen3Config(**_SMALL, head_dim=32), transformers.Qwen3ForCausalLM
    if name == "mistral":  # a window that cuts
        return transformers.MistralConfig(**_SMALL, sliding_window=7), transformers.MistralForCausalLM
    if name == "gemma2":  # softcap, alternating windows, a scale of its own
        options = {"head_dim": 32, "sliding_window": 7, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 24}
        return transformers.Gemma2Config(**_SMALL, **options), transformers.Gemma2ForCausalLM
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=97,
            n_positions=256,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return config, transformers.GPT2LMHeadModel
    if name == "bert":
        options = {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}
        return transformers.BertConfig(**options), transformers.BertModel
    if name == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=97,
            num_mel_bins=8,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=32,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
        return config, transformers.WhisperForConditionalGeneration
    raise KeyError(name)


CAUSAL = [n for n in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2") if n != "qwen3" or VERSION >= (4, 51)]


def build(name, implementation, dtype=torch.float32, device="cpu", state=None, **changes):
    """A model in eval mode; state: another model's weights to take. Weights follow torch's seed."""
    config, cls = _config(name)
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    if implementation is not None:
        config._attn_implementation = implementation
    model = cls(config).eval()
    if state is not None:
        model.load_state_dict(state)
    else:
        for (
            key,
            parameter,
        ) in model.named_parameters():  # larger than the initialisation's, so that attention is not flat
            if "norm" not in key.lower() and "ln_" not in key:
                parameter.data.normal_(0.0, 0.12)
    return model.to(device=device, dtype=dtype)


def pair(name, dtype=torch.float32, device="cpu", implementation="vivace", **changes):
    """(eager, ours) with equal weights."""
    eager = build(name, "eager", dtype, device, **changes)
    return eager, build(name, implementation, dtype, device, eager.state_dict(), **changes)


def static_cache(model, batch, length, device="cpu", dtype=torch.float32):
    parameters = inspect.signature(transformers.StaticCache.__init__).parameters
    options = {"config": model.config, "max_cache_len": length}
    if "batch_size" in parameters:
        options["batch_size"] = batch
    elif "max_batch_size" in parameters:
        options["max_batch_size"] = batch
    if "device" in parameters:
        options.update(device=device, dtype=dtype)
    return transformers.StaticCache(**options)


def tokens(batch, length, device="cpu"):
    return torch.randint(3, 97, (batch, length), device=device)


def padding(batch, length, side, device="cpu"):
    """int64 (batch, length): rows of different lengths, the first whole, the second short."""
    mask = torch.ones(batch, length, dtype=torch.int64, device=device)
    for row in range(1, batch):
        hidden = 2 + 3 * (row - 1)
        if side == "left":
            mask[row, :hidden] = 0
        else:
            mask[row, length - hidden :] = 0
    return mask
