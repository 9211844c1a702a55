"""Makes tests/golden/mrt5/byt5_bin and byt5_v5 with torch and transformers (extra `reference`).

- byt5_bin: the weights of the case byt5_plain in bfloat16, as torch.save writes a pytorch_model.bin: the embedding
  table under its three names, one storage for all of them.
- byt5_v5, byt5_v5_tied: random models as transformers 5 saves them (tie_word_embeddings true beside a head of its own;
  and without one), with inputs and the logits they give.
"""

import shutil
from pathlib import Path

import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from transformers import T5Config, T5ForConditionalGeneration

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "mrt5"


def torch_file() -> None:
    folder = GOLDEN / "byt5_bin"
    folder.mkdir(exist_ok=True)
    weights = {
        name: x.to(torch.bfloat16) for name, x in load_file(GOLDEN / "byt5_plain" / "weights.safetensors").items()
    }
    for alias in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        weights[alias] = weights["shared.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    shutil.copyfile(GOLDEN / "byt5_plain" / "config.json", folder / "config.json")


def saved_by_transformers(name: str, own_head: bool) -> None:
    folder = GOLDEN / name
    config = T5Config(vocab_size=384, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0)  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.save_pretrained(folder)
    if own_head:  # a new model of transformers 5 shares the two matrices; one that is loaded keeps them apart
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(384, 16)
        save_torch(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model = T5ForConditionalGeneration.from_pretrained(folder).eval()
        model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    source = torch.randint(3, 259, (2, 17))
    source[1, 11:] = 0
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.long), torch.randint(3, 259, (2, 6))], dim=1)
    with torch.no_grad():
        logits = model(input_ids=source, attention_mask=(source > 0).long(), decoder_input_ids=inputs).logits
    io = {"source": source.int().numpy(), "inputs": inputs.int().numpy(), "logits": logits.numpy()}
    save_file(io, folder / "io.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    torch_file()
    saved_by_transformers("byt5_v5", own_head=True)
    saved_by_transformers("byt5_v5_tied", own_head=False)
