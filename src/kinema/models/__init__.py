"""Networks over tensors: the DiT and the VAE. They know no ranks, no noise and no configuration files."""
