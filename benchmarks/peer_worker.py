"""The PyTorch side of benchmarks/peers: reads a case's name from each line of its input and prints how many seconds one
run of it took. Run by a Python that has torch, transformers and h-net-dynamic-chunking."""

import json
import math
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

c = json.loads(sys.argv[1])
torch.set_num_threads(c["threads"])
torch.manual_seed(0)
device = c["device"]
rows, length, vocab = c["rows"], c["length"], 256
compiled = torch.compile if c["compile"] else lambda m: m


class Block(nn.Module):
    """A Llama block with PyTorch's fused attention: RMSNorm, rotary positions, SwiGLU."""

    def __init__(self, d, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * mlp, bias=False), nn.Linear(mlp, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)

        def turn(v):
            a, b = v.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Flat(nn.Module):
    def __init__(self, d, layers, heads, mlp):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, d), nn.RMSNorm(d)
        self.blocks = nn.ModuleList(Block(d, heads, mlp) for _ in range(layers))
        half = d // heads // 2
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x) @ self.embed.weight.T


class LucidrainsHNet(nn.Module):
    def __init__(self, s):
        super().__init__()
        from h_net_dynamic_chunking import HNet
        from x_transformers import Decoder

        def decoder(d, depth, heads):
            return Decoder(dim=d, depth=depth, heads=heads, attn_dim_head=d // heads, rotary_pos_emb=True,
                        attn_flash=True, use_rmsnorm=True, ff_swish=True, ff_glu=True,
                        ff_mult=s["mlp"] / s["d"])  # fmt: skip

        self.embed = nn.Embedding(vocab, s["d"])
        self.net = HNet(decoder(s["d"], s["outer"], s["heads"]), decoder(s["inner"], s["main"], s["inner_heads"]),
                        decoder(s["d"], s["outer"], s["heads"]), s["d"], s["inner"],
                        target_avg_token_length=s["chunk"])  # fmt: skip
        self.norm = nn.RMSNorm(s["d"])

    def forward(self, ids):
        out = self.net(self.embed(ids))
        self.aux = out.loss
        return self.norm(out.output) @ self.embed.weight.T

    def calibrate(self, ids, chunk):
        """Sets the threshold of a boundary so that chunks have the mean length asked for."""
        chunker = self.net.dynamic_sequence_chunker
        with torch.no_grad():
            for _ in range(3):
                out = self.net(self.embed(ids), return_intermediates=True)
                chunker.boundary_threshold = float(torch.quantile(out.intermediates.probs.flatten(), 1 - 1 / chunk))
            made = self.net(self.embed(ids), return_intermediates=True).intermediates.boundary_mask
        return float(made.numel() / made.sum())


def parameters(model):
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def trainer(model, logits_of=None):
    """One step of AdamW with the mean cross-entropy."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    run = compiled(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        logits = run(ids) if logits_of is None else logits_of(run)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
        (loss + getattr(model, "aux", 0)).backward()
        optimizer.step()

    return step


def make_flat():
    model = Flat(**c["flat"])
    return trainer(model), {"parameters": parameters(model)}


def make_hnet():
    model = LucidrainsHNet(c["hnet"])
    chunk = model.calibrate(ids.cpu(), c["hnet"]["chunk"])
    return trainer(model), {"parameters": parameters(model), "chunk": chunk}


def make_blt():
    from transformers import BltConfig, BltForCausalLM

    s = c["hnet"]
    local = dict(hidden_size=s["d"], num_hidden_layers=s["outer"], num_attention_heads=s["heads"],
                 num_key_value_heads=s["heads"], intermediate_size=s["mlp"], vocab_size=vocab + 4,
                 hidden_size_global=s["inner"], max_position_embeddings=length)  # fmt: skip
    config = BltConfig(
        vocab_size=vocab + 4, max_position_embeddings=length, patch_in_forward=False, patch_size=s["chunk"],
        encoder_hash_byte_group_vocab=4096, cross_attn_k=s["inner"] // s["d"],
        encoder_config=local, decoder_config=local,
        global_config=dict(hidden_size=s["inner"], num_hidden_layers=s["main"], num_attention_heads=s["inner_heads"],
                           num_key_value_heads=s["inner_heads"], intermediate_size=s["inner_mlp"],
                           max_position_embeddings=length),
        patcher_config=dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                            vocab_size=vocab + 4),
    )  # fmt: skip
    config.num_hidden_layers = s["main"]
    model = BltForCausalLM(config)
    patches = torch.full((rows, length // s["chunk"]), s["chunk"], device=device)
    return trainer(model, lambda m: m(input_ids=ids + 4, patch_lengths=patches, use_cache=False).logits), {
        "parameters": parameters(model)}  # fmt: skip


def make_mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    s = c["mamba2"]
    model = Mamba2ForCausalLM(Mamba2Config(
        vocab_size=vocab, hidden_size=s["d"], num_hidden_layers=s["layers"], state_size=s["state"], head_dim=s["head"],
        num_heads=2 * s["d"] // s["head"], n_groups=1, expand=2, conv_kernel=4, chunk_size=s["chunk"],
        tie_word_embeddings=True, use_cache=False,
    ))  # fmt: skip
    return trainer(model, lambda m: m(input_ids=ids).logits), {"parameters": parameters(model)}


def make_hnet_decode():
    model = LucidrainsHNet(c["hnet"]).to(device).eval()
    chunk = model.calibrate(ids.cpu(), c["hnet"]["chunk"])

    def decode():
        with torch.no_grad():
            out = model.net(model.embed(ids[:1, :32]), return_hiddens=True)
            for _ in range(c["made"]):
                logits = model.norm(out.output[:, -1:]) @ model.embed.weight.T
                out = model.net(model.embed(logits.argmax(-1)), cache=out.next_cache, return_hiddens=True)

    return decode, {"parameters": parameters(model), "chunk": chunk}


def make_llama_decode():
    from transformers import LlamaConfig, LlamaForCausalLM

    s = c["flat_decode"]
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=s["d"], num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        intermediate_size=s["mlp"], tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )).to(device).eval()  # fmt: skip
    return lambda: model.generate(ids[:1, :32], max_new_tokens=c["made"], min_new_tokens=c["made"], do_sample=False), {
        "parameters": parameters(model)}  # fmt: skip


def products(left, right):
    """As many products of these two as `peers` does in a run."""

    def run():
        for _ in range(c["products"]["times"]):
            left @ right

    return run, {}


def normal(*sizes):
    return torch.randn(*(c["products"][size] for size in sizes), device=device).to(getattr(torch, c["dtype"]))


def make_product_forward():
    return products(normal("rows", "inputs"), normal("outputs", "inputs").T)


def make_product_input():
    return products(normal("rows", "outputs"), normal("outputs", "inputs"))


def make_product_weight():
    return products(normal("rows", "outputs").T, normal("rows", "inputs"))


generator = torch.Generator().manual_seed(0)
ids = torch.randint(97, 123, (rows, length), generator=generator).to(device)
targets = torch.roll(ids, -1, 1)
cases: dict = {}
for line in sys.stdin:
    name = line.strip()
    found = {}
    try:
        if name not in cases:
            cases[name], found = globals()[f"make_{name}"]()
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=c["dtype"] == "bfloat16"):
            cases[name]()
        if device != "cpu":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - start, **found}), flush=True)
    except Exception as e:  # shown in the table: a peer that cannot run here is no reason to lose the others
        print(json.dumps({"seconds": math.nan, "error": f"{type(e).__name__}: {e}"[:300]}), flush=True)
