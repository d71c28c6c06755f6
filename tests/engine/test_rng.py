"""Seeds as functions of (seed, stream, position)."""

from s4m_d2.engine.rng import PURPOSES, derive_seed, sample_seeds


def test_seeds_differ_by_seed_stream_position_and_purpose():
    seeds = [
        value
        for seed in (0, 1)
        for stream in ("labeled", "unlabeled")
        for position in range(50)
        for value in sample_seeds(seed, stream, position).values()
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 50 * len(PURPOSES)


def test_seeds_are_the_same_everywhere_fit_a_generator_and_keys_do_not_run_into_each_other():
    assert derive_seed(0, "labeled", 7, "augment") == 2972669034037773081
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1") != derive_seed(1)
    assert derive_seed("\udcff") != derive_seed("\udcfe")  # of file names that are not UTF-8
    assert all(0 <= derive_seed(position) < 2**63 for position in range(100))
