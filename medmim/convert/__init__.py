"""Foreign checkpoint layouts, one a file: pure functions from state dict to state dict."""
