"""Parts shared by more than one encoder or decoder: token order, positions, transformer block, convolutions, ..."""
