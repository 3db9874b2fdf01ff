"""Transcoders, crosscoders and cross-layer transcoders as other tools publish them, with their formulas in NumPy.

EXAMPLES maps a name to (format, family, sites, writer); a writer fills a directory and returns (what to load,
formula), and a formula maps what is read to (latents, what is written).
"""

import json

import numpy as np
from published_examples import GEMMA_2, K, N, draw, llama_scope, llamascopium, top, wide, write_json, write_tensors

D, OUT, LAYERS = 6, 5, 3


def arrays(out=D, skip=None, threshold=False):
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, out), "b_dec": (out,)}
    return draw(shapes | ({"W_skip": skip} if skip else {}) | ({"threshold": (N,)} if threshold else {}))


def transcode(w, x, skip=None):
    """Latents (ReLU, or JumpReLU with thresholds) and the output; `skip` is what x is multiplied by."""
    u = x @ w["W_enc"] + w["b_enc"]
    f = np.maximum(u, 0) * (u > w.get("threshold", 0))
    return f, f @ w["W_dec"] + w["b_dec"] + (0 if skip is None else x @ skip)


def saelens(path, architecture, **changes):
    """W_skip is [d_out, d_in]."""
    skip = (OUT, D) if "skip" in architecture else None
    weights = arrays(OUT, skip, architecture.startswith("jumprelu"))
    write_tensors(path / "sae_weights.safetensors", weights)
    config = {
        "d_in": D, "d_out": OUT, "d_sae": N, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.ln2.hook_normalized"},
    }  # fmt: skip
    write_json(path / "cfg.json", config | changes)
    w = wide(weights)
    return path, lambda x: transcode(w, x, w["W_skip"].T if skip else None)


def sparsify(path, skip=True, transcode=True, **changes):
    """The encoder subtracts b_dec unless `transcode`; x @ W_skip.T is added."""
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    weights = draw(shapes | ({"W_skip": (D, D)} if skip else {}))
    write_tensors(path / "sae.safetensors", weights)
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K,
        "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D,
    }  # fmt: skip
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    write_json(path / "cfg.json", kept)
    w = wide(weights)

    def formula(x):
        f = top((x if transcode else x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], K)
        return f, f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    return path, formula


def gemma_1(path):
    weights = arrays(threshold=True)
    folder = path / "gemma-scope-2b-pt-transcoders" / "layer_3"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights)
    return folder, lambda x: transcode(wide(weights), x)


HOOKS_2 = {
    "hf_hook_point_in": "model.layers.17.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output",
}


def gemma_2(path, affine=True):
    """affine_skip_connection is [d_in, d_out]."""
    weights = arrays(skip=(D, D) if affine else None, threshold=True)
    theirs = {"affine_skip_connection" if key == "W_skip" else key.replace("W_", "w_"): v for key, v in weights.items()}
    write_tensors(path / "params.safetensors", theirs)
    write_json(path / "config.json", GEMMA_2 | HOOKS_2 | {"type": "transcoder", "affine_connection": affine})
    return path, lambda x: transcode(wide(weights), x, wide(weights).get("W_skip"))


def gemma_2_layers(path, kind="clt"):
    """One file for each layer, decoders [d_sae, layers, d]; what a layer's latents write before it is 0."""
    shapes = {"w_enc": (D, N), "b_enc": (N,), "w_dec": (N, LAYERS, D), "b_dec": (D,), "threshold": (N,)}
    layers = [draw(shapes, seed=i) for i in range(LAYERS)]
    for i, weights in enumerate(layers):
        weights["w_dec"][:, :i] = 0
        write_tensors(path / f"params_layer_{i}.safetensors", weights)
    write_json(path / "config.json", GEMMA_2 | {"type": kind, "width": LAYERS * N})

    def formula(x):
        x, w = x.reshape(len(x), LAYERS, D), [wide(weights) for weights in layers]
        u = np.stack([x[:, i] @ w[i]["w_enc"] + w[i]["b_enc"] for i in range(LAYERS)], axis=1)
        f = np.maximum(u, 0) * (u > np.stack([v["threshold"] for v in w]))
        out = np.einsum("bln,lnod->bod", f, np.stack([v["w_dec"] for v in w])) + np.stack([v["b_dec"] for v in w])
        return f.reshape(len(x), -1), out.reshape(len(x), -1)

    return path, formula


HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(LAYERS)]
TARGETS = [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
NORMS = dict(zip(HOOKS + TARGETS, (9.0, 4.0, 2.5, 0.7, 1.3, 6.0), strict=True))
LOG = "activation_function.log_jumprelu_threshold"


def _llamascopium(path, kind, weights, hooks, act, gate=True, **own):
    norms = {f"dataset_average_activation_norm.{hook}": np.float32(NORMS[hook]) for hook in hooks}
    write_tensors(path / "sae_weights.safetensors", weights | norms)
    config = {
        "sae_type": kind, "d_model": D, "expansion_factor": N / D, "use_decoder_bias": True, "act_fn": act,
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": gate, "top_k": K,
        "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0, **own,
    }  # fmt: skip
    write_json(path / "config.json", config)
    return np.array([D**0.5 / NORMS[hook] for hook in hooks])


def crosscoder(path, act="relu"):
    """Every site gates with its own decoder norms: latents are [sites, d_sae], all the same for ReLU."""
    weights = draw({"W_E": (LAYERS, D, N), "b_E": (LAYERS, N), "W_D": (LAYERS, N, D), "b_D": (LAYERS, D)})
    if act == "jumprelu":
        weights[LOG] = np.linspace(-2, 2, N).astype(np.float32)
    s = _llamascopium(path, "crosscoder", weights, HOOKS, act, hook_points=HOOKS)

    def formula(x):
        w = wide(weights)
        scaled = x.reshape(len(x), LAYERS, D) * s[:, None]
        u = np.einsum("bhd,hdn->bn", scaled, w["W_E"]) + w["b_E"].sum(axis=0)
        n = np.linalg.norm(w["W_D"], axis=2)
        f = u[:, None] * ((u[:, None] * n > np.exp(w[LOG])) if act == "jumprelu" else (u[:, None] > 0) & (n > 0))
        out = (np.einsum("bhn,hnd->bhd", f, w["W_D"]) + w["b_D"]) / s[:, None]
        return (f[:, 0] if act == "relu" else f.reshape(len(x), -1)), out.reshape(len(x), -1)

    return path, formula


def clt(path, act="relu", gate=True):
    """W_D.<to> holds the decoders of layers 0 .. to into layer `to`."""
    weights = draw({"W_E": (LAYERS, D, N), "b_E": (LAYERS, N)})
    for to in range(LAYERS):
        weights |= draw({f"W_D.{to}": (to + 1, N, D), f"b_D.{to}": (D,)}, seed=20 + to)
    if act == "jumprelu":
        weights[LOG] = np.linspace(-2, 2, LAYERS * N).reshape(LAYERS, N).astype(np.float32)
    own = {"hook_points_in": HOOKS, "hook_points_out": TARGETS, "decode_with_csr": False}
    s = _llamascopium(path, "clt", weights, HOOKS + TARGETS, act, gate, **own)

    def formula(x):
        w, s_in, s_out = wide(weights), s[:LAYERS], s[LAYERS:]
        u = np.einsum("bld,ldn->bln", x.reshape(len(x), LAYERS, D) * s_in[:, None], w["W_E"]) + w["b_E"]
        squares = [sum((w[f"W_D.{to}"][i] ** 2).sum(axis=1) for to in range(i, LAYERS)) for i in range(LAYERS)]
        n = np.sqrt(np.stack(squares)) if gate else np.ones((LAYERS, N))
        u = u * n
        if act == "layertopk":
            f = top(u.reshape(len(x), -1), K).reshape(u.shape)
        else:
            f = u * (u > (np.exp(w[LOG]) if act == "jumprelu" else 0))
        pairs = [[f[:, i] / n[i] @ w[f"W_D.{to}"][i] for i in range(to + 1)] for to in range(LAYERS)]
        out = np.concatenate([(sum(pairs[to]) + w[f"b_D.{to}"]) / s_out[to] for to in range(LAYERS)], axis=1)
        return f.reshape(len(x), -1), out

    return path, formula


def tracer(path, act="relu", skip=True, config=None):
    """W_enc is [d_sae, d_in], W_skip [d_out, d_in]."""
    weights = arrays(OUT, (OUT, D) if skip else None, act == "jumprelu")
    theirs = {"activation_function.threshold" if key == "threshold" else key: v for key, v in weights.items()}
    write_tensors(path / "layer_4.safetensors", theirs | {"W_enc": theirs["W_enc"].T})
    if config is not None:
        (path / "config.yaml").write_text(json.dumps(config))

    def formula(x):
        w = wide(weights)
        f, out = transcode(w, x, w["W_skip"].T if skip else None)
        if act != "topk":
            return f, out
        best = top(f, K)
        return best, out + (best - f) @ w["W_dec"]

    return path / "layer_4.safetensors", formula


def tracer_layers(path, act="relu"):
    """W_dec_<i> is [d_sae, layers - i, d]."""
    layers = []
    for i in range(LAYERS):
        w = draw({"W_enc": (N, D), "b_enc": (N,), "b_dec": (D,), "W_dec": (N, LAYERS - i, D)}, seed=i)
        w |= draw({"threshold": (N,)}, seed=i) if act == "jumprelu" else {}
        numbered = {f"{key}_{i}": value for key, value in w.items()}
        write_tensors(path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": numbered.pop(f"W_dec_{i}")})
        write_tensors(path / f"W_enc_{i}.safetensors", numbered)
        layers.append(w)
    (path / "config.yaml").write_text("model_name: gpt2\nfeature_input_hook: mlp.hook_in\n")

    def formula(x):
        x, w = x.reshape(len(x), LAYERS, D), [wide(weights) for weights in layers]
        u = [x[:, i] @ w[i]["W_enc"].T + w[i]["b_enc"] for i in range(LAYERS)]
        f = [v * (v > w[i].get("threshold", 0)) for i, v in enumerate(u)]
        to = [sum(f[i] @ w[i]["W_dec"][:, k - i] for i in range(k + 1)) + w[k]["b_dec"] for k in range(LAYERS)]
        return np.concatenate(f, axis=1), np.concatenate(to, axis=1)

    return path, formula


def _with(writer, *args, **settings):
    return lambda path: writer(path, *args, **settings)


PAIR, MIXED = (D, D), (D, OUT)
OTHER = {"hook_point_out": "blocks.15.hook_attn_out", "dataset_average_activation_norm": {"in": 8.0, "out": 0.5}}
EXAMPLES = {
    "gemma scope 1": ("gemma_scope", "transcoder", PAIR, gemma_1),
    "gemma scope 2": ("gemma_scope", "transcoder", PAIR, _with(gemma_2, False)),
    "gemma scope 2, affine": ("gemma_scope", "transcoder", PAIR, gemma_2),
    "gemma scope 2, all layers": ("gemma_scope", "clt", (D,) * 6, gemma_2_layers),
    "gemma scope 2, crosscoder": ("gemma_scope", "clt", (D,) * 6, _with(gemma_2_layers, "crosscoder")),
    "sparsify skip": ("sparsify", "transcoder", PAIR, sparsify),
    "sparsify": ("sparsify", "transcoder", PAIR, _with(sparsify, False)),
    "sparsify, older skip": ("sparsify", "transcoder", PAIR, lambda path: sparsify(path, True, False, multi_topk=None)),
    "llamascopium, two hooks": (
        "llamascopium", "transcoder", PAIR, _with(llamascopium, "jumprelu", out="blocks.3.hook_mlp_out"),
    ),
    "llama scope, two hooks": ("llama_scope", "transcoder", PAIR, _with(llama_scope, jump_relu_threshold=0.1, **OTHER)),
    **{
        f"saelens {name}": ("saelens", "transcoder", MIXED, _with(saelens, name))
        for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    },
    **{
        f"llamascopium crosscoder {act}": ("llamascopium", "crosscoder", (D,) * 3, _with(crosscoder, act))
        for act in ("relu", "jumprelu")
    },
    **{
        f"llamascopium clt {act}": ("llamascopium", "clt", (D,) * 6, _with(clt, act))
        for act in ("relu", "jumprelu", "layertopk")
    },
    "llamascopium clt, ungated": ("llamascopium", "clt", (D,) * 6, _with(clt, "jumprelu", False)),
    "circuit-tracer": ("circuit_tracer", "transcoder", MIXED, tracer),
    "circuit-tracer jumprelu": ("circuit_tracer", "transcoder", MIXED, _with(tracer, "jumprelu", False)),
    "circuit-tracer topk": (
        "circuit_tracer", "transcoder", MIXED, _with(tracer, "topk", config={"activation": "topk", "k": K}),
    ),
    "circuit-tracer clt": ("circuit_tracer", "clt", (D,) * 6, tracer_layers),
    "circuit-tracer clt jumprelu": ("circuit_tracer", "clt", (D,) * 6, _with(tracer_layers, "jumprelu")),
}  # fmt: skip
