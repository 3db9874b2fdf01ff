"""SAEs on disk exactly as other tools publish them, each with its own formula in NumPy (float64).

EXAMPLES maps a name to (format, writer); a writer fills a directory and returns (what to load, formula), and a formula
maps rows to (latents, reconstructions).
"""

import json

import numpy as np
import safetensors.numpy

from saejax.interop import torch_file

D, N, K = 6, 20, 4


def draw(shapes, seed=7, spread=0.7):
    """Float32 arrays of the shapes; thresholds are positive."""
    rng = np.random.default_rng(seed)
    found = {key: (rng.normal(size=shape) * spread).astype(np.float32) for key, shape in shapes.items()}
    return {key: np.abs(value) + 0.1 if "threshold" in key else value for key, value in found.items()}


def wide(weights):
    return {key: value.astype(np.float64) for key, value in weights.items() if isinstance(value, np.ndarray)}


def top(u, k):
    """The k largest of each row, through a ReLU."""
    return np.maximum(u, 0) * (u >= np.sort(u, axis=1)[:, -k, None])


def write_json(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def write_tensors(path, weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({key: np.array(value, order="C") for key, value in weights.items()}, path)


OURS = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}


def jump(w, x):
    u = x @ w["W_enc"] + w["b_enc"]
    f = np.maximum(u, 0) * (u > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


def gemma_1(path):
    weights = draw(OURS)
    np.savez(path / "params.npz", **weights)
    return path, lambda x: jump(wide(weights), x)


HOOK_2 = "model.layers.17.output"
GEMMA_2 = {
    "width": N, "model_name": "google/gemma-3-4b-pt", "architecture": "jump_relu", "l0": 150,
    "affine_connection": False, "hf_hook_point_in": HOOK_2, "hf_hook_point_out": HOOK_2, "type": "sae",
}  # fmt: skip


def gemma_2(path):
    weights = draw(OURS)
    write_tensors(path / "params.safetensors", {key.replace("W_", "w_"): value for key, value in weights.items()})
    write_json(path / "config.json", GEMMA_2)
    return path, lambda x: jump(wide(weights), x)


OPENAI = {"pre_bias": (D,), "encoder.weight": (N, D), "latent_bias": (N,), "decoder.weight": (D, N)}


def openai(path, kind="TopK", **changes):
    import torch

    weights = draw(OPENAI)
    statistics = {
        "stats_last_nonzero": torch.zeros(N, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(N),
        "latents_mean_square": torch.full((N,), float("nan")),
    }
    settings = {"k": K, "postact_fn": "ReLU"} if kind == "TopK" else {}
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    torch.save(tensors | statistics | {"activation": kind, "activation_state_dict": settings} | changes, path / "8.pt")

    def formula(x):
        w = wide(weights)
        mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        rows = (x - mean) / (std + 1e-5) if kind == "TopK" else x
        u = (rows - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        f = top(u, K) if kind == "TopK" else np.maximum(u, 0)
        recon = f @ w["decoder.weight"].T + w["pre_bias"]
        return f, recon * std + mean if kind == "TopK" else recon

    return path / "8.pt", formula


def openai_relu(path):
    return openai(path, "ReLU")


GOODFIRE = {
    "encoder_linear.weight": (N, D), "encoder_linear.bias": (N,), "decoder_linear.weight": (D, N),
    "decoder_linear.bias": (D,),
}  # fmt: skip


def goodfire(path):
    weights = draw(GOODFIRE)
    file = path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch_file.write_state_dict(file, weights)

    def formula(x):
        w = wide(weights)
        f = np.maximum(x @ w["encoder_linear.weight"].T + w["encoder_linear.bias"], 0)
        return f, f @ w["decoder_linear.weight"].T + w["decoder_linear.bias"]

    return file, formula


QWEN = {
    "model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D, "d_sae": N, "k": K,
    "num_layers": 28, "hook_point": "resid_post", "dtype": "float32",
}  # fmt: skip


def qwen_without_config(path):
    weights = draw({"W_enc": (N, D), "b_enc": (N,), "W_dec": (D, N), "b_dec": (D,)}) | {"b_enc": np.ones(N, np.float32)}
    folder = path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir()
    torch_file.write_state_dict(folder / "layer5.sae.pt", weights)

    def formula(x):
        w = wide(weights)
        f = top(x @ w["W_enc"].T + w["b_enc"], K)
        return f, f @ w["W_dec"].T + w["b_dec"]

    return folder / "layer5.sae.pt", formula


def qwen(path):
    file, formula = qwen_without_config(path)
    write_json(file.parent / "config.json", QWEN)
    return file, formula


def llamascopium(path, act="relu", gate=True, norm="dataset-wise", out=None, **changes):
    """norm_in 11, norm_out 11 or (for another hook) 0.5."""
    shapes = {"W_E": (D, N), "b_E": (N,), "W_D": (N, D), "b_D": (D,)}
    key = "activation_function.log_jumprelu_threshold"
    weights = draw(shapes) | ({key: np.log(draw({"threshold": (N,)})["threshold"])} if act == "jumprelu" else {})
    hook = "blocks.3.hook_resid_post"
    norms = {hook: 11.0} | ({out: 0.5} if out else {})
    measured = {name: value if norm == "dataset-wise" else np.nan for name, value in norms.items()}
    extra = {f"dataset_average_activation_norm.{name}": np.float32(value) for name, value in measured.items()}
    write_tensors(path / "sae_weights.safetensors", weights | extra)
    config = {
        "sae_type": "sae", "d_model": D, "expansion_factor": N / D, "use_decoder_bias": True, "act_fn": act,
        "norm_activation": norm, "sparsity_include_decoder_norm": gate, "top_k": K, "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996, "jumprelu_threshold_window": 2.0,
        "hook_point_in": hook, "hook_point_out": out or hook, "use_glu_encoder": False,
    }  # fmt: skip
    write_json(path / "config.json", config | changes)

    def formula(x):
        w, n = wide(weights), np.linalg.norm(weights["W_D"].astype(np.float64), axis=1) if gate else np.ones(N)
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        by = {"dataset-wise": norms, "inference": dict.fromkeys(norms, D**0.5)}.get(norm, {hook: lengths})
        s_in, s_out = D**0.5 / by[hook], D**0.5 / by[out or hook]
        u = (x * s_in @ w["W_E"] + w["b_E"]) * n
        f = u * (u > np.exp(w[key])) if act == "jumprelu" else top(u, K if act == "topk" else N)
        return f, (f / n @ w["W_D"] + w["b_D"]) / s_out

    return path, formula


LLAMA_SCOPE = {
    "device": "cuda:0", "seed": 42, "dtype": "torch.bfloat16", "hook_point_in": "blocks.15.hook_mlp_out",
    "hook_point_out": "blocks.15.hook_mlp_out", "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 4, "d_model": D, "d_sae": N, "act_fn": "jumprelu", "jump_relu_threshold": 0.75390625,
    "norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 29.125, "out": 29.125},
    "decoder_exactly_fixed_norm": False, "sparsity_include_decoder_norm": True, "use_glu_encoder": False,
    "init_decoder_norm": 0.5, "init_encoder_with_decoder_transpose": True, "top_k": 50,
}  # fmt: skip


def llama_scope(path, **changes):
    weights = draw({"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)})
    config = LLAMA_SCOPE | changes
    write_json(path / "hyperparams.json", config)
    write_tensors(path / "checkpoints" / "final.safetensors", weights)

    def formula(x):
        w, norms = wide(weights), config["dataset_average_activation_norm"]
        s_in, s_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
        decoder = w["decoder.weight"].T * s_in / s_out
        n = np.linalg.norm(decoder, axis=1) if config["sparsity_include_decoder_norm"] else np.ones(N)
        u = (x @ w["encoder.weight"].T + w["encoder.bias"] / s_in) * n
        f = u * (u > config["jump_relu_threshold"])
        return f, (f / n) @ decoder + w["decoder.bias"] / s_out

    return path, formula


def _with(writer, *args, **settings):
    return lambda path: writer(path, *args, **settings)


EXAMPLES = {
    "gemma scope 1": ("gemma_scope", gemma_1),
    "gemma scope 2": ("gemma_scope", gemma_2),
    "openai topk": ("openai", openai),
    "openai relu": ("openai", openai_relu),
    "goodfire": ("goodfire", goodfire),
    "qwen scope": ("qwen_scope", qwen),
    "qwen scope, file alone": ("qwen_scope", qwen_without_config),
    "llama scope": ("llama_scope", llama_scope),
    "llama scope, free decoder": ("llama_scope", _with(llama_scope, sparsity_include_decoder_norm=False)),
    **{
        f"llamascopium {act}{', gated by norms' * gate}": ("llamascopium", _with(llamascopium, act, gate))
        for act in ("relu", "topk", "jumprelu")
        for gate in (True, False)
    },
    "llamascopium token-wise": ("llamascopium", _with(llamascopium, "topk", norm="token-wise")),
    "llamascopium folded": ("llamascopium", _with(llamascopium, "jumprelu", norm="inference")),
}
