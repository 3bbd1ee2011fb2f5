"""Where the true gradient is seen: hooks on the backward pass, the optimizer, the scaler and the first output."""
