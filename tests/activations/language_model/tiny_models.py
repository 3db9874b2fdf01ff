"""The tiny models that the tests of this directory compare with: one row per family and per switch of it."""

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=24,
)  # fmt: skip
# name -> (configuration class of transformers, model class, fields)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", SIZES | dict(tie_word_embeddings=True)),
    "llama-biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        SIZES | dict(attention_bias=True, mlp_bias=True, head_dim=16),
    ),
    "llama-llama3": ("LlamaConfig", "LlamaForCausalLM", SIZES | dict(rope_parameters=LLAMA3)),
    "llama-linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        SIZES | dict(rope_parameters=dict(rope_type="linear", rope_theta=5e3, factor=4.0)),
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES | dict(sliding_window=7)),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.15,
             bos_token_id=1, eos_token_id=2),
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen2-window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        SIZES | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | dict(head_dim=16)),
    # Caps low enough to bend scores and logits of O(1), a scale that is not 1 / sqrt(d_head).
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        SIZES | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24, layer_types=MIXED,
                     attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        SIZES | dict(head_dim=16, sliding_window=7, query_pre_attn_scalar=24, layer_types=MIXED,
                     rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                                          sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    ),
}  # fmt: skip
