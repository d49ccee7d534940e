"""Methods for a student and a teacher with different tokenizers."""
