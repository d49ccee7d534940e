"""Methods on the inside of a student: relations, hidden states, weights that are cut away or replaced."""
