"""Parts shared by more than one architecture: token order, positions, the transformer block."""
