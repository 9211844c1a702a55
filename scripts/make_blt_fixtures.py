"""Makes tests/golden/blt: parity cases of random BLTs, run by transformers (Apache-2.0; extra `reference`).

Each case has the config.json and the weights that transformers saves, and in io.safetensors tokens [b, t], logits
[b, t, 260], begins [b, t] (whether a patch begins there), and what the hash functions give, hashes [n, b, t].
"""

from pathlib import Path

import torch
from safetensors.numpy import save_file
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt.modeling_blt import byte_group_hash_function

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "blt"
PRIMES = (1000000007, 5915587277, 1500450271)


def config(**changes) -> BltConfig:
    local = dict(vocab_size=260, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24)
    shape = dict(
        encoder_config=dict(**local, num_hidden_layers=2, cross_attn_k=2, cross_attn_all_layers=True,
                            hidden_size_global=24),
        decoder_config=dict(**local, num_hidden_layers=2, cross_attn_k=2, cross_attn_all_layers=True,
                            hidden_size_global=24),
        global_config=dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=32),
        patcher_config=dict(vocab_size=260, hidden_size=8, num_attention_heads=2, num_hidden_layers=2,
                            intermediate_size=16, sliding_window=7),
        cross_attn_k=2, local_attention_window_len=9, encoder_hash_byte_group_size=[3, 8],
        encoder_hash_byte_group_vocab=53, encoder_hash_byte_group_nb_functions=1,
    )  # fmt: skip
    return BltConfig(**{**shape, **changes})


def make(name: str, cfg: BltConfig, rows: int = 2, length: int = 40) -> None:
    torch.manual_seed(0)
    model = BltForCausalLM(cfg).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    tokens = torch.randint(4, 260, (rows, length))
    tokens[:, 0] = 1
    with torch.no_grad():
        # A threshold with a patch every three bytes or so, as far from any entropy as can be.
        entropies = model.model.patcher(tokens, patch_size=4, threshold=9.0)[0][:, 1:].flatten().sort().values
        near = entropies[len(entropies) * 5 // 8 : len(entropies) * 6 // 8]
        gap = (near[1:] - near[:-1]).argmax()
        model.config.patching_threshold = float(near[gap] + near[gap + 1]) / 2
        logits = model(tokens, use_cache=False).logits  # its cache fails in 5.24
        patcher = model.model.patcher
        lengths = patcher(tokens, patch_size=4, threshold=model.config.patching_threshold,
                          max_patch_length=model.config.max_patch_length)[1]  # fmt: skip
    begins = torch.zeros(rows, length, dtype=torch.int32)
    for row, sizes in zip(begins, lengths):
        places = torch.cat([torch.zeros(1, dtype=sizes.dtype), sizes.cumsum(0)[:-1]])
        row[places[places < length].long()] = 1
    hashes = [byte_group_hash_function(tokens, size, prime, cfg.encoder_hash_byte_group_vocab)
              for prime in PRIMES[: cfg.encoder_hash_byte_group_nb_functions]
              for size in cfg.encoder_hash_byte_group_size]  # fmt: skip
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").replace(folder / "weights.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens.int().numpy(), "logits": logits.numpy(), "begins": begins.numpy(),
               "hashes": torch.stack(hashes).int().numpy()}, folder / "io.safetensors")  # fmt: skip
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    make("joined", config())
    local = dict(vocab_size=260, hidden_size=16, num_attention_heads=2, intermediate_size=24, cross_attn_k=1,
                 hidden_size_global=16, cross_attn_all_layers=False)  # fmt: skip
    make(
        "plain",
        config(
            encoder_config=dict(**local, num_hidden_layers=1), decoder_config=dict(**local, num_hidden_layers=2),
            global_config=dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32),
            cross_attn_k=1, local_attention_window_len=None, encoder_hash_byte_group_nb_functions=3,
            encoder_hash_byte_group_size=[2, 5], encoder_hash_byte_group_vocab=97, max_patch_length=3,
        ),
        rows=1,
    )  # fmt: skip
