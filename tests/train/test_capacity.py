"""How many slots training reserves: sizes, growth, shrinkage."""

import jax.numpy as jnp
import pytest

from bytelm.config import CapacityConfig, HNetConfig
from bytelm.train.capacity import first_capacity, next_capacity, possible_capacity, sizes, time_to_choose, track_need
from tiny import flat, hnet, t5


def model(levels=1, **capacity):
    return hnet(levels, capacity=CapacityConfig(**capacity))


def test_sizes_are_few_multiples_below_the_row():
    found = sizes(8192, CapacityConfig())
    assert found[0] == 8192 and found[1] == 4992 and all(n % 128 == 0 for n in found)  # 0.6 L, rounded up
    assert len(found) <= 16 and list(found) == sorted(set(found), reverse=True)
    assert sizes(512, CapacityConfig()) == (512, 384, 256, 128)
    assert sizes(100, CapacityConfig()) == (100,)  # a row shorter than the multiple


def test_training_starts_with_the_shares_asked_for():
    assert first_capacity(model(2), 8192) == (4992, 4992)
    assert first_capacity(model(2, start=(0.5, 0.5), multiple=8), 64) == (32, 16)
    assert first_capacity(model(2, start=(1.0,)), 8192) == (8192, 8192)
    assert first_capacity(flat(), 64) == ()
    three = HNetConfig(arch_layout="m1,[m1,[m1,[T1],m1],m1],m1", d_model=(64,) * 4, targets=(2.0,) * 3)
    assert first_capacity(three, 8192) == (4992, 4992, 4992)  # the last share holds on


def test_a_saved_capacity_that_the_config_would_not_choose_gives_way():
    assert possible_capacity(model(2), 8192, (2176, 896)) == (2176, 896)
    assert possible_capacity(model(2), 4096, (2176, 896)) == first_capacity(model(2), 4096)  # shorter rows now
    assert possible_capacity(model(2, every=0), 8192, (2176, 896)) == (4992, 4992)


def test_slots_follow_the_need():
    config = model(2, margin=1.25)
    at = lambda now, need: next_capacity(config, 8192, now, need)  # noqa: E731
    assert at((4992, 4992), (3900.0, 2000.0)) == (4992, 2816)  # 4,875 still needs 4,992
    assert at((4992, 4992), (1700.0, 600.0)) == (2176, 768)
    assert at((2176, 896), (2000.0, 880.0)) == (2176, 896)  # within what there is: no flutter
    assert at((2176, 896), (2177.0, 880.0)) == (2816, 896)  # overflow: more, with the margin
    assert at((2176, 896), (9000.0, 9000.0)) == (8192, 8192)
    for now, need in (((4992, 4992), (1700.0, 600.0)), ((2176, 896), (2177.0, 880.0))):
        assert all(slots in sizes(8192, config.capacity) for slots in at(now, need))


def test_an_inner_level_never_has_more_slots_than_the_one_above():
    assert next_capacity(model(2), 8192, (4992, 4992), (100.0, 4000.0)) == (128, 128)


def test_the_need_is_a_maximum_that_fades():
    need = jnp.zeros(1)
    for now in (100.0, 50.0, 50.0):
        need = track_need(need, jnp.array([now]))
    assert float(need[0]) == pytest.approx(100 - 0.03 * 50 - 0.03 * 48.5)
    assert float(track_need(need, jnp.array([200.0]))[0]) == 200


def test_when_slots_are_chosen():
    assert [s for s in range(1, 301) if time_to_choose(model(every=100), s)] == [100, 200, 300]
    assert not time_to_choose(model(every=0), 100) and not time_to_choose(flat(), 100)


def test_slots_of_kept_bytes():
    compact = t5("learned", deletion={"train": "compact"})
    assert first_capacity(compact, 1024) == (1024,)
    assert time_to_choose(compact, 200) and not time_to_choose(compact, 201)
    assert next_capacity(compact, 1024, (1024,), [560.0]) == (632,)  # 560 * 1.1 = 616
    assert next_capacity(compact, 1024, (632,), [640.0]) == (744,)  # above what there is
    assert next_capacity(compact, 1024, (632,), [600.0]) == (632,)
    assert next_capacity(compact, 1024, (632,), [0.0]) == (632,)  # all batches were skipped
    assert min(sizes(16, CapacityConfig(multiple=8))) == 8
    assert possible_capacity(compact, 1024, (632,)) == (632,)
    assert first_capacity(t5("learned", deletion={"train": "compact", "capacity": 0.5}), 1024) == (512,)
    assert first_capacity(t5("learned", deletion={"train": "compact", "capacity_every": 0}), 1024) == ()
    assert first_capacity(t5("learned"), 1024) == ()
