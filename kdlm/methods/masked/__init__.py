"""Methods for masked language models: which tokens are hidden, and what is learned at their places."""
