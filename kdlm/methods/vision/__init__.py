"""Methods on images and their classes."""
