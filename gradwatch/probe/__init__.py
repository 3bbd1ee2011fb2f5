"""What no gradient norm shows: forward passes read now and then, in pure torch, without a wait."""
