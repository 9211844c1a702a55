"""The flat model in plain numpy, written from the papers, token by token and head by head: the slow twin.

It shares no code with bytelm; parameters come as {path: array}. Computes in the type of its parameters.
"""

import numpy as np


def rms(x, scale, eps, axes=(-1,)):
    return x / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def rope(vector, position, dim, theta):
    out = vector.copy()
    for i in range(dim // 2):
        angle = position * theta ** (-2 * i / dim)
        a, b = vector[..., i], vector[..., i + dim // 2]
        out[..., i] = a * np.cos(angle) - b * np.sin(angle)
        out[..., i + dim // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def attention(x, p, prefix, config):
    """x [t, d] of one document -> [t, d]."""
    t, heads, groups = len(x), config.num_heads, config.num_kv_heads or config.num_heads
    width = config.head_dim or config.d_model // heads
    dim, theta = config.rope_dim or width, config.rope_theta
    q, k, v = (np.einsum("td,dhk->thk", x, p[f"{prefix}/{name}/kernel"]) for name in "qkv")
    q = np.stack([rope(q[i], i, dim, theta) for i in range(t)])
    k = np.stack([rope(k[i], i, dim, theta) for i in range(t)])
    out = np.zeros((t, heads, width), x.dtype)
    for i in range(t):
        first = max(0, i - config.window + 1) if config.window else 0
        for h in range(heads):
            g = h // (heads // groups)
            scores = k[first : i + 1, g] @ q[i, h] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ v[first : i + 1, g] / weights.sum()
    return np.einsum("thk,hkd->td", out, p[f"{prefix}/out/kernel"])


def mamba(x, p, prefix, config):
    """x [t, d] of one document -> [t, d]."""
    s, t = config.ssm, len(x)
    z = np.einsum("td,dhp->thp", x, p[f"{prefix}/z/kernel"])
    u = np.einsum("td,dhp->thp", x, p[f"{prefix}/x/kernel"])
    bc = np.einsum("td,dgn->tgn", x, p[f"{prefix}/bc/kernel"])
    dt = np.log1p(np.exp(x @ p[f"{prefix}/dt/kernel"] + p[f"{prefix}/dt_bias"]))

    def conv(v, name):
        kernel, out = p[f"{prefix}/{name}/kernel"], np.zeros_like(v)
        for i in range(t):
            for tap in range(len(kernel)):
                if i - tap >= 0:
                    out[i] += kernel[len(kernel) - 1 - tap] * v[i - tap]
        return silu(out + p[f"{prefix}/{name}/bias"])

    u, bc = conv(u, "conv_x"), conv(bc, "conv_bc")
    a = -np.exp(p[f"{prefix}/A_log"])
    state = np.zeros((*u.shape[1:], s.d_state), x.dtype)
    y = np.zeros_like(u)
    for i in range(t):
        for h in range(u.shape[1]):
            state[h] = np.exp(dt[i, h] * a[h]) * state[h] + dt[i, h] * np.outer(u[i, h], bc[i, 0])
            y[i, h] = state[h] @ bc[i, 1] + p[f"{prefix}/D"][h] * u[i, h]
    y = rms(y * silu(z), p[f"{prefix}/norm/scale"], config.norm_eps, axes=(-2, -1))
    return np.einsum("thp,hpd->td", y, p[f"{prefix}/out/kernel"])


def stack(x, params, prefix, config, runs):
    """x [t, d] of one document through the blocks and the closing norm."""
    for i, (kind, count) in enumerate(runs):
        run = {k: v for k, v in params.items() if k.startswith(f"{prefix}/run{i}/")}
        for layer in range(count):
            p = {k.removeprefix(f"{prefix}/run{i}/"): v[layer] for k, v in run.items()}
            normed = rms(x, p["mixer_norm/scale"], config.norm_eps)
            x = x + (attention(normed, p, "attention", config) if kind in "tT" else mamba(normed, p, "mamba", config))
            if kind.isupper():
                normed = rms(x, p["mlp_norm/scale"], config.norm_eps)
                hidden = silu(normed @ p["mlp/gate/kernel"]) * (normed @ p["mlp/up/kernel"])
                x = x + hidden @ p["mlp/down/kernel"]
    return rms(x, params[f"{prefix}/norm/scale"], config.norm_eps)


def flat(inputs, params, config, runs):
    """Logits [t, 257] of one document's inputs [t]."""
    y = stack(params["embed/table"][inputs], params, "stack", config.stack, runs)
    head = params["embed/table"].T if config.tie_embeddings else params["head/kernel"]
    return (y @ head)[:, :257]


def nll(logits, targets):
    """-ln p of each target."""
    top = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - top).sum(-1)) + top[:, 0] - logits[np.arange(len(targets)), targets]
