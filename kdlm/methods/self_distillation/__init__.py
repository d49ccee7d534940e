"""Methods in which a model learns from itself, one file each."""
