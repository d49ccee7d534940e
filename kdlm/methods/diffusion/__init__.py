"""Methods that distil diffusion and flow models."""
