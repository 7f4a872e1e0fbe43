import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd.rollouts import noise


def _one(seed: int, rollout_id: str, position: int) -> float:
    return float(noise.uniforms(np.array([noise.key(seed, rollout_id)]), np.array([position]))[0])


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 10**6)), min_size=1, max_size=20), st.integers(0, 2**40))
def test_noise_depends_on_nothing_but_seed_rollout_and_position(rows, seed):
    together = noise.uniforms(
        np.array([noise.key(seed, rollout_id) for rollout_id, _ in rows], dtype=np.uint64),
        np.array([position for _, position in rows]),
    )
    assert together.tolist() == [_one(seed, rollout_id, position) for rollout_id, position in rows]
    assert ((together > 0) & (together < 1)).all()


def test_noise_stays_what_it_was():
    """A resumed run replays its step with the same tokens, also under a later version of opd."""
    assert _one(0, "train/0/rows/0/0", 0) == 0.3436871853569735
    assert _one(7, "train/3/rows/12/1", 500) == 0.7388409526440097


def test_noise_is_uniform_and_unrelated_between_positions_rollouts_and_seeds():
    keys = np.array([noise.key(seed, f"step/{n}") for seed in (0, 1) for n in range(1000)], dtype=np.uint64)
    u = noise.uniforms(np.repeat(keys, 100), np.tile(np.arange(100), len(keys))).reshape(2, 1000, 100)
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    expected = u.size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 160  # 99.99th percentile of chi-square with 99 degrees
    centred = u - 0.5
    for one, other in (
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[0], centred[1]),
    ):
        assert abs(float((one * other).mean())) * 12 * np.sqrt(one.size) < 4.5  # standard errors
