"""From measurements per seed to verdicts: paired effects, equivalence, multiplicity, power; numpy and scipy alone."""
