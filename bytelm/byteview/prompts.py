"""Prompts with special tokens: the text of special tokens read as such, chats by the model's template, and text to be
filled in between two others."""

from collections.abc import Mapping, Sequence

import regex

from bytelm.byteview.byte_view import TokenizedLM
from bytelm.byteview.vocabulary import Vocabulary
from bytelm.config import ConfigError
from bytelm.protocol import Text
from bytelm.vocab import encode

# The special tokens of fill-in-the-middle: in front of the prefix, of the suffix, of the middle.
FIM_NAMES = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
)


def split_special(text: Text, vocabulary: Vocabulary) -> list[bytes | int]:
    """A text cut where it spells special tokens (the longest first): what lies between them, and their ids."""
    names = sorted((encode(name) for name in vocabulary.controls), key=len, reverse=True)
    if not names:
        return [encode(text)]
    out: list[bytes | int] = []
    for n, part in enumerate(regex.split(b"(" + b"|".join(map(regex.escape, names)) + b")", encode(text))):
        if n % 2:
            out.append(vocabulary.controls[part.decode()])
        elif part:
            out.append(part)
    return out


def with_special(lm: TokenizedLM, text: Text) -> TokenizedLM:
    """The model behind a text in which what spells a special token is that token."""
    parts = split_special(text, lm.vocabulary)
    return lm.behind(*parts, start=parts[:1] != [lm.vocabulary.start])


def chat(lm: TokenizedLM, messages: Sequence[Mapping[str, str]]) -> TokenizedLM:
    """The model where it is to answer the last message; what it generates is the answer. Messages have a `role` (user,
    assistant, system) and a `content`, which must not spell special tokens. Raises ConfigError."""
    if not lm.chat_template:
        raise ConfigError("the model has no chat template (chat_template in tokenizer_config.json): it was not made "
                          "for chats, or name its special tokens in the prompt (--special)")  # fmt: skip
    for message in messages:
        both = [message.get("role"), message.get("content")]
        if not all(isinstance(part, str) for part in both):
            raise ConfigError(f"chat: a message needs a role and a content, both text, not {dict(message)}")
        parts = [part for text in both for part in split_special(text or "", lm.vocabulary)]
        spelled = [part for part in parts if isinstance(part, int)]
        if spelled:
            name = next(name for name, i in lm.vocabulary.controls.items() if i == spelled[0])
            raise ConfigError(f"chat: a message spells the special token {name}, which would end it")
    parts = split_special(_render(lm, messages), lm.vocabulary)
    return lm.behind(*parts, start=not (parts and isinstance(parts[0], int)))


def _render(lm: TokenizedLM, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConfigError("chat templates need the package jinja2: pip install 'bytelm[tokenizers]'") from None
    names = {i: name for name, i in lm.vocabulary.controls.items()}

    def refuse(message: str) -> None:
        raise ConfigError(f"chat template: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse  # type: ignore[assignment]
    try:
        return environment.from_string(lm.chat_template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True,
            bos_token=names.get(lm.vocabulary.start or 0, ""), eos_token=names.get(lm.vocabulary.ends[0], ""),
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:  # it is a program
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"the model's chat template cannot be filled in: {e}") from None


def fill_in(
    lm: TokenizedLM,
    prefix: Text,
    suffix: Text,
    order: str = "spm",
    names: tuple[str, str, str] | None = None,
) -> TokenizedLM:
    """The model where it is to fill in what stands between two texts; what it generates is the middle.

    `order`: psm (prefix, suffix, middle: the prefix's last token is as it was cut) or spm (suffix first, so that the
    middle goes on with the prefix's bytes, in the midst of a token too). `names`: the special tokens in front of
    prefix, suffix and middle; those of known models are found. Raises ConfigError where the model has none.
    """
    v = lm.vocabulary
    known = [names] if names else [three for three in FIM_NAMES if all(name in v.controls for name in three)]
    if not known:
        raise ConfigError("the tokenizer has no special tokens for filling in the middle (<fim_prefix> and the like): "
                          "the model was not trained for it")  # fmt: skip
    before, behind, middle = (v.control(name) for name in known[0])
    if order not in ("psm", "spm"):
        raise ConfigError(f"order={order!r}: choose psm or spm")
    start = v.start not in v.ends  # else it separates documents, and no text begins with it
    if order == "psm":
        return lm.behind(before, prefix, behind, suffix, middle, start=start)
    return lm.behind(before, behind, suffix, middle, prefix, start=start)
