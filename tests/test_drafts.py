"""Drafted decoding gives the bytes of plain decoding, and really drafts."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.config import AheadConfig, ConfigError
from bytelm.copying import copied
from bytelm.lm import NetworkLM
from bytelm.models.build import init_params
from tiny import HYBRID, blt, flat, hat, hnet, megabyte, network, spacebyte

AHEAD = AheadConfig(bytes=3)
MODELS = {
    "flat": (flat(HYBRID), "copy"), "hnet": (hnet(1), "copy"), "hnet2 own": (hnet(2), "own"),
    "flat heads": (flat(HYBRID, ahead=AHEAD), "heads"), "hnet heads": (hnet(1, ahead=AHEAD), "heads"),
    "hnet words own": (hnet(1, chunker="words"), "own"), "hat own": (hat(), "own"), "hat": (hat(), "copy"),
    "spacebyte own": (spacebyte(), "own"), "megabyte": (megabyte(), "copy"), "blt": (blt(), "copy"),
    "blt own": (blt(), "own"),
}  # fmt: skip
PROMPTS = [b"abcabcabcabcabcab", b"", b"one two one two one t", b"x"]


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    config, draft = MODELS[request.param]
    # With larger weights this MegaByte never repeats itself, so nothing would be copied.
    _, params = network(config, seed=2, scale=1.5 if request.param == "megabyte" else 3.0)
    yield NetworkLM(config, params, context=64), NetworkLM(config, params, context=64, draft=draft)
    jax.clear_caches()  # the programs of all models together have more memory maps than Linux allows (conftest.py)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "seed": 1}],
    ids=["greedy", "sampled"],
)
def test_drafted_bytes_are_those_of_plain_decoding(pair, options):
    """Rows of unequal length together, and one alone beyond the window, where the network begins anew."""
    plain, drafted = pair
    assert drafted.generate_batch(PROMPTS, 40, **options) == plain.generate_batch(PROMPTS, 40, **options)
    assert drafted.generate(PROMPTS[0], 150, **options) == plain.generate(PROMPTS[0], 150, **options)
    assert drafted.generate(b"ab", 0) == b"" and len(drafted.generate(b"ab", 1, **options)) <= 1


@pytest.mark.slow
def test_drafts_are_made_and_kept(pair):
    _, drafted = pair
    drafted.counts.__init__()
    prompts = [b"the same again, the sa", b"go on", b"", b"aaaa"]
    texts = [drafted.generate(p, 40, temperature=t, seed=1) for p in prompts for t in (0.0, 1.0)]
    c = drafted.counts
    assert c.drafted and 0 <= c.right <= c.drafted
    assert c.passes + c.single + c.right == c.made >= sum(map(len, texts))
    if drafted.draft == "own":
        assert c.right > 0
    if drafted.draft == "copy":  # greedy texts of small models run into circles, which copying sees
        assert c.right > 0 and c.passes + c.single < c.made


@pytest.mark.slow
def test_stop_strings_and_ends(pair):
    plain, drafted = pair
    options = {"temperature": 1.0, "seed": 3}
    text = plain.generate(b"go on", 60, **options)
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    assert stop
    assert drafted.generate(b"go on", 60, stop=[stop], **options) == plain.generate(
        b"go on", 60, stop=[stop], **options
    )
    assert b"".join(drafted.stream(b"go on", 60, **options)) == text
    ends = [plain.generate(b"", 400, temperature=1.5, seed=s) for s in range(3)]
    assert ends == [drafted.generate(b"", 400, temperature=1.5, seed=s) for s in range(3)]


@given(st.binary(max_size=80), st.integers(1, 9))
def test_copies_follow_an_earlier_place_of_the_end(text, count):
    found = copied(text, count)
    assert len(found) <= count
    if found:
        assert any(text[:i].endswith(text[-4:]) and text[i:].startswith(found) for i in range(4, len(text)))
    assert copied(b"th", 4, source=b"the end") == b"e en" and copied(b"x", 4, source=b"the end") == b""
    assert copied(b"a quick", 6, source=b"The quick fox") == b" fox\na" and copied(b"", 3, b"abcd") == b"abc"
    assert copied(b"abcd1abcd", 3) == b"1ab" and copied(b"abcd1abc", 3) == b"" and copied(b"aaaaaaaa", 2) == b"a"


def test_what_cannot_draft_says_so():
    for config, draft in ((megabyte(), "own"), (flat(), "own"), (hat(), "heads"), (flat(), "heads")):
        with pytest.raises(ConfigError, match="draft="):
            NetworkLM(config, init_params(config, jax.random.key(0)), context=64, draft=draft)
    with pytest.raises(ConfigError, match="choose one"):
        NetworkLM(hnet(1), {}, context=64, draft="own", wait=0.5)
