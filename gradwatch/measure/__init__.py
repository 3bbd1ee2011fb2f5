"""What measuring costs: one plan for a list of tensors, one pass a step."""
