"""Structure of models without weights: blocks, linear layers, and names of their tensors."""
