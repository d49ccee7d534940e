"""Dataset distillation: the student is a small set of images, and what is distilled is the training set."""
