"""What is usually done about a prompt that ends inside a token, for comparison: nothing, or token healing.

Both take the prompt's tokens as they are and ask the model behind them: its law is that of texts whose tokens begin so.
Healing first gives up the last tokens, and lets the model spell their bytes anew; it is right where the cover of the
prompt begins no earlier.
"""

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.config import ConfigError
from bytelm.protocol import Text
from bytelm.vocab import encode


def uncorrected(lm: TokenizedLM, prompt: Text) -> TokenizedLM:
    """The model behind the prompt's own tokens. Raises ImpossibleText where it has none."""
    return healed(lm, prompt, 0)


def healed(lm: TokenizedLM, prompt: Text, back: int = 1) -> TokenizedLM:
    """The model behind all but the last `back` tokens of the prompt, whose bytes stand before every text. Raises
    ImpossibleText, ConfigError."""
    if back < 0:
        raise ConfigError(f"back={back}: must not be negative")
    behind_special = not lm.grammar.lead
    ids = lm.token_ids(lm.opening + encode(prompt), behind_special)
    kept = ids[: max(len(ids) - back, 0)]
    spelled = b"".join(lm.vocabulary.tokens[i] or b"" for i in ids[len(kept) :])
    return lm.fixed([*lm.trunk, *kept], spelled if ids else lm.grammar.lead)
